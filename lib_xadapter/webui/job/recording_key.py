"""The key under which what the base made is found again.

The base never depends on SDXL. As long as nothing that it does depend on has changed, what it made in an earlier job is
what it would make again.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from modules import sd_vae, shared
from modules.processing import StableDiffusionProcessing

from ...fingerprint import fingerprint
from ...settings import Settings
from ..base import plugins
from ..base.base_model import BaseModel, FileState, file_state
from ..base.base_processing import IMG2IMG_FIELDS, SHARED_FIELDS
from ..base.base_units import BaseUnits

UPGRADED_OPTIONS = ("sd_model_checkpoint", "sd_checkpoint_hash")
"""Settings of the WebUI that say nothing about the base."""
OWN_OPTIONS = "xadapter_"
BUILT_IN = "processing_scripts"
"""The folder of the scripts that the WebUI's own fields are, such as the seed."""
OWN_TITLES = ("X-Adapter", "ControlNet")
"""Scripts whose part in the base's side is known otherwise."""
JOB_FIELDS = ("prompts", "negative_prompts", "width", "height", "steps", "cfg_scale", "seeds")
SIDE_SETTINGS = ("base_start", "single_stage", "img2img_start")


def key_of(
    base: BaseModel,
    job: StableDiffusionProcessing,
    settings: Settings,
    networks: plugins.NetworkData,
    units: BaseUnits,
    p: StableDiffusionProcessing,
) -> str | None:
    """A key for all that the base's side depends on, apart from the noise levels of the joint stage.

    None where something of it cannot be compared.

    Args:
        base: the base model.
        job: its processing object.
        settings: of X-Adapter.
        networks: the base's LoRAs.
        units: the base's ControlNet units.
        p: SDXL's processing object, for what other extensions were told.
    """
    options = {name: value for name, value in shared.opts.data.items() if concerns_base(name)}
    return fingerprint(
        {
            "checkpoint": base.file,
            "job": {name: getattr(job, name) for name in (*JOB_FIELDS, *SHARED_FIELDS)},
            "given picture": {
                name: getattr(job, name, None) for name in (*IMG2IMG_FIELDS, "image_mask", "latent_mask")
            },
            # drawn anew for each job, whether they are used or not
            "subseeds": job.subseeds if job.subseed_strength else [],
            "settings": {name: getattr(settings, name) for name in SIDE_SETTINGS},
            "vae": vae_state(base),
            "schedule": job.sampler_noise_scheduler_override,
            "networks": {kind: [tag.items for tag in tags] for kind, tags in networks.items()},
            "loras": [lora_state(tag) for tag in plugins.lora_tags(networks)],
            "embeddings": [file_state(path) for path in embedding_files()],
            "units": units.state(),
            "options": options,
            "token merging": p.get_token_merging_ratio(),
            "other extensions": arguments_of_other_scripts(p),
        }
    )


def concerns_base(option: str) -> bool:
    """Whether a setting of the WebUI may change what the base makes."""
    return option not in UPGRADED_OPTIONS and not option.startswith(OWN_OPTIONS)


def vae_state(base: BaseModel) -> FileState | None:
    """The VAE's file that the WebUI chooses for the base; None for the checkpoint's own."""
    path = sd_vae.resolve_vae(base.info.filename).vae
    return None if path is None else file_state(path)


def arguments_of_other_scripts(p: StableDiffusionProcessing) -> list[Any]:
    """The arguments of other extensions' scripts: some of them have a hand in the base's sampling, too."""
    scripts = p.scripts.alwayson_scripts if p.scripts is not None else []
    others = [script for script in scripts if BUILT_IN not in script.filename and script.title() not in OWN_TITLES]
    return [[script.title(), p.script_args[script.args_from : script.args_to]] for script in others]


def lora_state(tag: Any) -> FileState | None:
    """A LoRA's file."""
    on_disk = plugins.known_lora(plugins.name_of(tag))
    return None if on_disk is None else file_state(on_disk.filename)


def embedding_files() -> Iterable[str]:
    """Textual inversions, all of them: which of them a prompt uses is known once it is encoded."""
    return sorted(shared.walk_files(shared.cmd_opts.embeddings_dir))
