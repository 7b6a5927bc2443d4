"""`XAdapterPipeline`: two pipelines of diffusers as their owner set them up, and as they were when the call is over."""

from __future__ import annotations

import copy
import hashlib
import signal
import threading

import pytest
import torch
from diffusers import (
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
)
from PIL import Image

from lib_xadapter.errors import DoesNotFit, WrongArgument
from lib_xadapter.headless import XAdapterPipeline
from lib_xadapter.headless.model_files import load_controlnet

pytestmark = pytest.mark.usefixtures("one_thread")

SIZE = {"width": 128, "height": 128}
STEPS = 3


def seeded(seed: int = 5) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def latents(pipe: XAdapterPipeline, **given) -> torch.Tensor:
    """Of a picture in few steps."""
    usual = {"prompt": "a cat", "num_inference_steps": STEPS, "generator": seeded(), "output_type": "latent", **SIZE}
    return pipe(**{**usual, **given}).images


@pytest.fixture(scope="module")
def plain(pipe) -> torch.Tensor:
    return latents(pipe)


def differs(one: torch.Tensor, other: torch.Tensor) -> bool:
    return float((one - other).norm() / other.norm()) > 1e-4


class TestPictures:
    def test_the_base_paints_what_it_paints_alone(self, pipe):
        alone = pipe.base(
            "a cat", width=64, height=64, num_inference_steps=STEPS, guidance_scale=5.0, generator=seeded()
        ).images[0]
        made = pipe("a cat", num_inference_steps=STEPS, generator=seeded(), return_base_images=True, **SIZE)
        assert made.base_images[0].tobytes() == alone.tobytes()

    def test_weight_0_is_the_plain_image_to_image_pipeline_over_the_bases_picture(self, pipe):
        made = pipe("a cat", num_inference_steps=STEPS, generator=seeded(), weight=0.0, return_base_images=True, **SIZE)
        plain = StableDiffusionXLImg2ImgPipeline(**pipe.upgraded.components, add_watermarker=False)
        start = made.base_images[0].resize((128, 128), Image.Resampling.LANCZOS)
        theirs = plain("a cat", image=start, strength=0.8, num_inference_steps=STEPS, generator=seeded(),
                       guidance_scale=5.0).images[0]  # fmt: skip
        assert made.images[0].tobytes() == theirs.tobytes()

    @pytest.mark.parametrize("strength", [0.4, 1.0])
    @pytest.mark.parametrize("count", [1, 2])
    def test_weight_0_is_the_plain_image_to_image_pipeline(self, pipe, picture, strength, count):
        given = {
            "image": picture,
            "strength": strength,
            "num_inference_steps": 5,
            "guidance_scale": 6.0,
            "negative_prompt": "fog",
            "num_images_per_prompt": count,
        }
        plain = StableDiffusionXLImg2ImgPipeline(**pipe.upgraded.components, add_watermarker=False)
        theirs = plain("a cat", generator=[seeded(7 + place) for place in range(count)], **given).images
        ours = pipe("a cat", generator=[seeded(7 + place) for place in range(count)], weight=0.0, **given).images
        assert [image.tobytes() for image in ours] == [image.tobytes() for image in theirs]

    @pytest.mark.parametrize("strength", [0.5, 1.0])
    def test_weight_0_is_the_plain_inpainting_pipeline(self, pipe, picture, mask, strength):
        given = {"image": picture, "mask_image": mask, "strength": strength, "num_inference_steps": 4, **SIZE}
        plain = StableDiffusionXLInpaintPipeline(**pipe.upgraded.components, add_watermarker=False)
        theirs = plain("a cat", generator=seeded(), guidance_scale=5.0, **given).images[0]
        ours = pipe("a cat", generator=seeded(), weight=0.0, **given).images[0]
        assert ours.tobytes() == theirs.tobytes()

    def test_weight_0_in_a_single_stage_is_the_plain_text_to_image_pipeline(self, pipe):
        given = {"num_inference_steps": STEPS, "guidance_scale": 6.0, "negative_prompt": "fog", **SIZE}
        theirs = pipe.upgraded("a cat", generator=seeded(), **given).images[0]
        ours = pipe("a cat", generator=seeded(), weight=0.0, single_stage=True, **given).images[0]
        assert ours.tobytes() == theirs.tobytes()

    def test_sdxl_follows_the_base_over_a_given_picture(self, pipe, picture, mask):
        for given in ({"image": picture}, {"image": picture, "mask_image": mask}):
            led, alone = (latents(pipe, weight=weight, strength=0.7, **given) for weight in (1.0, 0.0))
            assert differs(led, alone)

    def test_what_is_masked_out_stays(self, pipe, picture, mask):
        given = {"image": picture, "mask_image": mask, "num_inference_steps": 4}
        ours, alone = (latents(pipe, weight=weight, strength=0.5, **given) for weight in (1.0, 0.0))
        assert torch.equal(ours[..., :8], alone[..., :8])
        assert differs(ours[..., 8:], alone[..., 8:])

    @pytest.mark.parametrize(
        "given",
        [
            {"base_prompt": "ink"},
            {"base_negative_prompt": "fog"},
            {"weight": 0.5},
            {"weight": (1.0, 0.0, 1.0)},
            {"switch_point": 0.4},
            {"guidance_end": 0.3},
            {"base_guidance_scale": 2.0},
            {"base_num_inference_steps": 5},
            {"base_width": 96},
            {"base_generator": seeded(9)},
            {"single_stage": True},
            {"refresh_every": 2},
            {"cond_only": True},
            {"uncond_weight": 0.0},
            {"guidance_scale": 1.0},
        ],
        ids=str,
    )
    def test_every_argument_changes_the_picture(self, pipe, plain, given):
        assert differs(latents(pipe, **given), plain)

    def test_embeddings_stand_for_prompts(self, pipe, plain):
        base, base_negative = pipe.base.encode_prompt("a cat", "cpu", 1, True)
        cond, uncond, pooled, pooled_uncond = pipe.upgraded.encode_prompt(
            "a cat", device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True
        )
        made = latents(
            pipe, prompt=None, prompt_embeds=cond, negative_prompt_embeds=uncond, pooled_prompt_embeds=pooled,
            negative_pooled_prompt_embeds=pooled_uncond, base_prompt_embeds=base,
            base_negative_prompt_embeds=base_negative,
        )  # fmt: skip
        assert torch.equal(made, plain)

    def test_image_k_of_a_batch_has_generator_k(self, pipe):
        made = latents(pipe, num_images_per_prompt=2, generator=[seeded(3), seeded(4)])
        alone = latents(pipe, generator=[seeded(4)])
        assert torch.allclose(made[1:], alone, atol=1e-3)
        assert differs(made[:1], alone)

    def test_several_prompts_make_several_pictures(self, pipe):
        made = latents(pipe, prompt=["a cat", "a dog"], generator=[seeded(3), seeded(3)])
        assert torch.allclose(made[1:], latents(pipe, prompt="a dog", generator=[seeded(3)]), atol=1e-3)

    @pytest.fixture
    def led(self, pipe, small) -> XAdapterPipeline:
        """By a ControlNet of the base."""
        net = load_controlnet(small.controlnet, pipe.base.unet, torch.float32)
        parts = {**pipe.base.components, "controlnet": net}
        base = StableDiffusionControlNetPipeline(**parts, requires_safety_checker=False)
        base.set_progress_bar_config(disable=True)
        return XAdapterPipeline(base, pipe.upgraded, pipe.adapter)

    def test_a_controlnet_of_the_base_acts(self, led, plain, picture):
        assert differs(latents(led, control_image=picture), plain)
        off = latents(led, control_image=picture, base_arguments={"controlnet_conditioning_scale": 0.0})
        assert torch.allclose(off, plain, atol=1e-4)

    def test_a_controlnets_window_is_the_same_noise_levels_in_both_stages(self, led, picture):
        scales = []
        led.base.controlnet.register_forward_pre_hook(
            lambda module, args, named: scales.append(named["conditioning_scale"]), with_kwargs=True
        )
        window = {"control_guidance_end": 0.5}
        latents(led, control_image=picture, num_inference_steps=4, switch_point=0.5, base_arguments=window)
        assert scales == [1, 1, 0, 0, 0, 0]

    def test_a_callback_sees_and_changes_the_tensors_it_asks_for(self, pipe, plain):
        seen = []

        def halve(pipeline, step, timestep, tensors):
            seen.append((step, sorted(tensors)))
            return {"latents": tensors["latents"] / 2} if step == 0 else {}

        names = ["latents", "prompt_embeds", "add_time_ids"]
        made = latents(pipe, callback_on_step_end=halve, callback_on_step_end_tensor_inputs=names)
        assert seen == [(0, sorted(names)), (1, sorted(names))]
        assert differs(made, plain)

    @pytest.mark.parametrize("kind", ["pil", "np", "pt", "latent"])
    def test_output_types_and_tuples_are_those_of_diffusers(self, pipe, kind):
        (images,) = pipe(
            "a cat", num_inference_steps=1, generator=seeded(), output_type=kind, return_dict=False, **SIZE
        )
        assert (images[0].size if kind == "pil" else tuple(images.shape)) == {
            "pil": (128, 128),
            "np": (1, 128, 128, 3),
            "pt": (1, 3, 128, 128),
            "latent": (1, 4, 16, 16),
        }[kind]


class TestMemory:
    def test_recorded_is_lockstep(self, pipe, plain):
        assert torch.equal(latents(pipe, memory="recorded"), plain)

    def test_a_recording_is_used_again(self, pipe, monkeypatch):
        first = pipe("a cat", num_inference_steps=STEPS, generator=seeded(), memory="recorded", **SIZE)
        calls = []
        hook = pipe.base.unet.register_forward_pre_hook(lambda *_: calls.append(1))
        try:
            again = latents(pipe, weight=0.5, memory="recorded", base_side=first.base_side)
        finally:
            hook.remove()
        assert not calls
        assert torch.equal(again, latents(pipe, weight=0.5))

    def test_the_bases_picture_is_used_again_in_lockstep(self, pipe):
        first = pipe("a cat", num_inference_steps=STEPS, generator=seeded(), **SIZE)
        again = latents(pipe, weight=0.5, base_side=first.base_side)
        assert torch.equal(again, latents(pipe, weight=0.5))


class Hooks:
    """Everything on two pipelines that a call could leave behind."""

    def __init__(self, pipe: XAdapterPipeline) -> None:
        self._pipe = pipe
        for pipeline in (pipe.base, pipe.upgraded):
            for name in ("text_encoder", "text_encoder_2"):
                if getattr(pipeline, name, None) is not None:
                    # transformers hooks its own models when they are first called
                    getattr(pipeline, name)(torch.zeros(1, 2, dtype=torch.long), output_hidden_states=True)
        self.before = self._state()

    def _state(self) -> list:
        found: list = []
        for pipeline in (self._pipe.base, self._pipe.upgraded):
            found.append({name: id(value) for name, value in vars(pipeline).items() if name in PARTS})
            found.append(copy.deepcopy(dict(pipeline.config)))
            found.append(copy.deepcopy(dict(pipeline.scheduler.config)))
            found.append(vars(pipeline).get("_progress_bar_config"))
            found.append({name: id(one) for name, one in getattr(pipeline.unet, "attn_processors", {}).items()})
            for part in pipeline.components.values():
                found += _state_of(part) if isinstance(part, torch.nn.Module) else []
        return found

    def are_as_before(self) -> bool:
        return self._state() == self.before


def _state_of(part: torch.nn.Module) -> list:
    hooks = [
        (len(module._forward_hooks), len(module._forward_pre_hooks), vars(module).get("forward"), module.training)
        for module in part.modules()
    ]
    tensors = part.state_dict().values()
    return [hooks, [hashlib.sha256(bytes(value.reshape(-1).view(torch.uint8).numpy())).digest() for value in tensors]]


PARTS = ("scheduler", "unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")


class Stop(Exception):
    """Raised from a callback."""


class TestLeavesNothingBehind:
    def test_after_a_picture(self, pipe):
        hooks = Hooks(pipe)
        latents(pipe)
        latents(pipe, memory="recorded")
        assert hooks.are_as_before()

    @pytest.mark.parametrize("kind", [Stop, KeyboardInterrupt])
    @pytest.mark.parametrize("memory", ["lockstep", "recorded"])
    def test_after_something_is_raised_in_the_joint_stage(self, pipe, plain, kind, memory):
        hooks = Hooks(pipe)

        def stop(pipeline, step, timestep, tensors):
            raise kind

        with pytest.raises(kind):
            latents(pipe, memory=memory, callback_on_step_end=stop)
        assert hooks.are_as_before()
        assert torch.equal(latents(pipe), plain)

    @pytest.mark.parametrize("call", [2, 5], ids=["in stage 1", "in the joint stage"])
    def test_after_something_is_raised_in_the_base(self, pipe, plain, call):
        """In the joint stage, on its own thread."""
        hooks, calls = Hooks(pipe), []

        def fail(*_):
            calls.append(1)
            if len(calls) == call:
                raise Stop

        hook = pipe.base.unet.register_forward_pre_hook(fail)
        with pytest.raises(Stop):
            latents(pipe)
        hook.remove()
        assert hooks.are_as_before()
        assert torch.equal(latents(pipe), plain)

    @pytest.fixture
    def listening(self):
        """Programs that were started in the background do not hear Ctrl-C."""
        own = signal.signal(signal.SIGINT, signal.default_int_handler)
        yield
        signal.signal(signal.SIGINT, own)

    def test_after_ctrl_c_while_the_base_works_beside_sdxl(self, pipe, plain, listening):
        hooks = Hooks(pipe)

        def press(*_):
            if threading.current_thread() is not threading.main_thread():
                signal.raise_signal(signal.SIGINT)

        hook = pipe.base.unet.register_forward_pre_hook(press)
        with pytest.raises(KeyboardInterrupt):
            latents(pipe)
        hook.remove()
        assert hooks.are_as_before()
        assert torch.equal(latents(pipe), plain)

    def test_after_an_interruption_in_stage_1(self, pipe, plain):
        hooks, calls = Hooks(pipe), []

        def interrupt(base, step, timestep, tensors):
            pipe.interrupt = base._interrupt = True
            return tensors

        hook = pipe.base.unet.register_forward_pre_hook(lambda *_: calls.append(1))
        made = latents(pipe, base_arguments={"callback_on_step_end": interrupt}, switch_point=1.0)
        hook.remove()
        assert made.shape == plain.shape
        assert len(calls) == 2
        assert hooks.are_as_before()
        assert torch.equal(latents(pipe), plain)

    def test_after_an_interruption(self, pipe, plain):
        hooks, steps = Hooks(pipe), []

        def interrupt(pipeline, step, timestep, tensors):
            assert pipeline is pipe
            assert list(tensors) == ["latents"]
            steps.append(step)
            pipeline._interrupt = True
            return tensors

        made = latents(pipe, callback_on_step_end=interrupt)
        assert steps == [0]
        assert made.shape == plain.shape
        assert differs(made, plain)
        assert hooks.are_as_before()
        assert torch.equal(latents(pipe), plain)

    def test_the_callers_grad_mode_stays(self, pipe):
        assert torch.is_grad_enabled()
        latents(pipe)
        assert torch.is_grad_enabled()


class TestWrongCalls:
    @pytest.mark.parametrize(
        ("given", "sentence"),
        [
            ({"prompt": None}, "'prompt' is missing"),
            ({"switch_point": 2.0}, "'switch_point' is 2.0, expected a number from 0 to 1"),
            ({"weight": (1.0, 2.0)}, "'weight' is .*, expected a number or a list of 3"),
            ({"width": 100}, "'width' is 100, expected a multiple of 8"),
            ({"base_width": 100}, "'base_width' is 100"),
            ({"memory": "none"}, "'memory' is 'none'"),
            ({"mask_image": Image.new("L", (8, 8))}, "'mask_image' is given, but there is no 'image'"),
            ({"image": Image.new("RGB", (64, 64)), "strength": 0.0}, "'strength' is 0"),
            ({"image": Image.new("RGB", (64, 64)), "single_stage": True}, "a single stage starts from noise"),
            ({"prompt": ["a", "b"], "base_prompt": ["c"]}, "'base_prompt' is for 1 pictures, 'prompt' for 2"),
        ],
        ids=str,
    )
    def test_one_sentence_names_the_argument(self, pipe, given, sentence):
        with pytest.raises(WrongArgument, match=sentence):
            latents(pipe, **given)

    def test_pipelines_of_another_kind_are_named(self, pipe):
        with pytest.raises(DoesNotFit, match="'base' is a StableDiffusionXLPipeline, expected"):
            XAdapterPipeline(pipe.upgraded, pipe.upgraded, pipe.adapter)
        with pytest.raises(DoesNotFit, match="'upgraded' is a StableDiffusionPipeline, expected"):
            XAdapterPipeline(pipe.base, pipe.base, pipe.adapter)
        other = StableDiffusionImg2ImgPipeline(**pipe.base.components, requires_safety_checker=False)
        with pytest.raises(DoesNotFit, match="'base' is a StableDiffusionImg2ImgPipeline, expected a text-to-image"):
            XAdapterPipeline(other, pipe.upgraded, pipe.adapter)


def test_the_adapter_is_saved_and_found_again(pipe, tmp_path, plain):
    pipe.save_pretrained(tmp_path)
    again = XAdapterPipeline(pipe.base, pipe.upgraded, tmp_path / "x_adapter.safetensors")
    assert torch.equal(latents(again), plain)


def test_folders_of_diffusers_make_the_same_pipeline(pipe, tmp_path, plain):
    pipe.base.save_pretrained(tmp_path / "base")
    pipe.upgraded.save_pretrained(tmp_path / "upgraded")
    pipe.save_pretrained(tmp_path / "adapter")
    again = XAdapterPipeline.from_pretrained(
        base=tmp_path / "base", upgraded=tmp_path / "upgraded", adapter=tmp_path / "adapter", local_files_only=True
    )
    again.set_progress_bar_config(disable=True)
    assert not differs(latents(again), plain)
