"""One batch of pictures: the base's picture, the switch, the joint stage.

Source: paper, "Inference strategy"; released code, `pipeline/pipeline_sd_xl_adapter_controlnet.py`.
"""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace

import torch
from PIL import Image
from torch import Tensor

from ..evaluations import Evaluation, GuidanceWindow
from ..feature_sources import BaseDenoiser
from ..joint_stage import JointStage
from ..mapping_choice import choose_mapping_path
from ..mapping_paths import MappingPath
from ..memory import Work, decoding_memory
from ..overlap import SideStream
from ..recording import RecordingCache
from ..settings import AUTO, BASE_NOISE_SEED, RECORDED, START_STRENGTH, Settings
from ..taps import read_features
from ..two_stage import BaseCache, Coupling, KeptStageOne, Pass, StageOne, run
from .denoisers import Control, GuidedUnet, LockstepBase, Prompts
from .models import Models, noise_schedule_of
from .pictures import to_latents, to_pictures
from .samplers import StepRule, Steps, released_steps, sampler_named, webui_steps

logger = logging.getLogger(__name__)

SOLVER_ORDER = 2

LATENT_PIXEL = 8

STEP_SEEDS = (0x2312_2239, 0x2312_2240)
"""Added for the noise of samplers that add noise: base, upgraded."""


@dataclass(frozen=True)
class Rules:
    """Where the paper leaves a choice.

    Attributes:
        steps: which steps are taken.
        resample: how the base's picture is brought to the upgraded size.
        to_whole: how a picture's values become whole grey levels.
        base_follows_sampler: whether the base steps in the joint stage by the sampler's own order.
    """

    steps: StepRule = webui_steps
    resample: Image.Resampling = Image.Resampling.LANCZOS
    to_whole: Callable[[Tensor], Tensor] = torch.floor
    base_follows_sampler: bool = False


WEBUI_RULES = Rules()
RELEASED_RULES = Rules(released_steps, Image.Resampling.BICUBIC, torch.round, base_follows_sampler=True)


@dataclass(frozen=True)
class Noise:
    """All the randomness of one image, each kind from a generator of its own, so that batches do not matter.

    Attributes:
        base, upgraded: what the models start from, (4, h, w).
        base_again: what the base starts from in the joint stage, over its finished latent or alone, (4, h, w).
        base_steps, upgraded_steps: generators for samplers that add noise.
        encoding, base_encoding: generators for the upgraded VAE and the base's.
    """

    base: Tensor
    upgraded: Tensor
    base_again: Tensor
    base_steps: torch.Generator
    upgraded_steps: torch.Generator
    encoding: torch.Generator
    base_encoding: torch.Generator

    @classmethod
    def seeded(cls, seed: int, base_seed: int, base_size: tuple[int, int], upgraded_size: tuple[int, int]) -> Noise:
        """All noise of an image whose models have these seeds; sizes are (height, width) in latent pixels."""
        base_steps, upgraded_steps = STEP_SEEDS
        return cls(
            _standard_normal(base_seed, base_size),
            _standard_normal(seed, upgraded_size),
            _standard_normal(base_seed + BASE_NOISE_SEED, base_size),
            _generator(base_seed + base_steps),
            _generator(seed + upgraded_steps),
            _generator(seed),
            _generator(base_seed),
        )


def _generator(seed: int) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(seed)


def _standard_normal(seed: int, size: tuple[int, int]) -> Tensor:
    return torch.randn(4, *size, generator=_generator(seed))


@dataclass(frozen=True)
class Request:
    """What one batch of pictures is asked for; sizes in pixels, 0 in `settings` already replaced.

    Attributes:
        base_prompts, upgraded_prompts: what each model is told.
        settings: as in the WebUI.
        steps, cfg_scale, sampler: of the upgraded model; the base's own are in `settings`.
        noises: one an image.
        controls: ControlNets at work on the base.
        start: what the base paints over, at its size; None for noise.
    """

    base_prompts: Prompts
    upgraded_prompts: Prompts
    settings: Settings
    steps: int
    cfg_scale: float
    sampler: str
    noises: Sequence[Noise]
    controls: Sequence[Control] = ()
    start: Image.Image | None = None

    @property
    def base_steps(self) -> int:
        return self.settings.base_steps or self.steps

    @property
    def base_cfg_scale(self) -> float:
        return self.settings.base_cfg_scale or self.cfg_scale


Recordings = BaseCache

Progress = Callable[[str, int, int], None]
"""(what is under way, steps done, steps in all) → None; called before each step and after the last."""


def no_progress(stage: str, done: int, total: int) -> None:
    """For those who do not look."""


class TwoStages:
    """Makes pictures with a set of models.

    Args:
        models: loaded, on the CPU or where they run.
        rules: where the paper leaves a choice.
        progress: told of every step.
    """

    def __init__(self, models: Models, rules: Rules = WEBUI_RULES, progress: Progress = no_progress) -> None:
        models.check()
        self.models = models
        self.placement = models.placement
        self._rules = rules
        self.progress = progress

    @property
    def _device(self) -> str:
        return self.placement.device

    def base_latents(self, request: Request) -> Tensor:
        """Stage 1: the base's finished latents, (images, 4, h, w)."""
        strength = None if request.start is None else START_STRENGTH
        steps = self._steps(request, self.models.base, request.base_steps, strength)
        start = self._base_start(request, steps)
        model = self.guided_base(request)
        with self.placement.holding(self.models.base.unet, *self.models.controlnets):
            return self.walk("base", steps, start, model.predict)

    def _base_start(self, request: Request, steps: Steps) -> Tensor:
        """Noise, or the picture to start from with noise over it."""
        noise = self.stacked([noise.base for noise in request.noises])
        if request.start is None:
            return steps.from_noise(noise)
        vae, generators = self.models.base.vae, [noise.base_encoding for noise in request.noises]
        with self.placement.holding(vae):
            clean = to_latents(vae, [request.start] * len(generators), generators)
        return steps.noised(clean, noise)

    def base_pictures(self, latents: Tensor) -> list[Image.Image]:
        """The base's pictures, in 8 bits."""
        return self._decoded(self.models.base, latents)

    def upgraded_latents(
        self,
        request: Request,
        finished: Tensor | None,
        size: tuple[int, int],
        recordings: Recordings | None = None,
    ) -> Tensor:
        """The switch and stage 2: the upgraded model's finished latents.

        Args:
            request: as for stage 1.
            finished: the base's finished latents, None for a single stage from noise.
            size: of the pictures, (width, height) in pixels.
            recordings: those of the same base side, by switch point.
        """
        steps = self.joint_steps_of(request)
        noise = self.stacked([noise.upgraded for noise in request.noises])
        if finished is None:
            start = steps.from_noise(noise)
        else:
            start = steps.noised(self.carried_over(finished, request.noises, size), noise)
        return self.joint_stage(request, finished, start, steps, recordings=recordings)

    def upgraded_pictures(self, latents: Tensor) -> list[Image.Image]:
        """The upgraded model's pictures, in 8 bits."""
        return self._decoded(self.models.upgraded, latents)

    def joint_steps_of(self, request: Request) -> Steps:
        """The steps of the joint stage."""
        strength = None if request.settings.single_stage else request.settings.switch_point
        return self._steps(request, self.models.upgraded, request.steps, strength)

    def carried_over(self, finished: Tensor, noises: Sequence[Noise], size: tuple[int, int]) -> Tensor:
        """The base's pictures, resized, as clean latents of the upgraded model."""
        resized = [picture.resize(size, self._rules.resample) for picture in self.base_pictures(finished)]
        vae = self.models.upgraded.vae
        with self.placement.holding(vae):
            return to_latents(vae, resized, [noise.encoding for noise in noises])

    @torch.no_grad()
    def joint_stage(
        self,
        request: Request,
        finished: Tensor | None,
        latents: Tensor,
        steps: Steps,
        each_step: Callable[[Tensor], None] | None = None,
        recordings: Recordings | None = None,
    ) -> Tensor:
        """Stage 2 from noised latents of the upgraded model.

        Args:
            request: prompts, guidance and settings.
            finished: the base's finished latents, None for a single stage from noise.
            latents: at the noise level of the first step.
            steps: the joint ones.
            each_step: is given the upgraded latents after every step.
            recordings: those of the same base side, by switch point.
        """
        host = DiffusersHost(self, request, finished, latents, steps, each_step)
        return run(
            host, self._plan(request, steps), recordings if recordings is not None else RecordingCache(lambda: 0)
        )

    def _plan(self, request: Request, steps: Steps) -> Pass:
        settings = request.settings
        coupling = None
        if self.models.adapter is not None and any(settings.weights):
            window = GuidanceWindow.from_settings(settings)
            coupling = Coupling(self._mapping, settings.weights, window, settings.cond_only)
        return Pass(
            coupling,
            tuple(self.evaluations(steps)),
            recorded=coupling is not None and settings.memory == RECORDED,
            may_record=settings.memory == AUTO,
            key=settings.switch_point,
            solver_order=sampler_named(request.sampler).order if self._rules.base_follows_sampler else SOLVER_ORDER,
        )

    @functools.cached_property
    def _mapping(self) -> MappingPath:
        """How the mapping layers run, which depends on where they are then."""
        with self.placement.holding(self.models.adapter):
            return choose_mapping_path(self.models.adapter, self.placement.mapping)

    @functools.cached_property
    def side_stream(self) -> SideStream | None:
        """Where the base runs beside the upgraded model, on a GPU."""
        device = torch.device(self._device)
        return SideStream(device) if device.type == "cuda" else None

    def evaluations(self, steps: Steps) -> list[Evaluation]:
        """The model evaluations of the joint stage."""
        schedule, count = noise_schedule_of(self.models.upgraded), len(steps.timesteps)
        return [
            Evaluation(schedule.sigma_at(timestep), place // steps.scheduler.order, place / count)
            for place, timestep in enumerate(steps.timesteps.tolist())
        ]

    def walk(
        self,
        stage: str,
        steps: Steps,
        latent: Tensor,
        predict: Callable[[Tensor, Tensor], Tensor],
        each_step: Callable[[Tensor], None] | None = None,
    ) -> Tensor:
        # DDIM and PLMS look timesteps up in ordinary memory, and would wait for one on a GPU
        for done, timestep in enumerate(steps.timesteps.cpu()):
            self.progress(stage, done, len(steps.timesteps))
            output = predict(steps.scaled(latent, timestep), timestep)
            latent = steps.step(output, timestep, latent)
            if each_step is not None:
                each_step(latent)
        self.progress(stage, len(steps.timesteps), len(steps.timesteps))
        return latent

    def _steps(self, request: Request, pipeline: object, steps: int, strength: float | None = None) -> Steps:
        taken = self._rules.steps(
            sampler_named(request.sampler), pipeline.scheduler.config, steps, strength, self._device
        )
        upgraded = pipeline is self.models.upgraded
        noises = [noise.upgraded_steps if upgraded else noise.base_steps for noise in request.noises]
        return replace(taken, noises=noises)

    def guided_base(self, request: Request) -> GuidedUnet:
        return GuidedUnet(self.models.base.unet, request.base_prompts, request.base_cfg_scale, request.controls)

    def stacked(self, noises: Sequence[Tensor]) -> Tensor:
        return torch.stack(list(noises)).to(self._device)

    def _decoded(self, pipeline: object, latents: Tensor) -> list[Image.Image]:
        self.models.make_room(decoding_memory(_pixels(latents)))
        with self.placement.holding(pipeline.vae):
            return to_pictures(pipeline.vae, latents, self._rules.to_whole)


def _pixels(latents: Tensor) -> int:
    """Of one of their pictures."""
    return LATENT_PIXEL**2 * latents[0, 0].numel()


def _prediction_type(pipeline: object) -> str:
    return pipeline.scheduler.config.get("prediction_type", "epsilon")


class DiffusersHost:
    """The joint stage's view of a set of pipelines, for one pass; see `two_stage.Host`.

    Args:
        stages: the models and rules.
        request: prompts, guidance and settings.
        finished: the base's finished latents, None in a single stage.
        start: the upgraded latents at the noise level of the first step.
        steps: the joint ones.
        each_step: is given the upgraded latents after every step.
    """

    interrupted = False

    def __init__(
        self,
        stages: TwoStages,
        request: Request,
        finished: Tensor | None,
        start: Tensor,
        steps: Steps,
        each_step: Callable[[Tensor], None] | None,
    ) -> None:
        self._stages = stages
        self._request = request
        self._finished = finished
        self._start = start
        self._steps = steps
        self._each_step = each_step

    @property
    def device(self) -> str:
        return self._stages.placement.device

    @property
    def overlap(self) -> SideStream | None:
        base_pixels = LATENT_PIXEL**2 * self._request.noises[0].base.numel() // 4
        rows, controls = len(self._request.upgraded_prompts.rows), len(self._request.controls)
        work = Work(rows, _pixels(self._start), base_pixels, controls)
        fits = self._stages.models.fit_together(work.memory(overlapped=True))
        return self._stages.side_stream if fits else None

    def base_plugins(self) -> AbstractContextManager[None]:
        """They are part of its request."""
        return nullcontext()

    def sample_base(self) -> StageOne:
        """It has sampled already: its picture is shared by all switch points and weights of a job."""
        return StageOne(self._finished)

    def base_noise(self) -> Tensor:
        return self._stages.stacked([noise.base_again for noise in self._request.noises])

    @contextmanager
    def base_denoiser(self, stage_one: StageOne) -> Iterator[BaseDenoiser]:
        stages, base = self._stages, self._stages.models.base
        guided = stages.guided_base(self._request)
        with stages.placement.holding(base.unet, *stages.models.controlnets), read_features(base.unet) as reader:
            yield LockstepBase(guided, noise_schedule_of(base), _prediction_type(base), reader)

    def sample_upgraded(self, stage_one: StageOne, joint: JointStage | None) -> Tensor:
        stages, unet = self._stages, self._stages.models.upgraded.unet
        upgraded = GuidedUnet(unet, self._request.upgraded_prompts, self._request.cfg_scale)
        evaluations = iter(stages.evaluations(self._steps))

        def predict(latent: Tensor, timestep: Tensor) -> Tensor:
            if joint is None:
                return upgraded.predict(latent, timestep)
            evaluation = joint.evaluate(next(evaluations), upgraded.rows)
            with evaluation.fused_into(unet, slice(0, len(upgraded.rows))):
                return upgraded.predict(latent, timestep)

        adapter = stages.models.adapter if joint is not None else None
        with stages.placement.holding(adapter, unet):
            return stages.walk("SDXL", self._steps, self._start, predict, self._each_step)

    def samples_of_base(self, stage_one: StageOne) -> Tensor:
        raise NotImplementedError("a run without a WebUI is interrupted by KeyboardInterrupt")

    def base_to_device(self) -> None:
        """`base_plugins` brings it there."""

    def upgraded_to_device(self) -> None:
        """`sample_upgraded` brings it there."""

    @contextmanager
    def recording(self, evaluations: int) -> Iterator[Callable[[], None]]:
        done = itertools.count()
        yield lambda: self._stages.progress("recording", next(done), evaluations)
        self._stages.progress("recording", evaluations, evaluations)

    def remarks(self) -> None:
        """Nothing."""

    def stage_one_found(self, kept: KeptStageOne) -> None:
        """Its picture is shown once for all passes."""

    def base_rests(self, kept: KeptStageOne) -> None:
        """Nothing is shown of it."""

    def notify(self, sentence: str) -> None:
        logger.warning("%s", sentence)
