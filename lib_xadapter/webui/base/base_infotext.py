"""What stands under the picture of stage 1: what the WebUI would write with the base's checkpoint selected."""

from __future__ import annotations

import copy
from dataclasses import dataclass

from modules import sd_hijack, sd_vae, shared
from modules.processing import StableDiffusionProcessing, create_infotext
from PIL import Image

from .base_model import BaseModel
from .plugins import MODEL_ARGUMENT, NetworkData


@dataclass(frozen=True, eq=False)
class BasePicture:
    """A finished picture of stage 1, and what stands under it."""

    image: Image.Image
    infotext: str

    def shown(self) -> Image.Image:
        """As the WebUI shows its own: with the text in the file, unless the user's settings leave that out."""
        image = self.image.copy()
        if shared.opts.enable_pnginfo:
            image.info["parameters"] = self.infotext
        return image


def base_infotexts(base_p: StableDiffusionProcessing, base: BaseModel, networks: NetworkData) -> list[str]:
    """One text for each image of the batch.

    Args:
        base_p: the base's processing object, sampled.
        base: the base model.
        networks: its LoRAs, which its parsed prompts no longer name.
    """
    described = copy.copy(base_p)
    with base.current() as model:
        described.sd_model_name, described.sd_model_hash = base.info.name_for_extra, model.sd_model_hash
        described.sd_vae_name, described.sd_vae_hash = sd_vae.get_loaded_vae_name(), sd_vae.get_loaded_vae_hash()
        described.extra_generation_params = {
            **base_p.extra_generation_params,
            **sd_hijack.model_hijack.extra_generation_params,
        }
        prompts = [prompt + _tags(networks) for prompt in base_p.prompts]
        negative = list(base_p.negative_prompts)
        return [
            create_infotext(
                described, prompts, described.seeds, described.subseeds, index=place, all_negative_prompts=negative
            )
            for place in range(len(prompts))
        ]


def _tags(networks: NetworkData) -> str:
    """The tags as a prompt for the base alone has them."""
    return "".join(
        f" <{kind}:{':'.join(str(item) for item in tag.items if not str(item).startswith(f'{MODEL_ARGUMENT}='))}>"
        for kind, tags in networks.items()
        for tag in tags
    )
