"""Write small random checkpoints of the other kinds that can be the base; see small_models.py, whose tools they share.

    python small_bases.py WEBUI OUTPUT CLIP

CLIP is the tokenizer folder that small_models.py made. Each checkpoint comes with the .yaml that says what it is:

    models/Stable-diffusion/tiny21.safetensors   SD2.1 at 512: OpenCLIP, predicts the noise
    models/Stable-diffusion/tiny21v.safetensors  SD2.1 at 768: OpenCLIP, predicts the velocity
    models/Stable-diffusion/tiny15v.safetensors  SD1.5 that predicts the velocity
"""

import argparse
import sys
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf

sys.path.insert(0, str(Path(__file__).parent))  # isolated Python (-I) leaves the script's folder out

import small_models


def velocity_config(webui: Path, clip: Path) -> DictConfig:
    config = small_models.tiny_base_config(webui, clip)
    config.model.params.parameterization = "v"
    return config


def sd2_config(webui: Path, name: str) -> DictConfig:
    folder = webui / "repositories/stable-diffusion-stability-ai/configs/stable-diffusion"
    config = OmegaConf.load(folder / name)
    unet = config.model.params.unet_config.params
    unet.model_channels, unet.num_head_channels = small_models.TINY_UNET_WIDTH, 16
    unet.context_dim, unet.use_fp16, unet.use_checkpoint = small_models.OPEN_CLIP_WIDTH, False, False
    config.model.params.first_stage_config.params.ddconfig = small_models.tiny_vae()
    config.model.params.cond_stage_config.params.arch = "ViT-S-32-alt"
    return config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("webui", "output", "clip"):
        parser.add_argument(name, type=Path)
    given = parser.parse_args()
    webui, clip = given.webui.resolve(), given.clip.resolve()
    sys.path[:0] = [
        str(webui / "repositories" / folder) for folder in ("stable-diffusion-stability-ai", "generative-models")
    ]
    torch.manual_seed(17)
    generator = torch.Generator().manual_seed(19)
    configs = {
        "tiny21": sd2_config(webui, "v2-inference.yaml"),
        "tiny21v": sd2_config(webui, "v2-inference-v.yaml"),
        "tiny15v": velocity_config(webui, clip),
    }
    for name, config in configs.items():
        small_models.write_checkpoint(given.output / "models", name, config, generator)


if __name__ == "__main__":
    main()
