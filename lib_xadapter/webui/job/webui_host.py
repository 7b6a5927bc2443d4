"""The WebUI as host of the two-stage algorithm, for one sampling of one batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from modules import devices, lowvram, processing, sd_hijack, sd_samplers, shared
from modules.processing import StableDiffusionProcessing, StableDiffusionProcessingImg2Img
from modules.sd_samplers_common import Sampler
from PIL import Image
from torch import Tensor

from ...evaluations import Evaluation
from ...feature_sources import BaseDenoiser
from ...joint_stage import JointStage
from ...overlap import Overlap
from ...settings import BASE_NOISE_SEED
from ...taps import Taps, read_features
from ...two_stage import CachedStageOne, StageOne, size_of_pictures
from ..base.base_evaluation import BaseEvaluation
from ..base.base_infotext import BasePicture, base_infotexts
from ..base.base_processing import GivenPicture, seen_by_controlnet
from ..base.base_units import BaseUnits
from ..base.hooked_units import HookedUnits
from ..base.models import Models, base_to_device, upgraded_to_device
from ..base.stage_one import base_noise, finished, sample_base, start_from
from ..sampling import switch
from ..sampling.coupling import coupled
from ..sampling.mask_blending import MaskBlending
from ..sampling.samplings import Start, total_steps
from ..sampling.seeded import RandomState
from .batch import Batch, Encoding, encode, report_plugins
from .request import PlannedSampling, Request, notify, takes_residuals


@dataclass(frozen=True)
class BaseReport:
    """What the user is shown of the base: what its prompts hold, its pictures of stage 1, its ControlNets' maps."""

    encoding: Encoding
    base_pictures: tuple[BasePicture, ...]
    detected_maps: tuple[Image.Image, ...] = ()

    @property
    def size(self) -> int:
        """Bytes of RAM."""
        return size_of_pictures([*(picture.image for picture in self.base_pictures), *self.detected_maps])


@dataclass(frozen=True)
class SamplerCall:
    """The WebUI's call of its sampler.

    Attributes:
        sampler: the WebUI's, new for this sampling.
        arguments: by the names that its method gives them.
        as_called: makes the call as it is.
    """

    sampler: Sampler
    arguments: Mapping[str, Any]
    as_called: Callable[[], Tensor]

    @property
    def prompts(self) -> tuple[Any, Any]:
        """SDXL's encoded prompts, cond and uncond."""
        return self.arguments["conditioning"], self.arguments["unconditional_conditioning"]

    def noise(self) -> Tensor:
        """What is added to a picture, (images, 4, height / 8, width / 8)."""
        if "noise" in self.arguments:
            return self.arguments["noise"]
        return self.arguments["x"] * shared.opts.initial_noise_multiplier


class WebUIHost:
    """See `two_stage.Host`.

    Args:
        p: SDXL's processing object.
        models: what is loaded.
        request: the job.
        planned: the sampling of SDXL.
        batch: the base's part in it.
        units: the base's ControlNet units.
        given: what SDXL paints over in img2img and in the second pass of Hires. fix.
        call: the WebUI's call of its sampler, which `sample_upgraded` makes.
        detected_maps: what those units show beside the pictures of the job; added to where there is none yet.
    """

    def __init__(
        self,
        p: StableDiffusionProcessing,
        models: Models,
        request: Request,
        planned: PlannedSampling,
        batch: Batch,
        units: BaseUnits,
        given: GivenPicture | None,
        call: SamplerCall,
        detected_maps: list[Image.Image],
    ) -> None:
        self._p = p
        self._models = models
        self._request = request
        self._planned = planned
        self._batch = batch
        self._units = units
        self._given = given
        self._call = call
        self._blending = MaskBlending(p)
        self._detected_maps = detected_maps
        self._hooked = HookedUnits()
        self.base_pictures: list[BasePicture] = []
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
        return None if lowvram.is_enabled(shared.sd_model) else self._models.overlap(self._request.work)

    # ---- the base

    @contextmanager
    def base_plugins(self) -> Iterator[None]:
        encoding = encode(self._p, self._request.base, self._batch, self._upgraded_embeddings)
        self._report(encoding)
        self._encodings.append(encoding)
        seen = seen_by_controlnet(self._batch.base_p, self._p, self._request.settings)
        with self._units.hooked(seen, self._request.base, self._detected_maps) as self._hooked:
            yield

    def sample_base(self) -> StageOne:
        if self._planned.sampling.start is Start.NOISE:
            return StageOne(None)
        if self._planned.sampling.start is Start.PICTURE:
            return StageOne(self._latents_of_given_picture())
        start = self._request.settings.base_start
        base, base_p = self._request.base, self._batch.base_p
        made = sample_base(base, base_p, self._units, self._hooked, start, self._blending)
        # a second attempt, where memory did not suffice for the first, takes the place of its pictures
        pictures, texts = finished(base_p, made.pictures), base_infotexts(base_p, base, self._batch.networks)
        self.base_pictures[:] = [BasePicture(*both) for both in zip(pictures, texts, strict=True)]
        if not self.interrupted:
            shared.state.nextjob()
        return made

    def _latents_of_given_picture(self) -> Tensor:
        """The picture that SDXL paints over, as the base has it."""
        base_p = self._batch.base_p
        if self._planned.sampling.is_hires:
            with self._request.base.current() as model:
                base_p.sampler = sd_samplers.create_sampler(base_p.sampler_name, model)
                start_from(base_p, self._given.pictures)
        return base_p.init_latent

    def base_noise(self) -> Tensor:
        base_p = self._batch.base_p
        return base_noise(base_p, [seed + BASE_NOISE_SEED for seed in base_p.seeds]).next()

    @contextmanager
    def base_denoiser(self, stage_one: StageOne, taps: Taps) -> Iterator[BaseDenoiser]:
        base_p = self._batch.base_p
        with read_features(self._request.base.unet, taps) as reader:
            evaluation = BaseEvaluation(
                self._request.base, base_p, reader, stage_one.levels, self._prompt_steps(), self._blending
            )
            yield self._hooked.beside_sdxl(evaluation, reader)

    def _prompt_steps(self) -> int:
        """What prompt schedules are counted in where there is no stage 1."""
        sampling, base_p = self._planned.sampling, self._batch.base_p
        if sampling.start is Start.NOISE:
            return total_steps(base_p.sampler_name, base_p.steps)
        return sampling.evaluations(self._p)

    # ---- SDXL

    def sample_upgraded(
        self, stage_one: StageOne, joint: JointStage | None, planned: Sequence[Evaluation] | None
    ) -> Tensor:
        if joint is None:
            return self._sample(stage_one)
        fits = partial(takes_residuals, self._p, self._request)
        with coupled(joint, self._call.sampler, planned, fits):
            return self._sample(stage_one)

    def _sample(self, stage_one: StageOne) -> Tensor:
        """As the WebUI has called its sampler, or from the base's picture, noised to the switch point."""
        if self._planned.sampling.start is Start.BASE:
            return self._over_picture_of_base(stage_one)
        self._random_state.restore()
        return self._call.as_called()

    def _over_picture_of_base(self, stage_one: StageOne) -> Tensor:
        """As the img2img tab does it."""
        p, call = self._p, self._call
        pixels, latents = self._carried_over(stage_one)
        conditioning = p.img2img_image_conditioning(pixels * 2 - 1, latents, *self._mask())
        self._random_state.restore()
        with switch.denoising_strength(p, self._request.settings.switch_point):
            return call.sampler.sample_img2img(p, latents, call.noise(), *call.prompts, image_conditioning=conditioning)

    def _carried_over(self, stage_one: StageOne) -> tuple[Tensor, Tensor]:
        """The base's pictures as SDXL's: pixels, (images, 3, height, width) in 0..1, and latents.

        Outside of a mask the latents are those of the given picture.
        """
        p = self._p
        carried = switch.carry_over(stage_one.pictures, p.seeds, p.width, p.height)
        if getattr(p, "mask", None) is None:
            return carried.pixels, carried.latents
        return carried.pixels, carried.latents * p.nmask + p.init_latent * p.mask

    def _mask(self) -> tuple[Any, ...]:
        return (self._given.mask, self._p.mask_round) if self._given is not None else ()

    def samples_of_base(self, stage_one: StageOne) -> Tensor | processing.DecodedSamples:
        p = self._p
        if isinstance(p, StableDiffusionProcessingImg2Img) or p.enable_hr:
            return self._carried_over(stage_one)[1]
        # in the form in which the WebUI takes samples that need no decoding
        return processing.DecodedSamples(switch.resized(stage_one.pictures, p.width, p.height) * 2 - 1)

    # ---- moving models, recordings, what the user sees

    def base_to_device(self) -> None:
        base_to_device(self._request.base)

    def upgraded_to_device(self) -> None:
        upgraded_to_device(self._request.base)

    def both_to_device(self) -> None:
        self._request.base.to_gpu()

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

    def host_data(self) -> BaseReport:
        return BaseReport(self._encodings[-1], tuple(self.base_pictures), tuple(self._detected_maps))

    def on_stage_one_reused(self, kept: CachedStageOne) -> None:
        report: BaseReport = kept.host_data
        self.base_pictures[:] = report.base_pictures
        if self._planned.sampling.start is Start.BASE:
            shared.state.nextjob()

    def on_base_skipped(self, kept: CachedStageOne) -> None:
        report: BaseReport = kept.host_data
        self._report(report.encoding)
        self._detected_maps[:] = self._detected_maps or report.detected_maps
        if self._planned.recorded and self._planned.coupling is not None:
            # that of the recording
            shared.state.nextjob()

    def notify(self, sentence: str) -> None:
        notify(self._p, sentence)

    def _report(self, encoding: Encoding) -> None:
        report_plugins(self._p, self._request.base, self._batch, self._units, encoding, self._upgraded_embeddings)
