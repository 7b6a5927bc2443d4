"""The ControlNet units whose model is for the base: which of the panel's they are, and what is set in them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from modules.processing import StableDiffusionProcessing, StableDiffusionProcessingImg2Img
from PIL import Image

from ...errors import DoesNotFit, WrongArgument, XAdapterError
from ...families import FAMILY_NAMES
from .base_model import BaseModel
from .controlnet_units import Unit, extension, read_unit
from .hooked_units import HookedUnits, hooked

ENABLED = "control_net_enabled"
"""Of a processing object: what that axis sets."""


@dataclass(frozen=True, eq=False)
class BaseUnits:
    """The enabled units of a processing object.

    Attributes:
        p: SDXL's processing object.
        script: the extension's script object; None where there is none.
        enabled: all units of the panel, SDXL's too.
        infotext: what the extension writes for all of them, numbered as in the panel.
        problem: why they cannot be read, which `check` raises.
    """

    p: StableDiffusionProcessing
    script: Any = None
    enabled: tuple[Unit, ...] = ()
    infotext: Mapping[str, str] = field(default_factory=dict)
    problem: XAdapterError | None = None

    @property
    def of_base(self) -> list[Unit]:
        """Those that go to the base."""
        return [unit for unit in self.enabled if unit.family != "sdxl"]

    @contextmanager
    def taken_out(self) -> Iterator[None]:
        """While open, units that are switched off stand among SDXL's arguments in the places of the base's."""
        arguments = self.p.script_args
        given = {place: arguments[place] for place in (self.script.args_from + unit.number for unit in self.of_base)}
        without = {place: extension().ControlNetUnit(enabled=False) for place in given}
        _replace_arguments(self.p, without)
        try:
            with _not_switched_on(self.p, [unit.number for unit in self.of_base]):
                yield
        finally:
            # another script may have put in something else
            untouched = [place for place in without if self.p.script_args[place] is without[place]]
            _replace_arguments(self.p, {place: given[place] for place in untouched})

    def check(self, base: BaseModel) -> None:
        """Whether the units can be used on the base; writes all units into the infotext.

        Raises:
            XAdapterError: what was wrong when they were read, or a unit for another model than the base.
        """
        if self.problem is not None:
            raise self.problem
        for unit in self.of_base:
            if unit.family not in (base.family, None):
                raise DoesNotFit(
                    f"{unit} is for {FAMILY_NAMES[unit.family]}, the checkpoint {base.info.name} is "
                    f"{FAMILY_NAMES[base.family]}."
                )
        # the extension has written SDXL's own units alone in the meantime
        self.p.extra_generation_params.update(self.infotext)

    def check_those_of_sdxl(self) -> None:
        """Whether SDXL's own units are at work; what the extension raises for them ends in the WebUI's log.

        Raises:
            WrongArgument: it could not set them up.
        """
        units = [str(unit) for unit in self.enabled if unit.family == "sdxl"]
        if units and not getattr(self.script.latest_network, "control_params", None):
            raise WrongArgument(f"{', '.join(units)} cannot be used for SDXL; the WebUI's log tells why.")

    def state(self) -> list[Any]:
        """All that the units depend on: what is set in them, and when their models' files were written."""
        return [
            [unit.number, vars(unit.settings), None if unit.lacks_model else unit.model_file().stat().st_mtime]
            for unit in self.of_base
        ]

    def first_with_picture(self) -> Unit | None:
        """The first unit of the base with an image of its own."""
        return next((unit for unit in self.of_base if unit.picture() is not None), None)

    @contextmanager
    def hooked(
        self, job: StableDiffusionProcessing, base: BaseModel, detected_maps: list[Image.Image]
    ) -> Iterator[HookedUnits]:
        """While open, the base's UNet is under the control of the units.

        Args:
            job: the base's processing object, prompts encoded.
            base: the base model.
            detected_maps: what the extension has shown beside the pictures; where that is nothing yet, its maps are
                added at the end.

        Raises:
            WrongArgument: the extension cannot set a unit up.
        """
        if not self.of_base:
            yield HookedUnits()
            return
        with hooked(self.of_base, self.script, self.p, job, base, detected_maps) as units:
            yield units


def read_units(p: StableDiffusionProcessing) -> BaseUnits:
    """The units of a processing object, before any script's `process`. What is wrong with them, `check` raises."""
    external = extension()
    script = external.find_cn_script(p.scripts) if external else None
    if script is None:
        return BaseUnits(p)
    try:
        # each of them is looked at before the extension takes them all
        enabled = tuple(_enabled(p, script))
        return BaseUnits(p, script, enabled, _infotext(p, script))
    except XAdapterError as problem:
        return BaseUnits(p, script, problem=problem)


def _infotext(p: StableDiffusionProcessing, script: Any) -> dict[str, str]:
    """What the extension writes for all units, as if SDXL had them."""
    written = p.extra_generation_params
    # of an earlier picture of the same processing object the same may stand there already
    p.extra_generation_params = {}
    try:
        type(script).get_enabled_units(p)
        return p.extra_generation_params
    finally:
        p.extra_generation_params = written


def _enabled(p: StableDiffusionProcessing, script: Any) -> Iterator[Unit]:
    for number, given in enumerate(p.script_args[script.args_from : script.args_to]):
        if given is None:
            continue
        # the X/Y/Z plot's axes are attributes of the processing object
        unit = Unit(number, type(script).parse_remote_call(p, read_unit(number, given).settings, number))
        if unit.settings.enabled:
            unit.check_input(isinstance(p, StableDiffusionProcessingImg2Img))
            # what its file says is asked here, where a problem is kept
            _ = unit.family
            yield unit


@contextmanager
def _not_switched_on(p: StableDiffusionProcessing, numbers: Sequence[int]) -> Iterator[None]:
    """While open, the X/Y/Z plot's axis "[ControlNet] Enabled" leaves these units off; it goes by number, of one value
    for the first unit alone."""
    given = getattr(p, ENABLED, None)
    if given is None:
        yield
        return
    values = list(given) if isinstance(given, list) else [given]
    values += [None] * (max(numbers, default=-1) + 1 - len(values))
    ours = [False if number in numbers else value for number, value in enumerate(values)]
    setattr(p, ENABLED, ours)
    try:
        yield
    finally:
        if getattr(p, ENABLED, None) is ours:
            setattr(p, ENABLED, given)


def _replace_arguments(p: StableDiffusionProcessing, arguments: Mapping[int, Any]) -> None:
    """Put arguments into their places among the processing object's."""
    if arguments:
        p.script_args = type(p.script_args)(arguments.get(place, own) for place, own in enumerate(p.script_args))
