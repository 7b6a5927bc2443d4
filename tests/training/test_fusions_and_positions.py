"""Every fusion at every position is what a forward pass written out by hand computes."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lib_xadapter.errors import WrongFile
from lib_xadapter.evaluations import Evaluation
from lib_xadapter.feature_sources import BaseStep, Lockstep
from lib_xadapter.headless.inspection import describe
from lib_xadapter.joint_stage import Coupling, JointStage
from lib_xadapter.mapping import MappingLayers, layout_for, load_adapter, save_adapter
from lib_xadapter.mapping_paths import EagerMapping
from lib_xadapter.pairs import Pair
from lib_xadapter.recording import expected_size
from lib_xadapter.rows import batch_rows
from lib_xadapter.taps import FUSIONS, POSITIONS, check_fit, encoder_blocks, read_features
from lib_xadapter.trajectory import Trajectory
from tests.seeded import fill, seeded

from .tiny_pair import BASE_WIDTH, POOLED, TOKENS, UPGRADED_WIDTH, sizes

ROWS, TIMESTEP = 2, 500
WEIGHTS = (1.0, 0.5, 0.25)
Change = Callable[[tuple[str, int], Tensor], Tensor]


def told(upgraded: bool) -> tuple[Tensor, Tensor]:
    """Latent and tokens of a call."""
    latent = seeded("latent", (ROWS, 4, 16, 16)) if upgraded else seeded("base latent", (ROWS, 4, 8, 8))
    return latent, seeded("tokens", (ROWS, TOKENS, UPGRADED_WIDTH if upgraded else BASE_WIDTH))


def embedded(unet: nn.Module, upgraded: bool) -> Tensor:
    """The time embedding of a call, with SDXL's sizes."""
    times = torch.full((ROWS,), TIMESTEP)
    embedding = unet.time_embedding(unet.time_proj(times))
    if upgraded:
        numbers = unet.add_time_proj(sizes(ROWS).flatten()).reshape(ROWS, -1)
        embedding = embedding + unet.add_embedding(torch.cat([seeded("pooled", (ROWS, POOLED)), numbers], dim=-1))
    return embedding


def call(unet: nn.Module, upgraded: bool) -> Tensor:
    """The UNet's own forward pass."""
    latent, tokens = told(upgraded)
    added = {"text_embeds": seeded("pooled", (ROWS, POOLED)), "time_ids": sizes(ROWS)} if upgraded else None
    return unet(latent, TIMESTEP, encoder_hidden_states=tokens, added_cond_kwargs=added).sample


def by_hand(unet: nn.Module, upgraded: bool, change: Change) -> Tensor:
    """The same, layer after layer; `change` gets the output of each block, the encoder's before it is halved."""
    (latent, tokens), embedding = told(upgraded), embedded(unet, upgraded)

    def attended(block: nn.Module, place: int, x: Tensor) -> Tensor:
        return block.attentions[place](x, encoder_hidden_states=tokens).sample if hasattr(block, "attentions") else x

    x = unet.conv_in(latent)
    skips = [x]
    for number, block in enumerate(unet.down_blocks):
        for place, resnet in enumerate(block.resnets):
            x = attended(block, place, resnet(x, embedding))
            if place == len(block.resnets) - 1:
                x = change(("encoder", number), x)
            skips.append(x)
        for downsampler in block.downsamplers or ():
            x = downsampler(x)
            skips.append(x)
    x = change(("middle", 0), unet.mid_block(x, embedding, encoder_hidden_states=tokens))
    for number, block in enumerate(unet.up_blocks):
        for place, resnet in enumerate(block.resnets):
            x = attended(block, place, resnet(torch.cat([x, skips.pop()], dim=1), embedding))
        for upsampler in block.upsamplers or ():
            x = upsampler(x)
        x = change(("decoder", number), x)
    return unet.conv_out(unet.conv_act(unet.conv_norm_out(x)))


# where each level of a position reads and adds: base, upgraded
DECODER = [(("decoder", 1), ("middle", 0)), (("decoder", 2), ("decoder", 0)), (("decoder", 3), ("decoder", 1))]
ENCODER = [(("encoder", level), ("encoder", level)) for level in (2, 1, 0)]
PLACES = {"decoder": DECODER, "encoder": ENCODER, "both": ENCODER + DECODER}


def fused_by_hand(fusion: str, feature: Tensor, shift: Tensor, scale: Tensor | None, weight: float) -> Tensor:
    if fusion == "addition":
        return feature + weight * shift
    if fusion == "guidance":
        return (1 - weight) * feature + weight * shift
    mean, variance = feature.mean((2, 3), keepdim=True), feature.var((2, 3), keepdim=True, unbiased=False)
    normalised = (feature - mean) / (variance + 1e-5).sqrt()
    return feature + weight * (scale * normalised + shift)


def layers_for(base: nn.Module, upgraded: nn.Module, fusion: str, positions: str, **more: bool) -> MappingLayers:
    layers = MappingLayers(layout_for(base, upgraded, 2, positions, **more), fusion, positions)
    return fill(layers, f"{fusion}.{positions}.")


def joint_call(base: nn.Module, upgraded: nn.Module, layers: MappingLayers, weights=WEIGHTS) -> Tensor:
    """A joint step by the core."""
    rows = batch_rows([1, 1], with_uncond=False)
    with read_features(base, layers.taps) as reader:

        def denoise(latent: Tensor, evaluation: Evaluation) -> BaseStep:
            call(base, False)
            return BaseStep(reader.take(), rows, latent)

        source = Lockstep(denoise, Trajectory(torch.zeros(ROWS, 4, 8, 8)))
        joint = JointStage(source, Coupling(EagerMapping(layers), weights)).evaluate(Evaluation(1.0, 0, 0.0), rows)
        with joint.fused_into(upgraded, slice(0, ROWS)):
            return call(upgraded, True)


KINDS = list(itertools.product(FUSIONS, POSITIONS))


def test_the_table_written_here_knows_every_position():
    assert PLACES.keys() == POSITIONS.keys()


def test_by_hand_is_the_unets_own_forward_pass(base, upgraded):
    for unet, is_upgraded in ((base, False), (upgraded, True)):
        plain = by_hand(unet, is_upgraded, lambda place, x: x)
        torch.testing.assert_close(call(unet, is_upgraded), plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("fusion", "positions"), KINDS)
def test_a_joint_step_is_that_by_hand(base, upgraded, fusion, positions):
    layers, features = layers_for(base, upgraded, fusion, positions), {}

    def noted(place: tuple[str, int], x: Tensor) -> Tensor:
        features[place] = x
        return x

    by_hand(base, False, noted)

    def fused(place: tuple[str, int], x: Tensor) -> Tensor:
        for level, (read, added) in enumerate(PLACES[positions]):
            if added == place:
                hidden = layers.hidden(level, features[read])
                scale = layers.gamma[level](hidden) if fusion == "spade" else None
                x = fused_by_hand(fusion, x, layers.zero_out[level](hidden), scale, WEIGHTS[level % 3])
        return x

    expected = by_hand(upgraded, True, fused)
    torch.testing.assert_close(joint_call(base, upgraded, layers), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(expected, call(upgraded, True), atol=1e-2)


@pytest.mark.parametrize(("fusion", "positions"), KINDS)
def test_zeros_leave_the_upgraded_model_as_it_is_or_fade_it_out(base, upgraded, fusion, positions):
    """Guidance goes from the feature towards the residual, which is zero in the beginning."""
    layers = layers_for(base, upgraded, fusion, positions).zero_output()
    weights = (0.5, 0.5, 0.5)
    factor = 0.5 if fusion == "guidance" else 1.0
    places = {added for _, added in PLACES[positions]}
    expected = by_hand(upgraded, True, lambda place, x: factor * x if place in places else x)
    torch.testing.assert_close(joint_call(base, upgraded, layers, weights), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("fusion", "positions"), KINDS)
def test_a_file_tells_what_it_was_trained_for(base, upgraded, fusion, positions, tmp_path):
    layers, path = layers_for(base, upgraded, fusion, positions, norm=False), tmp_path / "own.safetensors"
    save_adapter(layers, path, Pair("sd1", "sdxl").metadata())
    again = load_adapter(path)
    assert (again.fusion, again.positions, again.taps) == (fusion, positions, POSITIONS[positions])
    assert torch.equal(joint_call(base, upgraded, again), joint_call(base, upgraded, layers))
    check_fit(again, base, upgraded)
    assert describe(path)[:1] == ["own.safetensors: an X-Adapter for SD1.5 → SDXL"]
    assert f"  positions: {positions}, fusion: {fusion}" in describe(path)


def test_a_spade_file_without_its_scales_is_told_by_its_key(base, upgraded, tmp_path):
    plain, path = layers_for(base, upgraded, "addition", "decoder"), tmp_path / "own.safetensors"
    plain.fusion = "spade"
    save_adapter(plain, path)
    with pytest.raises(WrongFile, match=r"own.safetensors misses 'gamma.0.bias'"):
        load_adapter(path)


@pytest.mark.parametrize("positions", POSITIONS)
def test_layers_take_the_time_and_norms_where_they_are_asked_to(base, upgraded, positions):
    layout = layout_for(base, upgraded, 2, positions, timestep=True)
    assert {block.time_channels for level in layout for block in level} == {4 * 8}
    with read_features(base, POSITIONS[positions]) as reader:
        call(base, False)
    found = reader.take()
    layers = fill(MappingLayers(layout, positions=positions), "timed.")
    residuals = [layers(found.levels, factor * found.time_embedding) for factor in (1, 2)]
    assert all(not torch.equal(one, other) for one, other in zip(*residuals, strict=True))


@pytest.mark.parametrize("positions", POSITIONS)
def test_the_size_of_a_recording_counts_every_level(base, positions):
    taps = POSITIONS[positions]
    with read_features(base, taps) as reader:
        call(base, False)
    size = sum(level.nbytes for level in reader.take().levels)
    assert expected_size(base, ROWS, (8, 8), 1, taps) == size


class Downsample(nn.Identity):
    pass


class CompVisEncoder(nn.Module):
    """The bones of the CompVis layout: where its blocks downsample."""

    def __init__(self, blocks: int, downsampling: tuple[int, ...]) -> None:
        super().__init__()
        self.input_blocks = nn.ModuleList(
            nn.Sequential(Downsample() if place in downsampling else nn.Identity()) for place in range(blocks)
        )


@pytest.mark.parametrize(
    ("unet", "ends"), [(CompVisEncoder(12, (3, 6, 9)), (2, 5, 8, 11)), (CompVisEncoder(9, (3, 6)), (2, 5, 8))]
)
def test_in_compvis_layout_an_encoder_block_ends_before_it_downsamples(unet, ends):
    assert encoder_blocks(unet) == [unet.input_blocks[place] for place in ends]
