"""One picture, start to end: stage 1 with the base, the switch, stage 2 with both, and everything put back.

The WebUI calls four methods of its processing object that bracket what we need: `init` before anything is made,
`parse_extra_network_prompts` and `setup_conds` for each batch's prompts, and `sample`. A `Generation` stands in for
them on one processing object. What goes wrong in there ends the job with its message; the WebUI swallows what a script
hook raises.
"""

from __future__ import annotations

import functools
import logging
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

from modules import (
    devices,
    extra_networks,
    processing,
    sd_hijack,
    sd_models,
    sd_samplers_common,
    sd_unet,
    sd_vae,
    shared,
)
from modules.processing import StableDiffusionProcessingTxt2Img
from PIL import Image

from .. import __version__
from ..errors import DoesNotFit, WrongArgument, XAdapterError
from ..feature_sources import Lockstep
from ..infotext import PLUGINS_KEY, write_infotext
from ..joint_stage import Course, Moment
from ..mapping_paths import MappingPath
from ..recording import Playback, Recording, record
from ..settings import BASE_NOISE_SEED, Settings, read_settings
from ..taps import check_fit, read_features
from ..trajectory import Trajectory
from . import model_files, plugins, routing, switch
from .base_evaluation import BaseEvaluation
from .base_model import BaseModel
from .base_side import BaseSide, Encoding, key_of
from .base_units import BaseUnits, without_leftovers
from .controlnet_units import MODEL_NAMES
from .models import Models
from .moments import planned_moments
from .refusal import Refusal
from .stage_one import StageOne, base_noise, base_processing, check_start, sample_base
from .stage_two import StageTwo
from .switch import denoising_strength

logger = logging.getLogger(__name__)

STAND_INS = ("init", "parse_extra_network_prompts", "setup_conds", "sample")


def ends_the_job(method: Callable[..., Any]) -> Callable[..., Any]:
    """What goes wrong in the method leaves the WebUI as it was and ends the job with its message."""

    @functools.wraps(method)
    def guarded(self: Generation, *args: Any, **kwargs: Any) -> Any:
        try:
            return method(self, *args, **kwargs)
        except XAdapterError as problem:
            self.end(keep_base=not self._base_networks)
            raise Refusal(problem) from problem
        except BaseException as error:
            # what its frames hold would fill the GPU while the models find their way back
            traceback.clear_frames(error.__traceback__)
            self.end(keep_base=False)
            raise

    return guarded


class Generation:
    """X-Adapter's part in one processing object's job.

    Args:
        p: the WebUI's processing object.
        models: what is loaded.
        arguments: the arguments as the page or the REST object gave them; read when the job starts.
    """

    def __init__(
        self, p: StableDiffusionProcessingTxt2Img, models: Models, arguments: Callable[[], Mapping[str, Any]]
    ) -> None:
        self.base_pictures: list[Image.Image] = []
        self.settings = Settings()
        self._p = p
        self._models = models
        self._arguments = arguments
        self._hosts: dict[str, Callable[..., Any]] = {}
        self._overridden: dict[str, Any] = {}
        self._base: BaseModel | None = None
        self._mapping: MappingPath | None = None
        self._base_job: StableDiffusionProcessingTxt2Img | None = None
        self._base_networks: plugins.NetworkData = {}
        self._networks_are_active = False
        self._caches: tuple[list, list] = ([None, None], [None, None])
        self._units = BaseUnits()
        self._in_turns = False
        self._planned: tuple[Moment, ...] | None = None
        self._key = ""
        self._made_earlier: BaseSide | None = None
        self._encoding: Encoding | None = None

    # ---- standing in for the processing object's methods

    def attach(self) -> None:
        """Stand in for the four methods, until the job ends."""
        without_leftovers(self._p)
        self._hosts = {name: getattr(self._p, name) for name in STAND_INS}
        # other extensions stand in for methods, too
        self._overridden = {name: self._p.__dict__[name] for name in STAND_INS if name in self._p.__dict__}
        for name in STAND_INS:
            setattr(self._p, name, getattr(self, name))
        self._units.take_over(self._p)

    @property
    def detected_maps(self) -> list[Image.Image]:
        """What the base's ControlNet units show beside the pictures."""
        return self._units.detected_maps

    @property
    def is_attached(self) -> bool:
        """Whether the job has not ended yet."""
        return self._p.__dict__.get("init") == self.init

    def detach(self) -> None:
        """Give the processing object its own methods and arguments back."""
        self._units.give_back()
        without_leftovers(self._p)
        for name in STAND_INS:
            if self._p.__dict__.get(name) == getattr(self, name):
                del self._p.__dict__[name]
                self._p.__dict__.update({name: self._overridden[name]} if name in self._overridden else {})

    def end(self, keep_base: bool = True) -> None:
        """Detach and let the models rest.

        Args:
            keep_base: False after what went wrong while the base had LoRAs, or for no known reason. A layer in which
                the Lora extension was interrupted never gets its own weights back; the next job loads them anew.
        """
        self.detach()
        self._let_networks_be()
        self._base_job = self._base = self._mapping = self._made_earlier = None
        if not keep_base:
            self._models.forget_base()
        try:
            if self._in_turns:
                self._models.upgraded_turn()
        finally:
            self._models.rest()

    @ends_the_job
    def init(self, all_prompts: list[str], all_seeds: list[int], all_subseeds: list[int]) -> None:
        """Before anything is made: read the arguments, refuse what cannot work, load what is needed."""
        settings = read_settings(self._arguments())
        refuse_what_cannot_work(self._p)
        info = model_files.find_base_checkpoint(settings.base_checkpoint)
        path = model_files.find_adapter(settings.adapter) if settings.has_adapter else None
        self._in_turns = self._models.take_turns(settings.memory, info, path)
        if path is not None and any(settings.weights):
            self._plan(settings)
        self._base = self._models.base(info, self._in_turns)
        self._units.check(self._base)
        check_start(settings, self._units)
        if path is not None:
            self._mapping = self._models.mapping(path)
            check_fit(self._mapping.adapter, self._base.unet, shared.sd_model.model.diffusion_model)
        self.settings = replace(
            settings, base_checkpoint=info.short_title, adapter=_adapter_name(path) if path else "None"
        )
        self._p.extra_generation_params.update(write_infotext(self.settings, __version__))
        self._hosts["init"](all_prompts, all_seeds, all_subseeds)
        self._count_jobs()

    def _plan(self, settings: Settings) -> None:
        """Find out which noise levels SDXL's sampler will ask for; without them the base cannot run ahead."""
        # the WebUI does so once the prompts are encoded; until then the model has the last job's schedule
        sd_models.apply_alpha_schedule_override(self._p.sd_model, self._p)
        self._planned = planned_moments(self._p, None if settings.single_stage else settings.switch_point)
        if self._planned is None and self._in_turns:
            self._in_turns = False
            notice = f"the noise levels of {self._p.sampler_name} are not known before it runs, so memory is 'lockstep'"
            logger.warning(notice)
            self._p.comment(f"X-Adapter: {notice}.")

    @ends_the_job
    def parse_extra_network_prompts(self) -> None:
        """Share out the LoRAs of a batch's prompts, and make the base's processing object for it."""
        p, settings = self._p, self.settings
        written = list(p.prompts)
        self._hosts["parse_extra_network_prompts"]()
        added = None if p.disable_extra_networks else plugins.network_of_the_settings()
        if added is not None:
            self._write_into_prompts(added)
        split = plugins.split_networks(p.extra_network_data)
        p.extra_network_data = split.upgraded
        own_prompts, own_networks = extra_networks.parse_prompts([settings.base_prompt] * len(written))
        self._base_networks = plugins.base_networks(split.base, own_networks)
        prompts = own_prompts if settings.base_prompt else list(p.prompts)
        negative = [settings.base_negative_prompt] * len(written) if settings.base_negative_prompt else None
        self._base_job = base_processing(p, settings, prompts, negative or list(p.negative_prompts))
        self._base_job.cached_c, self._base_job.cached_uc = self._caches
        self._encoding = None
        if added is not None:
            self._activate_what_is_written()

    def _write_into_prompts(self, added: extra_networks.ExtraNetworkParams) -> None:
        """Treat the LoRA that the WebUI's settings add to every prompt as if each prompt named it."""
        p = self._p
        if not any(tag.items[0] == added.items[0] for tag in plugins.lora_tags(p.extra_network_data)):
            p.extra_network_data.setdefault(plugins.LORA_TAGS[0], []).append(added)
            # as the Lora extension writes it into the prompts that the infotext shows
            p.all_prompts = [f"{prompt}<lora:{':'.join(map(str, added.items))}>" for prompt in p.all_prompts]

    def _activate_what_is_written(self) -> None:
        """Activate SDXL's LoRAs without the one that the WebUI's settings add, which may be the base's.

        The WebUI would activate them right after this, with the addition; whether this job has any is the processing
        object's own flag, which says that it has none until `setup_conds`.
        """
        p = self._p
        with plugins.no_added_network(), devices.autocast():
            extra_networks.activate(p, p.extra_network_data)
        self._networks_are_active, p.disable_extra_networks = True, True

    def _let_networks_be(self) -> None:
        """Give the processing object its flag back."""
        if self._networks_are_active:
            self._networks_are_active = self._p.disable_extra_networks = False

    @ends_the_job
    def setup_conds(self) -> None:
        """Encode SDXL's prompts, then the base's with its LoRAs and embeddings."""
        self._let_networks_be()
        self._hosts["setup_conds"]()
        job = self._base_job
        # the refiner has prompts encoded in the middle of sampling; the base's are there by then
        if job is None or self._encoding is not None:
            return
        upgraded_embeddings = set(sd_hijack.model_hijack.embedding_db.word_embeddings)
        in_force = not job.disable_extra_networks
        loras = routing.taken_loras(self._base_networks, self._p.extra_network_data) if in_force else []
        written = [*job.prompts, *job.negative_prompts]
        self._made_earlier = self._find_recording() if self._in_turns and self._couples else None
        self._encoding = self._made_earlier.encoding if self._made_earlier else self._encode(job, upgraded_embeddings)
        self._tell(loras, written, upgraded_embeddings, self._encoding)
        self._p.lora_hashes = {**getattr(self._p, "lora_hashes", {}), **self._encoding.lora_hashes}
        if self._p.lora_hashes:
            hashes = ", ".join(f"{name}: {value}" for name, value in self._p.lora_hashes.items())
            self._p.extra_generation_params["Lora hashes"] = hashes

    def _encode(self, job: StableDiffusionProcessingTxt2Img, upgraded_embeddings: set[str]) -> Encoding:
        """Encode the base's prompts, with its LoRAs and embeddings."""
        if self._in_turns:
            self._models.base_turn()
        with self._base.current():
            self._prepare_base(job, upgraded_embeddings)
            embeddings = sd_hijack.model_hijack.embedding_db
            job.setup_conds()
        names, unusable = tuple(embeddings.word_embeddings), tuple(embeddings.skipped_embeddings)
        return Encoding(names, unusable, dict(getattr(job, "lora_hashes", {})))

    def _tell(
        self,
        loras: Sequence[routing.Route],
        base_texts: Sequence[str],
        upgraded_embeddings: Collection[str],
        encoding: Encoding,
    ) -> None:
        """Say in the infotext and under the picture which plugin went to which model."""
        p = self._p
        texts = {routing.BASE: base_texts, routing.UPGRADED: [*p.prompts, *p.negative_prompts]}
        known = {
            routing.BASE: encoding.embeddings,
            routing.UPGRADED: upgraded_embeddings,
            "": encoding.unusable,
        }
        units = map(routing.unit_route, self._units.enabled)
        routes = [*loras, *routing.taken_embeddings(texts, known), *units]
        told = routing.sentence(routes, self._base.family)
        if told:
            p.extra_generation_params[PLUGINS_KEY] = told
            p.comment(f"X-Adapter: {told}.")

    @ends_the_job
    def sample(self, conditioning: Any, unconditional_conditioning: Any, *args: Any, **kwargs: Any) -> Any:
        """Latents of one batch: (images, 4, height / 8, width / 8), or pictures where stage 1 was interrupted."""
        p = self._p
        self._units.check_those_of_sdxl()
        with self._token_merging():
            made_by = self._sample_in_turns if self._in_turns else self._sample_together
            samples = made_by(conditioning, unconditional_conditioning)
        if p.iteration == p.n_iter - 1 or shared.state.interrupted or shared.state.stopping_generation:
            self.end()
        return samples

    def _sample_together(self, cond: Any, uncond: Any) -> Any:
        """Both models on the GPU, in lockstep."""
        with ExitStack() as scope:
            scope.enter_context(self._units.hooked(self._base_job, self._base))
            made = self._stage_one()
            if made.pictures and is_broken_off():
                return pictures_as_samples(made.pictures, self._p.width, self._p.height)
            source = scope.enter_context(self._lockstep(made)) if self._couples else None
            return self._stage_two.sample(made, source, cond, uncond)

    def _sample_in_turns(self, cond: Any, uncond: Any) -> Any:
        """The base first, then SDXL with the recording of it."""
        side = self._made_earlier or self._run_base()
        made = side.stage_one
        self._models.upgraded_turn()
        if made.pictures and is_broken_off():
            return pictures_as_samples(made.pictures, self._p.width, self._p.height)
        source = Playback(side.recording, devices.device) if self._couples else None
        return self._stage_two.sample(made, source, cond, uncond)

    # ---- the base

    def _stage_one(self) -> StageOne:
        """The base's picture; nothing in a single stage."""
        if self.settings.single_stage:
            return StageOne(None, [], [])
        made = sample_base(self._base, self._base_job, self._units, self.settings.base_start)
        self.base_pictures += made.pictures
        if not is_broken_off():
            shared.state.nextjob()
        return made

    def _run_base(self) -> BaseSide:
        """All that the base gives to the batch, put away for later jobs."""
        with self._units.hooked(self._base_job, self._base):
            made = self._stage_one()
            recording = self._record(made) if self._couples and not is_broken_off() else Recording(())
        # the joint stage is through: nothing needs the latents any more
        side = BaseSide(self._encoding, replace(made, latents=None), recording, self._units.detected_maps)
        if self._couples and not is_broken_off():
            self._models.recordings.put(self._key, side)
        return side

    def _record(self, made: StageOne) -> Recording:
        """The base's features for the joint stage; nothing of use where the user interrupts."""
        levels, state = self._base_levels(), shared.state
        state.sampling_step, state.sampling_steps = 0, len(levels)

        def count() -> None:
            if is_broken_off():
                raise sd_samplers_common.InterruptedException
            state.sampling_step += 1
            shared.total_tqdm.update()

        try:
            with self._lockstep(made) as source:
                recording = record(source, levels, count)
        except sd_samplers_common.InterruptedException:
            return Recording(())
        state.nextjob()
        return recording

    def _base_levels(self) -> list[float]:
        return Course.asked_for(self.settings).base_levels(self._planned)

    def _find_recording(self) -> BaseSide | None:
        """What an earlier job made of the same base, prompts, plugins and noise levels."""
        self._key = key_of(
            self._base,
            self._base_job,
            self.settings,
            self._base_networks,
            self._units,
            self._base_levels(),
            self._p,
        )
        found = self._models.recordings.find(self._key)
        if found is not None:
            logger.info("The SD1.5 side is the same as in an earlier job: its recording is used again")
            # their texts are written into them
            self.base_pictures += [picture.copy() for picture in found.stage_one.pictures]
            for _ in self._steps_of_base():
                shared.state.nextjob()
            self._units.detected_maps = self._units.detected_maps or list(found.detected_maps)
        return found

    @contextmanager
    def _lockstep(self, made: StageOne) -> Iterator[Lockstep]:
        """The base at the start of the joint stage."""
        job = self._base_job
        noise = base_noise(job, [seed + BASE_NOISE_SEED for seed in job.seeds]).next()
        with read_features(self._base.unet) as reader:
            evaluation = BaseEvaluation(self._base, job, reader, made.levels)
            evaluate = self._units.beside_sdxl(evaluation, reader, self._planned or ())
            yield Lockstep(evaluate, Trajectory(noise, made.latents))

    def _prepare_base(self, job: StableDiffusionProcessingTxt2Img, upgraded_embeddings: set[str]) -> None:
        """What the WebUI does before it encodes prompts, with the base as its current model."""
        model, hijack = self._base.model, sd_hijack.model_hijack
        sd_vae.reload_vae_weights(model)
        hijack.apply_circular(job.tiling)
        hijack.clear_comments()
        if not job.do_not_reload_embeddings:
            hijack.embedding_db.load_textual_inversion_embeddings()
        upgraded_only = upgraded_embeddings & set(hijack.embedding_db.skipped_embeddings)
        job.extra_network_data = self._base_networks
        if not job.disable_extra_networks:
            with plugins.no_added_network(), devices.autocast():
                extra_networks.activate(job, self._base_networks)
            plugins.check_loaded(self._base_networks, MODEL_NAMES[self._base.family])
        job.prompts = [plugins.without_names(prompt, upgraded_only) for prompt in job.prompts]
        job.negative_prompts = [plugins.without_names(prompt, upgraded_only) for prompt in job.negative_prompts]
        sd_models.apply_alpha_schedule_override(model, job)
        for comment in hijack.comments:
            self._p.comment(f"{MODEL_NAMES[self._base.family]}: {comment}")

    @property
    def _stage_two(self) -> StageTwo:
        return StageTwo(self._p, self.settings, self._mapping, self._planned, self._models.side_stream)

    @property
    def _couples(self) -> bool:
        """Whether features are led over at all."""
        return self._mapping is not None and any(self.settings.weights)

    # ---- manners

    @contextmanager
    def _token_merging(self) -> Iterator[None]:
        ratio = self._p.get_token_merging_ratio()
        sd_models.apply_token_merging(self._base.model, ratio)
        model = self._base.model
        try:
            yield
        finally:
            sd_models.apply_token_merging(model, 0)

    def _steps_of_base(self) -> list[int]:
        """Those of each job of the base: stage 1 and the recording, as far as there are any."""
        stage_one = [] if self.settings.single_stage else [self.settings.base_steps or self._p.steps]
        recording = [len(self._base_levels())] if self._couples and self._in_turns else []
        return stage_one + recording

    def _count_jobs(self) -> None:
        """Each stage is a job in the progress bar, as hires fix does it."""
        p, state, settings = self._p, shared.state, self.settings
        steps = self._steps_of_base()
        if not steps or state.processing_has_refined_job_count:
            return
        steps.append(p.steps if settings.single_stage else joint_steps(p, settings.switch_point))
        if state.job_count == -1:
            state.job_count = p.n_iter
        shared.total_tqdm.updateTotal(sum(steps) * state.job_count)
        state.job_count *= len(steps)
        state.processing_has_refined_job_count = True


def refuse_what_cannot_work(p: StableDiffusionProcessingTxt2Img) -> None:
    """The states of the WebUI that X-Adapter cannot work in.

    Raises:
        DoesNotFit, WrongArgument: one sentence on what to change.
    """
    if not shared.sd_model.is_sdxl:
        name = shared.sd_model.sd_checkpoint_info.name_for_extra
        raise DoesNotFit(f"X-Adapter leads from SD1.5 to SDXL: select an SDXL checkpoint; {name} is none.")
    if sd_unet.get_unet_option() is not None or sd_unet.current_unet is not None:
        raise DoesNotFit(
            "X-Adapter needs the models' own UNets: set 'SD Unet' to None in Settings (a replacement, such as "
            "TensorRT, is active)."
        )
    if p.enable_hr:
        raise WrongArgument("X-Adapter and Hires. fix do not work together yet: switch one of them off.")


def is_broken_off() -> bool:
    """Whether the user wants no more of this picture."""
    return shared.state.interrupted or shared.state.skipped


def joint_steps(p: StableDiffusionProcessingTxt2Img, switch_point: float) -> int:
    """How many steps SDXL takes from the switch point on, by the img2img tab's rule."""
    with denoising_strength(p, switch_point):
        _, last = sd_samplers_common.setup_img2img_steps(p)
    return last + 1


def pictures_as_samples(pictures: Sequence[Image.Image], width: int, height: int) -> processing.DecodedSamples:
    """Pictures in the form in which the WebUI takes samples that need no decoding."""
    return processing.DecodedSamples(switch.resized(pictures, width, height) * 2 - 1)


def _adapter_name(path: Any) -> str:
    return next(name for name, found in model_files.adapters().items() if found == path)
