"""A `generate` command on the small models."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lib_xadapter.headless.cli import main


@dataclass(frozen=True)
class CommandLine:
    """Says what has to be said to make a small picture in two steps."""

    folder: Path
    tokenizer: Path
    out: Path

    def __call__(self, *more: str, **replaced: str | None) -> int:
        """Exit status of the command."""
        return main(self.words(*more, **replaced))

    def words(self, *more: str, **replaced: str | None) -> list[str]:
        """The command; `more` and `replaced` give options other values, None leaves them out."""
        options = {
            "upgraded": "small-sdxl",
            "base": "small-sd15",
            "adapter": "small",
            "models-dir": str(self.folder),
            "tokenizer": str(self.tokenizer),
            "prompt": "a cat",
            "width": "128",
            "height": "128",
            "steps": "2",
            "seed": "5",
            "device": "cpu",
            "out": str(self.out),
        } | {name.replace("_", "-"): value for name, value in replaced.items()}
        usual = {f"--{name}": value for name, value in options.items() if f"--{name}" not in more}
        given = [word for option, value in usual.items() if value is not None for word in (option, value)]
        return ["generate", *given, *more]

    def pictures(self) -> list[Path]:
        return sorted(path for path in self.out.glob("*.png") if path.stem[0].isdigit())
