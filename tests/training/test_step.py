"""The loss of a step is the paper's, its gradients are right, and nothing is computed that they do not need."""

from __future__ import annotations

import dataclasses
import itertools
from types import SimpleNamespace

import pytest
import torch
from diffusers import ControlNetModel, DDIMScheduler, DDPMScheduler
from diffusers.training_utils import compute_snr
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lib_xadapter.errors import DoesNotFit
from lib_xadapter.headless.model_configs import NOISE
from lib_xadapter.mapping import MappingLayers, layout_for
from lib_xadapter.taps import FUSIONS, POSITIONS, fuse_into, middle_block, read_features
from lib_xadapter.training.encoding import EncodedRows
from lib_xadapter.training.recipe import Recipe
from lib_xadapter.training.step import Diffusion, Draws, TrainingStep
from tests.seeded import fill, seeded

from .tiny_pair import BASE_WIDTH, POOLED, TOKENS, UPGRADED_WIDTH, sizes, tiny_base, tiny_upgraded

ROWS = 2
KINDS = list(itertools.product(FUSIONS, POSITIONS))
KINDS_OF_TENSORS = ("up_opt", "in_conv", "block1", "block2", "timestep_proj", "zero_out", "gamma")
WIDTH = 1e-7
"""Of finite differences: so small that hardly a ReLU has its kink in between."""


def pipeline_of(unet: nn.Module, **scheduler: object) -> SimpleNamespace:
    return SimpleNamespace(unet=unet, scheduler=DDIMScheduler(**NOISE, **scheduler))


def rows_of(dtype: torch.dtype = torch.float32, size: int = 16) -> EncodedRows:
    def given(name: str, *shape: int) -> Tensor:
        return seeded(name, (ROWS, *shape)).to(dtype)

    return EncodedRows(
        given("upgraded mean", 4, size, size),
        given("upgraded std", 4, size, size).abs() / 10,
        given("base mean", 4, size // 2, size // 2),
        given("base std", 4, size // 2, size // 2).abs() / 10,
        given("base text", TOKENS, BASE_WIDTH),
        given("upgraded text", TOKENS, UPGRADED_WIDTH),
        given("upgraded pooled", POOLED),
        given("empty text", TOKENS, UPGRADED_WIDTH),
        given("empty pooled", POOLED),
        sizes(ROWS).to(dtype),
    )


def draws_of(recipe: Recipe, dtype: torch.dtype = torch.float32, size: int = 16) -> Draws:
    return Draws.of(recipe, 0, range(ROWS), (size, size), 1000).to(torch.device("cpu"), dtype)


def layers_of(
    base: nn.Module, upgraded: nn.Module, fusion: str = "addition", positions: str = "decoder"
) -> MappingLayers:
    layout = layout_for(base, upgraded, 2, positions, timestep=True)
    return fill(MappingLayers(layout, fusion, positions), f"{fusion}.{positions}.").requires_grad_(True)


def loss_of(step: TrainingStep, rows: EncodedRows, draws: Draws) -> Tensor:
    with step.losses(rows, draws) as losses:
        return losses.mean()


@pytest.fixture(scope="module")
def precise() -> tuple[nn.Module, nn.Module]:
    """Both in float64."""
    return tiny_base().double(), tiny_upgraded().double()


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize(("fusion", "positions"), KINDS)
def test_gradients_are_those_of_finite_differences(precise, fusion, positions, checkpointing):
    """Along a random direction in all mapping layers, and along one in each kind of their tensors, in float64."""
    base, upgraded = precise
    recipe = Recipe(min_snr=5.0)
    layers = layers_of(base, upgraded, fusion, positions).double()
    step = TrainingStep(pipeline_of(base), pipeline_of(upgraded), layers, recipe, checkpointing=checkpointing)
    rows, draws = rows_of(torch.float64), draws_of(recipe, torch.float64)
    with step.losses(rows, draws) as losses:
        losses.mean().backward()
    upgraded.disable_gradient_checkpointing()
    weights = dict(layers.named_parameters())
    directions = {name: seeded(name, tuple(weight.shape)).double() for name, weight in weights.items()}

    def moved(names: list[str], distance: float) -> float:
        """The loss from a point so far along the direction."""
        with torch.no_grad():
            for name in names:
                weights[name].add_(distance * directions[name])
            loss = float(loss_of(step, rows, draws))
            for name in names:
                weights[name].sub_(distance * directions[name])
        return loss

    for kind in ("", *KINDS_OF_TENSORS[: 0 if checkpointing else None]):
        names = [name for name in weights if kind in name]
        if names:
            expected = sum(float((weights[name].grad * directions[name]).sum()) for name in names)
            found = (moved(names, WIDTH) - moved(names, -WIDTH)) / (2 * WIDTH)
            assert found == pytest.approx(expected, rel=2e-5, abs=1e-7), kind


def test_gradients_reach_the_mapping_layers_and_nothing_else(base, upgraded):
    layers = layers_of(base, upgraded)
    step = TrainingStep(pipeline_of(base), pipeline_of(upgraded), layers, Recipe())
    with step.losses(rows_of(), draws_of(Recipe())) as losses:
        losses.sum().backward()
    assert all(parameter.grad is not None for parameter in layers.parameters())
    assert all(parameter.grad is None for unet in (base, upgraded) for parameter in unet.parameters())


@pytest.mark.parametrize("predicts", ["epsilon", "v_prediction"])
def test_the_loss_is_the_error_of_the_upgraded_prediction(base, upgraded, predicts):
    """Written out by diffusers' own scheduler for training."""
    recipe, layers = Recipe(), layers_of(base, upgraded).zero_output()
    pipeline = pipeline_of(upgraded, prediction_type=predicts)
    rows, draws = rows_of(), draws_of(recipe)
    scheduler = DDPMScheduler(**{name: value for name, value in NOISE.items() if name != "steps_offset"})
    latent = rows.upgraded_mean + rows.upgraded_std * draws.upgraded_latent
    noised = scheduler.add_noise(latent, draws.upgraded_noise, draws.timesteps)
    added = {"text_embeds": rows.empty_pooled, "time_ids": rows.sizes}
    with torch.no_grad():
        prediction = upgraded(noised, draws.timesteps, rows.empty_text, added_cond_kwargs=added).sample
    target = draws.upgraded_noise
    if predicts == "v_prediction":
        target = scheduler.get_velocity(latent, draws.upgraded_noise, draws.timesteps)
    expected = (prediction - target).square().mean((1, 2, 3))
    with TrainingStep(pipeline_of(base), pipeline, layers, recipe).losses(rows, draws) as losses:
        torch.testing.assert_close(losses.detach(), expected, rtol=1e-5, atol=1e-5)


def test_the_base_sees_the_caption_and_its_own_noise_at_the_same_timestep(base, upgraded):
    recipe, layers, seen = Recipe(), layers_of(base, upgraded), {}
    rows, draws = rows_of(), draws_of(recipe)
    step = TrainingStep(pipeline_of(base), pipeline_of(upgraded), layers, recipe)
    handle = base.register_forward_pre_hook(
        lambda module, given, named: seen.update(latent=given[0], timesteps=given[1], **named), with_kwargs=True
    )
    loss_of(step, rows, draws)
    handle.remove()
    latent = rows.base_mean + rows.base_std * draws.base_latent
    scheduler = DDPMScheduler(**{name: value for name, value in NOISE.items() if name != "steps_offset"})
    torch.testing.assert_close(seen["latent"], scheduler.add_noise(latent, draws.base_noise, draws.timesteps))
    assert torch.equal(seen["timesteps"], draws.timesteps)
    assert torch.equal(seen["encoder_hidden_states"], rows.base_text)


@pytest.mark.parametrize(("share", "expected"), [(1.0, 1.0), (0.0, 0.0), (0.5, 0.5)])
def test_as_many_upgraded_prompts_are_empty_as_are_asked_for(share, expected):
    empty = Draws.of(Recipe(empty_prompts=share), 0, range(400), (2, 2), 1000).empty
    assert float(empty.float().mean()) == pytest.approx(expected, abs=0.1)


def test_a_prompt_that_is_not_empty_is_the_caption(base, upgraded):
    layers = layers_of(base, upgraded)
    step = TrainingStep(pipeline_of(base), pipeline_of(upgraded), layers, Recipe())
    rows, draws = rows_of(), draws_of(Recipe())
    told = dataclasses.replace(draws, empty=torch.zeros(ROWS, dtype=torch.bool))
    captions = dataclasses.replace(rows, empty_text=rows.upgraded_text, empty_pooled=rows.upgraded_pooled)
    with torch.no_grad():
        assert loss_of(step, rows, told) == loss_of(step, captions, draws) != loss_of(step, rows, draws)


def test_every_row_draws_its_own_whatever_process_computes_it():
    together = Draws.of(Recipe(), 7, range(4), (4, 4), 1000)
    alone = Draws.of(Recipe(), 7, [2], (4, 4), 1000)
    for name, value in vars(alone).items():
        assert torch.equal(getattr(together, name)[2:3], value)
    later, other = Draws.of(Recipe(), 8, [2], (4, 4), 1000), Draws.of(Recipe(seed=1), 7, [2], (4, 4), 1000)
    assert not torch.equal(later.upgraded_noise, alone.upgraded_noise)
    assert not torch.equal(other.upgraded_noise, alone.upgraded_noise)
    assert not torch.equal(alone.base_noise[..., :2, :2], alone.upgraded_noise[..., :2, :2])


def test_shared_noise_is_the_upgraded_models_made_smaller():
    draws = Draws.of(Recipe(shared_noise=True), 0, range(50), (32, 32), 1000)
    quarters = draws.upgraded_noise.unfold(2, 2, 2).unfold(3, 2, 2)
    torch.testing.assert_close(draws.base_noise, quarters.sum((-1, -2)) / 2)
    assert float(draws.base_noise.std()) == pytest.approx(1, abs=0.02)


def test_the_base_runs_with_its_controlnet_in_the_rows_that_are_drawn_for_it(base, upgraded):
    net = fill(ControlNetModel.from_unet(base), "controlnet.")
    rows = dataclasses.replace(rows_of(), control=seeded("map", (ROWS, 1, 64, 64)).sigmoid())
    layers = layers_of(base, upgraded)

    def losses(controlnet: nn.Module | None, draws: Draws) -> Tensor:
        step = TrainingStep(pipeline_of(base), pipeline_of(upgraded), layers, Recipe(), controlnet=controlnet)
        with torch.no_grad(), step.losses(rows, draws) as found:
            return found

    draws = dataclasses.replace(draws_of(Recipe()), controlled=torch.tensor([True, False]))
    without, with_it = losses(None, draws), losses(net, draws)
    assert not torch.isclose(with_it[0], without[0])
    assert torch.isclose(with_it[1], without[1])
    assert draws_of(Recipe(controlled=1.0)).controlled.all() and not draws_of(Recipe()).controlled.any()


@pytest.mark.parametrize("predicts", ["epsilon", "v_prediction"])
def test_min_snr_weights_are_the_papers(predicts):
    scheduler, timesteps, gamma = DDPMScheduler(), torch.tensor([0, 100, 500, 999]), 5.0
    snr = compute_snr(scheduler, timesteps)
    expected = snr.clamp(max=gamma) / (snr + (predicts == "v_prediction"))
    found = Diffusion(scheduler.alphas_cumprod, predicts)
    torch.testing.assert_close(found.weights(timesteps, gamma), expected)
    assert found.weights(timesteps, 0.0).tolist() == [1, 1, 1, 1]


def test_a_model_that_predicts_something_else_is_told(base, upgraded):
    with pytest.raises(DoesNotFit, match="predicts 'sample', expected noise"):
        TrainingStep(pipeline_of(base), pipeline_of(upgraded, prediction_type="sample"), nn.Identity(), Recipe())


def flops(work) -> int:
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def backward_flops(make) -> int:
    """Of the backward pass through what `make` gives, a tensor or several, alone."""
    made = make()
    made = made if isinstance(made, tuple) else (made,)
    return flops(lambda: torch.autograd.backward(made, [torch.ones_like(one) for one in made]))


@pytest.fixture(scope="module")
def parts(base, upgraded):
    """FLOPs of a step's parts, each counted alone."""
    layers, rows, draws = layers_of(base, upgraded), rows_of(), draws_of(Recipe())

    def run_base() -> tuple[Tensor, ...]:
        with torch.no_grad(), read_features(base) as reader:
            base(rows.base_mean, draws.timesteps, rows.base_text)
        return reader.take()

    def run_upgraded() -> Tensor:
        added = {"text_embeds": rows.empty_pooled, "time_ids": rows.sizes}
        return upgraded(rows.upgraded_mean, draws.timesteps, rows.empty_text, added_cond_kwargs=added).sample

    def decode() -> Tensor:
        """Nothing but what follows the middle block needs a gradient."""
        with fuse_into(upgraded, lambda level, x: x.detach().requires_grad_(level == 0) if level == 0 else x):
            return run_upgraded()

    found = run_base()
    return {
        "base": flops(run_base),
        "upgraded": flops(run_upgraded),
        "mapping layers": flops(lambda: layers(found.levels, found.time_embedding)),
        "decoder, backward": backward_flops(decode),
        "mapping layers, backward": backward_flops(lambda: layers(found.levels, found.time_embedding)),
    }


def step_flops(base: nn.Module, upgraded: nn.Module, rows: EncodedRows) -> int:
    step = TrainingStep(pipeline_of(base), pipeline_of(upgraded), layers_of(base, upgraded), Recipe())

    def work() -> None:
        with step.losses(rows, draws_of(Recipe())) as losses:
            losses.sum().backward()

    return flops(work)


def test_a_step_costs_no_more_than_its_parts(base, upgraded, parts):
    assert all(parts.values())
    assert step_flops(base, upgraded, rows_of()) <= 1.05 * sum(parts.values())


def test_a_step_that_also_went_back_through_the_encoder_would_be_noticed(base, upgraded, parts):
    rows = rows_of()
    wasteful = dataclasses.replace(rows, upgraded_mean=rows.upgraded_mean.requires_grad_())
    assert step_flops(base, upgraded, wasteful) > 1.05 * sum(parts.values())


def test_the_graph_begins_behind_the_middle_block(base, upgraded):
    layers, seen = layers_of(base, upgraded), []
    step = TrainingStep(pipeline_of(base), pipeline_of(upgraded), layers, Recipe())
    modules = {"last of the encoder": upgraded.down_blocks[-1], "middle": middle_block(upgraded)}
    modules |= {"decoder": upgraded.up_blocks[0], "base": base}
    for name, module in modules.items():
        module.register_forward_hook(lambda module, given, output, name=name: seen.append((name, graph_of(output))))
    with step.losses(rows_of(), draws_of(Recipe())) as losses:
        assert losses.requires_grad
    for module in modules.values():
        module._forward_hooks.clear()
    assert seen == [("base", False), ("last of the encoder", False), ("middle", False), ("decoder", True)]


def graph_of(output: object) -> bool:
    first = output[0] if isinstance(output, tuple) else getattr(output, "sample", output)
    return first.requires_grad
