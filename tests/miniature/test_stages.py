"""The table of stages, and the order in which they are made."""

from __future__ import annotations

import pytest

pytest.importorskip("diffusers", reason="needs the extra 'headless'")

import torch

from lib_xadapter.errors import WrongFile
from lib_xadapter.headless.cli import main
from lib_xadapter.mapping import MappingLayers, layout_for
from lib_xadapter.miniature import architectures, measures, plugins, program
from lib_xadapter.miniature.judge import Judge
from lib_xadapter.miniature.making import MAKERS, Work
from lib_xadapter.miniature.stages import HOURS, STAGES


def test_every_stage_has_its_maker():
    assert MAKERS.keys() == STAGES.keys()


def test_every_stage_needs_only_stages_before_it():
    seen: set[str] = set()
    for name, stage in STAGES.items():
        assert set(stage.needs) <= seen, name
        seen.add(name)


def test_two_cores_can_make_all_of_it_in_the_time_that_is_said():
    finished: dict[str, float] = {}
    cores, waiting = [0.0, 0.0], list(STAGES.values())
    while waiting:
        core = min(range(2), key=cores.__getitem__)
        ready = [stage for stage in waiting if all(finished.get(name, 1e9) <= cores[core] for name in stage.needs)]
        if not ready:
            cores[core] = min(time for time in finished.values() if time > cores[core])
            continue
        waiting.remove(ready[0])
        cores[core] += ready[0].minutes
        finished[ready[0].name] = cores[core]
    assert max(cores) <= HOURS * 60


def test_all_weights_fit_the_repository():
    """fp16, two bytes a parameter, with room for each tensor's name."""
    with torch.device("meta"):
        base, upgraded = architectures.base_unet(), architectures.upgraded_unet()
        modules = [
            *(base, upgraded, architectures.vae("sd1"), architectures.vae("sdxl")),
            *(architectures.BaseText(), architectures.UpgradedText(), architectures.t2i_adapter(), Judge()),
            *(architectures.controlnet(base), architectures.controlnet(base)),
            *(measures.clip(), measures.depth_estimator()),
            *(architectures.upgraded_controlnet(upgraded), MappingLayers(layout_for(base, upgraded))),
        ]
        loras = [
            form.change(layer.weight, form.rank)
            for form, unet in [
                *((one, base) for one in plugins.FORMATS.values()),
                (plugins.FORMATS["palette"], upgraded),
            ]
            for _, layer in plugins.changed_layers(unet, form.convolutions)
        ]
    weights = [weight for module in [*modules, *loras] for weight in module.parameters()]
    named = 150
    assert sum(2 * weight.numel() + named for weight in weights) < 25e6


def test_a_stage_begins_when_what_it_needs_is_done():
    waiting = [STAGES[name] for name in ("base", "edges", "judge")]
    assert [stage.name for stage in program._can_begin(waiting, busy=set())] == ["base", "judge"]
    assert [stage.name for stage in program._can_begin(waiting[1:], busy={"judge"})] == ["edges"]


def test_a_stage_without_what_it_needs_says_which_is_missing(tmp_path):
    with pytest.raises(WrongFile, match="'base-vae' is not done"):
        Work(tmp_path).load("base-vae", architectures.vae("sd1"))


@pytest.mark.parametrize(
    "wrong", [["--share", "0"], ["--hours", "-1"], ["--workers", "0"], ["--seed", "-1"], ["--seed", "100"]]
)
def test_a_wrong_option_is_one_sentence(wrong, tmp_path, capsys):
    assert main(["miniature", "--out", str(tmp_path / "out"), *wrong]) == 2
    assert wrong[0] in capsys.readouterr().err


def test_a_folder_of_another_share_or_seed_is_refused(tmp_path, capsys):
    tiny = ["miniature", "--out", str(tmp_path), "--stage", "base-text"]
    assert main([*tiny, "--share", "0.0005"]) == 0
    assert main([*tiny, "--share", "0.0005", "--seed", "1"]) == 2
    assert main(tiny) == 2
    assert "was made with --seed 0 --share 0.0005; name another folder." in capsys.readouterr().err


def test_a_stage_that_is_done_is_not_made_again(tmp_path, capsys):
    tiny = ["miniature", "--out", str(tmp_path), "--share", "0.0005", "--stage", "base-text"]
    assert main(tiny) == 0
    weights = tmp_path / "stages/base-text/weights.safetensors"
    made = weights.stat().st_mtime_ns
    assert main(tiny) == 0
    assert weights.stat().st_mtime_ns == made
