"""`XAdapterPipeline` with every scheduler of diffusers, with parts that are offloaded, and with a compiled UNet."""

from __future__ import annotations

import diffusers
import pytest
import torch

from lib_xadapter.errors import DoesNotFit
from lib_xadapter.headless import XAdapterPipeline
from lib_xadapter.headless.samplers import check_scheduler
from lib_xadapter.headless.schedulers import denoised_from
from tests.headless.test_composed import latents

SMALL = {"width": 64, "height": 64}
REFUSED = {
    "flow matching": ["HeliosDMDScheduler", "HeliosScheduler"],
    "from pictures to noise": ["DDIMInverseScheduler", "DPMSolverMultistepInverseScheduler"],
    "no noise level for each timestep": [
        "AmusedScheduler",
        "BlockRefinementScheduler",
        "CMStochasticIterativeScheduler",
        "CosineDPMSolverMultistepScheduler",
        "DDPMWuerstchenScheduler",
        "DiscreteDDIMScheduler",
        "EDMDPMSolverMultistepScheduler",
        "EDMEulerScheduler",
        "EntropyBoundScheduler",
        "FlowMapEulerDiscreteScheduler",
        "FlowMatchEulerDiscreteScheduler",
        "FlowMatchHeunDiscreteScheduler",
        "FlowMatchLCMScheduler",
        "IPNDMScheduler",
        "KarrasVeScheduler",
        "LTXEulerAncestralRFScheduler",
        "MiniMaxH3Scheduler",
        "PiflowScheduler",
        "RFD4ProteinaScheduler",
        "SCMScheduler",
        "ScoreSdeVeScheduler",
        "VQDiffusionScheduler",
    ],
    "noise levels are those of other models": ["CogVideoXDDIMScheduler", "CogVideoXDPMScheduler"],
    "each of its steps needs mask, original_image": ["RePaintScheduler"],
}
NEEDED = {
    "AmusedScheduler": {"mask_token_id": 0},
    "RFD4ProteinaScheduler": {"schedule_mode": "power", "noise_mode": "tan", "tsr_k": 1.0, "tsr_sigma": 1.0},
    "VQDiffusionScheduler": {"num_vec_classes": 4},
}
"""What a scheduler cannot be made without."""
FOLLOWED = [
    "DDIMParallelScheduler",
    "DDIMScheduler",
    "DDPMParallelScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSDEScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LCMScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "SASolverScheduler",
    "TCDScheduler",
    "UnCLIPScheduler",
    "UniPCMultistepScheduler",
]


@pytest.fixture(scope="module")
def loaded(small) -> XAdapterPipeline:
    made = XAdapterPipeline.from_single_file(
        base=small.base, upgraded=small.upgraded, adapter=small.adapter, tokenizer=small.tokenizer
    )
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture
def pipe(loaded):
    """Its schedulers are put back."""
    own = loaded.base.scheduler, loaded.upgraded.scheduler
    yield loaded
    loaded.base.scheduler, loaded.upgraded.scheduler = own


def with_scheduler(pipe: XAdapterPipeline, name: str) -> XAdapterPipeline:
    kind = getattr(diffusers, name)
    for pipeline in (pipe.base, pipe.upgraded):
        # it takes no other noise levels than its own
        own = {"beta_schedule": "squaredcos_cap_v2"} if name == "UnCLIPScheduler" else {}
        pipeline.scheduler = kind.from_config({**pipeline.scheduler.config, **own})
    return pipe


@pytest.mark.parametrize("name", FOLLOWED)
def test_a_scheduler_is_followed(pipe, name):
    made = latents(with_scheduler(pipe, name), num_inference_steps=4, **SMALL)
    alone = latents(pipe, num_inference_steps=4, weight=0.0, **SMALL)
    assert bool(torch.isfinite(made).all())
    assert float((made - alone).norm() / alone.norm()) > 1e-3


@pytest.mark.parametrize(
    ("name", "reason"), [(name, reason) for reason, names in REFUSED.items() for name in names], ids=lambda word: word
)
def test_a_scheduler_that_cannot_be_followed_is_refused_by_name(name, reason):
    scheduler = getattr(diffusers, name)(**NEEDED.get(name, {}))
    with pytest.raises(DoesNotFit, match=f"{name} cannot be followed: .*{reason}"):
        check_scheduler(scheduler)


@pytest.mark.parametrize("part", ["base", "upgraded"])
def test_it_is_refused_before_anything_is_sampled(pipe, part):
    getattr(pipe, part).scheduler = diffusers.EDMEulerScheduler()
    called = []
    hook = pipe.base.unet.register_forward_pre_hook(lambda *_: called.append(1))
    with pytest.raises(DoesNotFit, match="EDMEulerScheduler cannot be followed"):
        latents(pipe, **SMALL)
    hook.remove()
    assert not called


@pytest.mark.skipif(not diffusers.__version__.startswith("0.42."), reason="the lists are those of diffusers 0.42")
def test_every_scheduler_of_diffusers_is_followed_or_refused():
    there = {name for name in dir(diffusers) if name.endswith("Scheduler")}
    assert there == {*FOLLOWED, *(name for names in REFUSED.values() for name in names)}


def test_flow_levels_of_a_solver_that_has_both_are_refused(pipe):
    config = pipe.upgraded.scheduler.config
    pipe.upgraded.scheduler = diffusers.UniPCMultistepScheduler.from_config(config, use_flow_sigmas=True)
    with pytest.raises(DoesNotFit, match="flow matching"):
        latents(pipe, **SMALL)


@pytest.mark.parametrize("part", ["base", "upgraded"])
def test_v_prediction_and_zero_terminal_snr(pipe, part):
    pipeline = getattr(pipe, part)
    options = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    pipeline.scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config, **options)
    led, alone = (latents(pipe, num_inference_steps=3, weight=weight, **SMALL) for weight in (1.0, 0.0))
    assert bool(torch.isfinite(led).all())
    assert float((led - alone).norm() / alone.norm()) > 1e-3


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_a_prediction_of_each_kind_tells_the_same_clean_latent(kind):
    clean, noise = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3)
    sigma = 2.5
    alpha = 1 / (1 + sigma**2) ** 0.5
    output = {"epsilon": noise, "v_prediction": alpha * noise - sigma * alpha * clean, "sample": clean}[kind]
    assert torch.allclose(denoised_from(output, clean + sigma * noise, sigma, kind), clean, atol=1e-5)


@pytest.fixture
def own_pipe(small):
    """One that may be changed."""
    made = XAdapterPipeline.from_single_file(
        base=small.base, upgraded=small.upgraded, adapter=small.adapter, tokenizer=small.tokenizer
    )
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="module")
def plain(loaded) -> torch.Tensor:
    return latents(loaded, **SMALL)


@pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
def test_groups_can_be_offloaded(own_pipe, plain, kind):
    """From memory to memory here, which takes the same ways."""
    cpu = torch.device("cpu")
    options = {"num_blocks_per_group": 1} if kind == "block_level" else {}
    for pipeline in (own_pipe.base, own_pipe.upgraded):
        pipeline.unet.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type=kind, **options)
    assert torch.equal(latents(own_pipe, **SMALL), plain)
    assert torch.equal(latents(own_pipe, memory="recorded", **SMALL), plain)


def test_parts_hooked_by_accelerate_stay_hooked(own_pipe, plain):
    """As `enable_model_cpu_offload` hooks them, which itself wants an accelerator."""
    from accelerate import cpu_offload_with_hook

    hooks = []
    for pipeline in (own_pipe.base, own_pipe.upgraded):
        for part in (pipeline.text_encoder, pipeline.unet, pipeline.vae):
            _, hook = cpu_offload_with_hook(part, torch.device("cpu"), prev_module_hook=hooks[-1] if hooks else None)
            hooks.append(hook)
    assert torch.equal(latents(own_pipe, **SMALL), plain)
    assert all(hasattr(part, "_hf_hook") for part in (own_pipe.base.unet, own_pipe.upgraded.unet))


def test_compiled_blocks_are_tapped(own_pipe, plain):
    """Also where they were called, and so compiled, before X-Adapter's hooks were there, and after."""
    torch.compiler.reset()
    for pipeline in (own_pipe.base, own_pipe.upgraded):
        pipeline.unet.compile_repeated_blocks(backend="eager")
    before = latents(own_pipe, weight=0.0, **SMALL)
    assert torch.allclose(latents(own_pipe, **SMALL), plain, atol=1e-4)
    assert torch.allclose(latents(own_pipe, weight=0.0, **SMALL), before, atol=1e-4)
    assert float((before - plain).norm() / plain.norm()) > 1e-3


@pytest.mark.parametrize("name", ["base", "upgraded"])
def test_unets_that_are_compiled_as_a_whole_are_refused(own_pipe, name):
    """Hooks that come after compilation are not called: X-Adapter would do nothing, without a word."""
    pipeline = getattr(own_pipe, name)
    plain_unet = pipeline.unet
    pipeline.unet = torch.compile(plain_unet, backend="eager")
    with pytest.raises(DoesNotFit, match=f"The UNet of '{name}' is compiled as a whole"):
        latents(own_pipe, **SMALL)
    pipeline.unet = plain_unet
    plain_unet.compile(backend="eager")
    with pytest.raises(DoesNotFit, match=f"The UNet of '{name}' is compiled as a whole"):
        latents(own_pipe, **SMALL)


def test_freeu_and_vae_tiling_take_part(own_pipe, plain):
    own_pipe.base.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    own_pipe.upgraded.vae.enable_tiling()
    assert float((latents(own_pipe, **SMALL) - plain).norm() / plain.norm()) > 1e-3


def test_loras_of_peft_act_with_their_weights(own_pipe, plain, small):
    pytest.importorskip("peft", reason="diffusers loads LoRAs by it")
    own_pipe.base.load_lora_weights(str(small.lora.parent), weight_name=small.lora.name, adapter_name="style")
    own_pipe.base.set_adapters(["style"], [0.7])
    made = latents(own_pipe, **SMALL)
    assert float((made - plain).norm() / plain.norm()) > 1e-3
    own_pipe.base.unload_lora_weights()
    assert torch.allclose(latents(own_pipe, **SMALL), plain, atol=1e-4)
