"""What changes in training: the mapping layers' weights, the optimizer, the learning rate, the moving average."""

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
from .recipe import ADAMW_8BIT, FLOAT16, Recipe


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
        self._optimizer = _optimizer(self.parameters, recipe)
        self._schedule = get_scheduler(_schedule_name(recipe), self._optimizer, recipe.warmup, steps)
        device = self.parameters[0].device
        self.scaler = torch.amp.GradScaler(device.type, enabled=recipe.precision == FLOAT16)
        self._ema = EMAModel(self.parameters, decay=recipe.ema) if recipe.ema else None

    @property
    def learning_rate(self) -> float:
        return self._optimizer.param_groups[0]["lr"]

    def forget_gradients(self) -> None:
        """A step begins."""
        self._optimizer.zero_grad(set_to_none=False)
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

    def gradient_norm(self) -> float:
        """Of the gradients of all rows, which are clipped now where that is asked for."""
        self.scaler.unscale_(self._optimizer)
        gradients = [parameter.grad for parameter in self.parameters]
        norm = torch.linalg.vector_norm(torch.stack([gradient.norm() for gradient in gradients]))
        if self._clip:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self._clip, norm)
        return float(norm)

    def take_step(self) -> None:
        """The weights follow the gradients."""
        self.scaler.step(self._optimizer)
        self.scaler.update()
        self._schedule.step()
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
        kept = self._optimizer.state_dict()
        tensors, numbers = {}, {}
        for place, values in kept["state"].items():
            for name, value in values.items():
                (tensors if isinstance(value, Tensor) else numbers)[f"{place}.{name}"] = value
        averages = [] if self._ema is None else self._ema.shadow_params
        schedule = self._schedule.state_dict()
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
                "optimizer": {"numbers": numbers, "param_groups": kept["param_groups"]},
                "schedule": schedule,
                "scaler": self.scaler.state_dict(),
            },
        )

    def go_on_from(self, checkpoint: Checkpoint) -> None:
        """Be as the checkpoint was."""
        self.layers.load_state_dict(checkpoint.tensors[LAYERS])
        found, facts = checkpoint.tensors, checkpoint.facts
        state: dict[int, dict[str, Any]] = {}
        for key, value in (found[OPTIMIZER] | facts["optimizer"]["numbers"]).items():
            place, name = key.split(".", 1)
            state.setdefault(int(place), {})[name] = value
        self._optimizer.load_state_dict({"state": state, "param_groups": facts["optimizer"]["param_groups"]})
        self._schedule.load_state_dict(facts["schedule"] | {"lr_lambdas": [None]})
        if facts["scaler"]:
            self.scaler.load_state_dict(facts["scaler"])
        if self._ema is not None:
            self._ema.optimization_step = checkpoint.step
            for number, value in found[EMA].items():
                self._ema.shadow_params[int(number)].copy_(value)


def _optimizer(parameters: list[torch.nn.Parameter], recipe: Recipe) -> torch.optim.Optimizer:
    kind = _adamw_8bit() if recipe.optimizer == ADAMW_8BIT else torch.optim.AdamW
    return kind(parameters, lr=recipe.learning_rate, weight_decay=recipe.weight_decay)


def _adamw_8bit() -> type[torch.optim.Optimizer]:
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise WrongArgument(f"--optimizer is {ADAMW_8BIT}: it needs bitsandbytes, which is not installed.") from error
    return AdamW8bit


def _schedule_name(recipe: Recipe) -> str:
    return "constant_with_warmup" if recipe.schedule == "constant" else recipe.schedule
