"""The WebUI as host of the two-stage algorithm, for one sampling of one batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from modules import devices, lowvram, processing, sd_hijack, shared
from modules.processing import StableDiffusionProcessingTxt2Img
from modules.sd_samplers_common import Sampler
from PIL import Image
from torch import Tensor

from ...feature_sources import BaseDenoiser
from ...joint_stage import JointStage
from ...overlap import Overlap
from ...settings import BASE_NOISE_SEED
from ...taps import read_features
from ...two_stage import RecordedBase, StageOne
from ..base.base_evaluation import BaseEvaluation
from ..base.base_units import BaseUnits
from ..base.hooked_units import HookedUnits
from ..base.models import Models
from ..base.stage_one import base_noise, sample_base
from ..sampling import switch
from ..sampling.coupling import coupled
from ..sampling.seeded import RandomState
from .batch import Batch, Encoding, encode, report_plugins
from .request import Request, notify


@dataclass(frozen=True)
class Remarks:
    """What a recording keeps beside the picture of stage 1: what its prompts hold, and its ControlNets' maps."""

    encoding: Encoding
    detected_maps: tuple[Image.Image, ...] = ()


@dataclass(frozen=True)
class SamplerCall:
    """What the WebUI calls its sampler with.

    Attributes:
        sampler: the WebUI's, new for this sampling.
        noise: (images, 4, height / 8, width / 8), standard normal.
        cond, uncond: SDXL's encoded prompts.
        image_conditioning: as the txt2img tab makes it.
    """

    sampler: Sampler
    noise: Tensor
    cond: Any
    uncond: Any
    image_conditioning: Tensor


class WebUIHost:
    """See `two_stage.Host`.

    Args:
        p: SDXL's processing object.
        models: what is loaded.
        request: the job.
        batch: the base's part of the batch.
        units: the base's ControlNet units.
        call: the WebUI's call of its sampler, which `sample_upgraded` makes.
        detected_maps: what those units show beside the pictures of the job; added to where there is none yet.
    """

    def __init__(
        self,
        p: StableDiffusionProcessingTxt2Img,
        models: Models,
        request: Request,
        batch: Batch,
        units: BaseUnits,
        call: SamplerCall,
        detected_maps: list[Image.Image],
    ) -> None:
        self._p = p
        self._models = models
        self._request = request
        self._batch = batch
        self._units = units
        self._call = call
        self._detected_maps = detected_maps
        self._hooked = HookedUnits()
        self.base_pictures: list[Image.Image] = []
        self._encodings: list[Encoding] = []
        self._random_state = RandomState.capture(p)
        # the embeddings of SDXL as long as it is the current model
        self._upgraded_embeddings = set(sd_hijack.model_hijack.embedding_db.word_embeddings)

    @property
    def interrupted(self) -> bool:
        return shared.state.interrupted or shared.state.skipped

    @property
    def device(self) -> torch.device:
        return devices.device

    @property
    def overlap(self) -> Overlap | None:
        # the WebUI moves a model's parts when they are called, which must not happen in the middle of a call of SDXL
        return None if lowvram.is_enabled(shared.sd_model) else self._models.side_stream

    # ---- the base

    @contextmanager
    def base_plugins(self) -> Iterator[None]:
        encoding = encode(self._p, self._request.base, self._batch, self._upgraded_embeddings)
        self._report(encoding)
        self._encodings.append(encoding)
        with self._units.hooked(self._batch.base_p, self._request.base, self._detected_maps) as self._hooked:
            yield

    def sample_base(self) -> StageOne:
        if self._request.settings.single_stage:
            return StageOne(None)
        start = self._request.settings.base_start
        made = sample_base(self._request.base, self._batch.base_p, self._units, self._hooked, start)
        # a second attempt, where memory did not suffice for the first, takes the place of its pictures
        self.base_pictures[:] = made.pictures
        if not self.interrupted:
            shared.state.nextjob()
        return made

    def base_noise(self) -> Tensor:
        base_p = self._batch.base_p
        return base_noise(base_p, [seed + BASE_NOISE_SEED for seed in base_p.seeds]).next()

    @contextmanager
    def base_denoiser(self, stage_one: StageOne) -> Iterator[BaseDenoiser]:
        with read_features(self._request.base.unet) as reader:
            evaluation = BaseEvaluation(self._request.base, self._batch.base_p, reader, stage_one.levels)
            yield self._hooked.beside_sdxl(evaluation, reader)

    # ---- SDXL

    def sample_upgraded(self, stage_one: StageOne, joint: JointStage | None) -> Tensor:
        evaluations = self._request.evaluations
        coupling = coupled(joint, self._call.sampler, evaluations) if joint is not None else nullcontext()
        if self._request.settings.single_stage:
            return self._from_noise(coupling)
        return self._from_picture(stage_one, coupling)

    def _from_noise(self, coupling: Any) -> Tensor:
        """Both from noise, as the txt2img tab does it."""
        call = self._call
        self._random_state.restore()
        with coupling:
            return call.sampler.sample(
                self._p, call.noise, call.cond, call.uncond, image_conditioning=call.image_conditioning
            )

    def _from_picture(self, stage_one: StageOne, coupling: Any) -> Tensor:
        """From the base's picture, noised to the switch point, as the img2img tab does it."""
        p, call = self._p, self._call
        carried = switch.carry_over(stage_one.pictures, p.seeds, p.width, p.height)
        conditioning = p.img2img_image_conditioning(carried.pixels * 2 - 1, carried.latents)
        noise = call.noise * shared.opts.initial_noise_multiplier
        self._random_state.restore()
        with coupling, switch.denoising_strength(p, self._request.settings.switch_point):
            return call.sampler.sample_img2img(
                p, carried.latents, noise, call.cond, call.uncond, image_conditioning=conditioning
            )

    def samples_of_base(self, stage_one: StageOne) -> processing.DecodedSamples:
        # in the form in which the WebUI takes samples that need no decoding
        pixels = switch.resized(stage_one.pictures, self._p.width, self._p.height)
        return processing.DecodedSamples(pixels * 2 - 1)

    # ---- moving models, recordings, what the user sees

    def base_to_device(self) -> None:
        self._models.base_to_device()

    def upgraded_to_device(self) -> None:
        self._models.upgraded_to_device()

    @contextmanager
    def recording(self, evaluations: int) -> Iterator[Callable[[], None]]:
        state = shared.state
        state.sampling_step, state.sampling_steps = 0, evaluations

        def step() -> None:
            state.sampling_step += 1
            shared.total_tqdm.update()

        yield step
        if not self.interrupted:
            state.nextjob()

    def remarks(self) -> Remarks:
        return Remarks(self._encodings[-1], tuple(self._detected_maps))

    def recording_found(self, base: RecordedBase) -> None:
        remarks: Remarks = base.remarks
        self._report(remarks.encoding)
        # their texts are written into them
        self.base_pictures[:] = [picture.copy() for picture in base.stage_one.pictures]
        self._detected_maps[:] = self._detected_maps or remarks.detected_maps
        for _ in self._request.base_steps(self._p):
            shared.state.nextjob()

    def notify(self, sentence: str) -> None:
        notify(self._p, sentence)

    def _report(self, encoding: Encoding) -> None:
        report_plugins(self._p, self._request.base, self._batch, self._units, encoding, self._upgraded_embeddings)
