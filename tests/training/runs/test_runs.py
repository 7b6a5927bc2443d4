"""Whole trainings: what is learned, what is kept, and that nothing is lost."""

from __future__ import annotations

import json
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import safetensors
import safetensors.torch
import torch
from accelerate import Accelerator
from accelerate.tracking import WandBTracker
from diffusers import ControlNetModel, UNet2DConditionModel
from PIL import Image
from torch import Tensor

from lib_xadapter.evaluation import maps
from lib_xadapter.headless.cli import main
from lib_xadapter.headless.inspection import describe
from lib_xadapter.mapping import BlockLayout, MappingLayers, load_adapter, save_adapter
from lib_xadapter.training import engine
from lib_xadapter.training.checkpoints import Checkpoint, Checkpoints, read_checkpoint
from lib_xadapter.training.encoding import Encoder
from lib_xadapter.training.engine import Training
from lib_xadapter.training.recipe import Recipe
from lib_xadapter.training.state import TrainedState
from lib_xadapter.training.validation import Validation
from tests.seeded import fill
from tests.small_models import make_small_models
from tests.training.tiny_models import save_pictures


def weights_of(out: Path) -> dict[str, Tensor]:
    return safetensors.torch.load_file(out / "adapter.safetensors")


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def farthest(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@pytest.fixture
def losses(monkeypatch) -> list[float]:
    """The loss of each step that is taken."""
    seen: list[float] = []
    inner = Training._step

    def noted(training, parts, interruption):
        sums = inner(training, parts, interruption)
        seen.append(sums.loss)
        return sums

    monkeypatch.setattr(Training, "_step", noted)
    return seen


@contextmanager
def ended_by(monkeypatch, number: int, at: int) -> Iterator[None]:
    """A signal comes in the middle of a step."""
    inner = Training._compute

    def computed(training, part, rows, sums):
        if part.step == at and 0 in part.rows:
            signal.raise_signal(number)
        inner(training, part, rows, sums)

    with monkeypatch.context() as patch:
        patch.setattr(Training, "_compute", computed)
        yield


# every option that has a state of its own, or another way through the loop
WAYS = {
    "usual": {},
    "EMA, warm-up, clipping": {"ema": 0.9, "warmup": 3, "schedule": "cosine", "clip": 0.5},
    "parts, buckets, captions": {"accumulation": 3, "empty-prompts": 0.5, "min-snr": 5, "more": ("--buckets",)},
    "bfloat16, checkpointing": {"precision": "bfloat16", "more": ("--checkpointing", "--timestep")},
    "float16": {"precision": "float16"},
    "both, spade": {"positions": "both", "fusion": "spade"},
    "Muon, float16": {"optimizer": "muon", "precision": "float16", "warmup": 2},
}


@pytest.mark.parametrize("way", WAYS)
def test_after_an_interruption_it_goes_on_to_the_bit(train, way, tmp_path, monkeypatch, capsys):
    options = dict(WAYS[way])
    more = options.pop("more", ())
    assert train(*more, **options) == 0
    whole = tmp_path / "whole"
    shutil.move(train.out, whole)
    with ended_by(monkeypatch, signal.SIGTERM, at=2):
        assert train(*more, **options) == 130
    assert "Ended by SIGTERM at" in (told := capsys.readouterr().out) and "--resume" in told
    assert train(*more, "--resume", **options) == 0
    assert same(weights_of(train.out), weights_of(whole))
    ours, theirs = (read_checkpoint(Checkpoints(out / "checkpoints", 1).last) for out in (train.out, whole))
    assert ours.facts == theirs.facts
    assert all(same(ours.tensors[group], theirs.tensors[group]) for group in theirs.tensors)


def test_the_learning_rate_is_constant_unless_it_is_told_to_warm_up_and_fall():
    def rates(**options: object) -> list[float]:
        recipe = Recipe(steps=4, learning_rate=1.0, **options)
        state = TrainedState(MappingLayers([[BlockLayout(1, 1)]] * 3), recipe, recipe.steps)
        found = []
        for _ in range(recipe.steps):
            found.append(state.learning_rate)
            state.forget_gradients()
            state.take_step()
        return found

    assert rates() == [1, 1, 1, 1]
    assert rates(warmup=2) == [0, 0.5, 1, 1]
    assert rates(schedule="linear", warmup=2) == [0, 0.5, 1, 0.5]


def test_gradients_in_parts_are_those_of_the_whole(train, tmp_path):
    for parts in (1, 4):
        train(out=tmp_path / str(parts), accumulation=parts, steps=1)
    found = [read_checkpoint(tmp_path / str(parts) / "checkpoints/step-00000001.safetensors") for parts in (1, 4)]
    for name in found[0].tensors["optimizer"]:
        one, other = (checkpoint.tensors["optimizer"][name] for checkpoint in found)
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)


def test_eight_pictures_are_learned_by_heart(train, tmp_path, losses, monkeypatch):
    """With one noise and timestep for each row of a batch, which is what can be learned by heart."""
    eight = save_pictures(tmp_path / "eight", 8)
    inner = engine.Draws.of
    monkeypatch.setattr(engine.Draws, "of", lambda recipe, step, *rest: inner(recipe, 0, *rest))
    monkeypatch.setattr(engine.Batches, "at", lambda batches, number, inner=engine.Batches.at: inner(batches, 0))
    assert train(data=eight, batch=8, steps=120, learning_rate=3e-3, save_every=200) == 0
    assert sum(losses[-5:]) / 5 < losses[0] / 2


def test_frozen_models_are_byte_for_byte_what_they_were(train, monkeypatch):
    seen = {}
    inner = Training.run

    def run(training):
        units = training._computed._base, training._computed._upgraded
        before = [{name: tensor.clone() for name, tensor in unit.state_dict().items()} for unit in units]
        outcome = inner(training)
        seen.update(same=[same(one, unit.state_dict()) for one, unit in zip(before, units, strict=True)])
        return outcome

    monkeypatch.setattr(Training, "run", run)
    assert train() == 0
    assert seen["same"] == [True, True]


def test_the_file_tells_what_it_is(train, pictures):
    train(fusion="spade", steps=1)
    path = train.out / "adapter.safetensors"
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    assert metadata["xadapter.pair"] == "sd1>sdxl"
    assert json.loads(metadata["xadapter.recipe"])["learning_rate"] == 1e-3
    assert (metadata["xadapter.steps"], metadata["xadapter.fusion"]) == ("1", "spade")
    assert metadata["xadapter.data"].startswith(f"64 pictures of {pictures.name}")
    said = "\n".join(describe(path))
    assert "an X-Adapter for SD1.5 → SDXL" in said and "  steps: 1" in said
    half = load_adapter(train.out / "adapter-fp16.safetensors")
    assert next(half.parameters()).dtype == torch.float16
    assert load_adapter(path).fusion == half.fusion == "spade"


def test_training_begins_with_zero_output_or_with_a_given_file(train, tmp_path, losses):
    train(steps=1, learning_rate=0)
    begun = load_adapter(train.out / "adapter.safetensors")
    assert all(not output.weight.any() for output in begun.zero_out)
    torch.nn.init.ones_(begun.zero_out[0].weight)
    save_adapter(begun, tmp_path / "own.safetensors")
    train(steps=1, learning_rate=0, out=tmp_path / "again", init=tmp_path / "own.safetensors")
    assert same(weights_of(tmp_path / "again"), begun.state_dict())
    assert losses[0] != losses[1]


def test_the_moving_average_is_what_is_written(train):
    train(steps=3, ema=0.5, save_every=3)
    checkpoint = read_checkpoint(train.out / "checkpoints/step-00000003.safetensors")
    trained, averages = checkpoint.tensors["layers"], checkpoint.tensors["ema"]
    written = weights_of(train.out)
    names = [name for name, _ in load_adapter(train.out / "adapter.safetensors").named_parameters()]
    assert all(torch.equal(written[name], averages[str(number)]) for number, name in enumerate(names))
    assert not same(written, trained)


def test_the_last_checkpoints_are_kept(train):
    train(save_every=1, keep=2)
    assert [path.name for path in sorted((train.out / "checkpoints").iterdir())] == [
        "step-00000005.safetensors",
        "step-00000006.safetensors",
    ]


def test_validation_grids_are_painted_and_change_nothing(train, tmp_path):
    train(steps=2)
    told = ("--validation-prompt", "a blot", "two blots", "--validate-every", "1", "--validation-steps", "2")
    assert train(*told, size=64, steps=2, out=tmp_path / "with") == 0
    assert train(size=64, steps=2, out=tmp_path / "without") == 0
    assert same(weights_of(tmp_path / "with"), weights_of(tmp_path / "without"))
    assert [path.name for path in sorted((tmp_path / "with/validation").iterdir())] == [
        "step-00000001.png",
        "step-00000002.png",
    ]


class StrictRun:
    """What `wandb.init` gives: its log takes no options of TensorBoard."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def log(self, data: dict, step: int | None = None, commit: bool | None = None) -> None:
        if "validation" in data:
            self.steps.append(step)

    def finish(self) -> None:
        """The training is over."""


def test_validation_grids_go_to_wandb(train, monkeypatch):
    tracker, run = WandBTracker("training"), StrictRun()
    tracker.run = run
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(Image=Image.fromarray))
    monkeypatch.setattr(Accelerator, "init_trackers", lambda self, *_, **__: self.trackers.append(tracker))
    assert (
        train("--validation-prompt", "a blot", "--validate-every", "1", "--validation-steps", "1", size=64, steps=2)
        == 0
    )
    assert run.steps == [1, 2]


def test_a_grid_waits_for_the_pictures_that_are_being_encoded(train, monkeypatch):
    """Both move and use the same VAEs and text encoders."""
    validating, encoding, met = threading.Event(), threading.Event(), []
    validate, paint, rows = Training._validate, Validation.paint, Encoder.rows

    def validated(training):
        validating.set()
        validate(training)

    def painted(validation, *given):
        met.append(encoding.is_set())
        return paint(validation, *given)

    def encoded(encoder, *given):
        encoding.set()
        if started:
            # the second step's, read ahead in the first
            validating.wait()
        started.append(given)
        found = rows(encoder, *given)
        encoding.clear()
        return found

    started: list[object] = []
    monkeypatch.setattr(Training, "_validate", validated)
    monkeypatch.setattr(Validation, "paint", painted)
    monkeypatch.setattr(Encoder, "rows", encoded)
    told = ("--validation-prompt", "a blot", "--validate-every", "1", "--validation-steps", "1")
    assert train(*told, size=64, steps=2) == 0
    assert met == [False, False]


def test_a_plugin_in_validation_grids_leaves_the_training_alone(train, tmp_path):
    small = make_small_models(tmp_path / "small")
    models = {"base": small.base, "upgraded": small.upgraded, "tokenizer": small.tokenizer, "size": 64, "batch": 1}
    told = ("--validation-prompt", "a cat", "--validate-every", "1", "--validation-steps", "1")
    grids = []
    for name, more in (("without", ()), ("with", ("--validation-lora", f"{small.lora}:2"))):
        assert train(*told, *more, **models, steps=2, out=tmp_path / name) == 0
        grids.append((tmp_path / name / "validation/step-00000002.png").read_bytes())
    assert grids[0] != grids[1]
    assert same(weights_of(tmp_path / "with"), weights_of(tmp_path / "without"))


def test_mapping_layers_learn_with_a_controlnet_of_the_base(train, tiny, tmp_path, monkeypatch):
    base = UNet2DConditionModel.from_pretrained(tiny / "base/unet")
    fill(ControlNetModel.from_unet(base), "controlnet.").save_pretrained(tmp_path / "net")
    told = {"controlnet": tmp_path / "net", "controlled": 0.5, "size": 128}
    assert train(**told) == 0
    whole = tmp_path / "whole"
    shutil.move(train.out, whole)
    assert train(size=128, out=tmp_path / "without") == 0
    assert not same(weights_of(tmp_path / "without"), weights_of(whole))
    with ended_by(monkeypatch, signal.SIGTERM, at=2):
        assert train(**told, cache=tmp_path / "cache") == 130
    assert train("--resume", **told, cache=tmp_path / "cache") == 0
    assert same(weights_of(train.out), weights_of(whole))
    assert "  controlnet: net" in describe(train.out / "adapter.safetensors")


def test_another_depth_estimator_does_not_go_on(train, tiny, tmp_path, monkeypatch, capsys):
    base = UNet2DConditionModel.from_pretrained(tiny / "base/unet")
    fill(ControlNetModel.from_unet(base), "controlnet.").save_pretrained(tmp_path / "net")
    monkeypatch.setattr(maps, "extractor", lambda *_: lambda picture: picture.convert("L"))
    for name in ("one", "another"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_text(name)
    told = {"controlnet": tmp_path / "net", "controlled": 0.5, "size": 128, "steps": 1, "control": "depth"}
    assert train(**told, depth=tmp_path / "one") == 0
    assert train("--resume", **told, depth=(tmp_path / "one").rename(tmp_path / "moved")) == 0
    assert train("--resume", **told, depth=tmp_path / "another") == 2
    assert "--depth is another than that" in capsys.readouterr().err


def test_the_base_sees_the_pictures_of_its_own_world(train, pictures, tmp_path, capsys):
    others = tmp_path / "others"
    others.mkdir()
    for path in pictures.glob("*.png"):
        Image.open(path).transpose(Image.Transpose.ROTATE_180).save(others / path.name)
    assert train(steps=2, out=tmp_path / "usual") == 0
    assert train(steps=2, base_data=others) == 0
    assert not same(weights_of(train.out), weights_of(tmp_path / "usual"))
    assert train("--resume", steps=2) == 2
    assert "--base-data is another than that" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"controlled": 0.5}, "--controlled is 0.5, but there is no --controlnet."),
        ({"controlnet": "net"}, "--controlnet is given, but --controlled is 0"),
    ],
)
def test_a_controlnet_and_its_share_go_together(train, told, message, capsys):
    assert train(**told) == 2
    assert message in capsys.readouterr().err


def test_what_is_trained_makes_pictures(train, tiny, tmp_path):
    train(learning_rate=0.05, fusion="spade", positions="both")
    pictures = []
    for adapter in (str(train.out / "adapter.safetensors"), "None"):
        words = ["--base", tiny / "base", "--upgraded", tiny / "upgraded", "--adapter", adapter, "--device", "cpu"]
        words += ["--width", 64, "--height", 64, "--steps", 2, "--out", tmp_path / adapter[-4:]]
        assert main(["generate", *map(str, words)]) == 0
        pictures.append(next((tmp_path / adapter[-4:]).glob("*.png")))
    one, other = (numpy.asarray(Image.open(path)) for path in pictures)
    assert (one != other).any()


def test_figures_go_to_tensorboard(train):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(steps=2, tracker="tensorboard")
    read = EventAccumulator(str(train.out / "training"))
    read.Reload()
    tags = read.Tags()["scalars"]
    assert [event.step for event in read.Scalars("loss")] == [1, 2]
    assert any(tag.startswith("loss/timesteps") for tag in tags) and "learning rate" in tags


class TestNothingLost:
    """Whatever ends a training, the last good checkpoint is there, untouched, and it is said in one sentence."""

    def refused(self, train, capsys, *more, **options) -> str:
        assert train(*more, **options) == 2
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert said.startswith("xadapter train: ")
        return said

    def test_a_loss_that_is_no_number(self, train, capsys, monkeypatch):
        inner = Training._compute

        def computed(training, part, rows, sums):
            if part.step == 3:
                rows.upgraded_mean.fill_(float("nan"))
            inner(training, part, rows, sums)

        monkeypatch.setattr(Training, "_compute", computed)
        said = self.refused(train, capsys)
        assert "The loss of step 4 is nan: train again in another --out with a lower --learning-rate" in said
        assert "step-00000002.safetensors is untouched" in said
        assert read_checkpoint(train.out / "checkpoints/step-00000002.safetensors").step == 2

    def test_a_full_disk(self, train, capsys, monkeypatch):
        inner = safetensors.torch.save_file

        def save_file(tensors, path, metadata=None):
            if "00000004" in str(path):
                Path(path).write_bytes(b"half of")
                raise OSError(28, "No space left on device")
            inner(tensors, path, metadata)

        monkeypatch.setattr("safetensors.torch.save_file", save_file)
        said = self.refused(train, capsys)
        assert "step-00000004.safetensors cannot be written: No space left on device" in said
        assert [path.name for path in (train.out / "checkpoints").iterdir()] == ["step-00000002.safetensors"]

    def test_a_checkpoint_that_is_cut_off(self, train, capsys):
        train(steps=2)
        path = train.out / "checkpoints/step-00000002.safetensors"
        path.write_bytes(path.read_bytes()[:1000])
        said = self.refused(train, capsys, "--resume", steps=2)
        assert "step-00000002.safetensors is no checkpoint of a training" in said

    def test_ctrl_c_is_obeyed_at_the_end_of_a_step(self, train, monkeypatch, capsys):
        with ended_by(monkeypatch, signal.SIGINT, at=0):
            assert train() == 130
        assert "Ended by SIGINT at" in capsys.readouterr().out
        assert Checkpoints(train.out / "checkpoints", 3).last.name == "step-00000001.safetensors"

    def test_handlers_are_put_back(self, train):
        before = signal.getsignal(signal.SIGINT)
        train(steps=1)
        assert signal.getsignal(signal.SIGINT) is before


def test_a_checkpoint_is_read_as_it_was_written(tmp_path):
    tensors = {"layers": {"a.b": torch.rand(3)}, "optimizer": {"0.step": torch.tensor(2.0)}, "ema": {}}
    path = Checkpoints(tmp_path / "kept", 1).save(Checkpoint(7, tensors, {"rate": 0.1}))
    again = read_checkpoint(path)
    assert (again.step, again.facts) == (7, {"rate": 0.1})
    assert all(same(again.tensors[group], tensors[group]) for group in tensors)
    (tmp_path / "usual").touch()
    assert path.stat().st_mode == (tmp_path / "usual").stat().st_mode
