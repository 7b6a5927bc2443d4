"""ADetailer with a detector that finds the same box in every picture, as its own need weights from the internet."""

import sys

from modules import script_callbacks, scripts
from PIL import Image, ImageDraw

BOX = [96, 96, 160, 160]


def fixed_box(model: object, image: Image.Image, confidence: float = 0.3, **_: object) -> object:
    mask = Image.new("L", image.size)
    ImageDraw.Draw(mask).rectangle(BOX, fill=255)
    found = sys.modules["adetailer.common"].PredictOutput
    return found(bboxes=[BOX], masks=[mask], confidences=[1.0], preview=image.copy())


def replace_detectors(*_: object) -> None:
    for data in scripts.scripts_data:
        if hasattr(data.module, "mediapipe_predict"):
            data.module.mediapipe_predict = fixed_box


script_callbacks.on_app_started(replace_detectors)
