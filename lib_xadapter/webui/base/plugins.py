"""Which LoRA goes to which model, and what the base's prompt keeps of the prompt."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

from modules import extra_networks, shared

from ...errors import WrongArgument, WrongFile
from ...families import BASE_FAMILIES
from ...lora_files import detect_lora_base
from ..known_files import found_in_file
from .attribute_overlay import with_attributes
from .host_state import lora_extension

LORA_TAGS = ("lora", "lyco")
MODEL_ARGUMENT = "model"
BASE, UPGRADED = "base", "sdxl"
MODELS_OF_CHOICE = {"base": (BASE,), "sdxl": (UPGRADED,), "both": (BASE, UPGRADED)}
"""What `<lora:name:1:model=…>` can say."""

ADDED_NETWORK = "sd_lora"
"""Key of the WebUI's setting "Add network to prompt"."""

NetworkData = dict[str, list[extra_networks.ExtraNetworkParams]]
"""What the WebUI reads from `<kind:…>` tags: kind → arguments of each tag."""


@dataclass(frozen=True)
class Split:
    """Extra networks of a prompt, by the model that gets them."""

    upgraded: NetworkData
    base: NetworkData


def split_networks(data: Mapping[str, Sequence[extra_networks.ExtraNetworkParams]]) -> Split:
    """SD1.5 and SD2 LoRAs for the base, everything else for SDXL, unless a tag says otherwise.

    Raises:
        WrongArgument: a LoRA is in no folder, or its tag names no model that there is.
        WrongFile: a LoRA's file cannot be read.
    """
    upgraded: NetworkData = {}
    base: NetworkData = {}
    for kind, tags in data.items():
        upgraded[kind] = []
        for tag in tags:
            models = models_of(tag) if kind in LORA_TAGS else (UPGRADED,)
            if BASE in models:
                base.setdefault(kind, []).append(tag)
            if UPGRADED in models:
                upgraded[kind].append(tag)
    return Split(upgraded, base)


def models_of(tag: extra_networks.ExtraNetworkParams) -> tuple[str, ...]:
    """The models that a LoRA tag is for: what its `model=` says, otherwise the one that its file was made for.

    Raises:
        WrongArgument: the LoRA is in no folder, or `model=` names no model that there is.
        WrongFile: its file cannot be read.
    """
    on_disk = find_lora(name_of(tag))
    choice = tag.named.get(MODEL_ARGUMENT)
    if choice is None:
        return (BASE,) if on_disk is not None and lora_base(on_disk.filename) in BASE_FAMILIES else (UPGRADED,)
    if choice not in MODELS_OF_CHOICE:
        raise WrongArgument(
            f"'{MODEL_ARGUMENT}={choice}' of the LoRA '{name_of(tag)}' is not among {', '.join(MODELS_OF_CHOICE)}."
        )
    return MODELS_OF_CHOICE[choice]


def name_of(tag: extra_networks.ExtraNetworkParams) -> str:
    """The name in a LoRA tag.

    Raises:
        WrongArgument: it has none.
    """
    if not tag.positional:
        raise WrongArgument(f"The tag <lora:{':'.join(tag.items)}> names no LoRA.")
    return tag.positional[0]


def find_lora(name: str) -> Any:
    """The WebUI's `NetworkOnDisk` of a name or alias; None where the Lora extension is switched off.

    Raises:
        WrongArgument: there is none of that name in the LoRA folders.
    """
    networks = lora_extension()
    if networks is None:
        return None
    on_disk = known_lora(name)
    if on_disk is None:
        networks.update_available_networks_by_names([name])
        on_disk = known_lora(name)
    if on_disk is None:
        raise WrongArgument(f"There is no LoRA named '{name}' in the WebUI's LoRA folders.")
    return on_disk


def known_lora(name: str) -> Any:
    """The `NetworkOnDisk` of a name or alias among those that the WebUI has listed, None where it has not."""
    networks = lora_extension()
    if networks is None:
        return None
    return networks.available_networks.get(name) or networks.available_network_aliases.get(name)


def lora_base(filename: str) -> str:
    """The model that a LoRA file was made for, "unknown" where it does not tell; looked up once for each file.

    Raises:
        WrongFile: it cannot be read.
    """
    return found_in_file("xadapter-lora-bases", filename, filename, lambda: detect_lora_base(filename))


def base_networks(from_prompt: NetworkData, from_base_prompt: Mapping[str, Sequence]) -> NetworkData:
    """LoRAs of the base: those of its own prompt, and the prompt's that are not named there again.

    Raises:
        WrongArgument: the base prompt names an SDXL LoRA.
    """
    for tag in lora_tags(from_base_prompt):
        refuse_upgraded_only(tag)
    own = {kind: list(tags) for kind, tags in from_base_prompt.items()}
    named = {name_of(tag) for tag in lora_tags(own)}
    for kind, tags in from_prompt.items():
        own.setdefault(kind, []).extend(tag for tag in tags if name_of(tag) not in named)
    return own


def refuse_upgraded_only(tag: extra_networks.ExtraNetworkParams) -> None:
    """In the base's own prompt, a LoRA that does not tell what it is for is taken for the base's.

    Raises:
        WrongArgument: it was made for SDXL, or its tag says so.
    """
    on_disk, choice = find_lora(name_of(tag)), tag.named.get(MODEL_ARGUMENT)
    made_for_sdxl = choice is None and on_disk is not None and lora_base(on_disk.filename) == UPGRADED
    if made_for_sdxl or (choice is not None and BASE not in models_of(tag)):
        raise WrongArgument(
            f"The LoRA '{name_of(tag)}' in the SD1.5 prompt was made for SDXL; it belongs into the prompt."
        )


def lora_tags(data: Mapping[str, Sequence]) -> Iterator[extra_networks.ExtraNetworkParams]:
    """The tags of LoRAs among all."""
    return (tag for kind in LORA_TAGS for tag in data.get(kind, []))


def network_of_the_settings() -> extra_networks.ExtraNetworkParams | None:
    """The LoRA that the setting "Add network to prompt" adds to every prompt that does not name it."""
    name = shared.opts.data.get(ADDED_NETWORK, "None")
    networks = lora_extension()
    # only what the extension itself would add: it looks at names, not at aliases
    if networks is None or name == "None" or name not in networks.available_networks:
        return None
    return extra_networks.ExtraNetworkParams(items=[name, shared.opts.extra_networks_default_multiplier])


@contextmanager
def no_added_network() -> Iterator[None]:
    """While open, the Lora extension does not see the setting "Add network to prompt"; everybody else does."""
    extension = sys.modules.get("extra_networks_lora")
    if extension is None:
        yield
        return
    options = with_attributes(shared.opts, **{ADDED_NETWORK: "None"})
    with patch.object(extension, "shared", with_attributes(shared, opts=options)):
        yield


def check_loaded(wanted: NetworkData, model: str) -> None:
    """Whether the current model has every LoRA that it was given; the WebUI only logs one that it cannot load.

    Args:
        wanted: the LoRAs that it was given.
        model: its name in the user's words.

    Raises:
        WrongFile: a LoRA could not be loaded, or holds nothing for this model.
    """
    networks = lora_extension()
    if networks is None:
        return
    loaded = {network.name: network for network in networks.loaded_networks}
    for tag in lora_tags(wanted):
        network = loaded.get(name_of(tag))
        if network is None:
            raise WrongFile(f"The LoRA '{name_of(tag)}' cannot be loaded; the WebUI's log tells more.")
        if not network.modules and not network.bundle_embeddings:
            raise WrongFile(f"The LoRA '{network.name}' holds no weights for the {model} model's layers.")


def check_applied(model: str) -> None:
    """Whether every layer of the current model took its LoRAs; the WebUI only counts those that did not.

    Args:
        model: its name in the user's words.

    Raises:
        WrongFile: some layers did not.
    """
    networks = lora_extension()
    if networks is not None and networks.extra_network_lora.errors:
        failed = ", ".join(f"'{name}' ({count} layers)" for name, count in networks.extra_network_lora.errors.items())
        raise WrongFile(f"LoRAs with weights of shapes that the {model} model does not have: {failed}.")
