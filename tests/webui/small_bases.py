"""Write small random checkpoints of the other kinds that can be the base; see small_models.py, whose tools they share.

    python small_bases.py WEBUI OUTPUT CLIP

CLIP is the tokenizer folder that small_models.py made. Each checkpoint comes with the .yaml that says what it is:

    models/Stable-diffusion/tiny21.safetensors   SD2.1 at 512: OpenCLIP, predicts the noise
    models/Stable-diffusion/tiny21v.safetensors  SD2.1 at 768: OpenCLIP, predicts the velocity
    models/Stable-diffusion/tiny15v.safetensors  SD1.5 that predicts the velocity
    models/Stable-diffusion/tiny15i.safetensors  SD1.5 for inpainting, with 9 channels
    models/Stable-diffusion/tiny21i.safetensors  SD2 for inpainting, likewise
    models/Stable-diffusion/tiny15e.safetensors  an SD1.5 UNet of 8 channels, as instruct-pix2pix has it
"""

import argparse
import sys
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf

sys.path.insert(0, str(Path(__file__).parent))  # isolated Python (-I) leaves the script's folder out

import small_models

LAST_NORM_BIASES = ("text_model.final_layer_norm.bias", "cond_stage_model.model.ln_final.bias")


def velocity_config(webui: Path, clip: Path) -> DictConfig:
    config = small_models.tiny_base_config(webui, clip)
    config.model.params.parameterization = "v"
    return config


def with_channels(config: DictConfig, channels: int) -> DictConfig:
    """A UNet that takes more than the latent; a config for inpainting says what the rest is."""
    config.model.params.unet_config.params.in_channels = channels
    return config


def inpainting_config(webui: Path, clip: Path) -> DictConfig:
    config = with_channels(small_models.tiny_base_config(webui, clip), 9)
    config.model.target = "ldm.models.diffusion.ddpm.LatentInpaintDiffusion"
    config.model.params.conditioning_key, config.model.params.finetune_keys = "hybrid", None
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


def with_text_mean(weights: small_models.StateDict) -> small_models.StateDict:
    """The WebUI divides by the mean of the text encoder's output, which an untrained last norm can make zero."""
    shifted = {key: value + 0.1 for key, value in weights.items() if key.endswith(LAST_NORM_BIASES)}
    return weights | shifted


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
        "tiny15i": inpainting_config(webui, clip),
        "tiny21i": sd2_config(webui, "v2-inpainting-inference.yaml"),
        "tiny15e": with_channels(small_models.tiny_base_config(webui, clip), 8),
    }
    for name, config in configs.items():
        weights = small_models.write_checkpoint(given.output / "models", name, config, generator)
        small_models.write(with_text_mean(weights), given.output / f"models/Stable-diffusion/{name}.safetensors")


if __name__ == "__main__":
    main()
