"""What the pictures of a folder were made with, so that none of another model or setting come among them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..headless.file_contents import contents_of, files_of
from ..headless.options import SETTINGS_OF_EVALUATE
from ..inversion_names import files_below, mentions
from .evaluate_command import DEPTH, Evaluation


def made_with(evaluation: Evaluation, dtype: str) -> dict[str, Any]:
    """All that a picture depends on beside its caption, its seed and its way, as JSON holds it."""
    files, job = evaluation.files, evaluation.job
    ours = {name: value for name, value in dataclasses.asdict(job.settings).items() if name in SETTINGS_OF_EVALUATE}
    uses_depth = DEPTH in evaluation.kinds and evaluation.measures.depth is not None
    return {
        "base": identity(files.base),
        "upgraded": identity(files.upgraded),
        "adapter": identity(files.adapter) if files.adapter else "None",
        "lora": [[identity(lora.path), lora.weight] for lora in files.loras],
        "embeddings": _embeddings(evaluation),
        "controlnet": [identity(path) for path in files.controlnets],
        "control": [control.kind for control in evaluation.controls],
        "control_scale": [control.scale for control in evaluation.controls],
        "upgraded_controlnet": [identity(path) for path in files.upgraded_controlnets],
        "upgraded_control": [control.kind for control in evaluation.upgraded_controls],
        "upgraded_control_scale": [control.scale for control in evaluation.upgraded_controls],
        "depth": identity(evaluation.measures.depth) if uses_depth else None,
        "dtype": dtype,
        "width": job.width,
        "height": job.height,
        "steps": job.steps,
        "cfg": job.cfg_scale,
        "sampler": job.sampler,
        "clip_skip": job.clip_skip,
        "negative_prompt": job.negative_prompt,
        "base_prompt": evaluation.base_prompt,
        # each text stands beside its pictures, as there can be more of them later
        "upgraded_captions": evaluation.upgraded_captions is not None,
        "reference": evaluation.reference,
        **ours,
    }


def difference(there: Mapping[str, Any], facts: Mapping[str, Any]) -> str | None:
    """The first name under which something else stands there; None where there is none."""
    return next((name for name in facts if there.get(name) != facts[name]), None)


def identity(path: Path) -> str:
    """Name, size and a hash of a file or a folder: another under the same name is found out."""
    size = sum(file.stat().st_size for file in files_of(path))
    return f"{path.name} ({size} bytes, {contents_of(path)})"


def _embeddings(evaluation: Evaluation) -> dict[str, str]:
    """Textual inversions that a prompt names."""
    job, upgraded = evaluation.job, evaluation.upgraded_captions
    texts = [
        evaluation.base_prompt,
        job.negative_prompt,
        job.settings.base_negative_prompt,
        *(upgraded.values() if upgraded else ()),
        *(caption.text for caption in evaluation.captions.usable),
    ]
    files = files_below(*evaluation.files.embeddings)
    return {name: identity(path) for name, path in files.items() if mentions(texts, name)}
