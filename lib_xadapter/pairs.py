"""Which pair of models mapping layers were trained for, as it stands in their file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .families import FAMILY_NAMES

PAIR = "xadapter.pair"
"""Its key in a file's metadata."""
ARROW = " → "


@dataclass(frozen=True)
class Pair:
    """The families of a base and an upgraded model: "sd1", "sdxl", …; "" where it is not known."""

    base: str = ""
    upgraded: str = ""

    @classmethod
    def written_in(cls, metadata: Mapping[str, str]) -> Pair:
        """The pair of a file; unknown where the file does not tell, as the released one."""
        base, _, upgraded = metadata.get(PAIR, "").partition(">")
        return cls(base, upgraded)

    def metadata(self) -> dict[str, str]:
        """As a file tells it."""
        return {PAIR: f"{self.base}>{self.upgraded}"}

    def __str__(self) -> str:
        """Such as SD1.5 → SDXL; empty where it is not known."""
        names = [FAMILY_NAMES.get(family, family) for family in (self.base, self.upgraded)]
        return ARROW.join(names) if all(names) else ""

    def describe(self, base: str) -> str:
        """In a sentence, with what is to be remarked; "" where it is not known. `base` as for `remark`."""
        remark = self.remark(base)
        return f"{remark[:1].upper()}{remark[1:]}." if remark else f"The adapter is for {self}." if str(self) else ""

    def remark(self, base: str) -> str:
        """What is to be said where a base of another family is selected, as a clause; "" where it is one of these.

        Args:
            base: its family, "" where that is not known.
        """
        if not str(self) or not base or base == self.base:
            return ""
        return f"the adapter was trained for {self}, the base selected is {FAMILY_NAMES.get(base, base)}"
