"""What in the WebUI says which model is the current one, taken down and put back.

The WebUI has one current model. The model itself, the hijack's text encoder and embeddings, the VAE's file, the LoRAs
in force and the number types are exchanged for the base's while the base runs. Settings of the WebUI are not among
them: the user can change one at any time, and must find it as it was chosen.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable, Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from modules import devices, sd_hijack, sd_models, sd_unet, sd_vae, shared

HIJACK_FIELDS = (
    "clip",
    "layers",
    "circular_enabled",
    "optimization_method",
    "embedding_db",
    "fixes",
    "comments",
    "extra_generation_params",
)
VAE_FIELDS = ("base_vae", "loaded_vae_file", "checkpoint_info")
FREEU, FREEU_COUNT = "lib_free_u.global_state", "current_sampling_step"
"""Where sd-webui-freeu counts the steps of every sampler, by which it goes on and off; it begins anew at each batch."""
NEUTRAL_PROMPT = "lib_neutral_prompt.global_state"
"""Where sd-webui-neutral-prompt keeps how the prompts that were encoded last are to be composed."""
DEVICE_FIELDS = ("fp8", "dtype_unet", "unet_needs_upcast")


@dataclass(frozen=True)
class Attribute:
    """An attribute of a module, a class or an object."""

    owner: Any
    name: str

    def read(self) -> Any:
        # a static method of a class is to be put back as one
        return inspect.getattr_static(self.owner, self.name)

    def write(self, value: Any) -> None:
        setattr(self.owner, self.name, value)


@dataclass(frozen=True)
class Contents:
    """What a list or a dictionary holds, which others keep references to."""

    container: Any

    def read(self) -> Any:
        return self.container.copy()

    def write(self, value: Any) -> None:
        self.container.clear()
        if isinstance(self.container, MutableMapping):
            self.container.update(value)
        else:
            self.container.extend(value)


Place = Attribute | Contents


@dataclass(frozen=True)
class HostState:
    """Places in the WebUI and its extensions, and what each held."""

    held: tuple[tuple[Place, Any], ...]

    @classmethod
    def capture(cls, places: Iterable[Place]) -> HostState:
        """As they are now."""
        return cls(tuple((place, place.read()) for place in places))

    def again(self) -> HostState:
        """The same places as they are now."""
        return HostState.capture(place for place, _ in self.held)

    def restore(self) -> None:
        """Let every place hold this again."""
        for place, value in self.held:
            place.write(value)


class Exchange:
    """Two states of the same places, of which one is in force.

    Args:
        state: the one that is not, at first.
    """

    def __init__(self, state: HostState) -> None:
        self._state = state

    @contextmanager
    def in_force(self) -> Iterator[None]:
        """While open, it is; what changes meanwhile is found there the next time."""
        outside = self._state.again()
        self._state.restore()
        try:
            yield
        finally:
            self._state = outside.again()
            outside.restore()


def lora_extension() -> ModuleType | None:
    """The built-in Lora extension's `networks`, or None where the user switched it off."""
    return sys.modules.get("networks")


def count_steps_anew() -> None:
    """What counts the current model's steps by itself takes the next for the first of a sampling."""
    if counting := sys.modules.get(FREEU):
        setattr(counting, FREEU_COUNT, 0)


def current_model_places() -> Iterator[Place]:
    """Everything that says which model is the current one."""
    yield Attribute(sd_models.model_data, "sd_model")
    yield Contents(sd_models.model_data.loaded_sd_models)
    for owner, names in ((sd_hijack.model_hijack, HIJACK_FIELDS), (sd_vae, VAE_FIELDS), (devices, DEVICE_FIELDS)):
        yield from (Attribute(owner, name) for name in names)
    if composing := sys.modules.get(NEUTRAL_PROMPT):
        yield Attribute(composing, "prompt_exprs")
    if counting := sys.modules.get(FREEU):
        yield Attribute(counting, FREEU_COUNT)
    yield Attribute(sd_unet, "original_forward")
    yield Attribute(shared, "parallel_processing_allowed")
    yield Contents(shared.loaded_hypernetworks)
    if loras := lora_extension():
        yield Contents(loras.loaded_networks)
        yield Contents(loras.networks_in_memory)
        yield Contents(loras.extra_network_lora.errors)
