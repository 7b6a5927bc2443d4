"""Every kind of LoRA file that the WebUI's Lora extension reads, on the base.

A kind works where the base's finished picture is the one that the WebUI's own txt2img makes with the SD1.5 checkpoint
selected, and where nothing of it is left afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from tests.pictures import grey_levels_apart

from .. import lora_formats
from ..lora_formats import Layer, Shapes, compvis, compvis_name, file_of, kohya, kohya_text, text_file, unet_file, webui
from .asking import HALF, arguments, made, plain
from .conftest import PLAIN, same_bytes
from .server import BASE_CHECKPOINT, UPGRADED_CHECKPOINT, WebUIServer
from .small_loras import TINY15, add_lora, filled

STEPS = {"steps": 3}
PICTURES = {"weight": 0, "switch_point": 0.2, "return_base_image": True}
# of GLoRA, the extension reads the older names only
FORMATS = {name: make for name, make in lora_formats.FORMATS.items() if name != "newer_glora"}


def peft_lora_in_kohyas_names(layer: Layer) -> Shapes:
    """What the extension reads of peft: its names of the two halves."""
    return lora_formats.peft_lora(layer)


def full_difference(layer: Layer) -> Shapes:
    """Of the whole weight, and of the bias where the layer has one."""
    if not layer.name.endswith(("to_k", "to_out.0", "conv2")):
        return {}
    difference = lora_formats.full(layer)
    return difference if not layer.name.endswith("to_k") else {"diff": difference["diff"]}


def glora_of_linear_layers(layer: Layer) -> Shapes:
    """The extension cannot multiply those of convolutions."""
    return {} if layer.kernel else lora_formats.glora(layer)


def compvis_oft(name: str) -> str:
    return "oft_unet_" + compvis_name(name).replace(".", "_")


@dataclass(frozen=True)
class Kind:
    """A file, and how a prompt asks for it."""

    shapes: Shapes
    prompt: str = "a cat <lora:{name}:1>"
    suffix: str = ".safetensors"


def kinds() -> dict[str, Kind]:
    of_unet = FORMATS | {"full": full_difference, "glora": glora_of_linear_layers}
    found = {f"{name} of the UNet": Kind(unet_file(TINY15, make)) for name, make in of_unet.items()}
    for name, make in FORMATS.items():
        if name not in ("lora_with_core", "loha_with_core", "lokr_with_core"):  # the same without convolutions
            found[f"{name} of the text encoder"] = Kind(text_file(TINY15, make))
    unet, text = unet_file(TINY15, lora_formats.lora), text_file(TINY15, lora_formats.lora)
    bundle = {"bundle_emb.bundled.string_to_param.*": (2, TINY15.context_width)}
    first_text_encoder = file_of(TINY15.text_layers(0), lora_formats.lora, kohya_text(0))
    found |= {
        "both": Kind(unet | text),
        "CompVis names": Kind(unet_file(TINY15, lora_formats.lora, compvis)),
        "names of the WebUI's modules": Kind(unet_file(TINY15, lora_formats.lora, webui)),
        "OFT in kohya's names": Kind(unet_file(TINY15, lora_formats.oft, compvis_oft)),
        "peft's names": Kind(unet_file(TINY15, peft_lora_in_kohyas_names, kohya)),
        "numbered text encoder": Kind(unet | first_text_encoder),
        "pickled": Kind(unet, suffix=".pt"),
        "weight 0.3": Kind(unet | text, "a cat <lora:{name}:0.3>"),
        "negative weight": Kind(unet | text, "a cat <lora:{name}:-0.5>"),
        "two weights": Kind(unet | text, "a cat <lora:{name}:0.2:0.9>"),
        "named weights": Kind(unet | text, "a cat <lora:{name}:te=0.1:unet=0.7>"),
        "only the first rank": Kind(unet, "a cat <lora:{name}:1:1:1>"),
        "dyn": Kind(unet, "a cat <lora:{name}:1:dyn=1>"),
        "lyco tag": Kind(unet, "a cat <lyco:{name}:0.8>"),
        "beside another": Kind(text, "a cat <lora:{name}:0.8> <lora:style15:0.5>"),
        # vectors of tiny15's width are no released model's
        "bundled embedding": Kind(bundle, "a bundled cat <lora:{name}:1:model=base>"),
        "LoRA with a bundled embedding": Kind(unet | bundle, "a bundled cat <lora:{name}:1>"),
    }
    return found


KINDS = kinds()
WITHOUT = {"bundled embedding": "a bundled cat", "LoRA with a bundled embedding": "a bundled cat"}


def file_name(kind: str) -> str:
    return "kind " + kind.replace("'", "")


def prompt_of(kind: str) -> str:
    return KINDS[kind].prompt.format(name=file_name(kind))


@pytest.fixture(scope="module")
def server(webui: WebUIServer) -> WebUIServer:
    for name, kind in KINDS.items():
        add_lora(webui, file_name(name), kind.shapes, kind.suffix)
    return webui


@pytest.fixture(scope="module")
def own_pictures(server: WebUIServer, request: pytest.FixtureRequest) -> Iterator[dict[str, Image.Image]]:
    """The WebUI's own picture of each prompt, with the SD1.5 checkpoint selected only once."""
    wanted = {item.callspec.params["kind"] for item in request.session.items if _asks_for_a_kind(item)}
    prompts = {prompt_of(kind) for kind in wanted} | {"a cat", "a bundled cat"}
    assert server.post("/sdapi/v1/options", {"sd_model_checkpoint": BASE_CHECKPOINT}).status == 200
    pictures = {prompt: plain(server, **HALF, **STEPS, prompt=prompt) for prompt in sorted(prompts)}
    assert server.post("/sdapi/v1/options", {"sd_model_checkpoint": UPGRADED_CHECKPOINT}).status == 200
    return pictures


def _asks_for_a_kind(item: pytest.Item) -> bool:
    return item.path.name == "test_lora_kinds.py" and "kind" in getattr(getattr(item, "callspec", None), "params", {})


def base_picture(server: WebUIServer, prompt: str) -> Image.Image:
    answer = made(server.txt2img(**{**PLAIN, **STEPS, "prompt": prompt}, **arguments(**PICTURES)))
    return answer.images[1]


@pytest.fixture(scope="module")
def without_any(server: WebUIServer, own_pictures) -> dict[str, Image.Image]:
    """The base's pictures before it ever had one of these files."""
    return {prompt: base_picture(server, prompt) for prompt in ("a cat", "a bundled cat")}


@pytest.mark.parametrize("kind", KINDS)
def test_is_applied_as_the_webui_applies_it_and_leaves_nothing_behind(server, own_pictures, without_any, kind):
    prompt, plain_prompt = prompt_of(kind), WITHOUT.get(kind, "a cat")
    with_it = base_picture(server, prompt)
    assert bool(server.changed_tensors()) == (kind != "bundled embedding")
    assert grey_levels_apart(with_it, own_pictures[prompt]) <= 1
    assert grey_levels_apart(with_it, without_any[plain_prompt]) > 1
    assert same_bytes(base_picture(server, plain_prompt), without_any[plain_prompt])
    assert server.changed_tensors() == []


@pytest.mark.parametrize(
    ("name", "shapes", "says"),
    [
        ("OFT in kohyas older names", unet_file(TINY15, lora_formats.oft, lora_formats.kohya_oft), "holds no weights"),
        ("GLoRA of convolutions", unet_file(TINY15, lora_formats.glora), "shapes that the SD1.5 model does not have"),
        ("dotted names", unet_file(TINY15, lora_formats.lora, lora_formats.diffusers), "holds no weights"),
        ("wrong widths", unet_file(lora_formats.SD15, lora_formats.norm), "shapes that the SD1.5 model does not have"),
        ("half a LoRA", {"lora_unet_mid_block_attentions_0_proj_in.lora_up.weight": (128, 2)}, "cannot be loaded"),
    ],
)
def test_what_the_extension_cannot_apply_is_refused_by_name(server, without_any, name, shapes, says):
    add_lora(server, name, shapes)
    answer = server.txt2img(**{**PLAIN, "prompt": f"a cat <lora:{name}:1:model=base>"}, **arguments(**PICTURES))
    assert answer.status == 422
    assert name in answer.error and says in answer.error
    assert same_bytes(base_picture(server, "a cat"), without_any["a cat"])
    assert server.changed_tensors() == []


def biases_of_layers_without(layer: Layer) -> Shapes:
    return lora_formats.full(layer) if layer.name.endswith("to_k") else {}


@pytest.mark.parametrize("number_type", [torch.float16, torch.float32], ids=["amid a layer", "at its next step"])
def test_a_base_in_which_the_extension_stopped_is_loaded_anew(server, without_any, number_type):
    """It gives a layer a bias that had none: it cannot in another number type, and then finds no backup of it."""
    name = f"biases {number_type}".replace("torch.", "")
    tensors = filled(unet_file(TINY15, biases_of_layers_without))
    file = server.data / f"models/Lora/{name}.safetensors"
    save_file({key: tensor.to(number_type) for key, tensor in tensors.items()}, file)
    prompt = f"a cat <lora:{name}:1>"
    assert server.txt2img(**{**PLAIN, **STEPS, "prompt": prompt}, **arguments(**PICTURES)).status == 500
    assert same_bytes(base_picture(server, "a cat"), without_any["a cat"])
    assert server.changed_tensors() == []
