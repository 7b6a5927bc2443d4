"""Write small random checkpoints that the real AUTOMATIC1111 WebUI loads, so that it can be tried on a CPU in seconds.

    python small_models.py WEBUI OUTPUT [--full-width-base]

WEBUI is the WebUI's folder (its code, configs and repositories are read, nothing is written there); run this with the
WebUI's own Python. OUTPUT gets the layout of a WebUI `--data-dir`. The WebUI's own model classes (ldm for SD1.5, sgm
for SDXL) are instantiated from shrunken copies of its configs, and what they initialise to is saved:

    models/Stable-diffusion/tinyxl.safetensors + .yaml     SDXL, 1/10 of the width, all blocks and conditioners
    models/Stable-diffusion/tiny15.safetensors + .yaml     SD1.5, likewise
    models/Lora/style15.safetensors, style15_nometa, stylexl   LoRAs for either model, with and without metadata
    models/ControlNet/t2iadapter_canny_sd15.safetensors    a T2I-Adapter for tiny15 (any width loads)
    models/X-Adapter/tiny.safetensors, tiny.bin            mapping layers of the released structure, tiny15 -> tinyxl
    models/tiny-clip/                                      CLIP tokenizer files, from open_clip's own BPE table
    embeddings/base15.safetensors, upgradedxl.safetensors  textual inversions for either model

`--full-width-base` writes these instead (2.9 GB); sd-webui-controlnet builds SD1.5 ControlNets at full width only:

    models/Stable-diffusion/wide15.safetensors + .yaml     SD1.5 at full width in fp16
    models/ControlNet/control_v11p_sd15_canny.safetensors  a ControlNet for it
    models/X-Adapter/wide.safetensors                      mapping layers, wide15 -> tinyxl
    models/wide-clip/                                      tokenizer files

The .yaml files name the tokenizer folder by its absolute path, so OUTPUT is not to be moved.
The output convolutions that training starts at zero get random weights, so that everything reaches the picture, and the
VAEs encode without random spread (a random VAE's posterior is wide, and the WebUI draws from it with the global
generator).
"""

import argparse
import contextlib
import gzip
import itertools
import json
import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import torch
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import save_file

StateDict = dict[str, torch.Tensor]

TINY_CLIP_WIDTH = 64
CLIP_HEAD_WIDTH = 64
OPEN_CLIP_WIDTH = 256  # of ViT-S-32-alt, the smallest text encoder in open_clip's table
TINY_UNET_WIDTH = 32
UNET_PREFIX = "model.diffusion_model."

TINY_BASE_FEATURES = (128, 64, 32)
WIDE_BASE_FEATURES = (1280, 640, 320)
TINY_UPGRADED_FEATURES = (128, 128, 64)

ATTENTION_LAYERS = ("to_q", "to_k", "to_v", "to_out.0")
PROJECTIONS = ("proj_in", "proj_out")


# --- CLIP's tokenizer -------------------------------------------------------------------------------------------------


def byte_letters() -> list[str]:
    """The printable character that stands for each byte in CLIP's vocabulary, in the vocabulary's order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    missing = 256 - len(printable)
    return [chr(code) for code in (*printable, *range(256, 256 + missing))]


def write_tokenizer(folder: Path, width: int) -> None:
    """CLIP tokenizer files and the config of a text encoder of the given width (768 is SD1.5's own)."""
    import open_clip

    table = Path(open_clip.__file__).parent / "bpe_simple_vocab_16e6.txt.gz"
    merges = gzip.decompress(table.read_bytes()).decode().split("\n")[1 : 49152 - 256 - 2 + 1]
    letters = byte_letters()
    words = ["".join(merge.split()) for merge in merges]
    vocabulary = [*letters, *(letter + "</w>" for letter in letters), *words, "<|startoftext|>", "<|endoftext|>"]
    end = "<|endoftext|>"
    special = {"bos_token": "<|startoftext|>", "eos_token": end, "unk_token": end, "pad_token": end}
    files = {
        "vocab.json": {token: number for number, token in enumerate(vocabulary)},
        "special_tokens_map.json": special,
        "tokenizer_config.json": {
            "model_max_length": 77,
            "do_lower_case": True,
            "tokenizer_class": "CLIPTokenizer",
            **special,
        },
        "config.json": {
            "architectures": ["CLIPTextModel"],
            "model_type": "clip_text_model",
            "hidden_size": width,
            "intermediate_size": 4 * width,
            "num_attention_heads": width // CLIP_HEAD_WIDTH,
            "num_hidden_layers": 12,
            "vocab_size": len(vocabulary),
            "max_position_embeddings": 77,
            "hidden_act": "quick_gelu",
            "projection_dim": width,
            "bos_token_id": len(vocabulary) - 2,
            "eos_token_id": len(vocabulary) - 1,
            "pad_token_id": 1,
            "layer_norm_eps": 1e-5,
        },
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, ensure_ascii=False), encoding="utf8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf8")


# --- checkpoints ------------------------------------------------------------------------------------------------------


def tiny_vae() -> dict:
    return {
        "double_z": True,
        "z_channels": 4,
        "resolution": 256,
        "in_channels": 3,
        "out_ch": 3,
        "ch": 32,
        "ch_mult": [1, 1, 1, 1],
        "num_res_blocks": 1,
        "attn_resolutions": [],
        "dropout": 0.0,
    }


def tiny_base_config(webui: Path, clip: Path) -> DictConfig:
    config = OmegaConf.load(webui / "configs/v1-inference.yaml")
    unet = config.model.params.unet_config.params
    unet.model_channels, unet.num_heads, unet.context_dim = TINY_UNET_WIDTH, 4, TINY_CLIP_WIDTH
    config.model.params.first_stage_config.params.ddconfig = tiny_vae()
    config.model.params.cond_stage_config.params = {"version": str(clip)}
    return config


def tiny_upgraded_config(webui: Path, clip: Path) -> DictConfig:
    config = OmegaConf.load(webui / "repositories/generative-models/configs/inference/sd_xl_base.yaml")
    unet = config.model.params.network_config.params
    unet.model_channels, unet.num_head_channels, unet.transformer_depth = TINY_UNET_WIDTH, 16, [1, 1, 2]
    unet.context_dim = TINY_CLIP_WIDTH + OPEN_CLIP_WIDTH
    unet.adm_in_channels = OPEN_CLIP_WIDTH + 6 * 256  # pooled text and six sizes
    unet.spatial_transformer_attn_type = "softmax"
    config.model.params.first_stage_config.params.ddconfig = tiny_vae() | {"attn_type": "vanilla"}
    text_encoders = config.model.params.conditioner_config.params.emb_models
    text_encoders[0].params.version = str(clip)
    text_encoders[1].params.arch = "ViT-S-32-alt"
    return config


def full_width_base_config(webui: Path, clip: Path) -> DictConfig:
    config = OmegaConf.load(webui / "configs/v1-inference.yaml")
    config.model.params.cond_stage_config.params = {"version": str(clip)}
    return config


@contextlib.contextmanager
def untrained_text_encoders() -> Iterator[None]:
    """Inside, the text encoders initialise from their configs instead of fetching pretrained weights."""
    import ldm.modules.encoders.modules as ldm_encoders
    import open_clip
    import sgm.modules.encoders.modules as sgm_encoders
    import transformers

    class UntrainedCLIPTextModel:
        @staticmethod
        def from_pretrained(folder: str, *_: object, **__: object) -> transformers.CLIPTextModel:
            return transformers.CLIPTextModel(transformers.CLIPTextConfig.from_pretrained(folder))

    create = open_clip.create_model_and_transforms

    def create_untrained(*args: object, pretrained: object = None, **kwargs: object) -> object:
        return create(*args, pretrained=None, **kwargs)

    with (
        patch.object(open_clip, "create_model_and_transforms", create_untrained),
        patch.object(ldm_encoders, "CLIPTextModel", UntrainedCLIPTextModel),
        patch.object(sgm_encoders, "CLIPTextModel", UntrainedCLIPTextModel),
    ):
        yield


def wake(state_dict: StateDict, generator: torch.Generator) -> StateDict:
    """Random weights where initialisation left zeros; a VAE encoder without spread: equal inputs, equal pictures.

    A text encoder's last norm that adds nothing would leave a mean of 0, which the WebUI divides by.
    """
    state_dict["first_stage_model.quant_conv.weight"][4:] = 0
    state_dict["first_stage_model.quant_conv.bias"][4:] = -30
    for key, value in state_dict.items():
        if key.endswith(("final_layer_norm.bias", "ln_final.bias")):
            state_dict[key] = torch.randn(value.shape, generator=generator) * 0.3
        if value.dtype.is_floating_point and value.ndim >= 2 and not value.any():
            state_dict[key] = torch.randn(value.shape, generator=generator) * (0.5 / math.sqrt(value[0].numel()))
    return {key: value.clone().contiguous() for key, value in state_dict.items()}


def instantiate(config: DictConfig, generator: torch.Generator) -> StateDict:
    from ldm.util import instantiate_from_config

    with untrained_text_encoders():
        return wake(instantiate_from_config(config.model).state_dict(), generator)


def half(state_dict: StateDict) -> StateDict:
    return {key: value.half() if value.dtype == torch.float32 else value for key, value in state_dict.items()}


# --- plugins ----------------------------------------------------------------------------------------------------------


def low_rank(
    name: str, weight: torch.Tensor, generator: torch.Generator, rank: int = 4, strength: float = 0.15
) -> StateDict:
    """The three LoRA tensors for one linear or convolution weight."""
    outputs, inputs, *kernel = weight.shape
    ones = [1] * len(kernel)
    return {
        f"{name}.lora_down.weight": torch.randn(rank, inputs, *kernel, generator=generator) / math.sqrt(inputs),
        f"{name}.lora_up.weight": torch.randn(outputs, rank, *ones, generator=generator) * (strength / math.sqrt(rank)),
        f"{name}.alpha": torch.tensor(float(rank)),
    }


def kohya_name_of_base_layer(key: str) -> str | None:
    """The name that kohya's trainer gives to an SD1.5 layer (diffusers block names); None where it trains nothing."""
    attention = re.fullmatch(r"model\.diffusion_model\.(input|output)_blocks\.(\d+)\.1\.(.*)\.weight", key)
    if attention and attention.group(3).endswith(ATTENTION_LAYERS + PROJECTIONS):
        side, number, rest = attention.group(1), int(attention.group(2)), attention.group(3).replace(".", "_")
        direction, number = ("down", number - 1) if side == "input" else ("up", number)
        block, index = divmod(number, 3)
        return f"lora_unet_{direction}_blocks_{block}_attentions_{index}_{rest}"
    text = re.fullmatch(
        r"cond_stage_model\.transformer\.text_model\.(encoder\.layers\.\d+\.(?:self_attn\..*_proj|mlp\.fc[12]))\.weight",
        key,
    )
    return f"lora_te_text_model_{text.group(1).replace('.', '_')}" if text else None


def kohya_name_of_upgraded_layer(key: str) -> str | None:
    """The name that kohya's trainer gives to an SDXL layer (CompVis block names); None where it trains nothing."""
    block = re.fullmatch(r"model\.diffusion_model\.((?:input|output|middle)_block.*)\.weight", key)
    if block and ".transformer_blocks." in key and block.group(1).endswith(ATTENTION_LAYERS):
        return f"lora_unet_{block.group(1).replace('.', '_')}"
    return None


def lora(names: dict[str, str | None], checkpoint: StateDict, generator: torch.Generator) -> StateDict:
    """A LoRA for every layer of the checkpoint that has a name."""
    weights: StateDict = {}
    for key, name in names.items():
        if name is not None:
            weights |= low_rank(name, checkpoint[key], generator)
    return weights


def t2i_adapter(channels: int, generator: torch.Generator) -> StateDict:
    """A T2I-Adapter for an SD1.5 UNet of the given width, under the names of the TencentARC files."""
    shapes = {"conv_in.weight": (channels, 192, 3, 3), "conv_in.bias": (channels,)}
    widths = [channels, channels, channels * 2, channels * 4, channels * 4]
    for level, (before, width) in enumerate(itertools.pairwise(widths)):
        for index in range(2):
            name, inputs = f"body.{level * 2 + index}", before if index == 0 else width
            if inputs != width:
                shapes |= {f"{name}.in_conv.weight": (width, inputs, 1, 1), f"{name}.in_conv.bias": (width,)}
            shapes |= {f"{name}.block1.weight": (width, width, 3, 3), f"{name}.block1.bias": (width,)}
            shapes |= {f"{name}.block2.weight": (width, width, 1, 1), f"{name}.block2.bias": (width,)}
    return {name: random_or_zero(shape, 1.0, generator) for name, shape in shapes.items()}


def random_or_zero(shape: tuple[int, ...], gain: float, generator: torch.Generator) -> torch.Tensor:
    """Zeros for a bias; for a weight, random numbers that keep an input's variance times gain squared."""
    if len(shape) == 1:
        return torch.zeros(shape)
    return torch.randn(shape, generator=generator) * (gain / math.sqrt(math.prod(shape[1:])))


def controlnet(checkpoint: StateDict, generator: torch.Generator) -> StateDict:
    """An SD1.5 ControlNet: the encoder of the given UNet, a random hint encoder and random (not zero) output convs."""
    encoder = tuple(UNET_PREFIX + part for part in ("time_embed", "input_blocks", "middle_block"))
    weights = {
        "control_model." + key.removeprefix(UNET_PREFIX): value
        for key, value in checkpoint.items()
        if key.startswith(encoder)
    }
    width = checkpoint[UNET_PREFIX + "input_blocks.0.0.weight"].shape[0]
    hint = [3, 16, 16, 32, 32, 96, 96, 256, width]
    shapes = {
        f"input_hint_block.{2 * number}": (outputs, inputs, 3, 3)
        for number, (inputs, outputs) in enumerate(itertools.pairwise(hint))
    }
    for block, outputs in enumerate(encoder_widths(checkpoint)):
        shapes[f"zero_convs.{block}.0"] = (outputs, outputs, 1, 1)
    shapes["middle_block_out.0"] = (outputs, outputs, 1, 1)
    for name, shape in shapes.items():
        weights[f"control_model.{name}.weight"] = random_or_zero(shape, 0.5, generator)
        weights[f"control_model.{name}.bias"] = torch.zeros(shape[0])
    return weights


def encoder_widths(checkpoint: StateDict) -> list[int]:
    """Channels of the outputs of the UNet's twelve input blocks (a convolution, a ResNet block or a downsampler)."""
    last_layers = [f"{UNET_PREFIX}input_blocks.{{}}.0.{end}" for end in ("weight", "op.weight", "out_layers.3.weight")]
    found = [layer.format(block) for block in range(12) for layer in last_layers if layer.format(block) in checkpoint]
    return [checkpoint[key].shape[0] for key in found]


def mapping_layers(inputs: tuple[int, ...], outputs: tuple[int, ...], generator: torch.Generator) -> StateDict:
    """Weights under the key names of the released X-Adapter checkpoint, for the given channel counts."""
    shapes = {}
    for level, (base, upgraded) in enumerate(zip(inputs, outputs, strict=True)):
        for block in range(3):
            name = f"body.{3 * level + block}"
            if block == 0 and level == 2:
                shapes[f"{name}.up_opt.op"] = (base, base, 3, 3)
            if block == 0 and base != upgraded:
                shapes[f"{name}.in_conv"] = (upgraded, base, 3, 3)
            shapes[f"{name}.block1"] = shapes[f"{name}.block2"] = (upgraded, upgraded, 3, 3)
        shapes[f"zero_out.{level}"] = (upgraded, upgraded, 1, 1)
    weights = {}
    for name, shape in shapes.items():
        weights[f"{name}.weight"] = random_or_zero(shape, 0.6, generator)
        weights[f"{name}.bias"] = torch.randn(shape[0], generator=generator) * 0.01
    return weights


# --- the files --------------------------------------------------------------------------------------------------------


def write_small(webui: Path, output: Path, generator: torch.Generator) -> None:
    models, embeddings = output / "models", output / "embeddings"
    clip = models / "tiny-clip"
    write_tokenizer(clip, TINY_CLIP_WIDTH)
    base = write_checkpoint(models, "tiny15", tiny_base_config(webui, clip), generator)
    upgraded = write_checkpoint(models, "tinyxl", tiny_upgraded_config(webui, clip), generator)

    base_lora = lora({key: kohya_name_of_base_layer(key) for key in base}, base, generator)
    trainer = {"ss_base_model_version": "sd_v1-5", "ss_network_module": "networks.lora"}
    write(base_lora, models / "Lora/style15.safetensors", trainer)
    write(base_lora, models / "Lora/style15_nometa.safetensors")
    upgraded_lora = lora({key: kohya_name_of_upgraded_layer(key) for key in upgraded}, upgraded, generator)
    write(upgraded_lora, models / "Lora/stylexl.safetensors", {"ss_base_model_version": "sdxl_base_v1-0"})

    write(t2i_adapter(TINY_UNET_WIDTH, generator), models / "ControlNet/t2iadapter_canny_sd15.safetensors")
    mapping = mapping_layers(TINY_BASE_FEATURES, TINY_UPGRADED_FEATURES, generator)
    write(mapping, models / "X-Adapter/tiny.safetensors")
    torch.save(mapping, models / "X-Adapter/tiny.bin")

    def words(width: int) -> torch.Tensor:
        return torch.randn(2, width, generator=generator)

    write({"emb_params": words(TINY_CLIP_WIDTH)}, embeddings / "base15.safetensors")
    both = {"clip_l": words(TINY_CLIP_WIDTH), "clip_g": words(OPEN_CLIP_WIDTH)}
    write(both, embeddings / "upgradedxl.safetensors")


def write_full_width_base(webui: Path, output: Path, generator: torch.Generator) -> None:
    models = output / "models"
    clip = models / "wide-clip"
    write_tokenizer(clip, width=768)
    base = write_checkpoint(models, "wide15", full_width_base_config(webui, clip), generator, dtype=torch.float16)
    control = half(controlnet(base, generator))
    write(control, models / "ControlNet/control_v11p_sd15_canny.safetensors")
    mapping = mapping_layers(WIDE_BASE_FEATURES, TINY_UPGRADED_FEATURES, generator)
    write(mapping, models / "X-Adapter/wide.safetensors")


def write_checkpoint(
    models: Path,
    name: str,
    config: DictConfig,
    generator: torch.Generator,
    dtype: torch.dtype = torch.float32,
) -> StateDict:
    weights = instantiate(config, generator)
    write(half(weights) if dtype == torch.float16 else weights, models / "Stable-diffusion" / f"{name}.safetensors")
    OmegaConf.save(config, models / "Stable-diffusion" / f"{name}.yaml")
    return weights


def write(weights: StateDict, file: Path, metadata: dict[str, str] | None = None) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(weights, file, metadata=metadata)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("webui", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--full-width-base", action="store_true")
    args = parser.parse_args()
    webui, output = args.webui.resolve(), args.output.resolve()
    sys.path[:0] = [
        str(webui / "repositories" / folder) for folder in ("stable-diffusion-stability-ai", "generative-models")
    ]
    torch.manual_seed(7)
    generator = torch.Generator().manual_seed(11)
    (write_full_width_base if args.full_width_base else write_small)(webui, output, generator)


if __name__ == "__main__":
    main()
