"""Write small random checkpoints of other kinds that can stand for SDXL; see small_models.py, whose tools they share.

    python small_upgraded.py WEBUI OUTPUT CLIP

CLIP is the tokenizer folder that small_models.py made. Each checkpoint comes with the .yaml that says what it is:

    models/Stable-diffusion/otherxl.safetensors      SDXL of the same shape, with other weights
    models/Stable-diffusion/tinyrefiner.safetensors  the SDXL refiner: other channels, one text encoder
    models/Stable-diffusion/tinyxli.safetensors      SDXL for inpainting, with 9 channels
"""

import argparse
import sys
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf

sys.path.insert(0, str(Path(__file__).parent))  # isolated Python (-I) leaves the script's folder out

import small_models

REFINER_WIDTH = 64


def refiner_config(webui: Path) -> DictConfig:
    config = OmegaConf.load(webui / "repositories/generative-models/configs/inference/sd_xl_refiner.yaml")
    unet = config.model.params.network_config.params
    unet.model_channels, unet.num_head_channels, unet.transformer_depth = REFINER_WIDTH, 16, 1
    unet.context_dim = small_models.OPEN_CLIP_WIDTH
    unet.adm_in_channels = small_models.OPEN_CLIP_WIDTH + 5 * 256  # pooled text, four sizes and the aesthetic score
    unet.spatial_transformer_attn_type = "softmax"
    config.model.params.first_stage_config.params.ddconfig = small_models.tiny_vae() | {"attn_type": "vanilla"}
    config.model.params.conditioner_config.params.emb_models[0].params.arch = "ViT-S-32-alt"
    return config


def inpainting_config(webui: Path, clip: Path) -> DictConfig:
    config = small_models.tiny_upgraded_config(webui, clip)
    config.model.params.network_config.params.in_channels = 9
    return config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("webui", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("clip", type=Path)
    args = parser.parse_args()
    webui, models = args.webui.resolve(), args.output.resolve() / "models"
    sys.path[:0] = [
        str(webui / "repositories" / folder) for folder in ("stable-diffusion-stability-ai", "generative-models")
    ]
    torch.manual_seed(17)
    generator = torch.Generator().manual_seed(23)
    configs = {
        "otherxl": small_models.tiny_upgraded_config(webui, args.clip),
        "tinyrefiner": refiner_config(webui),
        "tinyxli": inpainting_config(webui, args.clip),
    }
    for name, config in configs.items():
        small_models.write_checkpoint(models, name, config, generator)


if __name__ == "__main__":
    main()
