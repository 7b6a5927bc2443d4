"""What the two models are given of a picture: latents by their own VAEs, its caption by their encoders, its sizes.

Every picture and caption is encoded alone, so that what comes out does not depend on what else is in a batch. Of the
VAE the posterior's mean and deviation are kept, not one latent drawn from it, so that a picture gives other latents in
every epoch also where it is encoded once.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from PIL import Image
from torch import Tensor, nn

from ..headless.models import device_of
from ..headless.pictures import to_tensor
from .batches import Crop
from .latent_cache import Entry, LatentCache
from .pictures import BasePictures, Pictures

CACHE_VERSION = 1
"""Goes up whenever the same picture would be encoded otherwise."""
READERS = 4
"""Threads that read and crop pictures."""


@dataclass(frozen=True)
class EncodedRows:
    """Rows of a batch, one a picture, on the device in float32.

    Attributes:
        upgraded_mean, upgraded_std: of the posterior, (rows, 4, h, w), scaled by the VAE's factor: a latent is
            mean + std · noise.
        base_mean, base_std: the same of the base's VAE, (rows, 4, h/2, w/2).
        base_text: the captions through the base's encoder, (rows, 77, width).
        upgraded_text, upgraded_pooled: the captions through both encoders of SDXL, (rows, 77, width), (rows, width).
        empty_text, empty_pooled: the empty prompt through them.
        sizes: SDXL's size conditioning, (rows, 6): height and width of the picture as it was, top and left of the
            crop in the resized picture, height and width of the crop.
        control: map of the base's ControlNet, (rows, 1, height, width), 0 to 1; None where it has none.
    """

    upgraded_mean: Tensor
    upgraded_std: Tensor
    base_mean: Tensor
    base_std: Tensor
    base_text: Tensor
    upgraded_text: Tensor
    upgraded_pooled: Tensor
    empty_text: Tensor
    empty_pooled: Tensor
    sizes: Tensor
    control: Tensor | None = None


@dataclass(frozen=True)
class Control:
    """What makes control maps.

    Attributes:
        kind: of the maps.
        extract: picture → map of its size.
        estimator: what tells the network that makes them from others; "" where none does.
    """

    kind: str
    extract: Callable[[Image.Image], Image.Image]
    estimator: str = ""


class Encoder:
    """Encodes the rows of batches, or finds them encoded.

    Args:
        base: a diffusers pipeline of SD1.5 or SD2.
        upgraded: one of SDXL. Both VAEs are brought to float32, as SDXL's overflows in float16.
        cache: a folder that keeps what was encoded; several processes may share it.
        upgraded_captions: whether the captions go through the encoders of SDXL; where its prompt is always empty they
            need not, and `upgraded_text`, `upgraded_pooled` are those of the empty one.
        control: what makes maps for the base's ControlNet; None for none.
        base_pictures: what the base sees in the pictures' place; None for the same.
    """

    def __init__(
        self,
        base: Any,
        upgraded: Any,
        *,
        cache: Path | None = None,
        upgraded_captions: bool = True,
        control: Control | None = None,
        base_pictures: BasePictures | None = None,
    ) -> None:
        self._base, self._control, self._base_pictures = base, control, base_pictures
        self._upgraded = upgraded
        self._upgraded_captions = upgraded_captions
        for pipeline in (base, upgraded):
            if pipeline.vae.dtype != torch.float32:
                pipeline.vae.to(torch.float32)
        self._cache = None if cache is None else LatentCache(cache / "latents")
        self._empty: Entry | None = None
        self._vaes = _fingerprint(base.vae, upgraded.vae) if cache else ""
        self._base_encoder = _fingerprint(base.text_encoder) if cache else ""
        self._upgraded_encoders = _fingerprint(upgraded.text_encoder, upgraded.text_encoder_2) if cache else ""

    @property
    def _device(self) -> torch.device:
        return device_of(self._upgraded.unet)

    def rows(self, pictures: Pictures, crops: Sequence[Crop]) -> EncodedRows:
        """A batch's rows; crops must be of one size.

        Raises:
            WrongFile: a picture or a shard of the cache cannot be read any more.
        """
        latents = self._latents(pictures, crops)
        captions = [pictures.noted(crop.example).caption for crop in crops]
        base_texts = [self._base_text(caption) for caption in captions]
        self._empty = self._empty or self._upgraded_text("")
        empty = [self._empty] * len(crops)
        texts = [self._upgraded_text(caption) for caption in captions] if self._upgraded_captions else empty
        return EncodedRows(
            **{name: self._stacked(latents, name) for name in latents[0]},
            base_text=self._stacked(base_texts, "text"),
            upgraded_text=self._stacked(texts, "text"),
            upgraded_pooled=self._stacked(texts, "pooled"),
            empty_text=self._stacked(empty, "text"),
            empty_pooled=self._stacked(empty, "pooled"),
            sizes=torch.stack([_size_conditioning(pictures, crop) for crop in crops]).to(self._device),
            control=None if self._control is None else self._stacked(self._maps(pictures, crops), "map") / 255,
        )

    def flush(self) -> None:
        """Write to the cache what is not there yet."""
        if self._cache is not None:
            self._cache.flush()

    def _stacked(self, entries: Iterable[Entry], name: str) -> Tensor:
        return torch.stack([entry[name] for entry in entries]).to(self._device, torch.float32)

    def _latents(self, pictures: Pictures, crops: Sequence[Crop]) -> list[Entry]:
        keys = [self._latent_key(pictures, crop) for crop in crops]
        found = [self._found(key) for key in keys]
        missing = [crop for crop, entry in zip(crops, found, strict=True) if entry is None]
        with ThreadPoolExecutor(READERS) as pool:
            # read ahead of the encoders
            read = pool.map(lambda crop: self._read(pictures, crop), missing)
            return [
                self._kept(key, self._encode_picture(*next(read))) if entry is None else entry
                for key, entry in zip(keys, found, strict=True)
            ]

    def _latent_key(self, pictures: Pictures, crop: Crop) -> str:
        others = [] if self._base_pictures is None else [self._base_pictures.noted(crop.example).digest]
        return _key("latents", self._vaes, *_seen(pictures, crop), *others)

    def _read(self, pictures: Pictures, crop: Crop) -> tuple[Image.Image, Image.Image]:
        """The crop as each model sees it."""
        return _cropped(pictures[crop.example].picture, crop), self._read_for_base(pictures, crop)

    def _read_for_base(self, pictures: Pictures, crop: Crop) -> Image.Image:
        return _cropped(self._seen_by_base(pictures)[crop.example].picture, crop, 2)

    def _seen_by_base(self, pictures: Pictures) -> Pictures | BasePictures:
        return pictures if self._base_pictures is None else self._base_pictures

    def _maps(self, pictures: Pictures, crops: Sequence[Crop]) -> Iterator[Entry]:
        """Of the crops at the base's size."""
        for crop in crops:
            key = _key("map", self._control.kind, self._control.estimator, *_seen(self._seen_by_base(pictures), crop))
            yield self._found(key) or self._kept(key, self._map(pictures, crop))

    def _map(self, pictures: Pictures, crop: Crop) -> Entry:
        found = self._control.extract(self._read_for_base(pictures, crop))
        return {"map": torch.from_numpy(numpy.array(found.convert("L")))[None]}

    @torch.no_grad()
    def _encode_picture(self, upgraded: Image.Image, base: Image.Image) -> Entry:
        upgraded_mean, upgraded_std = posterior(self._upgraded.vae, upgraded)
        base_mean, base_std = posterior(self._base.vae, base)
        return {
            "upgraded_mean": upgraded_mean,
            "upgraded_std": upgraded_std,
            "base_mean": base_mean,
            "base_std": base_std,
        }

    def _base_text(self, caption: str) -> Entry:
        tokens = _tokens(self._base.tokenizer, caption)
        key = _key("base text", self._base_encoder, tokens.tolist())
        return self._found(key) or self._kept(key, self._encode_for_base(tokens))

    def _upgraded_text(self, caption: str) -> Entry:
        tokens = [_tokens(tokenizer, caption) for tokenizer in (self._upgraded.tokenizer, self._upgraded.tokenizer_2)]
        key = _key("upgraded text", self._upgraded_encoders, [one.tolist() for one in tokens])
        return self._found(key) or self._kept(key, self._encode_for_upgraded(*tokens))

    @torch.no_grad()
    def _encode_for_base(self, tokens: Tensor) -> Entry:
        encoder = self._base.text_encoder
        return {"text": encoder(tokens.to(device_of(encoder))).last_hidden_state[0].float()}

    @torch.no_grad()
    def _encode_for_upgraded(self, first: Tensor, second: Tensor) -> Entry:
        encoders = (self._upgraded.text_encoder, self._upgraded.text_encoder_2)
        outputs = [
            encoder(tokens.to(device_of(encoder)), output_hidden_states=True)
            for encoder, tokens in zip(encoders, (first, second), strict=True)
        ]
        text = torch.cat([output.hidden_states[-2][0].float() for output in outputs], dim=-1)
        return {"text": text, "pooled": outputs[1].text_embeds[0].float()}

    def _found(self, key: str) -> Entry | None:
        return None if self._cache is None else self._cache.get(key)

    def _kept(self, key: str, entry: Entry) -> Entry:
        if self._cache is not None:
            self._cache.put(key, entry)
        return entry


def posterior(vae: nn.Module, picture: Image.Image) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of a picture's latent, (4, h, w) each, as the UNet takes latents."""
    pixels = (2 * to_tensor(picture) - 1).to(device_of(vae))
    found = vae.encode(pixels).latent_dist
    return found.mean[0] * vae.config.scaling_factor, found.std[0] * vae.config.scaling_factor


def _seen(pictures: Pictures | BasePictures, crop: Crop) -> tuple[Any, ...]:
    """What tells a crop from every other."""
    return pictures.noted(crop.example).digest, (crop.resized, crop.top, crop.left, crop.height, crop.width)


def _cropped(picture: Image.Image, crop: Crop, smaller: int = 1) -> Image.Image:
    """The crop at the upgraded size, or so many times smaller, resized once."""
    width, height = (part / whole for part, whole in zip(picture.size, crop.resized, strict=True))
    box = (
        crop.left * width,
        crop.top * height,
        min((crop.left + crop.width) * width, picture.width),
        min((crop.top + crop.height) * height, picture.height),
    )
    size = crop.width // smaller, crop.height // smaller
    return picture.resize(size, Image.Resampling.LANCZOS, box)


def _size_conditioning(pictures: Pictures, crop: Crop) -> Tensor:
    width, height = pictures.original_sizes[crop.example].tolist()
    return torch.tensor([height, width, crop.top, crop.left, crop.height, crop.width], dtype=torch.float32)


def _tokens(tokenizer: Any, caption: str) -> Tensor:
    """(1, 77); what is longer is cut off, as in the models' own training."""
    found = tokenizer(caption, padding="max_length", truncation=True, max_length=77, return_tensors="pt")
    return found.input_ids


def _fingerprint(*modules: nn.Module) -> str:
    """Of modules' configurations and weights."""
    digest = hashlib.sha256()
    for module in modules:
        config = module.config.to_dict() if hasattr(module.config, "to_dict") else dict(module.config)
        settings = {name: value for name, value in config.items() if not name.startswith("_")}
        digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
        for name, tensor in sorted(module.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _key(*parts: Any) -> str:
    return hashlib.sha256(repr((CACHE_VERSION, *parts)).encode()).hexdigest()
