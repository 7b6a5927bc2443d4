"""Features are read and residuals added at the released code's places, and the models are left as they were."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lib_xadapter.errors import DoesNotFit
from lib_xadapter.mapping import MappingLayers, read_layout
from lib_xadapter.taps import addition, check_fit, decoder_blocks, fuse_into, guidance, read_features, resized_like
from tests.small_adapter import AdapterPlan
from tests.small_unets import JointInputs, base_unet, call_base, call_upgraded, upgraded_unet

pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def base():
    return base_unet()


@pytest.fixture(scope="module")
def upgraded():
    return upgraded_unet()


@pytest.fixture(params=["square", "wide"])
def inputs(request):
    return JointInputs(request.param)


def close(ours: torch.Tensor, golden, key: str) -> None:
    torch.testing.assert_close(ours, torch.from_numpy(golden[key]), rtol=0, atol=1e-4)


def hooks_of(module: nn.Module) -> int:
    return sum(len(child._forward_hooks) + len(child._forward_pre_hooks) for child in module.modules())


def test_features_are_the_outputs_of_the_last_three_decoder_blocks(base, inputs, golden_joint_step):
    with read_features(base) as reader:
        noise = call_base(base, inputs.base)
    close(noise, golden_joint_step, f"{inputs.size}.base.eps")
    for level, feature in enumerate(reader.take().levels):
        close(feature, golden_joint_step, f"{inputs.size}.feature.{level}")


@pytest.mark.parametrize(
    ("weight", "fuse", "name"),
    [
        (1.0, addition, "scale1.0"),
        (0.5, addition, "scale0.5"),
        (0.5, guidance, "guidance0.5"),
        (0.0, addition, "plain"),
    ],
)
def test_a_joint_step_is_that_of_the_released_code(
    base, upgraded, adapter, inputs, golden_joint_step, weight, fuse, name
):
    with read_features(base) as reader:
        call_base(base, inputs.base)
    residuals = adapter(reader.take().levels)
    for level, residual in enumerate(residuals):
        close(residual, golden_joint_step, f"{inputs.size}.residual.{level}")
    with fuse_into(upgraded, lambda level, feature: fuse(feature, residuals[level], weight)):
        noise = call_upgraded(upgraded, inputs.upgraded)
    close(noise, golden_joint_step, f"{inputs.size}.upgraded.{name}")


def test_features_of_several_calls_are_taken_row_after_row(base, inputs):
    with read_features(base) as reader:
        call_base(base, inputs.base)
        together = reader.take()
        call_base(base, inputs.base[:1])
        call_base(base, inputs.base[1:])
        apart = reader.take()
    assert [len(level) for level in apart.levels] == [2, 2, 2]
    torch.testing.assert_close(apart.levels[2][0], together.levels[2][0])
    assert len(apart.time_embedding) == 2


def test_a_level_that_is_not_asked_for_is_left_alone(upgraded, inputs):
    plain = call_upgraded(upgraded, inputs.upgraded)
    with fuse_into(upgraded, lambda level, feature: feature + 1, levels=()):
        assert torch.equal(call_upgraded(upgraded, inputs.upgraded), plain)


def test_hooks_are_gone_afterwards_even_when_a_model_raises(base, upgraded):
    with pytest.raises(ValueError, match="out of memory"):
        with read_features(base), fuse_into(upgraded, lambda level, feature: feature):
            assert hooks_of(base) == 4
            assert hooks_of(upgraded) == 3
            raise ValueError("out of memory")
    assert hooks_of(base) == hooks_of(upgraded) == 0


def test_a_residual_of_another_size_is_brought_to_the_features():
    feature = torch.zeros(1, 2, 6, 10, dtype=torch.float16)
    residual = resized_like(torch.ones(1, 2, 4, 4), feature)
    assert residual.shape == feature.shape
    assert residual.dtype == feature.dtype
    torch.testing.assert_close(residual, torch.ones_like(feature))


def layers_for(**channels) -> MappingLayers:
    return MappingLayers(read_layout(AdapterPlan(**channels).shapes()))


def test_an_adapter_for_these_models_fits(base, upgraded):
    check_fit(layers_for(), base, upgraded)


@pytest.mark.parametrize(
    ("channels", "sentence"),
    [
        ({"in_channels": (128, 128, 32)}, "level 1 .'body.3'. takes features of 128 channels, the base gives 64"),
        ({"out_channels": (128, 128, 32)}, "level 2 .'zero_out.2'. gives residuals of 32 channels, .* takes 64"),
    ],
)
def test_an_adapter_for_other_models_is_told_by_its_level(channels, sentence, base, upgraded):
    with pytest.raises(DoesNotFit, match=sentence):
        check_fit(layers_for(**channels), base, upgraded)


def test_a_module_that_is_no_unet_is_told():
    with pytest.raises(DoesNotFit, match="Linear is no UNet"):
        decoder_blocks(nn.Linear(1, 1))


class Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.out_channels = channels


class ResBlock(Upsample):
    pass


class CompVisUNet(nn.Module):
    """The bones of the CompVis layout: where its blocks upsample."""

    def __init__(self, blocks: int, upsampling: tuple[int, ...]) -> None:
        super().__init__()
        self.output_blocks = nn.ModuleList(
            nn.Sequential(ResBlock(place), *([Upsample(place)] if place in upsampling else []))
            for place in range(blocks)
        )


@pytest.mark.parametrize(
    ("unet", "ends"), [(CompVisUNet(12, (2, 5, 8)), (2, 5, 8, 11)), (CompVisUNet(9, (2, 5)), (2, 5, 8))]
)
def test_in_compvis_layout_a_decoder_block_ends_where_it_upsamples(unet, ends):
    assert decoder_blocks(unet) == [unet.output_blocks[place] for place in ends]
