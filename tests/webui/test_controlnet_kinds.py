"""Every kind of ControlNet unit that a file or a preprocessor makes, on the base, on the real WebUI."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.pictures import grey_levels_apart

from .conftest import is_between, same_bytes
from .server import WebUIServer, encode_image, small_models
from .small_controls import (
    FACE_ID,
    FACE_WIDTH,
    IMAGE_WIDTH,
    IP_ADAPTER,
    IP_ADAPTER_PLUS,
    PATCH_WIDTH,
    SHUFFLE,
    name_for_shuffling,
)
from .units import (
    CANNY,
    CONTROLNET,
    FIRMLY,
    LINES_XL,
    SMALL,
    T2I,
    T2I_ADAPTER,
    WIDE,
    Case,
    check_base_picture,
    embedding,
    extension,
    final,
    mask,
    natively,
    picture,
    unit,
)


def seen(seed: int, *shape: int) -> torch.Tensor:
    """Numbers of an embedding."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def image_prompt(seed: int = 0, **given) -> dict:
    embedded = embedding({"image_embeds": seen(seed, 1, IMAGE_WIDTH)})
    return unit(IP_ADAPTER, "ip-adapter_clip_h", ipadapter_input=embedded, **given)


SOFTLY = {"control_mode": "My prompt is more important"}
TWO_PICTURES = picture(), picture(background="olive")
INPAINTED = {"mask": encode_image(mask())}
HIDDEN = embedding({"hidden_states": [seen(1, 1, 257, PATCH_WIDTH), None]})
CASES: dict[str, Case] = {
    "IP-Adapter": ([image_prompt()], {}),
    "IP-Adapter of patches": ([unit(IP_ADAPTER_PLUS, "ip-adapter_clip_h", ipadapter_input=HIDDEN)], {}),
    "IP-Adapter of a face": (
        [unit(FACE_ID, "ip-adapter_face_id", ipadapter_input=embedding(seen(2, 1, FACE_WIDTH)))],
        {},
    ),
    "two IP-Adapters, one late, and a T2I-Adapter": (
        [image_prompt(weight=0.5), image_prompt(3, guidance_start=0.5), T2I],
        {"batch_size": 2},
    ),
    "IP-Adapter of two images": (
        [image_prompt() | {"ipadapter_input": [embedding({"image_embeds": seen(n, 1, IMAGE_WIDTH)}) for n in (4, 5)]}],
        {},
    ),
    "reference_adain": ([unit(None, "reference_adain", threshold_a=0.5)], {}),
    "reference_only, early": ([unit(None, "reference_only", guidance_end=0.6, **SOFTLY)], {}),
    "tile_resample": ([unit(T2I_ADAPTER, "tile_resample", threshold_a=2)], {}),
    "tile_colorfix+sharp": ([unit(T2I_ADAPTER, "tile_colorfix+sharp", threshold_a=8, threshold_b=1)], {}),
    "inpaint_global_harmonious": ([unit(T2I_ADAPTER, "inpaint", **INPAINTED)], {}),
    "inpaint_only+lama": ([unit(T2I_ADAPTER, "inpaint_only+lama", **INPAINTED)], {"batch_size": 2}),
    "recolor_luminance": ([unit(T2I_ADAPTER, "recolor_luminance", threshold_a=1)], {}),
    "shuffled image": ([unit(T2I_ADAPTER, "shuffle")], {}),
    "several images in one unit": (
        [unit(T2I_ADAPTER, input_mode="merge", image=[{"image": encode_image(image)} for image in TWO_PICTURES])],
        {},
    ),
    "effective region": ([T2I | {"effective_region_mask": encode_image(mask())}], {}),
    "weights for each level": ([T2I | {"advanced_weighting": [0.2, 0.4, 0.6, 0.8]}], {}),
}
FEW_AND_SMALL = {"steps": 2, "width": 128, "height": 128}
WIDE_CASES: dict[str, Case] = {
    "no unit": ([], FEW_AND_SMALL),
    "canny": ([CANNY], FEW_AND_SMALL),
    "a given map, as of depth, openpose or ip2p": ([unit(CONTROLNET, "none", weight=0.7)], FEW_AND_SMALL),
    "tile_resample": ([unit(CONTROLNET, "tile_resample", threshold_a=2)], FEW_AND_SMALL),
    "inpaint_only": ([unit(CONTROLNET, "inpaint_only", **INPAINTED)], FEW_AND_SMALL),
    "two units": (
        [CANNY, unit(CONTROLNET, "none", **FIRMLY, resize_mode="Resize and Fill")],
        FEW_AND_SMALL | {"batch_size": 2},
    ),
    "shuffle": ([unit(SHUFFLE, "shuffle")], FEW_AND_SMALL),
}


@pytest.fixture(scope="module")
def native_pictures(controlnet_webui):
    return natively(controlnet_webui, "tiny15", CASES)


@pytest.fixture(scope="module")
def without(controlnet_webui):
    return final(controlnet_webui, [], SMALL)


@pytest.fixture(scope="module")
def wide_webui(installation, models, start_webui, tmp_path_factory) -> Iterator[WebUIServer]:
    """A WebUI with a base of full width."""
    full_width, renamed = small_models(installation, full_width_base=True), tmp_path_factory.mktemp("renamed")
    name_for_shuffling(full_width, renamed)
    folders = [models, full_width, renamed]
    with start_webui("full-width", models=folders, more_extensions=[extension()]) as server:
        yield server


@pytest.fixture(scope="module")
def wide_pictures(wide_webui):
    return natively(wide_webui, "wide15", WIDE_CASES)


class TestSmallBase:
    """The base's picture is the WebUI's own, with the SD1.5 checkpoint selected and the same units."""

    @pytest.mark.parametrize("name", CASES)
    def test_case(self, controlnet_webui, native_pictures, name):
        check_base_picture(controlnet_webui, native_pictures, name, CASES[name], SMALL)


class TestIPAdapter:
    """It replaces the attention of layers, of one model only, and of none afterwards."""

    def test_sdxl_follows_it_in_the_joint_stage(self, controlnet_webui, without):
        half, whole = (final(controlnet_webui, [image_prompt(weight=weight)], SMALL) for weight in (0.5, 1))
        assert is_between(half, without, whole)

    def test_beside_a_unit_of_sdxl(self, controlnet_webui):
        beside = final(controlnet_webui, [image_prompt(), LINES_XL], SMALL)
        assert grey_levels_apart(beside, final(controlnet_webui, [LINES_XL], SMALL)) > 1
        assert grey_levels_apart(beside, final(controlnet_webui, [image_prompt()], SMALL)) > 1

    def test_nothing_of_it_is_left(self, controlnet_webui, without):
        final(controlnet_webui, [image_prompt()], SMALL)
        assert same_bytes(final(controlnet_webui, [], SMALL), without)


class TestFullWidthBase:
    """ControlNets exist at full width only."""

    @pytest.mark.parametrize("name", WIDE_CASES)
    def test_case(self, wide_webui, wide_pictures, name):
        check_base_picture(wide_webui, wide_pictures, name, WIDE_CASES[name], WIDE)

    def test_sdxl_follows_one_in_the_joint_stage(self, wide_webui):
        with_unit, without = (final(wide_webui, units, WIDE, **FEW_AND_SMALL) for units in ([CANNY], []))
        assert grey_levels_apart(with_unit, without) > 1
