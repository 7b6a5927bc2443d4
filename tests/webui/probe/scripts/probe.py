"""The tests' window into a running WebUI: what state it is in, what its UNets computed, and faults on demand.

An extension for tests only. While it neither records nor holds an armed fault, nothing of the WebUI is replaced.

    GET  /probe/imported  X-Adapter's modules that have been imported
    GET  /probe/state   what is loaded, hooked and selected
    POST /probe/reset   forget the UNet calls and samplings, and record from now on; {"progress": true} adds to each
                        call what the progress route says then
    GET  /probe/calls   the recorded UNet calls, oldest first
    GET  /probe/samplings  the recorded samplings, oldest first
    POST /probe/stop    record no more
    POST /probe/reload  reload the UI, as the button at the bottom of the page does
    POST /probe/arm     {"where": one of PLACES, "after": calls that pass first, "error": one of ERRORS}
    POST /probe/disarm  take an armed fault back; tells whether one was still armed
    POST /probe/pretend {"what": one of `pretences`, null for nothing any more}
    GET  /probe/axes    of the X/Y/Z plot, in its order
    POST /probe/parsed  what the WebUI reads from the infotext of {"written": parameters, "prompt": text}
    GET  /probe/jobs    how many of X-Adapter's jobs are kept
    GET  /probe/changed which tensors of the base are not, to the bit, those of its file
"""

import contextlib
import ctypes
import gc
import importlib
import os
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import fastapi
import ldm.models.diffusion.ddpm
import ldm.modules.diffusionmodules.openaimodel
import psutil
import sgm.models.diffusion
import sgm.modules.diffusionmodules.openaimodel
import torch
from modules import (
    devices,
    extensions,
    infotext_utils,
    script_callbacks,
    scripts,
    sd_models,
    sd_samplers_common,
    sd_unet,
    sd_vae,
    shared,
)
from modules.call_queue import queue_lock
from modules.sd_hijack import model_hijack
from modules.sd_samplers_cfg_denoiser import CFGDenoiser
from modules.sd_samplers_common import Sampler
from safetensors.torch import load_file

BASE = "LatentDiffusion"  # the class of SD1.x and SD2.x models
UPGRADED = "DiffusionEngine"  # the class of SDXL models
ANOTHER_CHECKPOINT = "tiny15"
CONTROLNET = "internal_controlnet.external_code"
FLOAT = torch.float32
WATCHER = "exit with the tests"
MEDVRAM = ": modules.lowvram."  # where the WebUI's own hooks for --medvram and --lowvram come from

# Every call of a UNet passes here, also when another extension has replaced the `forward` of the instance.
UNETS = {
    "base_unet": [(ldm.modules.diffusionmodules.openaimodel.UNetModel, "__call__")],
    "upgraded_unet": [(sgm.modules.diffusionmodules.openaimodel.UNetModel, "__call__")],
}
MODEL_OF_UNET = {"base_unet": BASE, "upgraded_unet": UPGRADED}
MODELS = (ldm.models.diffusion.ddpm.LatentDiffusion, sgm.models.diffusion.DiffusionEngine)

PLACES = {
    **UNETS,
    "sampler": [(sd_samplers_common.Sampler, "launch_sampling")],
    "vae_decode": [(model, "decode_first_stage") for model in MODELS],
    "vae_encode": [(model, "encode_first_stage") for model in MODELS],
    # Deep inside sd_models.load_model, after it has dropped the current model.
    "load_model": [(sd_models, "load_model_weights")],
}


def raise_runtime_error() -> None:
    raise RuntimeError("armed by the probe")


def raise_out_of_memory() -> None:
    raise torch.cuda.OutOfMemoryError("CUDA out of memory, armed by the probe")


def choose_base_checkpoint() -> None:
    """As the page does: the setting is changed at once, and the checkpoint is loaded when the job is through."""
    title = next(title for title in sd_models.checkpoint_tiles() if title.startswith(ANOTHER_CHECKPOINT))
    threading.Thread(target=shared.opts.set, args=("sd_model_checkpoint", title), daemon=True).start()
    while shared.opts.data["sd_model_checkpoint"] != title:
        os.sched_yield()


ERRORS = {
    "choose": choose_base_checkpoint,
    "save": lambda: shared.opts.save(shared.config_filename),
    "RuntimeError": raise_runtime_error,
    "OutOfMemoryError": raise_out_of_memory,
    "interrupt": shared.state.interrupt,
    "skip": shared.state.skip,
    "stop": shared.state.stop_generating,
}


def pretences() -> dict[str, list[tuple[Any, str, Any]]]:
    """What can be otherwise than it is: owner, name and value of each thing that is another one then."""
    infotext = sys.modules["lib_xadapter.infotext"]
    known_files = sys.modules["lib_xadapter.webui.known_files"]
    controlnet = sys.modules.get(CONTROLNET, SimpleNamespace(find_cn_script=None))
    return {
        "no free RAM": [(psutil, "virtual_memory", lambda: SimpleNamespace(available=0))],
        "a later default": [(infotext, "CHANGES", (infotext.Change("99.0", "switch_point", before=0.35),))],
        "a later version": [(known_files, "__version__", "99.0")],
        "jobs cannot begin": [(ours("webui.job.job"), "read_units", cannot_begin)],
        "another ControlNet": [(controlnet, "find_cn_script", lambda _: SimpleNamespace())],
        "a GPU with room for the base alone": [
            (ours("webui.base.models"), "devices", SimpleNamespace(device=torch.device("cuda"), dtype_unet=FLOAT)),
            (ours("webui.base.models"), "free_memory", lambda _: room_for_the_base()),
        ],
    }


def ours(name: str) -> Any:
    """A module of X-Adapter, imported where it was not yet."""
    return importlib.import_module(f"lib_xadapter.{name}")


def cannot_begin(_: object) -> None:
    raise RuntimeError("no job begins, says the probe")


def room_for_the_base() -> int:
    """Bytes for the loaded base and a picture's work beside it, and for a part of the adapter."""
    memory, (base,) = ours("memory"), [model for model in live_models() if type(model).__name__ == BASE]
    return memory.size_of(base) + memory.ONE_PICTURE.memory(overlapped=False) + 1


@dataclass
class Fault:
    """What happens, once, at the call of a place that follows `after` others."""

    where: str
    after: int
    error: str


@dataclass
class Sampling:
    """One sampling in which a model was evaluated.

    Attributes:
        start: the latents of its first model evaluation, as the sampler has them: (images, 4, h, w).
        level: the noise level there, a sigma or a timestep, whichever the sampler counts in.
        finished: the latents that it ended with.
    """

    start: torch.Tensor | None = None
    level: float = 0.0
    finished: torch.Tensor | None = None

    def as_json(self) -> dict[str, Any]:
        latents = {"start": self.start, "finished": self.finished}
        return {"level": self.level} | {name: None if x is None else x.tolist() for name, x in latents.items()}


class Probe:
    """Records UNet calls and samplings and lets one armed fault fire.

    The places it watches are replaced only while it does.
    """

    def __init__(self, progress: Callable[[], dict[str, Any]]) -> None:
        self.progress = progress
        self.asks_for_progress = False
        self.calls: list[dict[str, Any]] = []
        self.samplings: list[Sampling] = []
        self.under_way = Sampling()
        self.recording = False
        self.fault: Fault | None = None
        self.replaced = contextlib.ExitStack()
        self.pretended = contextlib.ExitStack()

    def pretend(self, what: str | None) -> None:
        self.pretended.close()
        if what is not None:
            for other in pretences()[what]:
                self.pretended.enter_context(patch.object(*other))

    def record(self, on: bool) -> None:
        self.recording = on
        self.watch()

    def arm(self, fault: Fault | None) -> None:
        self.fault = fault
        self.watch()

    def watch(self) -> None:
        self.replaced.close()
        places = set(UNETS) if self.recording else set()
        if self.fault:
            places.add(self.fault.where)
        for place in places:
            for owner, name in PLACES[place]:
                self.replace(owner, name, self.watched(place, getattr(owner, name)))
        if self.recording:
            self.replace(Sampler, "launch_sampling", self.sampled(Sampler.launch_sampling))
            self.replace(CFGDenoiser, "forward", self.begun(CFGDenoiser.forward))

    def replace(self, owner: Any, name: str, stand_in: Callable) -> None:
        self.replaced.enter_context(patch.object(owner, name, stand_in))

    def sampled(self, launch: Callable) -> Callable:
        def call(*args: Any, **kwargs: Any) -> torch.Tensor:
            sampling = self.under_way = Sampling()
            finished = launch(*args, **kwargs)
            if sampling.start is not None:
                sampling.finished = finished.clone()
                self.samplings.append(sampling)
            return finished

        return call

    def begun(self, forward: Callable) -> Callable:
        def call(denoiser: CFGDenoiser, x: torch.Tensor, level: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            sampling = self.under_way
            if sampling.start is None:
                sampling.start, sampling.level = x.clone(), float(level[0])
            return forward(denoiser, x, level, *args, **kwargs)

        return call

    def watched(self, place: str, original: Callable) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.fire(place)
            if self.recording and place in UNETS:
                said = {"said": self.progress()} if self.asks_for_progress else {}
                self.calls.append(describe_unet_call(place, *args, **kwargs) | said)
            return original(*args, **kwargs)

        return call

    def fire(self, place: str) -> None:
        fault = self.fault
        if fault is None or fault.where != place:
            return
        fault.after -= 1
        if fault.after < 0:
            self.arm(None)
            ERRORS[fault.error]()


def describe_unet_call(place: str, unet: torch.nn.Module, x: torch.Tensor, timesteps: torch.Tensor, *_, **__) -> dict:
    """One UNet call; its timestep is None if the rows disagree."""
    first, *others = timesteps.tolist()
    return {
        "model": MODEL_OF_UNET[place],
        "rows": x.shape[0],
        "timestep": first if all(other == first for other in others) else None,
        "height": x.shape[2],
        "width": x.shape[3],
        "merged": merged_tokens(unet),
    }


def merged_tokens(unet: torch.nn.Module) -> float:
    """The share of a UNet's tokens that are merged, by "Token merging ratio"."""
    merging = [module for module in unet.modules() if type(module).__name__ == "ToMeBlock"]
    return merging[0]._tome_info["args"]["ratio"] if merging else 0.0


def live_models() -> list[torch.nn.Module]:
    gc.collect()
    return [thing for thing in gc.get_objects() if type(thing).__name__ in (BASE, UPGRADED)]


def hooks(model: torch.nn.Module) -> list[str]:
    """Every forward hook and forward pre-hook below the model, as "class module: function"."""
    return [
        f"{type(model).__name__} {name}: {getattr(hook, '__module__', '')}.{getattr(hook, '__qualname__', hook)}"
        for name, module in model.named_modules()
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    ]


def checkpoint_name(model: torch.nn.Module | None) -> str | None:
    return model.sd_checkpoint_info.name if model is not None else None


def loaded_networks() -> list[str]:
    lora_extension = sys.modules.get("networks")
    return [network.name for network in lora_extension.loaded_networks] if lora_extension else []


def state() -> dict[str, Any]:
    """Waits for the running job and for a checkpoint that is being loaded."""
    with queue_lock, sd_models.model_data.lock:
        return state_between_jobs()


def state_between_jobs() -> dict[str, Any]:
    models, current = live_models(), sd_models.model_data.sd_model
    all_hooks = [hook for model in models for hook in hooks(model)]
    embeddings = model_hijack.embedding_db
    return {
        "checkpoint": checkpoint_name(current),
        "model": type(current).__name__,
        "loaded_checkpoints": [checkpoint_name(model) for model in sd_models.model_data.loaded_sd_models],
        "live_models": sorted(f"{type(model).__name__} on {model.device}" for model in models),
        "hooks": [hook for hook in all_hooks if MEDVRAM not in hook],
        "medvram_hooks": [hook for hook in all_hooks if MEDVRAM in hook],
        "sd_model_checkpoint": shared.opts.data.get("sd_model_checkpoint"),
        "sd_checkpoint_hash": shared.opts.data.get("sd_checkpoint_hash"),
        "sd_unet": sd_unet.current_unet_option.label if sd_unet.current_unet_option else None,
        "loaded_vae_file": sd_vae.loaded_vae_file,
        "vae_of_current_checkpoint": sd_vae.checkpoint_info in (None, getattr(current, "sd_checkpoint_info", None)),
        "loaded_networks": loaded_networks(),
        "extensions": [extension.name for extension in extensions.active()],
        "embeddings": sorted(embeddings.word_embeddings),
        "skipped_embeddings": sorted(embeddings.skipped_embeddings),
        "embedding_shape": embeddings.expected_shape,
        "hijack_has_current_text_encoder": model_hijack.clip is getattr(current, "cond_stage_model", None),
        "hijack_has_current_layers": {*map(id, model_hijack.layers or [])} == {*map(id, current.modules())}
        if current is not None
        else not model_hijack.layers,
        "optimization": model_hijack.optimization_method,
        "job": shared.state.job,
        "job_count": shared.state.job_count,
        "fp8": devices.fp8,
        "dtype_unet": str(devices.dtype_unet),
        "unet_needs_upcast": devices.unet_needs_upcast,
        "callbacks": {category: len(callbacks) for category, callbacks in script_callbacks.callback_map.items()},
    }


def changed_tensors() -> list[str]:
    """Of the SD1.x or SD2.x models that are alive, of which there is one at least."""
    with queue_lock:
        bases = [model for model in live_models() if type(model).__name__ == BASE]
        if not bases:
            raise fastapi.HTTPException(409, "no base model is loaded")
        return [name for model in bases for name in tensors_unlike_the_file(model)]


def tensors_unlike_the_file(model: torch.nn.Module) -> list[str]:
    file = load_file(model.sd_checkpoint_info.filename)
    # the WebUI wraps the text encoder and its embeddings
    loaded = {name.replace("wrapped.", ""): tensor for name, tensor in model.state_dict().items()}
    same = {name for name, tensor in loaded.items() if name in file and torch.equal(tensor.cpu(), file[name])}
    return sorted((loaded.keys() | file.keys()) - same)


def add_routes(_: object, app: fastapi.FastAPI) -> None:
    def progress() -> dict[str, Any]:
        route = next(route for route in app.routes if route.path == "/sdapi/v1/progress")
        return route.endpoint(SimpleNamespace(skip_current_image=False)).dict()

    probe = Probe(progress)
    script_callbacks.on_script_unloaded(lambda: (probe.record(False), probe.arm(None), probe.pretend(None)))

    @app.get("/probe/calls")
    def calls() -> list[dict[str, Any]]:
        return probe.calls

    @app.get("/probe/samplings")
    def samplings() -> list[dict[str, Any]]:
        return [sampling.as_json() for sampling in probe.samplings]

    @app.post("/probe/reset")
    def reset(progress: bool = fastapi.Body(False, embed=True)) -> None:
        probe.calls, probe.samplings, probe.asks_for_progress = [], [], progress
        probe.record(True)

    @app.post("/probe/stop")
    def stop() -> None:
        probe.record(False)

    @app.post("/probe/reload")
    def reload() -> None:
        shared.state.request_restart()

    @app.post("/probe/arm")
    def arm(
        where: str = fastapi.Body(...), after: int = fastapi.Body(0), error: str = fastapi.Body("RuntimeError")
    ) -> None:
        if where not in PLACES or error not in ERRORS:
            raise fastapi.HTTPException(422, f"where: one of {[*PLACES]}, error: one of {[*ERRORS]}")
        probe.arm(Fault(where, after, error))

    @app.post("/probe/disarm")
    def disarm() -> bool:
        was_armed = probe.fault is not None
        probe.arm(None)
        return was_armed

    @app.post("/probe/pretend")
    def pretend(what: str | None = fastapi.Body(None, embed=True)) -> None:
        probe.pretend(what)

    app.get("/probe/state")(state)
    app.get("/probe/memory")(memory)
    app.get("/probe/recordings")(recordings)
    app.get("/probe/jobs")(jobs)
    app.get("/probe/axes")(axes)
    app.get("/probe/changed")(changed_tensors)
    app.get("/probe/imported")(imported)
    app.post("/probe/parsed")(parsed)


@dataclass
class Infotext:
    """A prompt and the parameters under it."""

    written: dict[str, str]
    prompt: str = ""


def parsed(given: Infotext) -> dict[str, Any]:
    """What the WebUI reads from the infotext that it writes for these parameters, as `processing.create_infotext`."""
    lines = [
        f"{name}: {infotext_utils.quote(value)}" for name, value in {"Steps": 20, "Seed": 7, **given.written}.items()
    ]
    return infotext_utils.parse_generation_parameters(f"{given.prompt}\n{', '.join(lines)}")


def imported() -> list[str]:
    """X-Adapter's modules that have been imported so far."""
    return sorted(name for name in sys.modules if name.split(".")[0] == "lib_xadapter")


def jobs() -> int:
    """How many of X-Adapter's jobs are kept, once garbage is collected."""
    gc.collect()
    return sum(type(thing).__module__ == "lib_xadapter.webui.job.job" for thing in gc.get_objects())


def memory() -> int:
    """Bytes of the process, once garbage is collected and the C library has given back what is free."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
    return psutil.Process().memory_info().rss


def recordings() -> int:
    """Bytes that X-Adapter's recordings of the base fill."""
    models = getattr(sd_models.model_data, "xadapter_models", None)
    return models.recordings.size if models is not None else 0


def axes() -> list[str]:
    """Of the X/Y/Z plot, by the numbers that it takes over REST."""
    return [option.label for option in the_plot().current_axis_options]


def the_plot() -> scripts.Script:
    return next(script for script in scripts.scripts_txt2img.selectable_scripts if script.title() == "X/Y/Z plot")


def exit_with_the_tests() -> None:
    """The tests hold the other end of standard input: it closes when they end, however they end."""
    sys.stdin.read()
    os._exit(0)


script_callbacks.on_app_started(add_routes)
# Reload UI runs this file again, in the same process
if WATCHER not in (thread.name for thread in threading.enumerate()):
    threading.Thread(target=exit_with_the_tests, name=WATCHER, daemon=True).start()
