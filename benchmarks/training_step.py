"""A step of training at full size with random weights: what it computes, what memory it needs, how long it takes.

    python -m benchmarks.training_step

What is computed is counted, which takes neither weights nor time: a step, beside the sum of what it cannot do without,
which are the forward passes of both models and of the mapping layers, and the backward passes of the upgraded decoder,
behind the middle block, and of the mapping layers. Then steps are taken, and timed in turns with their parts: in
bfloat16, whose arithmetic is float32's on a CPU that has no other (`rounded_arithmetic.py`).
"""

from __future__ import annotations

import argparse
import functools
import resource
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import psutil
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from lib_xadapter.headless.models import Models, Placement
from lib_xadapter.memory import size_of
from lib_xadapter.taps import BaseFeatures, fuse_into, read_features
from lib_xadapter.training.encoding import EncodedRows
from lib_xadapter.training.recipe import Recipe
from lib_xadapter.training.state import TrainedState
from lib_xadapter.training.step import Draws, TrainingStep

from .random_adapter import type_name, type_named
from .random_models import LATENT_PIXEL, TOKENS, random_models
from .reports import Bar, Machine, Plot, Report, name_for, parser_for, turns_of
from .rounded_arithmetic import can_compute_in_bfloat16, rounded_arithmetic
from .timing import Spread, Work

GIGABYTE, TERA = 1e9, 1e12
COUNTED = 1024
"""Pixels of the upgraded picture in a step that is counted."""
TIMESTEPS = 1000
STEP, BASE, UPGRADED, LAYERS = "step", "base, forward", "upgraded model, forward", "mapping layers, forward"
DECODER, LAYERS_BACKWARD = "upgraded decoder, backward", "mapping layers, backward"
UPGRADED_BOTH, LAYERS_BOTH = "upgraded model, decoder also backward", "mapping layers, both ways"
OPTIMIZER = "optimizer"


class Parts:
    """A step of training, and what it is made of, each to be run alone.

    Args:
        models: on their device; their adapter becomes float32, to be trained.
        batch: pictures a step.
        size: of the upgraded model's pictures, in pixels.
        checkpointing: gradient checkpointing.
    """

    def __init__(self, models: Models, batch: int, size: int, checkpointing: bool = False) -> None:
        device, recipe, latent = torch.device(models.placement.device), Recipe(), (size // LATENT_PIXEL,) * 2
        self._models = models
        self.layers = models.adapter.float().train().requires_grad_(True)
        self._rows = random_rows(models, batch, size)
        self._draws = Draws.of(recipe, 0, range(batch), latent, TIMESTEPS).to(device, torch.float32)
        self._step = TrainingStep(models.base, models.upgraded, self.layers, recipe, self._autocast, checkpointing)

    def _autocast(self) -> AbstractContextManager:
        dtype, device = self._models.upgraded.unet.dtype, self._models.placement.device
        if dtype == torch.float32 or device == "meta":
            return nullcontext()
        return torch.autocast(torch.device(device).type, dtype)

    def step(self) -> None:
        """Losses and gradients."""
        with self._step.losses(self._rows, self._draws) as losses:
            losses.mean().backward()

    def base(self) -> BaseFeatures:
        """The base's features."""
        unet, rows = self._models.base.unet, self._rows
        weight = next(unet.parameters())
        with torch.no_grad(), read_features(unet) as reader:
            unet(rows.base_mean.to(weight), self._draws.timesteps, encoder_hidden_states=rows.base_text.to(weight))
        return reader.take()

    @functools.cached_property
    def features(self) -> BaseFeatures:
        """The base's features, found once."""
        return self.base()

    def mapped(self) -> tuple[Tensor, ...]:
        """The residuals."""
        features = self.features
        with self._autocast():
            return self.layers(features.levels)

    def upgraded(self) -> Tensor:
        """The upgraded model's prediction, without a graph."""
        with torch.no_grad():
            return self._predicted()

    def decoded(self) -> Tensor:
        """The same, with a graph that begins behind the middle block."""
        with fuse_into(self._models.upgraded.unet, lambda level, x: x.detach().requires_grad_(), levels=(0,)):
            return self._predicted()

    def _predicted(self) -> Tensor:
        unet, rows = self._models.upgraded.unet, self._rows
        weight = next(unet.parameters())
        added = {"text_embeds": rows.empty_pooled.to(weight), "time_ids": rows.sizes}
        text = rows.empty_text.to(weight)
        return unet(rows.upgraded_mean.to(weight), self._draws.timesteps, text, added_cond_kwargs=added).sample


def random_rows(models: Models, batch: int, size: int) -> EncodedRows:
    """What a step is given, of the models' widths."""
    generator, device = torch.Generator().manual_seed(0), models.placement.device
    base, upgraded, latent = models.base.unet.config, models.upgraded.unet.config, size // LATENT_PIXEL
    pooled = upgraded.projection_class_embeddings_input_dim - 6 * upgraded.addition_time_embed_dim

    def noise(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, generator=generator).to(device)

    text, short = noise(TOKENS, upgraded.cross_attention_dim), noise(pooled)
    return EncodedRows(
        upgraded_mean=noise(4, latent, latent),
        upgraded_std=torch.zeros(batch, 4, latent, latent, device=device),
        base_mean=noise(4, latent // 2, latent // 2),
        base_std=torch.zeros(batch, 4, latent // 2, latent // 2, device=device),
        base_text=noise(TOKENS, base.cross_attention_dim),
        upgraded_text=text,
        upgraded_pooled=short,
        empty_text=text,
        empty_pooled=short,
        sizes=torch.tensor([[float(size), size, 0, 0, size, size]] * batch, device=device),
    )


def backward(make: Callable[[], Tensor | tuple[Tensor, ...]]) -> Work:
    """The way back through what is made, which is made at once."""
    made = make()
    made = made if isinstance(made, tuple) else (made,)
    return lambda: torch.autograd.backward(made, [torch.ones_like(one) for one in made])


def counted(small: bool, size: int) -> dict[str, float]:
    """TFLOP of a step of one picture and of its parts, without weights and without running them."""
    models = random_models(torch.float32, Placement("meta"), small)
    parts = Parts(models, 1, size)
    # what is found once belongs to the base
    _ = parts.features

    def flops(work: Work) -> float:
        with FlopCounterMode(display=False) as counter:
            work()
        return counter.get_total_flops() / TERA

    return {
        STEP: flops(parts.step),
        BASE: flops(parts.base),
        UPGRADED: flops(parts.upgraded),
        LAYERS: flops(parts.mapped),
        DECODER: flops(backward(parts.decoded)),
        LAYERS_BACKWARD: flops(backward(parts.mapped)),
    }


def over_parts(found: Mapping[str, float]) -> float:
    """A step over the sum of the parts."""
    return found[STEP] / sum(value for name, value in found.items() if name != STEP)


@dataclass(frozen=True)
class Memory:
    """What a step needed, in GB.

    Attributes:
        peak: the most at once: on a GPU by torch's counter, elsewhere all that the process held.
        shares: what is known of it; the rest was made in passing.
    """

    peak: float
    shares: Mapping[str, float]


def measured(options: argparse.Namespace, batch: int) -> tuple[Memory, dict[str, Spread]]:
    """Steps that are taken, and their parts."""
    device = options.device
    models = random_models(options.type, Placement(str(device), options.type), options.small)
    for module in (models.base.unet, models.upgraded.unet, models.adapter):
        module.to(device)
    before = 0.0 if device.type == "cuda" else (psutil.Process().memory_info().rss - weights_of(models)) / GIGABYTE
    parts = Parts(models, batch, options.size, options.checkpointing)
    state = TrainedState(parts.layers, Recipe(), steps=100)

    def step() -> None:
        state.forget_gradients()
        parts.step()
        state.take_step()

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    step()
    peak = peak_memory(device)
    size = size_of(parts.layers) / GIGABYTE
    shares = {
        "base": size_of(models.base.unet) / GIGABYTE,
        "upgraded model": size_of(models.upgraded.unet) / GIGABYTE,
        "mapping layers, float32": size,
        "their gradients": size,
        "optimizer": 2 * size,
        "Python and libraries": before,
    }
    shares["made in passing"] = peak - sum(shares.values())
    works = {STEP: step}
    if not options.step_alone:
        works |= {
            BASE: parts.base,
            LAYERS_BOTH: lambda: backward(parts.mapped)(),
            UPGRADED_BOTH: lambda: backward(parts.decoded)(),
            OPTIMIZER: state.take_step,
        }
    times = turns_of(options).times(works)
    spreads = {name: found.spread for name, found in times.items()}
    if not options.step_alone:
        first, *rest = (found for name, found in times.items() if name != STEP)
        spreads["step over the sum of its parts"] = times[STEP].over(sum(rest, first))
    return Memory(peak, shares), spreads


def weights_of(models: Models) -> int:
    """Bytes."""
    return sum(map(size_of, (models.base.unet, models.upgraded.unet, models.adapter)))


def peak_memory(device: torch.device) -> float:
    """GB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIGABYTE
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIGABYTE


def main(arguments: Sequence[str] | None = None) -> None:
    options = read_options(arguments)
    machine = Machine.here(options.device)
    count = counted(options.small, COUNTED)
    rows, result = [], {f"TFLOP of {name}": value for name, value in count.items()}
    result["step over the sum of its parts, FLOP"] = over_parts(count)
    bars = []
    rounded = options.device.type == "cpu" and options.type == torch.bfloat16 and not can_compute_in_bfloat16()
    for batch in options.batches:
        with rounded_arithmetic() if rounded else nullcontext():
            memory, seconds = measured(options, batch)
        rows.append(
            {
                "batch": batch,
                "arithmetic": "float32, a layer at a time" if rounded else type_name(options.type),
                "pictures a second": batch / seconds[STEP].median,
                "peak, GB": memory.peak,
                **{f"{name}, GB": value for name, value in memory.shares.items()},
                **seconds,
            }
        )
        bars.append(Bar(f"batch {batch}", Spread(memory.peak, memory.peak, memory.peak)))
    Report(
        name=name_for("training_step", options),
        question=f"A training step, {options.size} over {options.size // 2} px, {type_name(options.type)}",
        machine=machine,
        options=vars(options),
        rows=rows,
        result=result,
        plot=Plot("GB", {"peak memory": bars}),
        not_run={} if options.device.type == "cuda" else {"time and memory on a GPU": "needs one"},
    ).publish(options.out)


def read_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = parser_for(__doc__, rounds=3)
    parser.add_argument("--size", type=int, help="of the upgraded picture (default: 1024 on a GPU, else 512)")
    parser.add_argument("--batches", type=int, nargs="+", help="default: 1 2 4 8 on a GPU, else 1")
    parser.add_argument("--dtype", type=type_named, default=torch.bfloat16, dest="type", help="default: bfloat16")
    parser.add_argument("--no-checkpointing", action="store_false", dest="checkpointing")
    parser.add_argument("--step-alone", action="store_true", help="do not time its parts")
    options = parser.parse_args(arguments)
    on_gpu = options.device.type == "cuda"
    options.size = options.size or (64 if options.small else 1024 if on_gpu else 512)
    options.batches = options.batches or ([1, 2, 4, 8] if on_gpu else [1])
    return options


if __name__ == "__main__":
    main()
