"""`train`: from a command line to a file of mapping layers."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import importlib.util
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import UNet2DConditionModel
from torch import nn

from .. import __version__
from ..errors import DoesNotFit, WrongArgument, WrongFile, XAdapterError
from ..families import FAMILY_OF_CONTEXT_WIDTH
from ..headless.annotator_names import CONTROLS
from ..headless.file_contents import contents_of
from ..headless.generate import naming
from ..headless.generate_command import check_folder
from ..headless.lora_names import Lora, read_lora
from ..headless.loras import merge_lora
from ..headless.model_files import load_base, load_controlnet, load_upgraded
from ..headless.models import Models, Placement
from ..headless.named_files import find_file
from ..headless.noise_schedule import trained_alphas
from ..headless.options import EXIT_WRONG, say
from ..lora_files import detect_lora_base
from ..mapping import METADATA, MappingLayers, layout_for, load_adapter
from ..pairs import Pair
from ..saving import write_tensors
from ..taps import check_fit
from .checkpoints import Checkpoint, Checkpoints, read_checkpoint
from .encoding import Control, Encoder
from .engine import Outcome, Training
from .pictures import BasePictures, PictureOptions, Pictures, open_pictures
from .recipe import AUTOMATIC, NO_TRACKER, TENSORBOARD, Course, Recipe, check_same, read, written
from .step import Diffusion
from .validation import Validation

logger = logging.getLogger(__name__)

_, DEPTH = CONTROLS
EXIT_INTERRUPTED = 130
ADAPTER, HALF_ADAPTER = "adapter.safetensors", "adapter-fp16.safetensors"
CHECKPOINTS, GRIDS = "checkpoints", "validation"
SAMPLED = 16
"""Numbers of each tensor that tell a model from another."""


def train(options: argparse.Namespace) -> int:
    """Train mapping layers; of several processes on one machine the first one says what is wrong from the start."""
    try:
        training, adapter = _prepare(options)
    except XAdapterError:
        if os.environ.get("LOCAL_RANK", "0") != "0":
            return EXIT_WRONG
        raise
    try:
        outcome = training.run()
    finally:
        adapter.accelerator.end_training()
    if adapter.accelerator.is_main_process:
        _tell(outcome, adapter, training)
    return EXIT_INTERRUPTED if outcome.interrupted_by else 0


@dataclasses.dataclass(frozen=True)
class AdapterFile:
    """Where the trained mapping layers go, and what their file tells.

    Attributes:
        accelerator: this process.
        folder: of the training.
        metadata: but for the steps.
    """

    accelerator: Accelerator
    folder: Path
    metadata: Mapping[str, str]

    def write(self, layers: MappingLayers, steps: int) -> list[Path]:
        """Both files, float32 and float16."""
        kind = {METADATA + "fusion": layers.fusion, METADATA + "positions": layers.positions}
        metadata = {**self.metadata, **kind, METADATA + "steps": str(steps)}
        weights = layers.state_dict()
        paths = [self.folder / ADAPTER, self.folder / HALF_ADAPTER]
        for path, dtype in zip(paths, (torch.float32, torch.float16), strict=True):
            write_tensors(path, {name: weight.to(dtype) for name, weight in weights.items()}, metadata)
        return paths


def _tell(outcome: Outcome, adapter: AdapterFile, training: Training) -> None:
    with training.state.averaged() as layers:
        paths = adapter.write(layers, outcome.step)
    say(f"{outcome.step} of {outcome.of_steps} steps: {' and '.join(map(str, paths))}")
    if outcome.interrupted_by:
        say(f"Ended by {outcome.interrupted_by} at {outcome.checkpoint}; the same command with --resume goes on.")


def _prepare(options: argparse.Namespace) -> tuple[Training, AdapterFile]:
    """Everything that can be wrong from the start is found here."""
    recipe, course = read(Recipe, vars(options)), read(Course, vars(options))
    check_folder(options.out)
    checkpoints = Checkpoints(options.out / CHECKPOINTS, course.keep)
    earlier = _earlier(options, recipe, checkpoints)
    accelerator = _accelerator(options, course)
    if recipe.batch < accelerator.num_processes:
        raise WrongArgument(f"--batch is {recipe.batch}, fewer pictures than {accelerator.num_processes} processes.")
    base, upgraded = _models(options, recipe, accelerator)
    controlnet = _controlnet(options, recipe, base)
    filters = PictureOptions(
        options.minimum_size, options.minimum_aesthetics, options.maximum_watermark, options.caption_column
    )
    with naming("--data"):
        pictures = open_pictures(options.data, filters, options.cache)
    base_pictures = _base_pictures(options, pictures)
    layers = _layers(options, recipe, base.unet, upgraded.unet)
    facts = {
        "models": {"base": fingerprint_of(base), "upgraded": fingerprint_of(upgraded)},
        "pictures": pictures.fingerprint,
    }
    if controlnet is not None:
        facts["models"]["controlnet"] = _digest([controlnet])
    if base_pictures is not None:
        facts["base pictures"] = base_pictures.pictures.fingerprint
    control = None if controlnet is None else _control(options, recipe, accelerator)
    if control is not None:
        facts["models"]["depth"] = control.estimator
    if earlier is not None:
        _check_same_sources(earlier, facts)
    training = Training(
        accelerator,
        recipe,
        course,
        base,
        upgraded,
        layers.to(accelerator.device, torch.float32),
        pictures,
        Encoder(
            base,
            upgraded,
            cache=options.cache,
            upgraded_captions=recipe.empty_prompts < 1,
            control=control,
            base_pictures=base_pictures,
        ),
        checkpoints,
        facts,
        _validation(options, recipe, course, base, upgraded, accelerator),
        controlnet,
    )
    if earlier is not None:
        training.go_on_from(earlier)
    accelerator.init_trackers("training", config=dataclasses.asdict(recipe))
    return training, AdapterFile(accelerator, options.out, _metadata(options, recipe, base, pictures))


def _earlier(options: argparse.Namespace, recipe: Recipe, checkpoints: Checkpoints) -> Checkpoint | None:
    """The checkpoint that the training goes on from."""
    last = checkpoints.last
    if last is None:
        if options.resume:
            logger.warning("--resume: there is no checkpoint in %s yet, so the training begins.", options.out)
        return None
    if not options.resume:
        raise WrongArgument(f"--out is {options.out}, which holds a training: --resume goes on with it.")
    checkpoint = read_checkpoint(last)
    check_same(checkpoint.facts["recipe"], recipe, last.name)
    return checkpoint


def _check_same_sources(earlier: Checkpoint, facts: Mapping[str, Any]) -> None:
    before, now = earlier.facts["models"], facts["models"]
    for option, one, other in (
        ("--base", before["base"], now["base"]),
        ("--upgraded", before["upgraded"], now["upgraded"]),
        ("--data", earlier.facts["pictures"], facts["pictures"]),
        ("--base-data", earlier.facts.get("base pictures"), facts.get("base pictures")),
        ("--controlnet", before.get("controlnet"), now.get("controlnet")),
        # older versions did not note it
        ("--depth", before.get("depth", now.get("depth")), now.get("depth")),
    ):
        if one != other:
            raise WrongArgument(f"{option} is another than that which the checkpoint was trained with.")


def _accelerator(options: argparse.Namespace, course: Course) -> Accelerator:
    tracker = course.tracker
    if tracker == AUTOMATIC:
        tracker = TENSORBOARD if importlib.util.find_spec(TENSORBOARD) else NO_TRACKER
    try:
        return Accelerator(
            cpu=options.cpu, log_with=None if tracker == NO_TRACKER else tracker, project_dir=str(options.out)
        )
    except ValueError as error:
        raise WrongArgument(f"--tracker is '{tracker}': {error}") from error


def _models(options: argparse.Namespace, recipe: Recipe, accelerator: Accelerator) -> tuple[Any, Any]:
    """Base and upgraded pipeline, frozen, on the device."""
    dtype, folder = getattr(torch, recipe.precision), options.models_dir
    with naming("--base"):
        base = load_base(find_file(options.base, "checkpoint", folder, "--base"), dtype, options.tokenizer)
    with naming("--upgraded"):
        path = find_file(options.upgraded, "checkpoint", folder, "--upgraded")
        upgraded = load_upgraded(path, dtype, options.tokenizer)
    for pipeline in (base, upgraded):
        pipeline.set_progress_bar_config(disable=True)
        pipeline.to(accelerator.device)
    return base, upgraded


def _base_pictures(options: argparse.Namespace, pictures: Pictures) -> BasePictures | None:
    if options.base_data is None:
        return None
    with naming("--base-data"):
        others = open_pictures(options.base_data, PictureOptions(needs_caption=False), options.cache)
        return BasePictures.beside(pictures, others)


def _controlnet(options: argparse.Namespace, recipe: Recipe, base: Any) -> nn.Module | None:
    """Of the base, frozen, on its device."""
    if options.controlnet is None and not recipe.controlled:
        return None
    if options.controlnet is None:
        raise WrongArgument(f"--controlled is {recipe.controlled:g}, but there is no --controlnet.")
    if not recipe.controlled:
        raise WrongArgument("--controlnet is given, but --controlled is 0: say how many pictures are seen with it.")
    with naming("--controlnet"):
        path = find_file(options.controlnet, "controlnet", options.models_dir, "--controlnet")
        net = load_controlnet(path, base.unet, base.unet.dtype)
    return net.to(base.unet.device).eval().requires_grad_(False)


def _control(options: argparse.Namespace, recipe: Recipe, accelerator: Accelerator) -> Control:
    """What makes the ControlNet's maps."""
    from ..evaluation.maps import extractor

    if recipe.control == DEPTH and options.depth is None:
        raise WrongArgument("--control is depth, but --depth names no estimator that makes the maps.")
    extract = extractor(recipe.control, options.depth, accelerator.device)
    return Control(recipe.control, extract, contents_of(options.depth) if recipe.control == DEPTH else "")


def _layers(
    options: argparse.Namespace, recipe: Recipe, base: UNet2DConditionModel, upgraded: UNet2DConditionModel
) -> MappingLayers:
    """Mapping layers whose output is zero, or those of a file."""
    layout = layout_for(base, upgraded, positions=recipe.positions, norm=recipe.norm, timestep=recipe.timestep)
    if options.init is None:
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(recipe.seed)
            return MappingLayers(layout, recipe.fusion, recipe.positions).zero_output()
    with naming("--init"):
        layers = load_adapter(find_file(options.init, "adapter", options.models_dir, "--init"), dtype=torch.float32)
        for name in ("fusion", "positions"):
            if getattr(layers, name) != getattr(recipe, name):
                raise DoesNotFit(f"its {name} is {getattr(layers, name)}, --{name} is {getattr(recipe, name)}.")
        check_fit(layers, base, upgraded)
        if layers.levels != tuple(map(tuple, layout)):
            raise DoesNotFit("its ResNet blocks are other ones than --norm and --timestep ask for.")
    return layers.train()


def _validation(
    options: argparse.Namespace,
    recipe: Recipe,
    course: Course,
    base: Any,
    upgraded: Any,
    accelerator: Accelerator,
) -> Validation | None:
    if not options.validation_prompt or not accelerator.is_main_process:
        return None
    placement = Placement(str(accelerator.device), getattr(torch, recipe.precision), mapping="eager")
    if options.validation_lora is not None:
        # a base of its own: the one that is trained with stays as it is
        base = load_base(
            find_file(options.base, "checkpoint", options.models_dir, "--base"), placement.dtype, options.tokenizer
        )
        base.set_progress_bar_config(disable=True)
        with naming("--validation-lora"):
            lora, weight = read_lora(options.validation_lora)
            path = find_file(lora, "lora", options.models_dir, "--validation-lora")
            if detect_lora_base(path) != "sd1":
                raise WrongFile(f"{path.name} is no LoRA for SD1.5.")
            merge_lora(Lora(path, weight), base, upgraded)
        base.to(accelerator.device)
    models = Models(base, upgraded, placement=placement)
    return Validation(models, options.validation_prompt, recipe.size, course.validation_steps, options.out / GRIDS)


def _metadata(options: argparse.Namespace, recipe: Recipe, base: Any, pictures: Pictures) -> dict[str, str]:
    """What the trained file tells of itself."""
    family = FAMILY_OF_CONTEXT_WIDTH.get(base.unet.config.cross_attention_dim, "sd1")
    metadata = {
        "base": Path(options.base).name,
        "upgraded": Path(options.upgraded).name,
        "data": f"{len(pictures)} pictures of {Path(options.data).name}, {pictures.fingerprint}",
        "recipe": written(recipe),
        "version": __version__,
    }
    if options.base_data is not None:
        metadata["base data"] = Path(options.base_data).name
    if options.controlnet is not None:
        metadata["controlnet"] = Path(options.controlnet).name
    if options.init is not None:
        metadata["init"] = Path(options.init).name
    return {**Pair(family, "sdxl").metadata(), **{METADATA + name: value for name, value in metadata.items()}}


def fingerprint_of(pipeline: Any) -> str:
    """What tells a model from another: its noise schedule, and its tensors' names, shapes and first numbers."""
    digest = hashlib.sha256(
        f"{Diffusion.of(pipeline).predicts} {trained_alphas(pipeline.scheduler.config).tolist()}".encode()
    )
    parts = (pipeline.unet, pipeline.vae, pipeline.text_encoder, getattr(pipeline, "text_encoder_2", None))
    return _digest([part for part in parts if part is not None], digest)


def _digest(parts: Sequence[nn.Module], begun: Any = None) -> str:
    """Of tensors' names, shapes and first numbers."""
    digest = begun or hashlib.sha256()
    for part in parts:
        for name, tensor in sorted(part.state_dict().items()):
            first = tensor.flatten()[:SAMPLED].float().cpu().numpy().tobytes()
            digest.update(f"{name} {tuple(tensor.shape)}".encode() + first)
    return digest.hexdigest()
