"""An `evaluate` command, its files found, read and checked before anything heavy is imported."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from ..errors import WrongArgument, WrongFile
from ..headless.annotator_names import CONTROLS
from ..headless.generate_command import (
    MOST_CONTROL,
    RELEASED_USUAL,
    USUAL,
    Files,
    check_folder,
    find_files,
    naming_options,
)
from ..headless.job import LARGEST_BATCH, Job
from ..headless.lora_names import LoraTags, take_tags
from ..headless.named_files import find_file
from ..headless.options import FID_AGAINST, FID_FEATURES, METRICS, SETTINGS_OF_EVALUATE
from ..headless.prompt_grammar import with_style
from ..headless.sampler_table import sampler_named
from ..settings import read_settings
from .captions import Caption, Captions, literal, picture_named, read_captions, text_named

CANNY, DEPTH = CONTROLS
FID, CLIP, CONDITION, STYLE = METRICS
AGAINST_SDXL, AGAINST_CAPTIONS = FID_AGAINST
OF_INCEPTION, OF_CLIP = FID_FEATURES
FEWEST_RESAMPLES = 100
LARGEST_LIMIT = 10**7


@dataclass(frozen=True)
class Control:
    """A ControlNet: the map it takes, and how strongly it acts."""

    kind: str
    scale: float


@dataclass(frozen=True)
class Item:
    """A caption with a seed: one picture each way."""

    caption: Caption
    seed: int

    @property
    def key(self) -> str:
        """The folder of its pictures."""
        return f"{self.caption.key}-{self.seed}"


@dataclass(frozen=True)
class Reference:
    """Pictures that were there before, one of each caption.

    Attributes:
        description: which they are.
        pictures: of the captions.
    """

    description: str
    pictures: Mapping[Caption, Path]


@dataclass(frozen=True)
class Measures:
    """What is measured, and where the weights for it lie.

    Attributes:
        metrics: names of figures.
        inception, clip, depth: weights; None where there are none.
        resamples: of the bootstrap.
        fid_against: the pictures that FID is a distance from; None for plain SDXL's.
        fid_features: what it is a distance between.
    """

    metrics: tuple[str, ...]
    inception: Path | None
    clip: Path | None
    depth: Path | None
    resamples: int
    fid_against: Reference | None = None
    fid_features: str = OF_INCEPTION


@dataclass(frozen=True)
class Beside:
    """Pictures of another evaluation, which are measured along with those of this one.

    Attributes:
        name: of the row.
        out: the other one's folder.
        file: of the picture in each item's folder.
    """

    name: str
    out: Path
    file: str

    @classmethod
    def read(cls, given: str) -> Beside:
        """Of "name=folder/file". Raises: WrongArgument: it is something else, or there are no such pictures."""
        name, equals, path = given.partition("=")
        out, file = Path(path).parent, Path(path).name
        if not (name and equals and file):
            raise WrongArgument(f"--beside is '{given}', expected NAME=DIR/FILE.")
        if not any(out.glob(f"pictures/*/{file}")):
            raise WrongArgument(f"--beside: no folder in {out / 'pictures'} has a {file}.")
        return cls(name, out, file)


@dataclass(frozen=True)
class Evaluation:
    """A command that can be carried out.

    Attributes:
        files: of the models.
        captions: what was read.
        seeds: of each caption.
        job: what every picture has in common.
        controls: one for each ControlNet of the base.
        upgraded_controls: one for each of the upgraded model itself.
        base_prompt: the prompt of the base, `{prompt}` standing for the caption; "" for the caption alone.
        upgraded_captions: what SDXL is told in the place of each, "" for an empty prompt; None for the captions.
        measures: the figures.
        reference: whether the released pipeline's rules hold.
        out: the folder of everything.
        batch: captions whose pictures are made at once.
        beside: rows from other evaluations.
        single_stage: whether X-Adapter from noise is among the ways.
        upgraded_alone: whether plain SDXL is the only way.
    """

    files: Files
    captions: Captions
    seeds: tuple[int, ...]
    job: Job
    controls: tuple[Control, ...]
    upgraded_controls: tuple[Control, ...]
    base_prompt: str
    measures: Measures
    reference: bool
    out: Path
    upgraded_captions: Mapping[Caption, str] | None = None
    batch: int = 1
    beside: tuple[Beside, ...] = ()
    single_stage: bool = False
    upgraded_alone: bool = False

    @property
    def items(self) -> tuple[Item, ...]:
        return tuple(Item(caption, seed) for caption in self.captions.usable for seed in self.seeds)

    @property
    def kinds(self) -> tuple[str, ...]:
        """Of maps, of either model's ControlNets."""
        return tuple(dict.fromkeys(control.kind for control in (*self.controls, *self.upgraded_controls)))

    def job_of(self, item: Item, maps: tuple[Image.Image, ...], upgraded_maps: tuple[Image.Image, ...] = ()) -> Job:
        """What the base and SDXL are asked for together, at every switch point and weight."""
        caption = literal(item.caption.text)
        base_prompt = with_style(caption, self.base_prompt)
        prompt = caption if self.upgraded_captions is None else literal(self.upgraded_captions[item.caption])
        return dataclasses.replace(
            self.job,
            prompt=prompt,
            seed=item.seed,
            settings=dataclasses.replace(self.job.settings, base_prompt="" if base_prompt == prompt else base_prompt),
            control_images=maps,
            control_scales=tuple((control.scale,) for control in self.controls),
            upgraded_maps=upgraded_maps,
            upgraded_map_scales=tuple(control.scale for control in self.upgraded_controls),
        )


def read_evaluation(options: argparse.Namespace) -> Evaluation:
    """Raises: XAdapterError: naming the option that is wrong."""
    check_folder(options.out)
    for option, path in (("--inception", options.inception), ("--clip", options.clip), ("--depth", options.depth)):
        if path is not None and not path.exists():
            raise WrongFile(f"{option}: there is no {path}.")
    if options.resamples < FEWEST_RESAMPLES:
        raise WrongArgument(f"--resamples is {options.resamples}, expected a whole number from {FEWEST_RESAMPLES}.")
    if options.limit is not None and not 1 <= options.limit <= LARGEST_LIMIT:
        raise WrongArgument(f"--limit is {options.limit}, expected a whole number from 1 to {LARGEST_LIMIT}.")
    if not 1 <= options.batch <= LARGEST_BATCH:
        raise WrongArgument(f"--batch is {options.batch}, expected a whole number from 1 to {LARGEST_BATCH}.")
    if take_tags(options.base_prompt).loras:
        raise WrongArgument("--base-prompt names a LoRA; name it by --lora.")
    files = dataclasses.replace(
        find_files(options, LoraTags("", ())),
        upgraded_controlnets=tuple(
            find_file(name, "controlnet", options.models_dir, "--upgraded-controlnet")
            for name in options.upgraded_controlnet
        ),
    )
    controls = _controls("", options, len(files.controlnets))
    upgraded_controls = _controls("upgraded-", options, len(files.upgraded_controlnets))
    needs_pictures = bool(controls or upgraded_controls) or options.fid_against == AGAINST_CAPTIONS
    captions = read_captions(options.captions, options.pictures, needs_pictures, options.limit or 0)
    seeds = tuple(dict.fromkeys(options.seed or [0]))
    evaluation = Evaluation(
        files=files,
        captions=captions,
        seeds=seeds,
        job=_job(options, files, controls),
        controls=controls,
        upgraded_controls=upgraded_controls,
        base_prompt=options.base_prompt,
        measures=Measures(
            tuple(options.metrics or METRICS),
            options.inception,
            options.clip,
            options.depth,
            options.resamples,
            _fid_against(options.fid_against, captions),
            options.fid_features,
        ),
        reference=options.reference,
        out=options.out,
        upgraded_captions=_upgraded_captions(options.upgraded_captions, captions),
        batch=options.batch,
        beside=tuple(Beside.read(given) for given in options.beside),
        single_stage=options.single_stage,
        upgraded_alone=options.upgraded_alone,
    )
    with naming_options():
        # what is out of range in one is so in all
        for seed in seeds:
            evaluation.job_of(Item(captions.usable[0], seed), (Image.new("RGB", (8, 8)),) * len(controls))
    return evaluation


def _upgraded_captions(folder: Path | None, captions: Captions) -> Mapping[Caption, str] | None:
    if folder is None:
        return None
    if not folder.is_dir():
        raise WrongFile(f"--upgraded-captions: there is no folder {folder}.")
    return {caption: text_named(folder, caption.name) for caption in captions.usable}


def _fid_against(given: str, captions: Captions) -> Reference | None:
    """The captions' own pictures, or those of their names in a folder; None for plain SDXL's."""
    if given == AGAINST_SDXL:
        return None
    if given == AGAINST_CAPTIONS:
        own = {caption: caption.picture for caption in captions.usable if caption.picture is not None}
        return Reference("that the captions came with", own)
    folder = Path(given)
    if not folder.is_dir():
        raise WrongArgument(f"--fid-against is '{given}', expected {AGAINST_SDXL}, {AGAINST_CAPTIONS} or a folder.")
    found = {caption: picture_named(folder, caption.name, "--fid-against") for caption in captions.usable}
    return Reference(f"of the captions in the folder {folder.name}", found)


def _controls(whose: str, options: argparse.Namespace, nets: int) -> tuple[Control, ...]:
    """Of the options whose names begin with "" or "upgraded-", for as many ControlNets as there are."""
    named = whose.replace("-", "_")
    kinds: Sequence[str] = getattr(options, f"{named}control")
    scales: Sequence[float] = getattr(options, f"{named}control_scale") or [1.0] * nets
    for option, given in (("control", kinds), ("control-scale", scales)):
        if len(given) != nets:
            raise WrongArgument(
                f"--{whose}{option} is given {len(given)} times, expected once for each --{whose}controlnet."
            )
    for scale in scales:
        if not 0 <= scale <= MOST_CONTROL:
            raise WrongArgument(f"--{whose}control-scale is {scale:g}, expected a number from 0 to {MOST_CONTROL:g}.")
    if len(set(kinds)) < nets:
        raise WrongArgument(f"--{whose}control names a kind of map twice, expected one ControlNet for each kind.")
    if DEPTH in kinds and options.depth is None:
        raise WrongArgument(f"--{whose}control is depth, but --depth names no estimator that makes the maps.")
    return tuple(Control(kind, scale) for kind, scale in zip(kinds, scales, strict=True))


def _job(options: argparse.Namespace, files: Files, controls: tuple[Control, ...]) -> Job:
    usual = RELEASED_USUAL if options.reference else USUAL
    own = {name: getattr(options, name) for name in SETTINGS_OF_EVALUATE}
    models = {"base_checkpoint": files.base.stem, "adapter": files.adapter.name if files.adapter else "None"}
    weights = [weight for weight in dict.fromkeys(options.weight) if weight != 0] if files.adapter else []
    with naming_options():
        return Job(
            negative_prompt=options.negative_prompt,
            settings=read_settings({**own, **models, "memory": options.memory}),
            width=options.width,
            height=options.height,
            steps=usual.steps if options.steps is None else options.steps,
            cfg_scale=usual.cfg_scale if options.cfg is None else options.cfg,
            sampler=sampler_named(options.sampler).name,
            switch_points=tuple(dict.fromkeys(options.switch_point)),
            weights=(0.0, *weights),
            model=files.upgraded.stem,
            loras=tuple((lora.path.stem, lora.weight) for lora in files.loras),
            control_names=tuple(path.stem for path in files.controlnets),
            control_images=(Image.new("RGB", (8, 8)),) * len(controls),
            clip_skip=options.clip_skip,
        )
