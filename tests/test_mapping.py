"""The mapping layers compute what the released code computes, from any file of its layout, at any size."""

from __future__ import annotations

import pytest
import torch

from lib_xadapter import load_adapter
from lib_xadapter.errors import WrongFile
from tests.seeded import seeded
from tests.small_adapter import AdapterPlan, save

VARIANTS = {
    "released": AdapterPlan(),
    "norm": AdapterPlan(norm=True),
    "two_blocks": AdapterPlan(blocks=2),
    "timestep": AdapterPlan(time_channels=128),
}
SIZES = {"square": (4, 4), "wide": (3, 5)}


def features(height: int, width: int, channels=(128, 64, 32)) -> list[torch.Tensor]:
    return [
        seeded(f"feature.{level}", (2, count, height * scale, width * scale))
        for level, (count, scale) in enumerate(zip(channels, (1, 2, 2), strict=True))
    ]


@pytest.mark.parametrize(
    ("variant", "size"),
    [
        ("released", "square"),
        ("released", "wide"),
        ("norm", "square"),
        ("two_blocks", "square"),
        ("timestep", "square"),
    ],
)
def test_residuals_are_those_of_the_released_code(variant, size, golden_mapping, tmp_path):
    file = save(VARIANTS[variant].weights(f"adapter.{variant}."), tmp_path / "adapter.safetensors")
    residuals = load_adapter(file)(features(*SIZES[size]), seeded("time_embedding", (2, 128)))
    for level, residual in enumerate(residuals):
        expected = torch.from_numpy(golden_mapping[f"{variant}.{size}.{level}"])
        torch.testing.assert_close(residual, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("suffix", [".safetensors", ".bin", ".pt"])
def test_every_file_format_gives_the_same_layers(suffix, tmp_path, adapter):
    again = load_adapter(save(AdapterPlan().weights(), tmp_path / f"adapter{suffix}"))
    for ours, theirs in zip(adapter(features(2, 3)), again(features(2, 3)), strict=True):
        assert torch.equal(ours, theirs)


def test_the_file_has_the_released_number_of_tensors_and_parameters():
    shapes = AdapterPlan(in_channels=(1280, 640, 320), out_channels=(1280, 1280, 640)).shapes()
    assert len(shapes) == 48
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == 212_914_240


def test_channel_counts_come_from_the_file(adapter):
    assert adapter.in_channels == (128, 64, 32)
    assert adapter.out_channels == (128, 128, 64)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (3, 5), (7, 4), (9, 13)])
def test_only_the_last_level_doubles_the_size_odd_sizes_included(adapter, height, width):
    sizes = [tuple(residual.shape[-2:]) for residual in adapter(features(height, width))]
    assert sizes == [(height, width), (2 * height, 2 * width), (4 * height, 4 * width)]


def test_rows_do_not_depend_on_their_neighbours(adapter):
    together = adapter(features(3, 4))
    alone = adapter([feature[1:] for feature in features(3, 4)])
    for batch, row in zip(together, alone, strict=True):
        torch.testing.assert_close(batch[1:], row, rtol=1e-5, atol=1e-5)


def test_the_type_is_the_files_unless_another_is_asked_for(tmp_path):
    half = {key: value.half() for key, value in AdapterPlan().weights().items()}
    file = save(half, tmp_path / "half.safetensors")
    assert next(load_adapter(file).parameters()).dtype == torch.float16
    assert next(load_adapter(file, dtype=torch.float32).parameters()).dtype == torch.float32


def without(key: str):
    return lambda weights: weights.pop(key)


def replaced(key: str, value: torch.Tensor):
    return lambda weights: weights.update({key: value})


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (without("body.4.block2.weight"), "misses 'body.4.block2.weight'"),
        (without("zero_out.1.bias"), "misses 'zero_out.1.bias'"),
        (without("zero_out.2.weight"), "misses 'zero_out.2.weight'"),
        (replaced("body.0.skip", torch.zeros(1)), "holds 'body.0.skip', which no X-Adapter has"),
        (replaced("gamma.0.weight", torch.zeros(1)), "holds 'gamma.0.weight', which no X-Adapter has"),
        (replaced("body.9.block1.weight", torch.zeros(1)), "holds 10 ResNet blocks"),
        (replaced("body.1.block1.weight", torch.zeros(128, 64, 3, 3)), "'body.1.block1.weight' is 128x64x3x3"),
        (replaced("body.2.block1.bias", torch.full((128,), float("nan"))), "'body.2.block1.bias' holds NaN"),
        (replaced("body.2.block1.bias", torch.full((128,), float("inf"))), "'body.2.block1.bias' holds NaN"),
        (
            replaced("body.2.block1.bias", torch.full((128,), float("nan")).to(torch.float8_e4m3fn)),
            "'body.2.block1.bias' holds NaN",
        ),
        (replaced("body.2.block1.bias", torch.zeros(128, dtype=torch.int64)), "'body.2.block1.bias' holds torch.int64"),
    ],
)
def test_a_wrong_file_is_told_by_its_key(change, sentence, tmp_path):
    weights = AdapterPlan().weights()
    change(weights)
    with pytest.raises(WrongFile, match=sentence):
        load_adapter(save(weights, tmp_path / "wrong.safetensors"))


def test_group_norms_of_channels_that_they_do_not_fit_are_told(tmp_path):
    plan = AdapterPlan(out_channels=(128, 128, 33), norm=True)
    with pytest.raises(WrongFile, match="GroupNorm in level 2 of 33 channels"):
        load_adapter(save(plan.weights(), tmp_path / "wrong.safetensors"))


def test_another_models_file_is_no_adapter(tmp_path):
    file = save({"lora_unet_mid_block.alpha": torch.zeros(1)}, tmp_path / "style.safetensors")
    with pytest.raises(WrongFile, match="style.safetensors is not an X-Adapter file"):
        load_adapter(file)


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_a_file_that_is_cut_off_says_so(suffix, tmp_path):
    file = save(AdapterPlan().weights(), tmp_path / f"cut{suffix}")
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(WrongFile, match=f"cut{suffix} is cut off"):
        load_adapter(file)


def test_a_pickle_with_code_in_it_is_refused(tmp_path):
    torch.save({"body.0.block1.weight": print}, tmp_path / "code.bin")
    with pytest.raises(WrongFile, match=r"code\.bin .* asks for __builtin__\.print, which no file of tensors needs"):
        load_adapter(tmp_path / "code.bin")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(WrongFile, match=r"no file .*nowhere\.bin"):
        load_adapter(tmp_path / "nowhere.bin")
