"""The prompts and LoRAs of one batch, shared out between SDXL and the base."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from modules import devices, extra_networks, sd_hijack, sd_models, sd_vae
from modules.processing import StableDiffusionProcessing, StableDiffusionProcessingImg2Img

from ...families import FAMILY_NAMES
from ...infotext import HIRES_PLUGINS_KEY, PLUGINS_KEY
from ...inversion_names import without_names
from ...settings import Settings
from ..base import plugins
from ..base.base_model import BaseModel, same_optimization
from ..base.base_processing import (
    GivenPicture,
    Prompts,
    beside_hires,
    beside_img2img,
    of_img2img,
    of_txt2img,
    set_prompts,
)
from ..base.base_units import BaseUnits
from ..base.stage_one import set_up_img2img
from ..page import routing
from ..sampling.samplings import Sampling, Start
from .request import Request


@dataclass(frozen=True)
class Batch:
    """The base's part of a batch.

    Attributes:
        base_p: its processing object.
        networks: its LoRAs.
    """

    base_p: StableDiffusionProcessing
    networks: plugins.NetworkData


@dataclass(frozen=True)
class Encoding:
    """What is known once the base's prompts are encoded.

    Attributes:
        embeddings: names of the textual inversions that the base has vectors for.
        unusable: names of those that it has not.
        lora_hashes: for the infotext.
    """

    embeddings: Collection[str]
    unusable: Collection[str]
    lora_hashes: Mapping[str, str]


def share_out(p: StableDiffusionProcessing, request: Request, given: GivenPicture | None) -> Mapping[Sampling, Batch]:
    """The base's part in each sampling of the batch whose prompts were just parsed.

    SDXL's extra networks are left without the base's LoRAs, and the infotext without the plugins of an earlier batch.

    Args:
        p: SDXL's processing object.
        request: the job.
        given: what SDXL paints over in img2img.

    Raises:
        WrongArgument: a prompt names a LoRA that is in no folder, or for the wrong model.
        WrongFile: a LoRA's file cannot be read.
    """
    for key in (PLUGINS_KEY, HIRES_PLUGINS_KEY):
        p.extra_generation_params.pop(key, None)
    added = None if p.disable_extra_networks else plugins.network_of_the_settings()
    if added is not None:
        _write_into_prompts(p, added)
    split = plugins.split_networks(p.extra_network_data)
    p.extra_network_data = split.upgraded
    parts = {False: (p.prompts, p.negative_prompts, split.base)}
    if getattr(p, "enable_hr", False):
        hires = plugins.split_networks(p.hr_extra_network_data)
        p.hr_extra_network_data = hires.upgraded
        parts[True] = p.hr_prompts, p.hr_negative_prompts, hires.base
    return {
        planned.sampling: _batch(p, request.settings, planned.sampling, given, *parts[planned.sampling.is_hires])
        for planned in request.samplings
    }


def _batch(
    p: StableDiffusionProcessing,
    settings: Settings,
    sampling: Sampling,
    given: GivenPicture | None,
    prompts: Sequence[str],
    negative_prompts: Sequence[str],
    base_networks: plugins.NetworkData,
) -> Batch:
    count = len(p.prompts)
    own_prompts, own_networks = extra_networks.parse_prompts([settings.base_prompt] * count)
    networks = plugins.base_networks(base_networks, own_networks)
    positive = own_prompts if settings.base_prompt else list(prompts)
    negative = [settings.base_negative_prompt] * count if settings.base_negative_prompt else list(negative_prompts)
    base_prompts = Prompts(positive, negative)
    if sampling.is_hires:
        return Batch(beside_hires(p, settings, base_prompts), networks)
    if not isinstance(p, StableDiffusionProcessingImg2Img):
        return Batch(of_txt2img(p, settings, base_prompts), networks)
    if sampling.start is Start.PICTURE:
        return Batch(beside_img2img(p, settings, base_prompts, given), networks)
    return Batch(of_img2img(p, settings, base_prompts), networks)


def _write_into_prompts(p: StableDiffusionProcessing, added: extra_networks.ExtraNetworkParams) -> None:
    """Treat the LoRA that the WebUI's settings add to every prompt as if each prompt named it."""
    if not any(tag.items[0] == added.items[0] for tag in plugins.lora_tags(p.extra_network_data)):
        p.extra_network_data.setdefault(plugins.LORA_TAGS[0], []).append(added)
        # as the Lora extension writes it into the prompts that the infotext shows
        p.all_prompts = [f"{prompt}<lora:{':'.join(map(str, added.items))}>" for prompt in p.all_prompts]
    hires = getattr(p, "hr_extra_network_data", None)
    if hires is not None and not any(tag.items[0] == added.items[0] for tag in plugins.lora_tags(hires)):
        hires.setdefault(plugins.LORA_TAGS[0], []).append(added)


def encode(
    p: StableDiffusionProcessing, base: BaseModel, batch: Batch, upgraded_embeddings: Collection[str]
) -> Encoding:
    """Prepare the base's processing object, with its LoRAs and embeddings, as the WebUI does with its current model.

    Raises:
        WrongFile: a LoRA cannot be loaded, or holds nothing for the base.
    """
    base_p, hijack = batch.base_p, sd_hijack.model_hijack
    with base.current() as model:
        with same_optimization():
            sd_vae.reload_vae_weights(model)
        hijack.apply_circular(base_p.tiling)
        hijack.clear_comments()
        if not base_p.do_not_reload_embeddings:
            hijack.embedding_db.load_textual_inversion_embeddings()
        base_p.extra_network_data = batch.networks
        if not base_p.disable_extra_networks:
            with plugins.no_added_network(), devices.autocast():
                extra_networks.activate(base_p, batch.networks)
            plugins.check_loaded(batch.networks, FAMILY_NAMES[base.family])
        upgraded_only = set(upgraded_embeddings) & set(hijack.embedding_db.skipped_embeddings)
        set_prompts(
            base_p,
            Prompts(
                [without_names(prompt, upgraded_only) for prompt in base_p.prompts],
                [without_names(prompt, upgraded_only) for prompt in base_p.negative_prompts],
            ),
        )
        sd_models.apply_alpha_schedule_override(model, base_p)
        for comment in hijack.comments:
            p.comment(f"{FAMILY_NAMES[base.family]}: {comment}")
        base_p.setup_conds()
        # where they stand for a second pass, too
        base_p.c, base_p.uc = base_p.get_conds()
        if isinstance(base_p, StableDiffusionProcessingImg2Img):
            set_up_img2img(base_p)
        known, unusable = tuple(hijack.embedding_db.word_embeddings), tuple(hijack.embedding_db.skipped_embeddings)
    return Encoding(known, unusable, dict(getattr(base_p, "lora_hashes", {})))


def report_plugins(
    p: StableDiffusionProcessing,
    base: BaseModel,
    batch: Batch,
    units: BaseUnits,
    encoding: Encoding,
    upgraded_embeddings: Collection[str],
) -> None:
    """Say in the infotext and under the picture which plugin went to which model in the sampling under way."""
    in_force = not batch.base_p.disable_extra_networks
    is_hires = getattr(p, "is_hr_pass", False)
    networks = p.hr_extra_network_data if is_hires else p.extra_network_data
    prompts = (p.hr_prompts, p.hr_negative_prompts) if is_hires else (p.prompts, p.negative_prompts)
    loras = routing.taken_loras(batch.networks, networks) if in_force else []
    base_texts = [*batch.base_p.all_prompts, *batch.base_p.all_negative_prompts]
    texts = {routing.BASE: base_texts, routing.UPGRADED: [text for part in prompts for text in part]}
    known = {routing.BASE: encoding.embeddings, routing.UPGRADED: upgraded_embeddings, "": encoding.unusable}
    routes = [*loras, *routing.taken_embeddings(texts, known), *map(routing.unit_route, units.enabled)]
    _write_plugins(p, routing.sentence(routes, base.family), is_hires)
    p.lora_hashes = {**getattr(p, "lora_hashes", {}), **encoding.lora_hashes}
    if p.lora_hashes:
        hashes = ", ".join(f"{name}: {value}" for name, value in p.lora_hashes.items())
        p.extra_generation_params["Lora hashes"] = hashes


def _write_plugins(p: StableDiffusionProcessing, summary: str, is_hires: bool) -> None:
    """A sentence, "" for no plugins; of the second pass of Hires. fix where it is another than the first one's."""
    written = p.extra_generation_params
    if is_hires and summary != written.get(PLUGINS_KEY, ""):
        written[HIRES_PLUGINS_KEY] = summary or "none"
        p.comment(f"X-Adapter, Hires. fix: {summary or 'no plugins'}.")
    elif summary and not is_hires:
        written[PLUGINS_KEY] = summary
        p.comment(f"X-Adapter: {summary}.")
