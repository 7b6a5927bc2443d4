"""One picture, start to end: stage 1 with the base, the switch, stage 2 with both, and everything put back.

The WebUI calls four methods of its processing object that bracket what we need: `init` before anything is made,
`parse_extra_network_prompts` and `setup_conds` for each batch's prompts, and `sample`. A `Generation` stands in for
them on one processing object. What goes wrong in there ends the job with its message; the WebUI swallows what a script
hook raises.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from modules import (
    devices,
    extra_networks,
    processing,
    rng,
    sd_hijack,
    sd_models,
    sd_samplers,
    sd_samplers_common,
    sd_unet,
    sd_vae,
    shared,
)
from modules.processing import StableDiffusionProcessingTxt2Img
from modules.textual_inversion.textual_inversion import EmbeddingDatabase
from PIL import Image
from torch import Tensor

from .. import __version__
from ..errors import DoesNotFit, WrongArgument, XAdapterError
from ..infotext import PLUGINS_KEY, write_infotext
from ..joint_stage import JointStage, Window
from ..mapping import MappingLayers
from ..settings import BASE_NOISE_SEED, Settings, half, read_settings
from ..taps import check_fit, read_features
from ..trajectory import Trajectory
from . import model_files, plugins, routing, switch
from .base_model import BaseModel
from .controlnet_units import BaseUnits, without_leftovers
from .lockstep import BaseEvaluation, lockstep, noise_level
from .models import Models
from .refusal import Refusal

logger = logging.getLogger(__name__)

ATTRIBUTE = "xadapter_generation"
STAND_INS = ("init", "parse_extra_network_prompts", "setup_conds", "sample")
SHARED_FIELDS = (
    "sampler_name",
    "scheduler",
    "subseed_strength",
    "seed_resize_from_h",
    "seed_resize_from_w",
    "tiling",
    "eta",
    "s_min_uncond",
    "s_churn",
    "s_tmin",
    "s_tmax",
    "s_noise",
    "disable_extra_networks",
    "do_not_reload_embeddings",
)
"""What the base's processing object takes from SDXL's as it is."""


def ends_the_job(method: Callable[..., Any]) -> Callable[..., Any]:
    """What goes wrong in the method leaves the WebUI as it was and ends the job with its message."""

    @functools.wraps(method)
    def guarded(self: Generation, *args: Any, **kwargs: Any) -> Any:
        try:
            return method(self, *args, **kwargs)
        except XAdapterError as problem:
            self.end()
            raise Refusal(problem) from problem
        except BaseException:
            self.end()
            raise

    return guarded


@dataclass(frozen=True)
class StageOne:
    """What the base made alone.

    Attributes:
        latents: its finished latents, (images, 4, h, w).
        pictures: their pictures.
        levels: the noise level of each sampling step, for prompt schedules in the joint stage.
    """

    latents: Tensor | None
    pictures: list[Image.Image]
    levels: list[float]


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
        self._adapter: MappingLayers | None = None
        self._base_job: StableDiffusionProcessingTxt2Img | None = None
        self._base_networks: plugins.NetworkData = {}
        self._networks_are_active = False
        self._caches: tuple[list, list] = ([None, None], [None, None])
        self._units = BaseUnits()

    # ---- standing in for the processing object's methods

    def attach(self) -> None:
        """Stand in for the four methods, until the job ends."""
        without_leftovers(self._p)
        earlier = getattr(self._p, ATTRIBUTE, None)
        if earlier is not None:
            earlier.detach()
        setattr(self._p, ATTRIBUTE, self)
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

    def detach(self) -> None:
        """Give the processing object its own methods and arguments back."""
        self._units.give_back()
        without_leftovers(self._p)
        for name in STAND_INS:
            if self._p.__dict__.get(name) == getattr(self, name):
                del self._p.__dict__[name]
                self._p.__dict__.update({name: self._overridden[name]} if name in self._overridden else {})

    def end(self) -> None:
        """Detach and let the models rest."""
        self.detach()
        self._let_networks_be()
        self._base_job = self._base = self._adapter = None
        self._models.rest()

    @ends_the_job
    def init(self, all_prompts: list[str], all_seeds: list[int], all_subseeds: list[int]) -> None:
        """Before anything is made: read the arguments, refuse what cannot work, load what is needed."""
        settings = read_settings(self._arguments())
        refuse_what_cannot_work(self._p)
        info = model_files.find_base_checkpoint(settings.base_checkpoint)
        path = model_files.find_adapter(settings.adapter) if settings.has_adapter else None
        self._base = self._models.base(info)
        self._units.check(self._base)
        if path is not None:
            self._adapter = self._models.adapter(path)
            check_fit(self._adapter, self._base.unet, shared.sd_model.model.diffusion_model)
        self.settings = replace(
            settings, base_checkpoint=info.short_title, adapter=_adapter_name(path) if path else "None"
        )
        self._p.extra_generation_params.update(write_infotext(self.settings, __version__))
        self._hosts["init"](all_prompts, all_seeds, all_subseeds)
        if not settings.single_stage:
            self._count_stage_one()

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
        self._base_job = self._base_processing(prompts, negative or list(p.negative_prompts))
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
        if job is None or job.c is not None:
            return
        upgraded_embeddings = set(sd_hijack.model_hijack.embedding_db.word_embeddings)
        in_force = not job.disable_extra_networks
        loras = routing.taken_loras(self._base_networks, self._p.extra_network_data) if in_force else []
        written = [*job.prompts, *job.negative_prompts]
        with self._base.current():
            self._prepare_base(job, upgraded_embeddings)
            base_embeddings = sd_hijack.model_hijack.embedding_db
            job.setup_conds()
        self._tell(loras, written, upgraded_embeddings, base_embeddings)
        self._p.lora_hashes = {**getattr(self._p, "lora_hashes", {}), **getattr(job, "lora_hashes", {})}
        if self._p.lora_hashes:
            hashes = ", ".join(f"{name}: {value}" for name, value in self._p.lora_hashes.items())
            self._p.extra_generation_params["Lora hashes"] = hashes

    def _tell(
        self,
        loras: Sequence[routing.Route],
        base_texts: Sequence[str],
        upgraded_embeddings: Collection[str],
        base_embeddings: EmbeddingDatabase,
    ) -> None:
        """Say in the infotext and under the picture which plugin went to which model."""
        p = self._p
        texts = {routing.BASE: base_texts, routing.UPGRADED: [*p.prompts, *p.negative_prompts]}
        known = {
            routing.BASE: base_embeddings.word_embeddings,
            routing.UPGRADED: upgraded_embeddings,
            "": base_embeddings.skipped_embeddings,
        }
        units = map(routing.unit_route, self._units.enabled)
        told = routing.sentence([*loras, *routing.taken_embeddings(texts, known), *units])
        if told:
            p.extra_generation_params[PLUGINS_KEY] = told
            p.comment(f"X-Adapter: {told}.")

    @ends_the_job
    def sample(self, conditioning: Any, unconditional_conditioning: Any, *args: Any, **kwargs: Any) -> Any:
        """Latents of one batch: (images, 4, height / 8, width / 8), or pictures where stage 1 was interrupted."""
        p, settings = self._p, self.settings
        with ExitStack() as scope:
            scope.enter_context(self._token_merging())
            scope.enter_context(self._units.hooked(self._base_job, self._base))
            if settings.single_stage:
                samples = self._sample_single_stage(conditioning, unconditional_conditioning)
            else:
                made = self._sample_base()
                self.base_pictures += made.pictures
                if shared.state.interrupted or shared.state.skipped:
                    samples = pictures_as_samples(made.pictures, p.width, p.height)
                else:
                    shared.state.nextjob()
                    samples = self._sample_joint(made, conditioning, unconditional_conditioning)
        if p.iteration == p.n_iter - 1 or shared.state.interrupted or shared.state.stopping_generation:
            self.end()
        return samples

    # ---- stage 1

    def _base_processing(self, prompts: list[str], negative_prompts: list[str]) -> StableDiffusionProcessingTxt2Img:
        """What the WebUI would process with the SD1.5 checkpoint selected, for the batch under way."""
        p, settings = self._p, self.settings
        job = StableDiffusionProcessingTxt2Img(
            prompt=prompts,
            negative_prompt=negative_prompts,
            width=settings.base_width or half(p.width),
            height=settings.base_height or half(p.height),
            steps=settings.base_steps or p.steps,
            cfg_scale=settings.base_cfg_scale or p.cfg_scale,
            batch_size=len(prompts),
            do_not_save_samples=True,
            do_not_save_grid=True,
            **{name: getattr(p, name) for name in SHARED_FIELDS},
        )
        job.sampler_noise_scheduler_override = p.sampler_noise_scheduler_override
        job.seeds = job.all_seeds = list(p.seeds)
        job.subseeds = job.all_subseeds = list(p.subseeds)
        job.prompts = job.all_prompts = prompts
        job.negative_prompts = job.all_negative_prompts = negative_prompts
        job.cached_c, job.cached_uc = self._caches
        job.fill_fields_from_opts()
        return job

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
            plugins.check_loaded(self._base_networks)
        job.prompts = [plugins.without_names(prompt, upgraded_only) for prompt in job.prompts]
        job.negative_prompts = [plugins.without_names(prompt, upgraded_only) for prompt in job.negative_prompts]
        sd_models.apply_alpha_schedule_override(model, job)
        for comment in hijack.comments:
            self._p.comment(f"SD1.5: {comment}")

    def _sample_base(self) -> StageOne:
        """The base's own picture, by the WebUI's own sampler."""
        job, levels = self._base_job, []
        with self._base.current() as model, self._units.stage_one():
            job.sampler = sd_samplers.create_sampler(job.sampler_name, model)
            denoiser = job.sampler.model_wrap_cfg

            def note(module: torch.nn.Module, args: tuple) -> None:
                levels[denoiser.step :] = [noise_level(denoiser, args[1])]

            job.rng = self._base_noise(job.seeds)
            self._units.change_noise(job)
            noise = job.rng.next()
            hook = denoiser.register_forward_pre_hook(note)
            try:
                latents = job.sampler.sample(
                    job, noise, job.c, job.uc, image_conditioning=job.txt2img_image_conditioning(noise)
                )
            finally:
                hook.remove()
            plugins.check_applied()
            pictures = switch.decode(model, latents, self._units.finish)
        devices.torch_gc()
        return StageOne(latents, pictures, levels)

    def _base_noise(self, seeds: Sequence[int]) -> rng.ImageRNG:
        job = self._base_job
        return rng.ImageRNG(
            (4, job.height // processing.opt_f, job.width // processing.opt_f),
            seeds,
            subseeds=job.subseeds,
            subseed_strength=job.subseed_strength,
            seed_resize_from_h=job.seed_resize_from_h,
            seed_resize_from_w=job.seed_resize_from_w,
        )

    # ---- stage 2

    def _sample_joint(self, made: StageOne, cond: Any, uncond: Any) -> Tensor:
        """SDXL from the base's picture, noised to the switch point, as the img2img tab does it."""
        p = self._p
        carried = switch.carry_over(made.pictures, p.seeds, p.width, p.height)
        p.sampler = sd_samplers.create_sampler(p.sampler_name, p.sd_model)
        conditioning = p.img2img_image_conditioning(carried.pixels * 2 - 1, carried.latents)
        noise = p.rng.next() * shared.opts.initial_noise_multiplier
        self._announce(carried.latents, noise, cond, uncond)
        with self._joint_stage(made), denoising_strength(p, self.settings.switch_point):
            return p.sampler.sample_img2img(p, carried.latents, noise, cond, uncond, image_conditioning=conditioning)

    def _sample_single_stage(self, cond: Any, uncond: Any) -> Tensor:
        """Both from noise, as the txt2img tab does it."""
        p = self._p
        p.sampler = sd_samplers.create_sampler(p.sampler_name, p.sd_model)
        noise = p.rng.next()
        self._announce(noise, noise, cond, uncond)
        with self._joint_stage(StageOne(None, [], [])):
            return p.sampler.sample(p, noise, cond, uncond, image_conditioning=p.txt2img_image_conditioning(noise))

    def _announce(self, x: Tensor, noise: Tensor, cond: Any, uncond: Any) -> None:
        """What the WebUI tells scripts before every sampling."""
        if self._p.scripts is not None:
            self._p.scripts.process_before_every_sampling(p=self._p, x=x, noise=noise, c=cond, uc=uncond)

    @contextmanager
    def _joint_stage(self, made: StageOne) -> Iterator[None]:
        """While open, the processing object's sampler runs in lockstep with the base."""
        settings = self.settings
        if self._adapter is None or not any(settings.weights):
            yield
            return
        noise = self._base_noise([seed + BASE_NOISE_SEED for seed in self._base_job.seeds]).next()
        with read_features(self._base.unet) as reader:
            stage = JointStage(
                self._units.beside_sdxl(BaseEvaluation(self._base, self._base_job, reader, made.levels), reader),
                Trajectory(noise, made.latents),
                self._adapter,
                settings.weights,
                Window(settings.guidance_start, settings.guidance_end),
            )
            with lockstep(stage, self._p.sampler):
                yield

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

    def _count_stage_one(self) -> None:
        """Two jobs a batch in the progress bar, as hires fix does it."""
        p, state = self._p, shared.state
        if state.processing_has_refined_job_count:
            return
        if state.job_count == -1:
            state.job_count = p.n_iter
        with denoising_strength(p, self.settings.switch_point):
            _, joint_steps = sd_samplers_common.setup_img2img_steps(p)
        base_steps = self.settings.base_steps or p.steps
        shared.total_tqdm.updateTotal((base_steps + joint_steps + 1) * state.job_count)
        state.job_count *= 2
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


@contextmanager
def denoising_strength(p: StableDiffusionProcessingTxt2Img, strength: float) -> Iterator[None]:
    """While open, the processing object has an img2img tab's denoising strength."""
    own, p.denoising_strength = p.denoising_strength, strength
    try:
        yield
    finally:
        p.denoising_strength = own


def pictures_as_samples(pictures: Sequence[Image.Image], width: int, height: int) -> processing.DecodedSamples:
    """Pictures in the form in which the WebUI takes samples that need no decoding."""
    return processing.DecodedSamples(switch.resized(pictures, width, height) * 2 - 1)


def _adapter_name(path: Any) -> str:
    return next(name for name, found in model_files.adapters().items() if found == path)
