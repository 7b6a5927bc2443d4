"""The WebUI's own Lora extension on the layers of a checkpoint, without a WebUI around it.

    python webui_loras.py WEBUI CHECKPOINT OUT LORA…

To be run with the WebUI's own Python. Its `networks.py` reads each LoRA file for the checkpoint's layers and changes
their weights; what it imports of the WebUI beside is replaced by mocks. OUT is a safetensors file of every weight and
bias that a LoRA changed, `NAME/KEY`, where NAME is that of the LoRA's file and KEY that in the checkpoint. A LoRA is
written as FILE or as FILE=TEXT ENCODER'S WEIGHT,UNET'S WEIGHT,RANK, the last one empty for the whole.
"""

import sys
from pathlib import Path
from unittest.mock import MagicMock

import torch
from safetensors.torch import load_file, save_file
from torch import nn

PREFIXES = {
    "model.": "",
    "cond_stage_model.": "",
    "conditioner.embedders.0.": "0_",
    "conditioner.embedders.1.": "1_",
}
"""What stands before a layer's name in the checkpoint → in the extension."""


def lora_extension(webui: Path, layers: dict[str, nn.Module], sdxl: bool) -> object:
    """The module `networks`, which knows these layers."""
    modules = MagicMock()
    modules.models.sd3.mmdit.QkvLinear = type("QkvLinear", (nn.Module,), {})
    for path in ("modules.models.sd3.mmdit", "modules.textual_inversion.textual_inversion"):
        module, parts = modules, path.split(".")
        for depth, name in enumerate(parts):
            module = getattr(module, name) if depth else modules
            sys.modules[".".join(parts[: depth + 1])] = module
    for name in ("gradio", "lora_patches"):
        sys.modules[name] = MagicMock()
    modules.devices.cpu, modules.devices.dtype = torch.device("cpu"), torch.float32
    modules.sd_models.read_state_dict = load_file
    modules.shared.sd_model = MagicMock(spec=["network_layer_mapping", "is_sdxl"])
    modules.shared.sd_model.network_layer_mapping, modules.shared.sd_model.is_sdxl = layers, sdxl
    sys.path.insert(0, str(webui / "extensions-builtin/Lora"))
    import networks

    networks.extra_network_lora = MagicMock(errors={})
    return networks


def layers_of(checkpoint: dict[str, torch.Tensor]) -> dict[str, tuple[str, nn.Module]]:
    """The checkpoint's layers by the extension's names, each with its key."""
    found = {}
    for key, weight in checkpoint.items():
        prefix = next((prefix for prefix in PREFIXES if key.startswith(prefix)), None)
        if prefix is None or not key.endswith(("weight", "in_proj_weight")):
            continue
        layer = key.removesuffix(".in_proj_weight").removesuffix(".weight")
        name = PREFIXES[prefix] + layer.removeprefix(prefix).replace(".", "_")
        if key.endswith("in_proj_weight"):
            module = nn.MultiheadAttention(weight.shape[1], 1)
            module.in_proj_weight.data = weight.clone()
            module.out_proj.weight.data = checkpoint[f"{layer}.out_proj.weight"].clone()
            module.out_proj.bias.data = checkpoint[f"{layer}.out_proj.bias"].clone()
        else:
            module = layer_of(weight)
            module.weight.data = weight.clone()
            bias = checkpoint.get(f"{layer}.bias")
            module.bias = None if bias is None else nn.Parameter(bias.clone())
        module.network_layer_name = name
        found[name] = (layer, module.requires_grad_(False))
    return found


def layer_of(weight: torch.Tensor) -> nn.Module:
    if weight.ndim == 4:
        return nn.Conv2d(weight.shape[1], weight.shape[0], weight.shape[2:], padding=weight.shape[2] // 2)
    return nn.Linear(weight.shape[1], weight.shape[0]) if weight.ndim == 2 else nn.LayerNorm(weight.shape[0])


def with_lora(networks: object, layers: dict[str, tuple[str, nn.Module]], lora: str) -> dict[str, torch.Tensor]:
    """What a LoRA changes."""
    path, _, weights = lora.partition("=")
    text, unet, rank = (weights or "1,1,").split(",")
    network = networks.load_network(Path(path).stem, MagicMock(filename=path))
    network.te_multiplier, network.unet_multiplier = float(text), float(unet)
    network.dyn_dim = int(rank) if rank else None
    networks.loaded_networks[:] = [network]
    changed = {}
    for layer, module in layers.values():
        # that of an attention layer is applied with it, as its own forward is never called
        if layer.endswith(".attn.out_proj"):
            continue
        before = {name: value.clone() for name, value in module.state_dict().items()}
        networks.network_apply_weights(module)
        after = module.state_dict()
        differing = (name for name in after if not torch.equal(after[name], before[name]))
        changed |= {f"{layer}.{name}": after[name].clone() for name in differing}
        module.load_state_dict(before)
        module.network_current_names = ()
        module.network_weights_backup = module.network_bias_backup = None
    if networks.extra_network_lora.errors:
        raise SystemExit(f"{path}: the extension counts errors: {networks.extra_network_lora.errors}")
    return changed


def main() -> None:
    webui, checkpoint, out, *loras = sys.argv[1:]
    weights = load_file(checkpoint)
    layers = layers_of(weights)
    modules = {name: module for name, (_, module) in layers.items()}
    if any(name.startswith("model_transformer_resblocks_") for name in modules):
        # by which the extension knows SD2
        modules["model_transformer_resblocks"] = nn.ModuleList()
    networks = lora_extension(Path(webui), modules, sdxl="1_model_ln_final" in layers)
    found = {}
    for lora in loras:
        name = Path(lora.partition("=")[0]).stem
        found |= {f"{name}/{key}": value for key, value in with_lora(networks, layers, lora).items()}
    save_file(found, out)


if __name__ == "__main__":
    main()
