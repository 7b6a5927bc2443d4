"""What the WebUI draws from torch's own generator, drawn from each image's seed, so that batches make no difference."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from modules import processing, shared
from modules.processing import StableDiffusionProcessingTxt2Img
from torch import Tensor


def each_from_its_seed(seeds: Sequence[int], make: Callable[[int], Tensor]) -> Tensor:
    """The rows that `make` gives for the images' places, one each; the generator is afterwards where it was."""
    rows = []
    for place, seed in enumerate(seeds):
        with seeded(seed):
            rows.append(make(place))
    return torch.cat(rows)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """While open, torch's own generators draw from a seed; afterwards they are where they were."""
    with torch.random.fork_rng(devices=[shared.device] if shared.device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def blank_conditioning(job: StableDiffusionProcessingTxt2Img) -> Tensor:
    """What the txt2img tab gives an inpainting model beside the latent, everything masked: (images, 5, h, w).

    For other models it is as many rows that nothing reads. The job's model must be the WebUI's current one.
    """
    size = (1, 4, job.height // processing.opt_f, job.width // processing.opt_f)
    latent = torch.zeros(size, device=shared.device)
    # an inpainting model's grey picture passes the VAE, which draws
    return each_from_its_seed(job.seeds, lambda _: job.txt2img_image_conditioning(latent))
