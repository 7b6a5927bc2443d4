"""Which plugin goes to which model, in words: before a run for the page, after it for the picture."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from modules import extra_networks, sd_hijack

from ...errors import XAdapterError
from ...families import FAMILY_NAMES, FAMILY_OF_EMBEDDING_WIDTH
from ...inversion_names import mentions
from ..base import plugins
from ..base.controlnet_units import Unit, read_unit
from ..base.host_state import lora_extension
from ..base.plugins import BASE, UPGRADED

LORA = "LoRA"
EMBEDDING = "textual inversion"
UNIT = "ControlNet unit"
UNIT_FIELDS = ("enabled", "module", "model")
"""What tells where a unit goes."""
NO_MODEL = "neither model"


@dataclass(frozen=True)
class Route:
    """Where a plugin goes.

    Attributes:
        kind: what it is, in the user's words.
        name: as the prompt names it.
        models: "base", "sdxl", both, or none where nothing can take it.
        made_for: the model of its file: sd1, sd2, sdxl, or unknown.
        problem: why nothing can take it, where that is known.
    """

    kind: str
    name: str
    models: tuple[str, ...]
    made_for: str = "unknown"
    problem: str = ""

    def describe(self, base_family: str) -> str:
        """In words, with a base of that family."""
        names = {BASE: FAMILY_NAMES[base_family], UPGRADED: FAMILY_NAMES["sdxl"]}
        models = " and ".join(names[model] for model in self.models) or NO_MODEL
        return f"{self.kind} {self.name} to {models}" + (f" ({self.problem})" if self.problem else "")


def sentence(routes: Iterable[Route], base_family: str) -> str:
    """All of them in one line, "" for none."""
    return "; ".join(route.describe(base_family) for route in routes)


# --- after a run ------------------------------------------------------------------------------------------------------


def taken_loras(base: plugins.NetworkData, upgraded: plugins.NetworkData) -> list[Route]:
    """Where the LoRAs went, with SDXL as the current model and its LoRAs active.

    The base's are checked before it runs; of SDXL's, the WebUI leaves out in silence what holds nothing for it.
    """
    networks = lora_extension()
    loaded = networks.loaded_networks if networks else []
    in_force = {network.name for network in loaded if network.modules or network.bundle_embeddings}
    of_base = [plugins.name_of(tag) for tag in plugins.lora_tags(base)]
    of_upgraded = [plugins.name_of(tag) for tag in plugins.lora_tags(upgraded)]

    def models(name: str) -> Iterator[str]:
        if name in of_base:
            yield BASE
        if name in of_upgraded and name in in_force:
            yield UPGRADED

    return [Route(LORA, name, tuple(models(name))) for name in dict.fromkeys([*of_base, *of_upgraded])]


def taken_embeddings(texts: Mapping[str, Sequence[str]], known: Mapping[str, Collection[str]]) -> list[Route]:
    """Where the textual inversions of the prompts went.

    Args:
        texts: each model's prompts and negative prompts.
        known: the names that each model has vectors for, and under "" those that neither has.
    """
    everything = dict.fromkeys(name for names in known.values() for name in names)
    written = {name: [model for model in texts if mentions(texts[model], name)] for name in everything}
    return [
        Route(EMBEDDING, name, tuple(model for model in models if name in known[model]))
        for name, models in written.items()
        if models
    ]


def unit_route(unit: Unit) -> Route:
    """Where an enabled unit of the ControlNet panel goes.

    Raises:
        XAdapterError: its model is not known.
    """
    model = UPGRADED if unit.family == "sdxl" else BASE
    return Route(f"{UNIT} {unit.number}", unit.name, (model,), unit.family or "unknown")


# --- before a run -----------------------------------------------------------------------------------------------------


def expected(prompts: Iterable[tuple[str, str, str, str]]) -> list[Route]:
    """Where the plugins of these prompts will go, from the files and without any model.

    Args:
        prompts: of each pass prompt and negative prompt, and the base's own.
    """
    return _joined(route for of_a_pass in prompts for route in _expected(*of_a_pass))


def _expected(prompt: str, negative_prompt: str, base_prompt: str, base_negative_prompt: str) -> Iterator[Route]:
    """Those of one pass, a plugin of both models twice."""
    text, networks = extra_networks.parse_prompt(prompt)
    base_text, base_networks = extra_networks.parse_prompt(base_prompt)
    added = plugins.network_of_the_settings()
    tags = list(plugins.lora_tags(networks))
    if added is not None and not any(tag.items[0] == added.items[0] for tag in tags):
        tags.append(added)
    own_tags = list(plugins.lora_tags(base_networks))
    own = {tag.items[0] for tag in own_tags}
    loras = [_expected_lora(tag, plugins.models_of) for tag in tags]
    # what the base prompt names, too, goes to the base as it stands there
    loras = [_without_base(route) if route.name in own else route for route in loras]
    texts = {
        UPGRADED: [text, negative_prompt],
        BASE: [base_text or text, base_negative_prompt or negative_prompt],
    }
    yield from loras
    yield from (_expected_lora(tag, _own_model) for tag in own_tags)
    yield from _expected_embeddings(texts)


def _expected_lora(
    tag: extra_networks.ExtraNetworkParams, models_of: Callable[[extra_networks.ExtraNetworkParams], tuple[str, ...]]
) -> Route:
    name = str(tag.items[0])
    # a name that is being typed is not looked for on the disk
    on_disk = plugins.known_lora(name)
    if on_disk is None:
        return Route(LORA, name, (), problem="there is none of that name")
    try:
        return Route(LORA, name, models_of(tag), plugins.lora_base(on_disk.filename))
    except XAdapterError as problem:
        return Route(LORA, name, (), problem=str(problem))


def _own_model(tag: extra_networks.ExtraNetworkParams) -> tuple[str, ...]:
    plugins.refuse_upgraded_only(tag)
    return (BASE,)


def _without_base(route: Route) -> Route:
    return Route(route.kind, route.name, tuple(model for model in route.models if model != BASE), route.made_for)


def _expected_embeddings(texts: Mapping[str, Sequence[str]]) -> Iterator[Route]:
    database = sd_hijack.model_hijack.embedding_db
    for name, embedding in {**database.skipped_embeddings, **database.word_embeddings}.items():
        # SDXL's have vectors for each of its text encoders
        made_for = (
            "sdxl" if isinstance(embedding.vec, dict) else FAMILY_OF_EMBEDDING_WIDTH.get(embedding.shape, "unknown")
        )
        model = UPGRADED if made_for == "sdxl" else BASE
        if mentions(texts[model], name):
            yield Route(EMBEDDING, name, (model,), made_for)


def expected_units(units: Sequence[Mapping[str, Any]]) -> list[Route]:
    """Where the enabled ones of these units will go, from their models' files and without any model.

    Args:
        units: as the ControlNet extension takes them over REST; nothing but `UNIT_FIELDS` is looked at.
    """
    return [_expected_unit(number, given) for number, given in enumerate(units) if given.get("enabled")]


def _expected_unit(number: int, given: Mapping[str, Any]) -> Route:
    subject, name = f"{UNIT} {number}", str(given.get("model") or given.get("module"))
    try:
        # the extension unpickles some of the other fields
        unit = read_unit(number, {field: given[field] for field in UNIT_FIELDS if field in given})
        subject, name = str(unit), unit.name
        return unit_route(unit)
    except XAdapterError as problem:
        reason = str(problem).removeprefix(f"{subject} ").rstrip(".")
        return Route(f"{UNIT} {number}", name, (), problem=reason)


def with_base(route: Route, base_family: str) -> Route:
    """The route with a base of that family, which takes nothing that was made for the other."""
    if BASE not in route.models or route.made_for in (base_family, "unknown", "sdxl"):
        return route
    return replace(_without_base(route), problem=f"it was made for {FAMILY_NAMES[route.made_for]}")


def _joined(routes: Iterable[Route]) -> list[Route]:
    """One route for each plugin."""
    found: dict[tuple[str, str], Route] = {}
    for route in routes:
        known = found.get((route.kind, route.name))
        models = {*(known.models if known else ()), *route.models}
        ordered = tuple(model for model in (BASE, UPGRADED) if model in models)
        found[route.kind, route.name] = Route(route.kind, route.name, ordered, route.made_for, route.problem)
    return list(found.values())
