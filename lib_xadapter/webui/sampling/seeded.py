"""What the WebUI draws from torch's own generator, drawn from each image's seed, so that batches make no difference."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from modules import processing, shared
from modules.processing import StableDiffusionProcessing
from torch import Tensor


def each_from_its_seed(seeds: Sequence[int], make: Callable[[int], Tensor]) -> Tensor:
    """The rows that `make` gives for the images' places, one each; the generator is afterwards where it was."""
    rows = []
    for place, seed in enumerate(seeds):
        with seeded(seed):
            rows.append(make(place))
    return torch.cat(rows)


@contextmanager
def nothing_drawn() -> Iterator[None]:
    """Afterwards torch's own generators are where they were."""
    with torch.random.fork_rng(devices=[shared.device] if shared.device.type == "cuda" else []):
        yield


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """While open, torch's own generators draw from a seed; afterwards they are where they were."""
    with nothing_drawn():
        torch.manual_seed(seed)
        yield


def blank_conditioning(job: StableDiffusionProcessing) -> Tensor:
    """What the txt2img tab gives an inpainting model beside the latent, everything masked: (images, 5, h, w).

    For other models it is as many rows that nothing reads. The job's model must be the WebUI's current one.
    """
    size = (1, 4, job.height // processing.opt_f, job.width // processing.opt_f)
    latent = torch.zeros(size, device=shared.device)
    # an inpainting model's grey picture passes the VAE, which draws
    return each_from_its_seed(job.seeds, lambda _: job.txt2img_image_conditioning(latent))


@dataclass(frozen=True)
class RandomState:
    """Where torch's own generators and a processing object's generators of noise are."""

    rng: Any
    of_torch: Tensor
    of_cuda: Tensor | None
    of_images: tuple[Any, ...]

    @classmethod
    def capture(cls, p: StableDiffusionProcessing) -> RandomState:
        """As they are now."""
        # the ControlNet extension wraps the generators of some pictures
        images = getattr(p.rng, "rng", p.rng)
        on_gpu = shared.device.type == "cuda"
        return cls(
            images,
            torch.random.get_rng_state(),
            torch.cuda.get_rng_state(shared.device) if on_gpu else None,
            tuple(_state(generator) for generator in images.generators),
        )

    def restore(self) -> None:
        """As they were."""
        torch.random.set_rng_state(self.of_torch)
        if self.of_cuda is not None:
            torch.cuda.set_rng_state(self.of_cuda, shared.device)
        for generator, state in zip(self.rng.generators, self.of_images, strict=True):
            if isinstance(generator, torch.Generator):
                generator.set_state(state)
            else:
                generator.offset = state


def _state(generator: Any) -> Any:
    """Of a generator of torch's, or of the WebUI's own that draws as NVIDIA's does."""
    return generator.get_state() if isinstance(generator, torch.Generator) else generator.offset
