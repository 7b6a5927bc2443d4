"""Which LoRA goes to which model, and what the base's prompt keeps of the prompt."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from modules import extra_networks

from ..errors import WrongArgument, WrongFile
from ..lora_files import detect_lora_base
from .base_model import lora_extension

LORA_TAGS = ("lora", "lyco")
BASE_LORAS = ("sd1", "sd2")

NetworkData = dict[str, list[extra_networks.ExtraNetworkParams]]
"""What the WebUI reads from `<kind:…>` tags: kind → arguments of each tag."""


@dataclass(frozen=True)
class Split:
    """Extra networks of a prompt, by the model that gets them."""

    upgraded: NetworkData
    base: NetworkData


def split_networks(data: Mapping[str, Sequence[extra_networks.ExtraNetworkParams]]) -> Split:
    """SD1.5 and SD2 LoRAs for the base, everything else for SDXL.

    Raises:
        WrongArgument: a LoRA is in no folder.
        WrongFile: a LoRA's file cannot be read.
    """
    upgraded: NetworkData = {}
    base: NetworkData = {}
    for kind, tags in data.items():
        upgraded[kind] = []
        for tag in tags:
            goes_to_base = kind in LORA_TAGS and lora_base(tag.positional[0]) in BASE_LORAS
            (base.setdefault(kind, []) if goes_to_base else upgraded[kind]).append(tag)
    return Split(upgraded, base)


def lora_base(name: str) -> str:
    """The model that a LoRA of the user's folders was made for, "unknown" where its file does not tell."""
    networks = lora_extension()
    if networks is None:
        return "unknown"
    on_disk = networks.available_networks.get(name) or networks.available_network_aliases.get(name)
    if on_disk is None:
        networks.update_available_networks_by_names([name])
        on_disk = networks.available_networks.get(name) or networks.available_network_aliases.get(name)
    if on_disk is None:
        raise WrongArgument(f"There is no LoRA named '{name}' in the WebUI's LoRA folders.")
    return detect_lora_base(on_disk.filename)


def base_networks(from_prompt: NetworkData, from_base_prompt: Mapping[str, Sequence]) -> NetworkData:
    """LoRAs of the base: those of its own prompt, and the prompt's that are not named there again.

    Raises:
        WrongArgument: the base prompt names an SDXL LoRA.
    """
    split = split_networks(from_base_prompt)
    for kind in LORA_TAGS:
        for tag in split.upgraded.get(kind, []):
            if lora_base(tag.positional[0]) == "sdxl":
                raise WrongArgument(
                    f"The LoRA '{tag.positional[0]}' in the SD1.5 prompt was made for SDXL; it belongs into the prompt."
                )
    own = {kind: list(tags) for kind, tags in from_base_prompt.items()}
    named = {tag.positional[0] for kind in LORA_TAGS for tag in own.get(kind, [])}
    for kind, tags in from_prompt.items():
        own.setdefault(kind, []).extend(tag for tag in tags if tag.positional[0] not in named)
    return own


def check_loaded(wanted: NetworkData) -> None:
    """Whether the current model has every LoRA that it was given; the WebUI only logs one that it cannot load.

    Raises:
        WrongFile: a LoRA could not be loaded, or holds nothing for this model.
    """
    networks = lora_extension()
    if networks is None:
        return
    loaded = {network.name: network for network in networks.loaded_networks}
    for tag in (tag for kind in LORA_TAGS for tag in wanted.get(kind, [])):
        network = loaded.get(tag.positional[0])
        if network is None:
            raise WrongFile(f"The LoRA '{tag.positional[0]}' cannot be loaded; the WebUI's log tells more.")
        if not network.modules and not network.bundle_embeddings:
            raise WrongFile(f"The LoRA '{network.name}' holds no weights for the SD1.5 model's layers.")


def check_applied() -> None:
    """Whether every layer of the current model took its LoRAs; the WebUI only counts those that did not.

    Raises:
        WrongFile: some layers did not.
    """
    networks = lora_extension()
    if networks is not None and networks.extra_network_lora.errors:
        told = ", ".join(f"'{name}' ({count} layers)" for name, count in networks.extra_network_lora.errors.items())
        raise WrongFile(f"LoRAs with weights of shapes that the SD1.5 model does not have: {told}.")


def without_names(prompt: str, names: Iterable[str]) -> str:
    """The prompt less the names of textual inversions, and the commas that led to them."""
    for name in sorted(names, key=len, reverse=True):
        prompt = re.sub(rf"(?:,\s*)?(?<!\w){re.escape(name)}(?!\w)", "", prompt, flags=re.IGNORECASE)
    return prompt
