"""What makes a ControlNet's map of a picture, by name; read before anything heavy is imported."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import WrongArgument


@dataclass(frozen=True)
class Detector:
    """A class of controlnet_aux.

    Attributes:
        kind: its name.
        module: what sd-webui-controlnet calls the same annotator, for the text under a picture.
        weights: the files that it reads from a folder.
    """

    kind: str
    module: str
    weights: tuple[str, ...] = ()


ANNOTATORS = {
    "canny": Detector("CannyDetector", "canny"),
    "lineart_standard": Detector("LineartStandardDetector", "lineart_standard"),
    "depth": Detector("MidasDetector", "depth_midas", ("dpt_hybrid-midas-501f0c75.pt",)),
    "hed": Detector("HEDdetector", "softedge_hed", ("ControlNetHED.pth",)),
    "lineart": Detector("LineartDetector", "lineart_realistic", ("sk_model.pth", "sk_model2.pth")),
    "lineart_anime": Detector("LineartAnimeDetector", "lineart_anime", ("netG.pth",)),
    "mlsd": Detector("MLSDdetector", "mlsd", ("mlsd_large_512_fp32.pth",)),
    "normal": Detector("NormalBaeDetector", "normal_bae", ("scannet.pt",)),
    "openpose": Detector("OpenposeDetector", "openpose", ("body_pose_model.pth", "hand_pose_model.pth", "facenet.pth")),
    "pidi": Detector("PidiNetDetector", "softedge_pidinet", ("table5_pidinet.pth",)),
    "zoe": Detector("ZoeDetector", "depth_zoe", ("ZoeD_M12_N.pt",)),
}
NO_ANNOTATOR = "none"
CONTROLS = ("canny", "depth")
"""Maps that evaluation and training make themselves."""


@dataclass(frozen=True)
class Annotator:
    """One of `ANNOTATORS`, and the folder with its weights."""

    name: str
    folder: Path | None = None

    @property
    def module(self) -> str:
        """As sd-webui-controlnet calls it."""
        return ANNOTATORS[self.name].module


def read_annotators(given: Sequence[str], nets: int) -> tuple[Annotator | None, ...]:
    """What `--annotate` says for each ControlNet; None where its picture is a map already.

    Raises:
        WrongArgument: there is no such annotator, its weights are missing, or so is controlnet_aux.
    """
    if not given:
        return (None,) * nets
    if len(given) != nets:
        raise WrongArgument(f"--annotate is given {len(given)} times, expected once for each --controlnet.")
    found = tuple(_read(text) for text in given)
    if any(found) and importlib.util.find_spec("controlnet_aux") is None:
        raise WrongArgument('--annotate needs controlnet_aux: pip install ".[annotators]".')
    return found


def _read(text: str) -> Annotator | None:
    name, _, folder = text.partition(":")
    if name == NO_ANNOTATOR:
        return None
    if name not in ANNOTATORS:
        raise WrongArgument(f"--annotate: there is no '{name}'; there is {NO_ANNOTATOR}, {', '.join(ANNOTATORS)}.")
    for file in ANNOTATORS[name].weights:
        if not folder or not (Path(folder) / file).is_file():
            where = f"in {folder} there is none" if folder else f"write {name}:FOLDER"
            raise WrongArgument(f"--annotate: '{name}' needs a folder with {file}; {where}.")
    return Annotator(name, Path(folder) if ANNOTATORS[name].weights else None)
