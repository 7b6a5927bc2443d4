"""What changes in training: the mapping layers' weights, the optimizers, the learning rate, the moving average."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor

from ..errors import WrongArgument
from ..mapping import MappingLayers
from .checkpoints import EMA, LAYERS, OPTIMIZER, Checkpoint
from .muon import Muon, is_matrix
from .recipe import ADAMW_8BIT, FLOAT16, MUON, Recipe


class TrainedState:
    """The mapping layers and all that is needed to train them on.

    Args:
        layers: on the device, float32.
        recipe: what is asked for.
        steps: of the whole training.
    """

    def __init__(self, layers: MappingLayers, recipe: Recipe, steps: int) -> None:
        self.layers = layers
        self.parameters = list(layers.parameters())
        self._clip = recipe.clip
        self._optimizers = optimizers_of(self.parameters, recipe)
        self._schedules = [
            get_scheduler(_schedule_name(recipe), one, num_warmup_steps=recipe.warmup, num_training_steps=steps)
            for one in self._optimizers
        ]
        device = self.parameters[0].device
        self.scaler = torch.amp.GradScaler(device.type, enabled=recipe.precision == FLOAT16)
        self._ema = EMAModel(self.parameters, decay=recipe.ema) if recipe.ema else None

    @property
    def learning_rate(self) -> float:
        return self._optimizers[0].param_groups[0]["lr"]

    def forget_gradients(self) -> None:
        """A step begins."""
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            else:
                parameter.grad.zero_()

    def gradient_norm(self) -> float:
        """Of the gradients of all rows, which are clipped now where that is asked for."""
        for optimizer in self._optimizers:
            self.scaler.unscale_(optimizer)
        gradients = [parameter.grad for parameter in self.parameters]
        norm = torch.linalg.vector_norm(torch.stack([gradient.norm() for gradient in gradients]))
        if self._clip:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self._clip, norm)
        return float(norm)

    def take_step(self) -> None:
        """The weights follow the gradients."""
        for optimizer in self._optimizers:
            self.scaler.step(optimizer)
        self.scaler.update()
        for schedule in self._schedules:
            schedule.step()
        if self._ema is not None:
            self._ema.step(self.parameters)

    @contextmanager
    def averaged(self) -> Iterator[MappingLayers]:
        """While open, the layers hold the moving average where there is one."""
        if self._ema is None:
            yield self.layers
            return
        self._ema.store(self.parameters)
        try:
            self._ema.copy_to(self.parameters)
            yield self.layers
        finally:
            self._ema.restore(self.parameters)

    def checkpoint(self, step: int, facts: Mapping[str, Any]) -> Checkpoint:
        """All of this, behind so many steps; `facts` are to be kept with it."""
        kept = [optimizer.state_dict() for optimizer in self._optimizers]
        tensors, numbers = {}, {}
        for which, of_one in enumerate(kept):
            for place, values in of_one["state"].items():
                for name, value in values.items():
                    (tensors if isinstance(value, Tensor) else numbers)[f"{which}.{place}.{name}"] = value
        averages = [] if self._ema is None else self._ema.shadow_params
        schedules = [schedule.state_dict() for schedule in self._schedules]
        for schedule in schedules:
            # functions of the step, which the recipe names
            del schedule["lr_lambdas"]
        return Checkpoint(
            step,
            {
                LAYERS: self.layers.state_dict(),
                OPTIMIZER: tensors,
                EMA: {str(number): average for number, average in enumerate(averages)},
            },
            {
                **facts,
                "optimizers": {"numbers": numbers, "param_groups": [of_one["param_groups"] for of_one in kept]},
                "schedules": schedules,
                "scaler": self.scaler.state_dict(),
            },
        )

    def go_on_from(self, checkpoint: Checkpoint) -> None:
        """Be as the checkpoint was."""
        self.layers.load_state_dict(checkpoint.tensors[LAYERS])
        found, facts = checkpoint.tensors, checkpoint.facts
        states: list[dict[int, dict[str, Any]]] = [{} for _ in self._optimizers]
        for key, value in (found[OPTIMIZER] | facts["optimizers"]["numbers"]).items():
            which, place, name = key.split(".", 2)
            states[int(which)].setdefault(int(place), {})[name] = value
        groups = facts["optimizers"]["param_groups"]
        for optimizer, state, its_groups in zip(self._optimizers, states, groups, strict=True):
            optimizer.load_state_dict({"state": state, "param_groups": its_groups})
        for schedule, its in zip(self._schedules, facts["schedules"], strict=True):
            schedule.load_state_dict(its | {"lr_lambdas": [None] * len(schedule.lr_lambdas)})
        if facts["scaler"]:
            self.scaler.load_state_dict(facts["scaler"])
        if self._ema is not None:
            self._ema.optimization_step = checkpoint.step
            for number, value in found[EMA].items():
                self._ema.shadow_params[int(number)].copy_(value)


def optimizers_of(parameters: list[torch.nn.Parameter], recipe: Recipe) -> list[torch.optim.Optimizer]:
    """What each parameter is learned by: one for all, or Muon for matrices and AdamW for the rest."""
    options = {"lr": recipe.learning_rate, "weight_decay": recipe.weight_decay}
    if recipe.optimizer == ADAMW_8BIT:
        return [_adamw_8bit()(parameters, **options)]
    if recipe.optimizer != MUON:
        return [torch.optim.AdamW(parameters, **options)]
    matrices = [weight for weight in parameters if is_matrix(weight)]
    others = [weight for weight in parameters if not is_matrix(weight)]
    return [
        *([torch.optim.AdamW(others, **options)] if others else []),
        *([Muon(matrices, **options)] if matrices else []),
    ]


def _adamw_8bit() -> type[torch.optim.Optimizer]:
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise WrongArgument(f"--optimizer is {ADAMW_8BIT}: it needs bitsandbytes, which is not installed.") from error
    return AdamW8bit


def _schedule_name(recipe: Recipe) -> str:
    return "constant_with_warmup" if recipe.schedule == "constant" else recipe.schedule
