"""`evaluate`, from captions to a page, on small models."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy
import pytest
import safetensors.torch
import torch
from PIL import Image

from lib_xadapter.evaluation import program, ways
from lib_xadapter.evaluation.figures.frechet import FrechetDistance, Inception
from lib_xadapter.evaluation.maps import fitted
from lib_xadapter.headless import composed
from lib_xadapter.headless.cli import main
from tests.pictures import grey_levels_apart

WAYS = ("SD1.5", "SDEdit + SDXL", "X-Adapter", "SDXL")
FILES = ("base.png", "sdedit-0.8.png", "x-adapter-0.8-1.png", "sdxl.png")
PLUGINS = (
    *("--controlnet", "small-edges", "small-edges", "--control", "canny", "depth"),
    *("--lora", "small-style"),
)


@dataclass(frozen=True)
class Evaluate:
    """An `evaluate` command that makes small pictures in one step."""

    models: Path
    tokenizer: Path
    captions: Path
    out: Path

    def words(self, *more: str) -> list[str]:
        usual = {
            "captions": self.captions,
            "upgraded": "small-sdxl",
            "base": "small-sd15",
            "adapter": "small",
            "models-dir": self.models,
            "tokenizer": self.tokenizer,
            "width": 64,
            "height": 64,
            "steps": 2,
            "device": "cpu",
            "resamples": 100,
            "out": self.out,
        }
        left = {f"--{name}": str(value) for name, value in usual.items() if f"--{name}" not in more}
        return ["evaluate", *(word for pair in left.items() for word in pair), *more]

    def __call__(self, *more: str) -> int:
        return main(self.words(*more))

    def pictures(self) -> dict[Path, int]:
        """When each was written."""
        found = (path for path in self.out.rglob("pictures/*/*.png"))
        return {path.relative_to(self.out): path.stat().st_mtime_ns for path in found if path.name in FILES}

    def report(self) -> dict:
        return json.loads((self.out / "figures.json").read_text(encoding="utf-8"))


def save_inversion(path: Path, vectors: int) -> None:
    path.parent.mkdir(exist_ok=True)
    safetensors.torch.save_file({"emb_params": torch.zeros(vectors, 64)}, path)


@pytest.fixture(scope="module", autouse=True)
def loaded_once():
    """The models of a command are loaded when it is first given."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(program, "load_models", functools.cache(program.load_models))
        yield


@pytest.fixture
def evaluate(small, captioned, tmp_path) -> Evaluate:
    return Evaluate(small.folder, small.tokenizer, captioned, tmp_path / "out")


@pytest.fixture(scope="module")
def whole(small, captioned, clip_folder, depth_folder, inception_file, tmp_path_factory) -> Evaluate:
    """A finished evaluation with every figure that there is."""
    run = Evaluate(small.folder, small.tokenizer, captioned, tmp_path_factory.mktemp("whole"))
    weights = ["--clip", str(clip_folder), "--depth", str(depth_folder), "--inception", str(inception_file)]
    assert run(*PLUGINS, *weights) == 0
    return run


class TestPictures:
    def test_every_caption_has_one_each_way(self, whole):
        folders = list((whole.out / "pictures").iterdir())
        assert sorted(path.name[:4] for path in folders) == ["ball", "moon"]
        for folder in folders:
            assert {path.name for path in folder.glob("*.png")} == {
                *FILES, "source.png", "map-canny.png", "map-depth.png"
            }  # fmt: skip
            pictures = [Image.open(folder / name).tobytes() for name in FILES]
            assert len(set(pictures)) == 4

    def test_they_are_those_of_generate(self, whole, small, tmp_path):
        """The same models, plugins, map and seed: the same pictures, to the byte."""
        (folder,) = (whole.out / "pictures").glob("ball*")
        command = [
            "generate", "--upgraded", "small-sdxl", "--base", "small-sd15", "--adapter", "small", "--models-dir",
            str(small.folder), "--tokenizer", str(small.tokenizer), "--width", "64", "--height", "64", "--steps", "2",
            "--device", "cpu", "--controlnet", "small-edges", "small-edges", "--lora", "small-style",
            "--control-image", str(folder / "map-canny.png"), str(folder / "map-depth.png"), "--weight", "0", "1",
            "--return-base-image", "--prompt", r"a yellow ball \(number 0\) at 10:\30", "--out", str(tmp_path),
        ]  # fmt: skip
        assert main(command) == 0
        theirs = [Image.open(path).tobytes() for path in sorted(tmp_path.glob("0*.png"))]
        base, sdedit, adapter, _ = (Image.open(folder / name).tobytes() for name in FILES)
        assert theirs == [base, sdedit, base, adapter]

    def test_plain_sdxl_knows_nothing_of_the_base(self, evaluate):
        """Another base prompt changes every picture but its."""
        assert evaluate("--limit", "1", "--metrics", "condition") == 1
        other = Evaluate(evaluate.models, evaluate.tokenizer, evaluate.captions, evaluate.out.with_name("other"))
        assert other("--limit", "1", "--metrics", "condition", "--base-prompt", "ink, {prompt}") == 1
        changed = {
            path.name: Image.open(evaluate.out / path).tobytes() != Image.open(other.out / path).tobytes()
            for path in evaluate.pictures()
        }
        assert changed == {"base.png": True, "sdedit-0.8.png": True, "x-adapter-0.8-1.png": True, "sdxl.png": False}

    def test_sdxl_can_be_told_another_caption_than_the_base(self, evaluate, tmp_path):
        """Of the base everything stays; SDXL alone makes what it makes of that caption."""
        given = ("--limit", "1", "--metrics", "condition")
        told = tmp_path / "told"
        told.mkdir()
        (told / "ball.txt").write_text("a green hill", encoding="utf-8")
        alone = tmp_path / "hill.txt"
        alone.write_text("a green hill", encoding="utf-8")
        other = replace(evaluate, out=evaluate.out.with_name("other"))
        hill = replace(evaluate, out=evaluate.out.with_name("hill"), captions=alone)
        assert evaluate(*given) == other(*given, "--upgraded-captions", str(told)) == hill(*given) == 1

        def picture(run: Evaluate, name: str) -> bytes:
            (path,) = run.out.glob(f"pictures/*/{name}")
            return Image.open(path).tobytes()

        assert [picture(other, name) == picture(evaluate, name) for name in FILES] == [True, False, False, False]
        assert picture(other, "sdxl.png") == picture(hill, "sdxl.png")

    def test_captions_that_sdxl_is_to_be_told_and_that_are_not_there_are_named(self, evaluate, tmp_path, capsys):
        assert evaluate("--upgraded-captions", str(tmp_path / "nowhere")) == 2
        assert "--upgraded-captions: there is no folder" in capsys.readouterr().err
        assert evaluate("--upgraded-captions", str(tmp_path)) == 2
        assert "ball.txt cannot be read" in capsys.readouterr().err

    def test_a_controlnet_of_sdxl_itself_acts_in_all_pictures_of_sdxl(self, evaluate, own_controlnet):
        given = ["--limit", "1", "--metrics", "condition"]
        assert evaluate(*given) == 1
        other = Evaluate(evaluate.models, evaluate.tokenizer, evaluate.captions, evaluate.out.with_name("other"))
        own = ["--upgraded-controlnet", str(own_controlnet), "--upgraded-control", "canny"]
        assert other(*given, *own) == 0
        changed = {
            path.name: Image.open(evaluate.out / path).tobytes() != Image.open(other.out / path).tobytes()
            for path in evaluate.pictures()
        }
        assert changed == {"base.png": False, "sdedit-0.8.png": True, "x-adapter-0.8-1.png": True, "sdxl.png": True}
        assert {figure["name"] for figure in other.report()["figures"]} == {"SSIM, canny", "F1, edges"}


class TestTogether:
    """Captions in one batch, and other evaluations beside this one."""

    def test_captions_made_in_one_batch_have_the_pictures_that_they_have_alone(self, evaluate, whole, depth_folder):
        calls = []
        with pytest.MonkeyPatch.context() as patch:
            make = ways.make_together
            patch.setattr(ways, "make_together", lambda *given: calls.append(len(given[1])) or make(*given))
            depth = ("--depth", str(depth_folder))
            assert evaluate(*PLUGINS, *depth, "--batch", "2", "--metrics", "condition") == 0
        assert calls == [2, 2]
        assert evaluate.pictures().keys() == whole.pictures().keys()
        for path in evaluate.pictures():
            assert grey_levels_apart(Image.open(evaluate.out / path), Image.open(whole.out / path)) <= 1

    def test_what_the_base_has_made_is_taken_for_all_of_a_batch(self, evaluate, whole, depth_folder):
        shutil.copytree(whole.out, evaluate.out)
        lost = sorted(evaluate.out.glob("pictures/*/x-adapter-*.png"))
        for path in lost:
            path.unlink()
        calls = []
        with pytest.MonkeyPatch.context() as patch:
            make = ways.make_together
            note = calls.append
            patch.setattr(ways, "make_together", lambda *given: note((len(given[1]), given[-1])) or make(*given))
            depth = ("--depth", str(depth_folder))
            assert evaluate(*PLUGINS, *depth, "--batch", "2", "--metrics", "condition") == 0
        assert [(jobs, len(side.latents)) for jobs, side in calls] == [(2, 2)]
        for path in lost:
            beside = whole.out / path.relative_to(evaluate.out)
            assert grey_levels_apart(Image.open(path), Image.open(beside)) <= 1

    def test_prompts_of_different_lengths_are_made_one_after_the_other(self, evaluate, tmp_path):
        captions = tmp_path / "captions.txt"
        captions.write_text("a house\n" + "a house by the sea and " * 20 + "\n", encoding="utf-8")
        assert evaluate("--captions", str(captions), "--batch", "2", "--metrics", "fid") == 1
        assert len(evaluate.pictures()) == 2 * len(FILES)

    def test_a_single_stage_is_one_more_row_for_each_weight(self, evaluate, captioned):
        more = ("--single-stage", "--weight", "1", "0.5", "--batch", "2", "--metrics", "condition")
        assert evaluate("--controlnet", "small-edges", "--control", "canny", *more) == 0
        single = [f"X-Adapter, single stage, weight {weight}" for weight in ("1", "0.5")]
        assert [way for way in evaluate.report()["ways"] if "single" in way] == single
        for folder in (evaluate.out / "pictures").iterdir():
            made = {name: (folder / name).read_bytes() for name in ("single-1.png", "single-0.5.png", "sdxl.png")}
            assert len(set(made.values())) == 3

    def test_plain_sdxl_can_be_the_only_row(self, evaluate, clip_folder):
        more = ("--upgraded-alone", "--batch", "2", "--clip", str(clip_folder), "--metrics", "clip", "style")
        assert evaluate(*more) == 0
        assert {path.name for path in evaluate.pictures()} == {"sdxl.png"}
        told = evaluate.report()
        assert told["ways"] == ["SDXL"]
        assert told["not_computed"] == {"Style similarity": "there is no picture of SD1.5 to be like."}

    def test_another_evaluations_pictures_are_a_row_of_the_table(self, evaluate, whole, clip_folder):
        more = ("--clip", str(clip_folder), "--metrics", "clip", "style", "--batch", "2")
        assert evaluate(*more, "--beside", f"with plugins={whole.out}/x-adapter-0.8-1.png") == 0
        told = evaluate.report()
        assert told["ways"] == [*WAYS, "with plugins"]
        (score,) = (figure for figure in told["figures"] if figure["name"] == "CLIP score")
        (theirs,) = (figure for figure in whole.report()["figures"] if figure["name"] == "CLIP score")
        assert score["ways"]["with plugins"]["value"] == pytest.approx(theirs["ways"]["X-Adapter"]["value"])
        assert {"one": "X-Adapter", "other": "with plugins"}.items() <= score["differences"][-2].items()
        row = told["pictures"][0]["pictures"]["with plugins"]
        assert (evaluate.out / row).resolve().parent.parent == (whole.out / "pictures").resolve()

    @pytest.mark.parametrize(
        ("given", "told"),
        [
            ("nothing", "--beside is 'nothing', expected NAME=DIR/FILE."),
            ("other=/nowhere/base.png", "--beside: no folder in /nowhere/pictures has a base.png."),
        ],
    )
    def test_what_is_not_there_is_refused(self, evaluate, capsys, given, told):
        assert evaluate("--beside", given) == 2
        assert told in capsys.readouterr().err

    def test_two_rows_of_one_name_are_refused(self, evaluate, whole, capsys):
        pictures = f"{whole.out}/sdxl.png"
        assert evaluate("--beside", f"X-Adapter={pictures}") == 2
        told = "--beside: the table already has a row '{}'; choose another name."
        assert told.format("X-Adapter") in capsys.readouterr().err
        assert evaluate("--beside", f"other={pictures}", "--beside", f"other={whole.out}/base.png") == 2
        assert told.format("other") in capsys.readouterr().err
        assert not evaluate.pictures()

    def test_captions_that_another_evaluation_has_not_are_told(self, evaluate, whole, tmp_path, clip_folder, capsys):
        other = Path(shutil.copytree(whole.out, tmp_path / "other"))
        (lost, kept) = sorted(other.glob("pictures/*/sdxl.png"))
        lost.unlink()
        given = ("--clip", str(clip_folder), "--metrics", "clip", "--beside", f"other={other}/sdxl.png")
        assert evaluate(*given) == 0
        assert evaluate.report()["sample"]["captions"] == 1
        assert "Not measured: 1 of 2 captions, of which 'other' has no picture." in capsys.readouterr().out
        kept.parent.rename(kept.parent.with_name("another caption"))
        assert evaluate(*given) == 2
        said = capsys.readouterr().err
        assert "--beside: no caption has a picture in every row: of the 2 that are made, 'other' lacks 2." in said

    def test_the_frechet_distance_can_be_of_clips_features(self, evaluate, whole, clip_folder, depth_folder):
        shutil.copytree(whole.out, evaluate.out)
        more = ("--clip", str(clip_folder), "--fid-features", "clip", "--metrics", "fid")
        assert evaluate(*PLUGINS, "--depth", str(depth_folder), *more) == 0
        (figure,) = evaluate.report()["figures"]
        assert figure["name"] == "Fréchet, CLIP"
        assert set(figure["ways"]) == set(WAYS) - {"SDXL"}
        assert all(found["value"] > 0 for found in figure["ways"].values())


class TestGoingOn:
    def test_nothing_is_made_twice_and_no_model_is_loaded_for_nothing(self, whole, monkeypatch, tmp_path, depth_folder):
        # another report takes the place of the one that is there
        again = replace(whole, out=Path(shutil.copytree(whole.out, tmp_path / "again")))
        before = again.pictures()
        monkeypatch.setattr("lib_xadapter.evaluation.program.load_models", None)
        assert again(*PLUGINS, "--depth", str(depth_folder), "--metrics", "fid") == 1
        assert again.pictures() == before

    @pytest.mark.parametrize("finished", [1, 2, 3, 5])
    def test_a_run_that_was_killed_goes_on_where_it_was(self, evaluate, monkeypatch, finished):
        """Whichever picture it was killed after."""
        saved, calls = [], []
        save, run = ways.save_picture, composed.XAdapterPipeline.run

        def save_so_many(path, *given):
            if len(saved) == finished:
                raise KeyboardInterrupt
            saved.append(save(path, *given))

        def counted(self, request, side=None, *given, **named):
            calls.append(side is None)
            return run(self, request, side, *given, **named)

        monkeypatch.setattr(composed.XAdapterPipeline, "run", counted)
        with monkeypatch.context() as patch:
            patch.setattr(ways, "save_picture", save_so_many)
            assert evaluate("--metrics", "condition") == 130
        before = evaluate.pictures()
        assert len(before) == finished
        assert evaluate("--metrics", "condition") == 1
        after = evaluate.pictures()
        assert len(after) == 8
        assert {path: after[path] for path in before} == before

    def test_a_killed_process_leaves_no_half_picture(self, evaluate):
        killed_after_three = (
            "import os, signal, sys\n"
            "from lib_xadapter.evaluation import ways\n"
            "from lib_xadapter.headless import cli\n"
            "save, saved = ways.save_picture, []\n"
            "def killed(path, *given):\n"
            "    saved.append(save(path, *given))\n"
            "    if len(saved) == 3: os.kill(os.getpid(), signal.SIGKILL)\n"
            "ways.save_picture = killed\n"
            "cli.main(sys.argv[1:])\n"
        )
        ended = subprocess.run(
            [sys.executable, "-c", killed_after_three, *evaluate.words()], capture_output=True, timeout=1800
        )
        assert ended.returncode == -9
        before = evaluate.pictures()
        assert len(before) == 3
        assert evaluate("--metrics", "condition") == 1
        assert before.items() <= evaluate.pictures().items()
        assert len(evaluate.pictures()) == 8
        for path in evaluate.pictures():
            Image.open(evaluate.out / path).load()

    def test_more_weights_use_the_bases_side_again(self, evaluate, monkeypatch):
        assert evaluate("--limit", "1", "--metrics", "condition") == 1
        stages = []
        make = ways.make_together

        def watched(models, jobs, rules, told, *more):
            def show(stage, done, total):
                stages.extend([stage] * (done == 0))

            return make(models, jobs, rules, show, *more)

        monkeypatch.setattr(ways, "make_together", watched)
        assert evaluate("--limit", "1", "--metrics", "condition", "--weight", "1", "0.5", "1.5") == 1
        assert stages == ["recording", "SDXL", "SDXL"]

    def test_other_models_or_settings_need_another_folder(self, evaluate, capsys):
        assert evaluate("--limit", "1", "--metrics", "condition") == 1
        for more, told in (
            (("--steps", "3"), "were made with 'steps' 2, not 3"),
            (("--lora", "small-style"), "were made with 'lora' [], not [['small-style.safetensors ("),
            (("--guidance-end", "0.5"), "were made with 'guidance_end' 1.0, not 0.5"),
        ):
            assert evaluate("--limit", "1", *more) == 2
            assert told in capsys.readouterr().err

    def test_pictures_of_another_type_need_another_folder_unless_all_are_made(self, evaluate, capsys):
        given = ("--metrics", "condition", "--dtype", "bfloat16")
        assert evaluate("--limit", "1", "--metrics", "condition") == 1
        before = evaluate.pictures()
        assert evaluate("--limit", "1", *given) == 1
        assert evaluate.report()["made_with"]["dtype"] == "float32"
        assert evaluate(*given) == 2
        assert "were made with 'dtype' 'float32', not 'bfloat16'" in capsys.readouterr().err
        assert evaluate.pictures() == before

    def test_another_textual_inversion_under_a_name_in_the_captions_needs_another_folder(
        self, evaluate, tmp_path, capsys
    ):
        folder = tmp_path / "embeddings"
        for name in ("ball", "nowhere"):
            save_inversion(folder / f"{name}.safetensors", 1)
        given = ["--limit", "1", "--metrics", "condition", "--embeddings", str(folder)]
        assert evaluate(*given) == 1
        save_inversion(folder / "nowhere.safetensors", 2)
        assert evaluate(*given) == 1
        save_inversion(folder / "ball.safetensors", 2)
        assert evaluate(*given) == 2
        assert "were made with 'embeddings' {'ball': 'ball.safetensors" in capsys.readouterr().err

    def test_an_adapter_that_was_trained_further_needs_another_folder(self, evaluate, tmp_path, capsys):
        """Its name and its size are the same."""
        (released,) = evaluate.models.rglob("small.safetensors")
        adapter = Path(shutil.copy(released, tmp_path / "adapter.safetensors"))
        given = ("--limit", "1", "--metrics", "condition", "--adapter", str(adapter))
        assert evaluate(*given) == 1
        content = adapter.read_bytes()
        adapter.write_bytes(content[:-100] + bytes(byte ^ 1 for byte in content[-100:]))
        assert evaluate(*given) == 2
        assert "were made with 'adapter' 'adapter.safetensors (" in capsys.readouterr().err

    def test_another_depth_estimator_needs_another_folder_where_there_are_depth_maps(
        self, evaluate, whole, tmp_path, depth_folder, capsys
    ):
        shutil.copytree(whole.out, evaluate.out)
        other = Path(shutil.copytree(depth_folder, tmp_path / "other"))
        assert evaluate(*PLUGINS, "--depth", str(other), "--metrics", "fid") == 2
        assert "were made with 'depth' 'depth" in capsys.readouterr().err
        assert evaluate("--limit", "1", "--metrics", "fid", "--out", str(tmp_path / "none")) == 1
        given = ("--limit", "1", "--metrics", "fid", "--out", str(tmp_path / "none"), "--depth", str(other))
        assert evaluate(*given) == 1

    def test_loras_of_one_file_name_are_told_apart(self, evaluate, tmp_path, capsys):
        (style,) = evaluate.models.rglob("small-style.safetensors")
        (tmp_path / "other").mkdir()
        other = shutil.copy(style, tmp_path / "other")
        given = ("--limit", "1", "--metrics", "condition", "--lora", f"{other}:0.5")
        assert evaluate(*given, "small-style") == 1
        assert evaluate(*given) == 2
        assert "were made with 'lora' [[" in capsys.readouterr().err

    def test_texts_for_sdxl_can_become_more_but_none_another(self, evaluate, tmp_path, capsys):
        told = tmp_path / "told"
        told.mkdir()
        (told / "ball.txt").write_text("a green hill", encoding="utf-8")
        given = ("--upgraded-captions", str(told), "--metrics", "condition")
        assert evaluate("--limit", "1", *given) == 1
        before = evaluate.pictures()
        (told / "moon.txt").write_text("a red moon", encoding="utf-8")
        assert evaluate(*given) == 1
        assert before.items() < evaluate.pictures().items()
        (told / "ball.txt").write_text("a green hull", encoding="utf-8")
        assert evaluate(*given) == 2
        said = capsys.readouterr().err
        assert "--upgraded-captions: of 'ball' there are pictures" in said
        assert "SDXL was told 'a green hill', not 'a green hull'" in said

    def test_without_the_bases_picture_and_latents_all_that_came_of_them_is_made_again(self, evaluate):
        given = ("--limit", "1", "--metrics", "condition")
        assert evaluate(*given) == 1
        before = evaluate.pictures()
        (folder,) = (evaluate.out / "pictures").iterdir()
        bytes_before = (folder / "base.png").read_bytes()
        (folder / "base.png").unlink()
        (folder / "base.safetensors").unlink()
        assert evaluate(*given) == 1
        assert evaluate.pictures().keys() == before.keys()
        assert (folder / "base.png").read_bytes() == bytes_before
        assert (folder / "base.safetensors").is_file()

    def test_a_folder_without_pictures_belongs_to_nobody(self, evaluate, capsys):
        assert evaluate("--limit", "1", "--base", "small-sdxl") == 2
        assert evaluate("--limit", "1", "--metrics", "condition") == 1


class TestProcesses:
    def test_where_one_of_two_is_lost_both_end_and_what_is_made_is_kept(self, evaluate):
        code = (
            "import os, signal, sys\n"
            "from lib_xadapter.evaluation import ways\n"
            "from lib_xadapter.headless import cli\n"
            "save, saved = ways.save_picture, []\n"
            "def lost(path, *given):\n"
            "    saved.append(save(path, *given))\n"
            "    if os.environ['RANK'] == '1' and len(saved) == 2: os.kill(os.getpid(), signal.SIGKILL)\n"
            "ways.save_picture = lost\n"
            "cli.program()\n"
        )
        driver = evaluate.out.with_name("driver.py")
        driver.write_text(code, encoding="utf-8")
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", str(driver)]
        words = evaluate.words("--metrics", "condition")
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
        ended = subprocess.run([*launcher, *words], capture_output=True, env=environment, timeout=1800)
        assert ended.returncode != 0
        before = evaluate.pictures()
        assert 2 <= len(before) < 8
        assert evaluate("--metrics", "condition") == 1
        assert before.items() <= evaluate.pictures().items()
        assert len(evaluate.pictures()) == 8

    @pytest.mark.parametrize("launcher", ["accelerate", "torchrun"])
    def test_two_share_out_the_work(self, evaluate, launcher):
        launchers = {
            "accelerate": ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"],
            "torchrun": ["torch.distributed.run", "--nproc_per_node", "2"],
        }
        command = [sys.executable, "-m", *launchers[launcher], "--module" if launcher == "accelerate" else "-m"]
        seeds = ["--seed", "1", "2", "--metrics", "condition"]
        ended = subprocess.run(
            [*command, "lib_xadapter", *evaluate.words(*seeds)], capture_output=True, encoding="utf-8", timeout=1800
        )
        assert "Condition reconstruction: there is no --controlnet" in ended.stdout
        assert len(evaluate.pictures()) == 16
        one = Evaluate(evaluate.models, evaluate.tokenizer, evaluate.captions, evaluate.out.with_name("one"))
        assert one(*seeds) == 1
        for path in one.pictures():
            assert grey_levels_apart(Image.open(one.out / path), Image.open(evaluate.out / path)) <= 1


class TestReport:
    def test_every_figure_has_an_interval_for_every_way_it_is_for(self, whole):
        told = whole.report()
        assert told["sample"] == {"captions": 2, "seeds": 1}
        assert told["not_computed"] == {}
        ways_of = {figure["name"]: tuple(figure["ways"]) for figure in told["figures"]}
        assert ways_of == {
            "FID": WAYS[:3],
            "CLIP score": WAYS,
            "SSIM, canny": WAYS,
            "F1, edges": WAYS,
            "SSIM, depth": WAYS,
            "Style similarity": WAYS[1:],
        }
        for figure in told["figures"]:
            for estimate in (*figure["ways"].values(), *figure["differences"]):
                low, high = estimate["interval"]
                assert low <= estimate["value"] <= high

    def test_values_are_those_of_the_pictures(self, whole):
        from lib_xadapter.evaluation.figures.condition import edge_f1, map_similarity
        from lib_xadapter.evaluation.maps import canny

        told = whole.report()
        figures = {figure["name"]: figure for figure in told["figures"]}
        found = []
        for row in told["pictures"]:
            given = Image.open(whole.out / row["pictures"]["canny map"])
            made = canny(Image.open(whole.out / row["pictures"]["X-Adapter"]))
            found.append(edge_f1(made, given))
            assert row["values"]["F1, edges"]["X-Adapter"] == pytest.approx(found[-1], abs=1e-6)
            assert row["values"]["SSIM, canny"]["X-Adapter"] == pytest.approx(map_similarity(made, given), abs=1e-6)
        assert figures["F1, edges"]["ways"]["X-Adapter"]["value"] == pytest.approx(numpy.mean(found))

    def test_the_table_says_it_all_in_text(self, whole):
        text = (whole.out / "table.txt").read_text(encoding="utf-8")
        assert text.startswith("2 captions with 1 seed each, 95 % intervals")
        heading, *rows = text.split("\n\n")[1].splitlines()
        assert re.split(r"  +", heading.strip()) == [
            "FID ↓", "CLIP score ↑", "SSIM, canny ↑", "F1, edges ↑", "SSIM, depth ↑", "Style similarity ↑"
        ]  # fmt: skip
        assert [row.split("  ")[0] for row in rows] == list(WAYS)
        assert rows[3].split()[1] == "–"
        assert "SDEdit + SDXL less X-Adapter" in text
        assert "FID of 2 pictures is far above what it settles to" in text

    def test_what_cannot_be_computed_is_named_with_its_reason(self, evaluate, clip_folder, depth_folder, capsys):
        given = ["--clip", str(depth_folder), "--controlnet", "small-edges", "--control", "canny"]
        assert evaluate("--limit", "1", *given) == 0
        said = capsys.readouterr().out
        assert "Not computed: FID: --inception names no weights of InceptionV3." in said
        assert f"Not computed: CLIP score: --clip: {depth_folder} holds no CLIP model" in said
        assert evaluate.report()["not_computed"].keys() == {"FID", "CLIP score", "Style similarity"}

    def test_fid_can_be_measured_against_the_captions_own_pictures(self, whole, tmp_path, inception_file, depth_folder):
        again = replace(whole, out=Path(shutil.copytree(whole.out, tmp_path / "again")))
        given = [*PLUGINS, "--metrics", "fid", "--inception", str(inception_file), "--depth", str(depth_folder)]
        assert again(*given, "--fid-against", "captions") == 0
        (figure,) = again.report()["figures"]
        assert tuple(figure["ways"]) == WAYS
        assert figure["description"].endswith("from the pictures that the captions came with")
        inception = Inception(inception_file)
        own = [fitted(Image.open(path), (64, 64)) for path in sorted(whole.captions.glob("*.png"))]
        made = [Image.open(path) for path in sorted((again.out / "pictures").glob("*/sdxl.png"))]
        distance = FrechetDistance(inception.features(made), inception.features(own))(numpy.ones((1, 2), int))
        assert figure["ways"]["SDXL"]["value"] == pytest.approx(float(distance[0]), rel=1e-4)

    def test_fid_can_be_measured_against_pictures_of_the_captions_names(
        self, whole, tmp_path, inception_file, depth_folder, capsys
    ):
        again = replace(whole, out=Path(shutil.copytree(whole.out, tmp_path / "again")))
        given = [*PLUGINS, "--metrics", "fid", "--inception", str(inception_file), "--depth", str(depth_folder)]
        others = Path(shutil.copytree(whole.captions, tmp_path / "others"))
        assert again(*given, "--fid-against", str(others)) == 0
        (figure,) = again.report()["figures"]
        assert figure["description"].endswith("from the pictures of the captions in the folder others")
        assert again(*given, "--fid-against", "captions") == 0
        (own,) = again.report()["figures"]
        assert figure["ways"] == own["ways"]
        (others / "moon.png").unlink()
        capsys.readouterr()
        assert again(*given, "--fid-against", str(others)) == 2
        assert f"--fid-against: {others} has no picture 'moon'." in capsys.readouterr().err
        assert again(*given, "--fid-against", "nowhere") == 2
        assert "--fid-against is 'nowhere', expected sdxl, captions or a folder." in capsys.readouterr().err

    def test_metrics_takes_some(self, evaluate, clip_folder):
        assert evaluate("--metrics", "clip", "style", "--clip", str(clip_folder), "--limit", "1") == 0
        told = evaluate.report()
        assert [figure["name"] for figure in told["figures"]] == ["CLIP score", "Style similarity"]
        assert told["not_computed"] == {}

    def test_several_weights_and_switch_points_are_ways_of_their_own(self, evaluate, clip_folder):
        more = ["--weight", "0", "1", "1,0.5,0", "--switch-point", "0.8", "0.5"]
        assert evaluate("--limit", "1", "--metrics", "clip", "--clip", str(clip_folder), *more) == 0
        assert evaluate.report()["ways"] == [
            "SD1.5",
            "SDEdit + SDXL, switch point 0.8",
            "SDEdit + SDXL, switch point 0.5",
            "X-Adapter, switch point 0.8, weight 1",
            "X-Adapter, switch point 0.5, weight 1",
            "X-Adapter, switch point 0.8, weight 1, 0.5, 0",
            "X-Adapter, switch point 0.5, weight 1, 0.5, 0",
            "SDXL",
        ]

    def test_without_an_adapter_there_is_no_such_way(self, evaluate, clip_folder):
        more = ["--adapter", "None", "--metrics", "clip", "--clip", str(clip_folder), "--limit", "1"]
        assert evaluate(*more) == 0
        assert evaluate.report()["ways"] == ["SD1.5", "SDEdit + SDXL", "SDXL"]

    def test_a_broken_picture_is_left_out_by_name_and_the_rest_is_measured(self, evaluate, captioned, tmp_path):
        folder = tmp_path / "captions"
        folder.mkdir()
        for path in captioned.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        (folder / "a.png").write_bytes(b"no picture")
        (folder / "a.txt").write_text("broken")
        (folder / "b.txt").write_text("no picture at all")
        given = ["--captions", str(folder), "--controlnet", "small-edges", "--control", "canny"]
        assert evaluate(*given, "--metrics", "condition") == 0
        told = evaluate.report()
        assert told["sample"]["captions"] == 2
        ((name, reason),) = told["left_out"].items()
        assert name.startswith("a-")
        assert "a.png is no picture that can be read" in reason
        assert told["skipped"] == {"no picture": ["b"]}


class TestBadInput:
    @pytest.mark.parametrize(
        ("more", "told"),
        [
            (["--captions", "nowhere.txt"], "--captions: nowhere.txt cannot be read"),
            (["--width", "100"], "--width is 100, expected a multiple of 8 from 64 to 4096"),
            (["--seed", "-1"], "--seed is -1, expected a whole number from 0"),
            (["--limit", "0"], "--limit is 0, expected a whole number from 1"),
            (["--resamples", "5"], "--resamples is 5, expected a whole number from 100"),
            (["--metrics", "beauty"], "argument --metrics: invalid choice: 'beauty'"),
            (["--inception", "nowhere"], "--inception: there is no nowhere"),
            (["--clip", "nowhere"], "--clip: there is no nowhere"),
            (["--controlnet", "small-edges"], "--control is given 0 times, expected once for each --controlnet"),
            (["--control", "canny"], "--control is given 1 times, expected once for each --controlnet"),
            (["--controlnet", "small-edges", "--control", "depth"], "--control is depth, but --depth names no"),
            (
                ["--upgraded-controlnet", "small-edges", "--upgraded-control", "depth"],
                "--upgraded-control is depth, but --depth names no",
            ),
            (["--upgraded-control", "canny"], "expected once for each --upgraded-controlnet"),
            (["--controlnet", "small-edges", "--control", "canny", "--control-scale", "3"], "--control-scale is 3"),
            (["--controlnet", "small-edges", "small-edges", "--control", "canny", "canny"], "a kind of map twice"),
            (["--base-prompt", "<lora:small-style>"], "--base-prompt names a LoRA; name it by --lora"),
            (["--upgraded", "small-sd15"], "--upgraded:"),
            (["--base", "nobody"], "--base: there is no checkpoint 'nobody'"),
            (["--device", "abacus"], "--device is 'abacus'"),
            (["--guidance-start", "0.9", "--guidance-end", "0.1"], "--guidance-start is 0.9, after --guidance-end"),
            (["--base-start", "control image"], "--base-start is 'control image', but there is no"),
        ],
    )  # fmt: skip
    def test_it_is_told_in_one_line(self, evaluate, capsys, more, told):
        try:
            status = evaluate(*more)
        except SystemExit as ended:
            status = ended.code
        said = capsys.readouterr().err.strip().splitlines()
        assert status == 2
        assert told in said[-1]
        assert not evaluate.pictures()

    def test_a_folder_without_captions_is_told(self, evaluate, capsys, tmp_path):
        (tmp_path / "empty").mkdir()
        assert evaluate("--captions", str(tmp_path / "empty")) == 2
        assert "has no caption that can be used (it holds none)" in capsys.readouterr().err
