"""What X-Adapter's WebUI side needs of its host, looked for before anything of it is imported."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec

REQUIRED = (
    "modules.cache",
    "modules.devices",
    "modules.extra_networks",
    "modules.images",
    "modules.infotext_utils",
    "modules.launch_utils",
    "modules.lowvram",
    "modules.paths",
    "modules.processing",
    "modules.prompt_parser",
    "modules.rng",
    "modules.script_callbacks",
    "modules.scripts",
    "modules.sd_hijack",
    "modules.sd_models",
    "modules.sd_samplers",
    "modules.sd_samplers_cfg_denoiser",
    "modules.sd_samplers_common",
    "modules.sd_samplers_kdiffusion",
    "modules.sd_samplers_timesteps",
    "modules.sd_unet",
    "modules.sd_vae",
    "modules.shared",
    "modules.textual_inversion.textual_inversion",
    "modules.ui_common",
    "modules.ui_components",
    "modules.ui_extra_networks",
    "k_diffusion.sampling",
    "ldm.modules.diffusionmodules.openaimodel",
    "sgm.modules.diffusionmodules.openaimodel",
)
"""Those of AUTOMATIC1111's WebUI. Its forks have gone other ways: WebUI Forge has no ldm, SD.Next no such samplers."""
FORKS = {"modules_forge": "WebUI Forge"}
"""Packages of forks that may have all of those and sample otherwise, as Forge before August 2024 did."""


def missing(required: Iterable[str] = REQUIRED) -> list[str]:
    """Modules that the host has not."""
    return [name for name in required if not _is_there(name)]


def why_off() -> str:
    """One line for the log of a host that X-Adapter does not run in; "" in one that it does."""
    forks = [fork for package, fork in FORKS.items() if _is_there(package)]
    names = missing()
    if not forks and not names:
        return ""
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    this = f"this is {forks[0]}" if forks else f"this host has no {shown}"
    return f"X-Adapter is off: it runs in AUTOMATIC1111's WebUI 1.10, and {this}."


def _is_there(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:
        return False
