"""What the models are given, held against diffusers, and the cache that takes the encoders' place."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy
import pytest
import torch
from PIL import Image

pytest.importorskip("datasets", reason="needs the extra 'train'")
pytest.importorskip("diffusers", reason="needs the extra 'headless'")

from transformers import CLIPTextModel, CLIPTextModelWithProjection

from lib_xadapter.errors import WrongFile
from lib_xadapter.headless.model_files import load_base, load_upgraded
from lib_xadapter.training.batches import Batches, Crop
from lib_xadapter.training.encoding import Control, Encoder
from lib_xadapter.training.latent_cache import LatentCache
from lib_xadapter.training.pictures import BasePictures, PictureOptions, open_pictures
from tests.small_models import make_small_models, seeded, small_vae, text_config

SIZE = 64
CAPTIONS = ("a cat (grey:1.5)", "x" * 200, "a house by the sea", "a [red] tree")


@pytest.fixture(scope="session")
def pair(tmp_path_factory):
    """Both pipelines, from files; their VAEs with a posterior that has a width."""
    small = make_small_models(tmp_path_factory.mktemp("small"))
    base, upgraded = (
        load(path, torch.float32, small.tokenizer)
        for load, path in ((load_base, small.base), (load_upgraded, small.upgraded))
    )
    base.vae, upgraded.vae = seeded(small_vae(), "base.vae"), seeded(small_vae(), "upgraded.vae")
    return base, upgraded


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    draw = numpy.random.default_rng(0)
    for number, caption in enumerate(CAPTIONS):
        height, width = [(64, 64), (80, 160), (150, 70), (40, 40)][number]
        pixels = draw.integers(0, 255, (height // 4, width // 4, 3), dtype=numpy.uint8)
        Image.fromarray(pixels).resize((width, height)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(caption)
    return open_pictures(str(folder))


@pytest.fixture
def crops(pictures):
    return sorted(Batches(pictures.sizes, 4, 1, SIZE, False).at(0), key=lambda crop: crop.example)


def parts_of(pipeline):
    return vars(pipeline) if isinstance(pipeline, SimpleNamespace) else pipeline.components


def raising(pair):
    """The same pipelines, whose encoders must not be called."""

    def refuse(*given, **named):
        raise AssertionError("this was to come from the cache")

    def silent(part):
        module = type("Silent", (type(part),), {"forward": refuse, "encode": refuse})
        copy = module.__new__(module)
        copy.__dict__ = part.__dict__
        return copy

    names = ("vae", "text_encoder", "text_encoder_2")
    return tuple(
        SimpleNamespace(**{name: silent(part) if name in names else part for name, part in parts_of(one).items()})
        for one in pair
    )


def equal(first, second):
    names = [name for name, value in vars(first).items() if value is not None]
    return all(torch.equal(getattr(first, name), getattr(second, name)) for name in names)


# --- what is given ----------------------------------------------------------------------------------------------------


def test_rows_have_the_shapes_that_a_step_wants(pair, pictures, crops):
    rows = Encoder(*pair).rows(pictures, crops)
    assert rows.control is None
    tensors = {name: value for name, value in vars(rows).items() if value is not None}
    assert {name: tuple(value.shape) for name, value in tensors.items()} == {
        "upgraded_mean": (4, 4, 8, 8),
        "upgraded_std": (4, 4, 8, 8),
        "base_mean": (4, 4, 4, 4),
        "base_std": (4, 4, 4, 4),
        "base_text": (4, 77, 64),
        "upgraded_text": (4, 77, 128),
        "upgraded_pooled": (4, 64),
        "empty_text": (4, 77, 128),
        "empty_pooled": (4, 64),
        "sizes": (4, 6),
    }
    assert all(value.dtype == torch.float32 and not value.requires_grad for value in tensors.values())


@pytest.mark.parametrize(("side", "size"), [("upgraded", SIZE), ("base", SIZE // 2)])
def test_latents_are_the_posteriors_of_each_models_own_vae(pair, pictures, crops, side, size):
    pipeline = dict(zip(("base", "upgraded"), pair, strict=True))[side]
    rows = Encoder(*pair).rows(pictures, crops)
    # the picture that is as large as the crop
    picture = pictures[0].picture.resize((size, size), Image.Resampling.LANCZOS)
    pixels = torch.from_numpy(numpy.array(picture)).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        posterior = pipeline.vae.encode(pixels).latent_dist
    factor = pipeline.vae.config.scaling_factor
    torch.testing.assert_close(getattr(rows, f"{side}_mean")[0], factor * posterior.mean[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(getattr(rows, f"{side}_std")[0], factor * posterior.std[0], rtol=1e-5, atol=1e-5)
    assert getattr(rows, f"{side}_std").min() > 1e-3


@pytest.mark.filterwarnings("ignore")
def test_captions_are_told_as_diffusers_tells_them(pair, pictures, crops):
    """Brackets are words here, and what is longer than 77 tokens is cut off."""
    base, upgraded = pair
    rows = Encoder(*pair).rows(pictures, crops)
    for number, caption in enumerate(CAPTIONS):
        expected, _ = base.encode_prompt(caption, "cpu", 1, False)
        torch.testing.assert_close(rows.base_text[number : number + 1], expected)
        text, _, pooled, _ = upgraded.encode_prompt(caption, device="cpu", do_classifier_free_guidance=False)
        torch.testing.assert_close(rows.upgraded_text[number : number + 1], text)
        torch.testing.assert_close(rows.upgraded_pooled[number : number + 1], pooled)
    text, _, pooled, _ = upgraded.encode_prompt("", device="cpu", do_classifier_free_guidance=False)
    torch.testing.assert_close(rows.empty_text, text.repeat(4, 1, 1))
    torch.testing.assert_close(rows.empty_pooled, pooled.repeat(4, 1))


def test_sizes_are_those_that_sdxl_was_trained_with(pair, pictures):
    crop = Crop(example=1, resized=(128, 64), top=0, left=24, height=64, width=64)
    sizes = Encoder(*pair).rows(pictures, [crop]).sizes
    # original height and width, top, left, target height and width
    assert sizes.tolist() == [[80, 160, 0, 24, 64, 64]]


def test_the_base_can_see_another_picture_of_the_same_name(pair, pictures, crops, tmp_path):
    folder = tmp_path / "others"
    folder.mkdir()
    for number in range(len(CAPTIONS)):
        small = pictures[number].picture.resize((24, 24) if number == 0 else pictures[number].picture.size)
        small.transpose(Image.Transpose.FLIP_TOP_BOTTOM).save(folder / f"{number}.webp", lossless=True)
    others = open_pictures(str(folder), PictureOptions(needs_caption=False))
    usual = Encoder(*pair, control=Control("canny", lambda picture: picture)).rows(pictures, crops)
    encoder = Encoder(
        *pair,
        control=Control("canny", lambda picture: picture),
        cache=tmp_path / "cache",
        base_pictures=BasePictures.beside(pictures, others),
    )
    rows = encoder.rows(pictures, crops)
    assert torch.equal(rows.upgraded_mean, usual.upgraded_mean)
    assert not torch.equal(rows.base_mean, usual.base_mean)
    torch.testing.assert_close(rows.control[1], usual.control[1].flip(-2), atol=0.05, rtol=0)
    assert equal(encoder.rows(pictures, crops), rows)
    (folder / "2.webp").unlink()
    with pytest.raises(WrongFile, match="no picture for the base in the place of 2.png"):
        BasePictures.beside(pictures, open_pictures(str(folder), PictureOptions(needs_caption=False)))


def test_both_models_see_the_same_part_of_the_picture(pair, tmp_path):
    folder = tmp_path / "halves"
    folder.mkdir()
    halves = Image.new("RGB", (256, 128), "black")
    halves.paste("white", (128, 0, 256, 128))
    halves.save(folder / "a.png")
    (folder / "a.txt").write_text("halves")
    pictures = open_pictures(str(folder))
    encoder = Encoder(*pair)
    left, right, white = (encoder.rows(pictures, [Crop(0, (128, 64), 0, left, 64, 64)]) for left in (0, 64, 60))
    for side in ("upgraded_mean", "base_mean"):
        assert not torch.allclose(getattr(left, side), getattr(right, side), atol=1e-2)
        # four black columns at the left edge
        assert not torch.allclose(getattr(white, side), getattr(right, side), atol=1e-2)
        torch.testing.assert_close(getattr(white, side)[..., -1], getattr(right, side)[..., -1], atol=0.2, rtol=0.2)


def test_a_picture_is_encoded_alike_whatever_else_is_in_the_batch(pair, pictures, crops):
    encoder = Encoder(*pair)
    together = encoder.rows(pictures, crops)
    for number, crop in enumerate(crops):
        alone = encoder.rows(pictures, [crop])
        given = [name for name, value in vars(together).items() if value is not None]
        assert given == [name for name, value in vars(alone).items() if value is not None]
        assert all(torch.equal(getattr(alone, name)[0], getattr(together, name)[number]) for name in given)


def test_captions_need_not_go_through_sdxl_where_its_prompt_is_always_empty(pair, pictures, crops):
    rows = Encoder(*pair, upgraded_captions=False).rows(pictures, crops)
    assert torch.equal(rows.upgraded_text, rows.empty_text)
    assert torch.equal(rows.upgraded_pooled, rows.empty_pooled)


def test_a_vae_in_half_precision_is_brought_to_float32(pair):
    base, upgraded = pair
    halved = SimpleNamespace(**{**upgraded.components, "vae": seeded(small_vae(), "upgraded.vae").half()})
    Encoder(base, halved)
    assert halved.vae.dtype == torch.float32


# --- the cache --------------------------------------------------------------------------------------------------------


def test_an_epoch_from_the_cache_needs_neither_vae_nor_text_encoder(pair, pictures, tmp_path):
    batches = Batches(pictures.sizes, 2, 1, SIZE, True)
    numbers = range(2 * batches.per_epoch)
    encoder = Encoder(*pair, cache=tmp_path / "cache")
    first = [encoder.rows(pictures, batches.at(number)) for number in numbers]
    encoder.flush()
    again = Encoder(*raising(pair), cache=tmp_path / "cache")
    assert all(equal(again.rows(pictures, batches.at(number)), first[number]) for number in numbers)


def test_the_encoders_that_must_not_be_called_would_tell(pair, pictures, crops, tmp_path):
    with pytest.raises(AssertionError, match="from the cache"):
        Encoder(*raising(pair), cache=tmp_path / "cache").rows(pictures, crops)


def test_the_cache_gives_the_bits_that_the_encoders_gave(pair, pictures, crops, tmp_path):
    plain = Encoder(*pair).rows(pictures, crops)
    assert equal(Encoder(*pair, cache=tmp_path / "cache").rows(pictures, crops), plain)
    assert equal(Encoder(*raising(pair), cache=tmp_path / "cache").rows(pictures, crops), plain)


@pytest.mark.parametrize("what", ["VAE of the base", "VAE of SDXL", "picture", "crop", "size"])
def test_latents_are_made_anew_where_what_they_depend_on_has_changed(pair, pictures, crops, tmp_path, what):
    base, upgraded = pair
    Encoder(*pair, cache=tmp_path / "cache").rows(pictures, crops[:1])
    wanted = crops[0]
    if what.startswith("VAE"):
        changed = small_vae()
        changed.load_state_dict((base if "base" in what else upgraded).vae.state_dict())
        with torch.no_grad():
            changed.encoder.conv_in.bias[0] += 1
        pipeline = SimpleNamespace(**{**(base if "base" in what else upgraded).components, "vae": changed.eval()})
        base, upgraded = (pipeline, upgraded) if "base" in what else (base, pipeline)
    if what == "picture":
        path = tmp_path / "pictures" / "0.png"
        with Image.open(path) as opened:
            opened.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(path)
        pictures = open_pictures(str(tmp_path / "pictures"))
    if what == "crop":
        wanted = Crop(0, (80, 80), 3, 0, 64, 64)
    if what == "size":
        wanted = Crop(0, (48, 48), 0, 0, 48, 48)
    with pytest.raises(AssertionError, match="from the cache"):
        Encoder(*raising((base, upgraded)), cache=tmp_path / "cache").rows(pictures, [wanted])


@pytest.mark.parametrize("what", ["caption", "encoder of the base", "encoder of SDXL"])
def test_texts_are_made_anew_where_what_they_depend_on_has_changed(pair, pictures, crops, tmp_path, what):
    base, upgraded = pair
    Encoder(*pair, cache=tmp_path / "cache").rows(pictures, crops[:1])
    if what == "caption":
        (tmp_path / "pictures" / "0.txt").write_text("another")
        pictures = open_pictures(str(tmp_path / "pictures"))
    if what == "encoder of the base":
        other = seeded(CLIPTextModel(text_config("quick_gelu")), "other", gain=1.5)
        base = SimpleNamespace(**{**base.components, "text_encoder": other})
    if what == "encoder of SDXL":
        other = seeded(CLIPTextModelWithProjection(text_config("gelu")), "other", gain=1.5)
        upgraded = SimpleNamespace(**{**upgraded.components, "text_encoder_2": other})
    with pytest.raises(AssertionError, match="from the cache"):
        Encoder(*raising((base, upgraded)), cache=tmp_path / "cache").rows(pictures, crops[:1])


def test_maps_are_made_anew_where_another_network_makes_them(pair, pictures, crops, tmp_path):
    def maps(level, estimator):
        control = Control("depth", lambda picture: Image.new("L", picture.size, level), estimator)
        return Encoder(*pair, control=control, cache=tmp_path / "cache").rows(pictures, crops[:1]).control

    assert torch.equal(maps(51, "one"), maps(0, "one"))
    assert not torch.equal(maps(51, "one"), maps(0, "another"))


def test_one_entry_is_enough_for_one_picture_under_two_names(pair, pictures, crops, tmp_path):
    folder = tmp_path / "pictures"
    (folder / "copy.png").write_bytes((folder / "0.png").read_bytes())
    (folder / "copy.txt").write_text(CAPTIONS[0])
    doubled = open_pictures(str(folder))
    Encoder(*pair, cache=tmp_path / "cache").rows(doubled, crops[:1])
    (copy,) = (number for number in range(5) if doubled.noted(number).name == "copy.png")
    again = Encoder(*raising(pair), cache=tmp_path / "cache")
    assert again.rows(doubled, [replace(crops[0], example=copy)])


# --- its shards -------------------------------------------------------------------------------------------------------


def key(number: int) -> str:
    return f"{number:064x}"


def entry(number: int) -> dict[str, torch.Tensor]:
    return {"a": torch.full((2, 3), float(number)), "b": torch.tensor(number)}


def holds(cache, number):
    found = cache.get(key(number))
    return found is not None and torch.equal(found["a"], entry(number)["a"]) and found["b"] == number


def test_entries_are_there_at_once_and_on_disk_from_then_on_that_a_shard_is_full(tmp_path):
    cache = LatentCache(tmp_path)
    for number in range(100):
        cache.put(key(number), entry(number))
        assert holds(cache, number)
    assert len(list(tmp_path.iterdir())) == 1
    other = LatentCache(tmp_path)
    assert all(holds(other, number) for number in range(64))
    assert other.get(key(64)) is None
    cache.flush()
    assert all(holds(other, number) for number in range(100))


def test_what_is_left_is_written_when_the_cache_is_let_go(tmp_path):
    cache = LatentCache(tmp_path)
    cache.put(key(1), entry(1))
    del cache
    assert holds(LatentCache(tmp_path), 1)


def test_a_shard_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    cache = LatentCache(tmp_path)
    cache.put(key(1), entry(1))
    with monkeypatch.context() as full:
        full.setattr("pathlib.Path.write_bytes", _disk_full)
        with pytest.raises(WrongFile, match="cannot be written: No space left"):
            cache.flush()
        assert not list(tmp_path.iterdir())
    cache.flush()
    assert holds(LatentCache(tmp_path), 1)


def _disk_full(path, data):
    with path.open("wb") as file:
        file.write(data[: len(data) // 2])
    raise OSError(28, "No space left on device")


def test_a_shard_that_another_process_is_writing_is_not_looked_at(tmp_path):
    (tmp_path / ".abc.part17.safetensors").write_bytes(b"half")
    assert LatentCache(tmp_path).get(key(1)) is None


def test_a_shard_that_is_cut_off_is_named(tmp_path):
    cache = LatentCache(tmp_path)
    cache.put(key(1), entry(1))
    cache.flush()
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(WrongFile, match=f"{path} is no shard of a cache or is cut off"):
        LatentCache(tmp_path)


WRITES = """
import sys, torch
from pathlib import Path
from lib_xadapter.training.latent_cache import LatentCache
cache, first = LatentCache(Path(sys.argv[1])), int(sys.argv[2])
print("ready", flush=True)
sys.stdin.readline()
for number in range(first, first + 150):
    cache.put(f"{number:064x}", {"a": torch.full((2, 3), float(number)), "b": torch.tensor(number)})
"""


def test_several_processes_write_at_once(tmp_path):
    """Entries 100 to 149 come from both."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITES, str(tmp_path), str(first)], **pipes) for first in (0, 100)
    ]
    reader = LatentCache(tmp_path)
    assert [writer.stdout.readline() for writer in writers] == ["ready\n"] * 2
    for writer in writers:
        writer.stdin.write("go\n")
        writer.stdin.flush()
    assert [writer.communicate()[0] for writer in writers] == ["", ""]
    assert [writer.returncode for writer in writers] == [0, 0]
    assert all(holds(reader, number) for number in range(250))
