"""The paper's tables and ablations in the miniature world, with all figures.

    python -m benchmarks.miniature_tables [NAME …] [--out DIR] [--captions N] [--models DIR]

Without names, everything that is not there yet. A name is one of an adapter, which is trained, or of a run, which is
evaluated. What is there stays; a run of which captions are missing goes on. At last the tables are written to DIR.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lib_xadapter.miniature.captions import BETWEEN, Facts, parse
from lib_xadapter.miniature.finished import MiniatureModels
from lib_xadapter.miniature.making import write_adapter_pictures, write_held_out
from lib_xadapter.miniature.scenes import SECRET_SHAPE, SHAPES
from lib_xadapter.miniature.styles import STYLES

from .miniature_fine_tuned import STYLE, fine_tune

PROGRAM = ("-m", "lib_xadapter")
CAPTIONS = 512
SHIPPED = "paper"
"""The adapter that comes with the package: trained by the paper's recipe."""
RECIPE = "recipe"
"""One by the same recipe with the budget of those that are trained in another way, which it is compared with."""
FIRST = "edges"
"""A run whose pictures of plain SDXL others take."""
STEPS, CFG, BATCH = 20, 4, 32
ADAPTER_STEPS, ADAPTER_BATCH = 600, 16
OF_THE_UPGRADED = ("sdxl.png",)
"""What runs without plugins of SDXL have in common."""
OF_THE_BASE_ALONE = ("base.png", "base.safetensors", "source.png", "map-*.png")
"""What runs with one base and its plugins have in common, whatever SDXL is told."""
OF_THE_BASE = (*OF_THE_BASE_ALONE, "sdedit-*.png", "sdxl.png")
"""What runs with one base, its plugins and its switch points have in common."""
OF_THE_ADAPTER = "x-adapter-*.png"
"""What runs have in common that differ in nothing but the rows beside them."""


@dataclass(frozen=True)
class Adapter:
    """Mapping layers that are trained in another way.

    Attributes:
        title: what is other in it.
        options: of `train`.
    """

    title: str
    options: tuple[str, ...] = ()


ADAPTERS: Mapping[str, Adapter] = {
    SHIPPED: Adapter("decoder, addition, 100 % empty prompts"),
    RECIPE: Adapter("decoder, addition, 100 % empty prompts, by Muon in 600 steps"),
    "encoder": Adapter("in the encoder", ("--positions", "encoder")),
    "both": Adapter("in encoder and decoder", ("--positions", "both")),
    "guidance": Adapter("fusion by guidance", ("--fusion", "guidance")),
    "spade": Adapter("fusion by SPADE", ("--fusion", "spade")),
    "prompts-50": Adapter("50 % empty prompts", ("--empty-prompts", "0.5")),
    "prompts-0": Adapter("no empty prompts", ("--empty-prompts", "0")),
    "timestep": Adapter("told the timestep", ("--timestep",)),
    "shared-noise": Adapter("both models see one noise", ("--shared-noise",)),
    "controlled": Adapter(
        "has seen a ControlNet", ("--controlnet", "miniature-edges", "--controlled", "0.5", "--control", "canny")
    ),
    "min-snr": Adapter("noise levels weighted by Min-SNR", ("--min-snr", "5")),
}


@dataclass(frozen=True)
class Beside:
    """A row from another run."""

    name: str
    run: str
    file: str = "x-adapter-0.8-1.png"


@dataclass(frozen=True)
class Run:
    """An `evaluate` command.

    Attributes:
        title: its heading.
        options: beside those that all have.
        adapter: one of `ADAPTERS`; None for none.
        beside: rows of other runs.
        like: a run whose base pictures it shares.
        compares: whether it shares all pictures of that run, to put others beside them.
        idea: of `miniature_ideas`; "" for none.
        fine_tuned: whether the base is one that was trained on in a style.
        shapes: that are in the captions' scenes.
        upgraded_caption: what SDXL is told in the place of a caption; None for the caption.
    """

    title: str
    options: tuple[str, ...] = ()
    adapter: str | None = SHIPPED
    beside: tuple[Beside, ...] = ()
    like: str = ""
    compares: bool = False
    idea: str = ""
    fine_tuned: bool = False
    shapes: tuple[str, ...] = SHAPES
    upgraded_caption: Callable[[Facts], str] | None = None

    @property
    def has_plain_upgraded(self) -> bool:
        """Whether its plain SDXL is that of the captions, without plugins of its own."""
        plugins = any("upgraded" in option for option in self.options)
        return self.adapter is not None and not plugins and self.shapes == SHAPES and self.upgraded_caption is None

    @property
    def picture(self) -> str:
        """The file of its X-Adapter's pictures, at the usual switch point."""
        weight = self.options[self.options.index("--weight") + 1] if "--weight" in self.options else "1"
        return f"x-adapter-0.8-{weight.replace(',', '_')}.png"

    def shared_with(self, other: Run) -> tuple[str, ...]:
        """The pictures that it has in common with the run that it is like."""
        if self.upgraded_caption is not other.upgraded_caption:
            return OF_THE_BASE_ALONE
        return (*OF_THE_BASE, OF_THE_ADAPTER) if self.compares else OF_THE_BASE


def colourless_caption_of(facts: Facts) -> str:
    """A caption without the colours of objects and ground."""
    objects = BETWEEN.join(f"{one.size} {one.shape} {one.place}" for one in facts.objects)
    return objects if facts.pattern == "plain" else f"{objects} on {facts.pattern}"


def empty_caption_of(_facts: Facts) -> str:
    return ""


EDGES = ("--controlnet", "miniature-edges", "--control", "canny")
DEPTH = ("--controlnet", "miniature-depth", "--control", "depth")
OWN_EDGES = ("--upgraded-controlnet", "miniature-upgraded-edges", "--upgraded-control", "canny")
ABLATIONS = ("encoder", "both", "guidance", "spade", "prompts-50", "prompts-0")
"""The paper's."""
TRAINED_IDEAS = ("timestep", "shared-noise", "controlled", "min-snr")
FREE_IDEAS = ("prompt-half", "uncond-half", "uncond-0", "end-0.6", "coarse-2", "fine-2", "amplified", "control-1.5")
"""Nothing is trained for them."""

SINGLE_RUNS: Mapping[str, Run] = {
    "native-edges": Run("SDXL's own ControlNet", (*OWN_EDGES, "--upgraded-alone"), adapter=None),
    "native-palette": Run(
        "SDXL's own LoRA", ("--lora", "miniature-upgraded-palette", "--upgraded-alone"), adapter=None
    ),
    "edges": Run(
        "Table 1: edges", (*EDGES, "--single-stage"), beside=(Beside("own ControlNet", "native-edges", "sdxl.png"),)
    ),
    "depth": Run("Table 1: depth", DEPTH),
    "depth-uncond-0": Run("Depth, unconds without the adapter", (*DEPTH, "--uncond-weight", "0"), like="depth"),
    "palette": Run(
        "Table 2: a palette",
        ("--lora", "miniature-palette"),
        beside=(Beside("SDXL's own LoRA", "native-palette", "sdxl.png"),),
    ),
    "lines": Run("Table 2: line drawings", ("--lora", "miniature-lines")),
    "pattern": Run("Table 2: dots", ("--lora", "miniature-pattern")),
    **{
        f"{style}-uncond-0": Run(
            f"{style.capitalize()}, unconds without the adapter",
            ("--lora", f"miniature-{style}", "--uncond-weight", "0"),
            like=style,
        )
        for style in STYLES
    },
    **{
        f"{style}-{name}{suffix}": Run(
            f"{style.capitalize()}, SDXL told {description}{of_unconds}",
            ("--lora", f"miniature-{style}", "--uncond-weight", weight),
            like=style if not suffix else f"{style}-{name}",
            upgraded_caption=upgraded_caption,
        )
        for style in ("palette", "lines")
        for name, description, upgraded_caption in (
            ("colourless", "no colours", colourless_caption_of),
            ("unprompted", "nothing", empty_caption_of),
        )
        for suffix, weight, of_unconds in (("", "1", ""), ("-uncond-0", "0", ", unconds without the adapter"))
    },
    "unprompted": Run("No plugin, SDXL told nothing", upgraded_caption=empty_caption_of),
    "switch-points": Run(
        "Switch point, edges", (*EDGES, "--switch-point", "0.4", "0.6", "0.8", "1"), like="edges", compares=True
    ),
    **{
        f"switch-points-uncond-0{suffix}": Run(
            f"Switch point, edges, unconds without the adapter, {ADAPTERS[adapter].title}",
            (*EDGES, "--uncond-weight", "0", "--switch-point", "0.4", "0.6", "0.8"),
            adapter,
            (Beside("by the recipe at 0.8", "edges"), Beside("own ControlNet", "native-edges", "sdxl.png")),
            like="switch-points",
        )
        for suffix, adapter in (("", SHIPPED), ("-controlled", "controlled"))
    },
    "weights": Run("Weight, edges", (*EDGES, "--weight", "0.5", "1", "1.5", "2"), like="edges", compares=True),
    "two": Run(
        "Edges and depth at once",
        ("--controlnet", "miniature-edges", "miniature-depth", "--control", "canny", "depth"),
    ),
    "sketch": Run("A T2I-Adapter", ("--controlnet", "t2iadapter-miniature-sketch", "--control", "canny")),
    "word": Run("A textual inversion", shapes=(SECRET_SHAPE,)),
    "word-uncond-0": Run(
        "A textual inversion, unconds without the adapter",
        ("--uncond-weight", "0"),
        like="word",
        shapes=(SECRET_SHAPE,),
    ),
    "fine-tuned": Run(f"A base fine-tuned in a style ({STYLE})", fine_tuned=True),
    "remix": Run("Edges of the base, palette of SDXL", (*EDGES, "--lora", "miniature-upgraded-palette")),
    "edges-prompt-half": Run(
        "Edges, the prompt's features for both halves of CFG", (*EDGES, "--cond-only"), like="edges"
    ),
    "edges-uncond-0": Run("Edges, unconds without the adapter", (*EDGES, "--uncond-weight", "0"), like="edges"),
    "unconds": Run(
        "Edges, the share of unconds",
        EDGES,
        beside=(
            Beside("unconds without the adapter", "edges-uncond-0"),
            Beside("own ControlNet", "native-edges", "sdxl.png"),
        ),
        like="edges",
        compares=True,
    ),
    "edges-uncond-half": Run("Edges, unconds with half of it", (*EDGES, "--uncond-weight", "0.5"), like="edges"),
    "edges-control-1.5": Run("Edges, the ControlNet at 1.5", (*EDGES, "--control-scale", "1.5")),
    "edges-end-0.6": Run("Edges, X-Adapter in the first 60 %", (*EDGES, "--guidance-end", "0.6"), like="edges"),
    "edges-coarse-2": Run("Edges, the coarse level twice", (*EDGES, "--weight", "2,1,1"), like="edges"),
    "edges-fine-2": Run("Edges, the fine level twice", (*EDGES, "--weight", "1,1,2"), like="edges"),
    **{
        f"edges-fine-2-uncond-0{suffix}": Run(
            f"Edges, the fine level twice, unconds without the adapter, {ADAPTERS[adapter].title}",
            (*EDGES, "--weight", "1,1,2", "--uncond-weight", "0"),
            adapter,
            (Beside("by the recipe", "edges"), Beside("own ControlNet", "native-edges", "sdxl.png")),
            like="edges",
        )
        for suffix, adapter in (("", SHIPPED), ("-controlled", "controlled"))
    },
    "edges-amplified": Run("Edges, the ControlNet's difference amplified", EDGES, like="edges", idea="amplified:1"),
    **{
        f"edges-{name}": Run(
            f"Edges, {ADAPTERS[name].title}", EDGES, name, like="edges", idea="shared" if name == "shared-noise" else ""
        )
        for name in (RECIPE, *ABLATIONS, *TRAINED_IDEAS)
    },
}


def rows_of(heading: str, adapter: str, like: str, names: Sequence[str]) -> Run:
    """A run's X-Adapter with that of others beside it."""
    runs = {f"edges-{name}": SINGLE_RUNS[f"edges-{name}"] for name in names}
    beside = tuple(Beside(run.title, name, run.picture) for name, run in runs.items())
    return Run(heading, EDGES, adapter, beside, like, compares=True)


RUNS: Mapping[str, Run] = {
    **SINGLE_RUNS,
    "ablations": rows_of("Ablations, edges", RECIPE, f"edges-{RECIPE}", ABLATIONS),
    "trained-ideas": rows_of("Ideas that are trained, edges", RECIPE, f"edges-{RECIPE}", TRAINED_IDEAS),
    "free-ideas": rows_of("Ideas without training, edges", SHIPPED, "edges", FREE_IDEAS),
}


@dataclass(frozen=True)
class Tables:
    """Where everything is.

    Attributes:
        out: adapters, runs and tables.
        models: the miniature models.
        captions: how many of them.
    """

    out: Path
    models: MiniatureModels = field(default_factory=MiniatureModels)
    captions: int = CAPTIONS

    def adapter(self, name: str) -> Path:
        return self.models.adapter if name == SHIPPED else self.out / "adapters" / name / "adapter.safetensors"

    def run(self, name: str) -> Path:
        return self.out / "runs" / name

    def train(self, name: str) -> None:
        """By `train`, all with the same budget."""
        if self.adapter(name).is_file():
            return
        pictures, base_pictures = self.out / "pictures", self.out / "base-pictures"
        write_adapter_pictures(pictures, base_pictures)
        _command(
            *PROGRAM,
            "train",
            *("--base", self.models.base, "--upgraded", self.models.upgraded, "--tokenizer", self.models.tokenizer),
            *("--models-dir", self.models.folder, "--data", pictures, "--cache", self.out / "cache"),
            *("--base-data", base_pictures, "--out", self.adapter(name).parent),
            *("--size", 128, "--batch", ADAPTER_BATCH, "--steps", ADAPTER_STEPS),
            *("--schedule", "cosine", "--warmup", 50, "--ema", 0.99, "--precision", "float32", "--cpu", "--resume"),
            *("--save-every", 200, "--validate-every", 10**6, "--tracker", "none"),
            *("--optimizer", "muon", "--learning-rate", "1.5e-3"),
            *ADAPTERS[name].options,
        )

    def evaluate(self, name: str) -> None:
        """By `evaluate`, all on the same captions."""
        run = RUNS[name]
        if run.like:
            self._share(self.run(run.like), self.run(name), run.shared_with(RUNS[run.like]))
        if name != FIRST and run.has_plain_upgraded:
            self._share(self.run(FIRST), self.run(name), OF_THE_UPGRADED)
        captions = self.out / ("captions" if run.shapes == SHAPES else f"captions-{'-'.join(run.shapes)}")
        flat, shaded = write_held_out(captions, self.captions, run.shapes)
        base = fine_tune(self.models, self.out / "fine-tuned") if run.fine_tuned else self.models.base
        beside = [f"{one.name}={self.run(one.run) / one.file}" for one in run.beside]
        _command(
            *(("-m", "benchmarks.miniature_ideas", run.idea) if run.idea else PROGRAM),
            "evaluate",
            *("--captions", flat, "--limit", self.captions, "--models-dir", self.models.folder),
            *("--base", base, "--upgraded", self.models.upgraded, "--tokenizer", self.models.tokenizer),
            *("--adapter", "None" if run.adapter is None else self.adapter(run.adapter)),
            *("--width", 128, "--height", 128, "--steps", STEPS, "--cfg", CFG, "--batch", BATCH, "--device", "cpu"),
            *("--clip", self.models.clip, "--depth", self.models.depth_estimator),
            *("--fid-features", "clip", "--fid-against", shaded, "--out", self.run(name)),
            *run.options,
            *(
                ("--upgraded-captions", self._upgraded_captions(flat, run.upgraded_caption))
                if run.upgraded_caption
                else ()
            ),
            *(("--beside", *beside) if beside else ()),
        )

    def _upgraded_captions(self, captions: Path, upgraded_caption: Callable[[Facts], str]) -> Path:
        """A folder of texts that SDXL is told, one for each caption."""
        folder = self.out / upgraded_caption.__name__
        folder.mkdir(exist_ok=True)
        for path in captions.glob("*.txt"):
            (folder / path.name).write_text(upgraded_caption(parse(path.read_text(encoding="utf-8"))), encoding="utf-8")
        return folder

    def _share(self, there: Path, here: Path, patterns: Sequence[str]) -> None:
        """Hard links to what another run has made."""
        for folder in (there / "pictures").glob("*"):
            for file in (file for pattern in patterns for file in folder.glob(pattern)):
                link = here / "pictures" / folder.name / file.name
                link.parent.mkdir(parents=True, exist_ok=True)
                if not link.exists():
                    os.link(file, link)

    def figures(self, name: str) -> dict[str, Any]:
        return json.loads((self.run(name) / "figures.json").read_text(encoding="utf-8"))


def _command(*options: object) -> None:
    """Raises: subprocess.CalledProcessError: it ended with an error."""
    subprocess.run([sys.executable, *map(str, options)], check=True)


def table(figures: Mapping[str, Any]) -> list[str]:
    """Markdown: a row for each way, a column for each figure, with 95 % intervals."""
    arrows = {"higher": "↑", "lower": "↓"}
    columns = figures["figures"]
    lines = ["| | " + " | ".join(f"{one['name']} {arrows[one['better']]}" for one in columns) + " |"]
    lines.append("|---" * (len(columns) + 1) + "|")
    for way in figures["ways"]:
        lines.append(f"| {way} | " + " | ".join(_cell(one["ways"].get(way)) for one in columns) + " |")
    return lines


def _cell(estimate: Mapping[str, Any] | None) -> str:
    if estimate is None:
        return "–"
    low, high = estimate["interval"]
    return f"{estimate['value']:.3f} ({low:.3f}–{high:.3f})"


def write(tables: Tables) -> Path:
    """All tables of the runs that are there."""
    lines = []
    for name, run in RUNS.items():
        if (tables.run(name) / "figures.json").is_file():
            figures = tables.figures(name)
            lines += [f"## {run.title}", "", f"{figures['sample']['captions']} captions.", "", *table(figures), ""]
    path = tables.out / "tables.md"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join([*ADAPTERS, *RUNS])}")
    parser.add_argument("--out", type=Path, default=Path("xadapter-tables"), help="default: %(default)s")
    parser.add_argument("--captions", type=int, default=CAPTIONS, help="default: %(default)s")
    parser.add_argument("--models", type=Path, help="a folder of `miniature` (default: the models that come with it)")
    options = parser.parse_args(arguments)
    models = MiniatureModels() if options.models is None else MiniatureModels(options.models)
    tables = Tables(options.out, models, options.captions)
    for name in options.names or [*ADAPTERS, *RUNS]:
        if name in ADAPTERS:
            tables.train(name)
        elif name in RUNS:
            tables.evaluate(name)
        else:
            parser.error(f"there is no '{name}'.")
    print(write(tables))


if __name__ == "__main__":
    main()
