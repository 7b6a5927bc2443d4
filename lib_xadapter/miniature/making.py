"""How each stage makes what it makes. A stage reads the weights of those before it and writes its own, once."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from PIL import Image
from torch import Tensor, nn

from .. import __version__
from ..errors import WrongFile, XAdapterError
from ..mapping import METADATA, load_adapter, save_adapter
from ..pairs import PAIR
from ..saving import write_whole
from . import architectures, autoencoders, judge, measures, model_files, plugins
from .captions import caption_of, facts_of
from .denoising import Denoiser, by_controlnet, by_t2i_adapter, denoising_loss
from .drawing import base_picture, upgraded_picture
from .latents import Bank, Source, fill, open_bank
from .learning import Course, Loss, learn
from .scenes import SECRET_SHAPE, SHAPES, Scene, scene_of
from .stages import HOURS, STAGES, Stage
from .styles import styled_picture
from .vocabulary import numbers, write_tokenizer
from .worlds import HELD_OUT, WORLDS, Picture, first_scene

WEIGHTS = "weights.safetensors"
STYLED_PICTURES = 2048
WORD_PICTURES = 512
OWN_WORD = "blossom"
"""The word of the textual inversion: the name of its file."""
LIKE = "star</w>"
"""The token that its vectors begin as."""
ADAPTER_PICTURES = 6144
PAIR_NAME = "miniature base>miniature upgraded"
"""What the adapter's file says it is for."""
SIZE = {world: size for world, (_, size) in WORLDS.items()}


class StageFailed(XAdapterError):
    """A stage's own program ended with an error."""


@dataclass(frozen=True)
class Work:
    """What all stages share.

    Attributes:
        out: the folder of everything.
        seed: of everything.
        share: of steps and pictures.
        hours: that all stages may take together.
    """

    out: Path
    seed: int = 0
    share: float = 1.0
    hours: float = HOURS

    @property
    def models(self) -> Path:
        """Laid out as a WebUI's models/ folder."""
        return self.out / "models"

    def folder(self, stage: str) -> Path:
        folder = self.out / "stages" / stage
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def seed_of(self, stage: str) -> int:
        return 1000 * self.seed + list(STAGES).index(stage)

    def number(self, whole: int, least: int = 8) -> int:
        """A number of steps or pictures, by the share that is asked for."""
        return max(least, round(whole * self.share))

    def course(self, stage: Stage) -> Course:
        steps = self.number(stage.steps)
        return Course(
            steps=steps,
            batch=min(stage.batch, steps),
            learning_rate=stage.learning_rate,
            warmup=min(300, steps // 10),
            seconds=stage.minutes * 60 * self.hours / HOURS,
            seed=self.seed_of(stage.name),
        )

    def learn(self, stage: Stage, module: nn.Module, loss_of: Callable[[int], Loss]) -> int:
        """Learn a stage's module; gives its steps.

        Args:
            loss_of: rows a step → the loss of one.
        """
        course = self.course(stage)
        return learn(module, loss_of(course.batch), course, self.folder(stage.name), stage.name)

    def load(self, stage: str, module: nn.Module) -> nn.Module:
        """A module with the weights of a stage that is done, frozen.

        Raises:
            WrongFile: it is not done.
        """
        path = self.folder(stage) / WEIGHTS
        if not path.is_file():
            raise WrongFile(f"The stage '{stage}' is not done: there is no {path}.")
        module.load_state_dict(safetensors.torch.load_file(path))
        return module.eval().requires_grad_(False)

    def keep(self, stage: str, tensors: Mapping[str, Tensor]) -> None:
        """Write the weights of a stage."""
        whole = {name: value.detach().clone().contiguous() for name, value in tensors.items()}
        write_whole(self.folder(stage) / WEIGHTS, lambda to: to.write_bytes(safetensors.torch.save(whole)))


def make(work: Work, stage: Stage) -> int:
    """Make a stage, going on from what is there; gives its steps."""
    torch.manual_seed(work.seed_of(stage.name))
    return MAKERS[stage.name](work, stage)


# --- VAEs, text encoders, latents -------------------------------------------------------------------------------------


def _vae(family: str) -> Callable[[Work, Stage], int]:
    def make_vae(work: Work, stage: Stage) -> int:
        vae = architectures.vae(family)
        steps = work.learn(stage, vae, lambda batch: autoencoders.vae_loss(vae, family, batch))
        autoencoders.normalise(vae, family, work.seed_of(stage.name))
        work.keep(stage.name, vae.state_dict())
        return steps

    return make_vae


def _text(work: Work, stage: Stage) -> int:
    upgraded = stage.name == "upgraded-text"
    text = _text_of(stage.name.removesuffix("-text"))
    reader = judge.Reader(architectures.TEXT_WIDTH * (2 if upgraded else 1), pooled=upgraded)
    both = nn.ModuleDict({"text": text, "reader": reader})
    steps = work.learn(stage, both, lambda batch: judge.reading_loss(text, reader, batch))
    work.keep(stage.name, text.state_dict())
    return steps


def _text_of(world: str) -> nn.Module:
    return architectures.UpgradedText() if world == "upgraded" else architectures.BaseText()


def _vae_of(work: Work, world: str) -> nn.Module:
    return work.load(f"{world}-vae", architectures.vae("sdxl" if world == "upgraded" else "sd1"))


def _source(work: Work, world: str) -> Source:
    draw = upgraded_picture if world == "upgraded" else base_picture
    pictures = work.number(STAGES[f"{world}-latents"].steps)
    # both worlds show the same scenes
    return Source(draw, first_scene("latents", work.seed), pictures)


def _latents(work: Work, stage: Stage) -> int:
    world = stage.name.removesuffix("-latents")
    return len(fill(_source(work, world), _vae_of(work, world), work.folder(stage.name), stage.name))


def _bank(work: Work, world: str) -> Bank:
    return open_bank(_source(work, world), work.folder(f"{world}-latents"))


# --- base and upgraded model ------------------------------------------------------------------------------------------


def _model(work: Work, stage: Stage) -> int:
    unet = architectures.upgraded_unet() if stage.name == "upgraded" else architectures.base_unet()
    # learned along with its UNet, the base's text encoder forgot places before the UNet had any use for them
    text = work.load(f"{stage.name}-text", _text_of(stage.name)).requires_grad_(stage.name == "upgraded")
    denoiser, bank = Denoiser(unet, text), _bank(work, stage.name)
    steps = work.learn(stage, denoiser.parts(), lambda batch: denoising_loss(denoiser, bank, batch))
    work.keep(stage.name, denoiser.parts().state_dict())
    return steps


def _denoiser(work: Work, world: str) -> Denoiser:
    unet = architectures.upgraded_unet() if world == "upgraded" else architectures.base_unet()
    denoiser = Denoiser(unet, _text_of(world))
    work.load(world, denoiser.parts())
    return denoiser


# --- plugins ----------------------------------------------------------------------------------------------------------


def _controls(kind: str, world: str) -> plugins.Controls:
    draw = plugins.depth if kind == "depth" else plugins.edges
    return plugins.maps_of(lambda scene: draw(scene, SIZE[world]))


def _controlnet(work: Work, stage: Stage) -> int:
    world = "upgraded" if stage.name.startswith("upgraded") else "base"
    denoiser, bank = _denoiser(work, world), _bank(work, world)
    make_net = architectures.upgraded_controlnet if world == "upgraded" else architectures.controlnet
    net = make_net(denoiser.unet).requires_grad_(True)
    if world == "upgraded":
        _read_maps_like(net, work.load("edges", architectures.controlnet(architectures.base_unet())))
    features = by_controlnet(net, _controls(stage.name, world))
    steps = work.learn(stage, net, lambda batch: denoising_loss(denoiser, bank, batch, features))
    work.keep(stage.name, net.state_dict())
    return steps


def _read_maps_like(net: nn.Module, other: nn.Module) -> None:
    """Give a ControlNet the layers by which another one reads its maps; all but the last are not learned again.

    They are what costs most in it, and edges are edges at every size.
    """
    reading = net.controlnet_cond_embedding
    reading.load_state_dict(other.controlnet_cond_embedding.state_dict())
    reading.requires_grad_(False)
    reading.conv_out.requires_grad_(True)


def _sketch(work: Work, stage: Stage) -> int:
    denoiser, bank, adapter = _denoiser(work, "base"), _bank(work, "base"), architectures.t2i_adapter()
    features = by_t2i_adapter(adapter, _controls("edges", "base"))
    steps = work.learn(stage, adapter, lambda batch: denoising_loss(denoiser, bank, batch, features))
    work.keep(stage.name, adapter.state_dict())
    return steps


def _style(work: Work, stage: Stage) -> int:
    world = "upgraded" if stage.name.startswith("upgraded") else "base"
    style = stage.name.removeprefix("upgraded-")
    draw = upgraded_picture if world == "upgraded" else base_picture

    def styled(scene: Scene) -> Picture:
        return styled_picture(draw(scene), scene, style)

    source = Source(styled, first_scene("styles", work.seed), work.number(STYLED_PICTURES))
    bank = fill(source, _vae_of(work, world), work.folder(stage.name), f"{stage.name} latents")
    denoiser = _denoiser(work, world)
    changes = plugins.add_changes(denoiser.unet, plugins.FORMATS[style], work.seed_of(stage.name))
    steps = work.learn(stage, changes, lambda batch: denoising_loss(denoiser, bank, batch))
    work.keep(stage.name, plugins.lora_tensors(denoiser.unet, changes, compvis=world == "upgraded"))
    return steps


def _word(work: Work, stage: Stage) -> int:
    denoiser = _denoiser(work, "base")
    word = plugins.OwnWord(denoiser.text.encoder, numbers()[LIKE])
    pictures = work.number(WORD_PICTURES)
    names, tokens = {SECRET_SHAPE: OWN_WORD}, {OWN_WORD: word.tokens}
    first = first_scene("word", work.seed)
    source = Source(base_picture, first, pictures, (SECRET_SHAPE,), names, tokens)
    bank = fill(source, _vae_of(work, "base"), work.folder(stage.name), f"{stage.name} latents")
    steps = work.learn(stage, word, lambda batch: denoising_loss(denoiser, bank, batch))
    work.keep(stage.name, {"emb_params": word.vectors})
    return steps


# --- what is measured by, mapping layers, files -----------------------------------------------------------------------


def _judge(work: Work, stage: Stage) -> int:
    classifier = judge.Judge()
    steps = work.learn(stage, classifier, lambda batch: judge.judge_loss(classifier, batch))
    work.keep(stage.name, classifier.state_dict())
    return steps


def _clip(work: Work, stage: Stage) -> int:
    both = measures.ClipWithStyles()
    steps = work.learn(stage, both, lambda batch: measures.clip_loss(both, batch))
    work.keep(stage.name, both.clip.state_dict())
    return steps


def _depth_estimator(work: Work, stage: Stage) -> int:
    estimator = measures.depth_estimator()
    steps = work.learn(stage, estimator, lambda batch: measures.depth_loss(estimator, batch))
    work.keep(stage.name, estimator.state_dict())
    return steps


def _adapter(work: Work, stage: Stage) -> int:
    """By `train`, as a user would: from files and a folder of pictures with captions."""
    _write_models(work)
    pictures, base_pictures = (work.folder(stage.name) / name for name in ("pictures", "base-pictures"))
    write_adapter_pictures(pictures, base_pictures, work.number(ADAPTER_PICTURES), work.seed)
    course = work.course(stage)
    arguments = {
        "--base": work.models / "Stable-diffusion" / model_files.BASE,
        "--upgraded": work.models / "Stable-diffusion" / model_files.UPGRADED,
        "--tokenizer": work.models / "tokenizer",
        "--data": pictures,
        "--base-data": base_pictures,
        "--cache": work.folder(stage.name) / "cache",
        "--out": work.folder(stage.name) / "training",
        "--size": SIZE["upgraded"],
        "--batch": course.batch,
        "--steps": course.steps,
        "--learning-rate": course.learning_rate,
        "--schedule": "cosine",
        "--warmup": course.warmup,
        "--ema": 0.999 if course.steps > 2000 else 0.9,
        "--precision": "float32",
        "--seed": course.seed,
        "--save-every": 100,
        "--validate-every": 10**6,
        "--tracker": "none",
    }
    options = [str(part) for pair in arguments.items() for part in pair]
    ended = subprocess.run([sys.executable, "-m", "lib_xadapter", "train", *options, "--cpu", "--resume"], check=False)
    if ended.returncode:
        raise StageFailed(f"The stage '{stage.name}': train ended with status {ended.returncode}.")
    trained = load_adapter(work.folder(stage.name) / "training" / "adapter.safetensors")
    work.keep(stage.name, trained.state_dict())
    return course.steps


def write_adapter_pictures(upgraded: Path, base: Path, count: int = ADAPTER_PICTURES, seed: int = 0) -> None:
    """What mapping layers learn from: folders of the same scenes as either world shows them."""
    first = first_scene("adapter", seed)
    write_pictures(upgraded, range(first, first + count), upgraded_picture)
    write_pictures(base, range(first, first + count), base_picture)


def write_pictures(
    folder: Path, seeds: range, draw: Callable[[Scene], Picture], shapes: tuple[str, ...] = SHAPES
) -> None:
    """A folder of pictures with captions, kohya's way; what is there stays.

    Args:
        shapes: that can be in them; the one that no caption names is called by the word of the textual inversion.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for seed in seeds:
        path = folder / f"{seed}.png"
        if not path.is_file():
            scene = scene_of(seed, shapes)
            caption = caption_of(facts_of(scene), {SECRET_SHAPE: OWN_WORD})
            (folder / f"{seed}.txt").write_text(caption, encoding="utf-8")
            write_whole(path, lambda to, scene=scene: Image.fromarray(draw(scene)).save(to))


def write_held_out(folder: Path, count: int, shapes: tuple[str, ...] = SHAPES) -> tuple[Path, Path]:
    """Captions of scenes that no model has seen, with pictures of both worlds at the upgraded size.

    Control maps are made of the base world's, whose edges are those of the scene alone.

    Args:
        folder: of both folders.
        count: of the captions.
        shapes: as in `write_pictures`.

    Returns:
        The folder of the base world, and that of the upgraded one.
    """
    base, upgraded, seeds = folder / "base", folder / "upgraded", range(HELD_OUT, HELD_OUT + count)
    write_pictures(base, seeds, lambda scene: base_picture(scene, SIZE["upgraded"]), shapes)
    write_pictures(upgraded, seeds, upgraded_picture, shapes)
    return base, upgraded


def _write_models(work: Work) -> None:
    """Base and upgraded model as folders of diffusers."""
    write_tokenizer(work.models / "tokenizer")
    for world, name in (("base", model_files.BASE), ("upgraded", model_files.UPGRADED)):
        folder = work.models / "Stable-diffusion" / name
        model_files.save_model(folder, _denoiser(work, world), _vae_of(work, world), work.models / "tokenizer")


def _files(work: Work, stage: Stage) -> int:
    _write_models(work)
    base, upgraded = architectures.base_unet(), architectures.upgraded_unet()
    for name, unet, make_net in (
        ("edges", base, architectures.controlnet),
        ("depth", base, architectures.controlnet),
        ("upgraded-edges", upgraded, architectures.upgraded_controlnet),
    ):
        net = work.load(name, make_net(unet))
        net.half().save_pretrained(work.models / "ControlNet" / f"miniature-{name}")
    sketch = work.load("sketch", architectures.t2i_adapter())
    sketch.half().save_pretrained(work.models / "ControlNet" / "t2iadapter-miniature-sketch")
    for name in ("palette", "lines", "pattern", "upgraded-palette"):
        _save(work, f"Lora/miniature-{name}", _kept(work, name), name)
    _save(work, f"embeddings/{OWN_WORD}", _kept(work, "word"), "word")
    _save(work, "measures/judge", _kept(work, "judge"), "judge")
    measures.save_clip(work.load("clip", measures.clip()), work.models / "measures/clip", work.models / "tokenizer")
    measures.save_depth_estimator(
        work.load("depth-estimator", measures.depth_estimator()), work.models / "measures/depth"
    )
    _write_adapter(work)
    return 0


def _write_adapter(work: Work) -> None:
    layers = load_adapter(work.folder("adapter") / "training" / "adapter-fp16.safetensors")
    path = work.models / "X-Adapter" / "miniature.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_adapter(layers, path, {**_made_by(work, "adapter"), PAIR: PAIR_NAME})


def _kept(work: Work, stage: str) -> dict[str, Tensor]:
    return safetensors.torch.load_file(work.folder(stage) / WEIGHTS)


def _save(work: Work, name: str, tensors: Mapping[str, Tensor], stage: str) -> None:
    model_files.save_half(work.models / f"{name}.safetensors", tensors, _made_by(work, stage))


def _made_by(work: Work, stage: str) -> dict[str, str]:
    return {METADATA + "made": f"python -m lib_xadapter miniature, {stage}, seed {work.seed}, version {__version__}"}


def _grids(work: Work, stage: Stage) -> int:
    from .grids import write_grids

    return write_grids(work, work.number(stage.steps, least=4))


MAKERS: Mapping[str, Callable[[Work, Stage], int]] = {
    "upgraded-vae": _vae("sdxl"),
    "base-vae": _vae("sd1"),
    "upgraded-text": _text,
    "base-text": _text,
    "upgraded-latents": _latents,
    "base-latents": _latents,
    "upgraded": _model,
    "base": _model,
    "judge": _judge,
    "clip": _clip,
    "depth-estimator": _depth_estimator,
    "adapter": _adapter,
    "edges": _controlnet,
    "depth": _controlnet,
    "sketch": _sketch,
    "palette": _style,
    "lines": _style,
    "pattern": _style,
    "word": _word,
    "upgraded-edges": _controlnet,
    "upgraded-palette": _style,
    "files": _files,
    "grids": _grids,
}
