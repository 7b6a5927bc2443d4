"""Textual inversions are found by their names in prompts, for either model, and their files are read only then."""

from __future__ import annotations

from pathlib import Path

import numpy
import pytest
import safetensors.torch
import torch
from PIL import Image

from lib_xadapter.errors import DoesNotFit, WrongArgument, WrongFile
from lib_xadapter.headless import encode_prompt
from lib_xadapter.headless.generate_command import embedding_folders
from lib_xadapter.headless.inversions import Inversions, Lookup, bundled_inversions, read_inversion
from lib_xadapter.headless.model_files import load_base, load_upgraded
from lib_xadapter.headless.models import Models
from lib_xadapter.headless.prompts import PromptPair, encode_for_base, encode_for_upgraded

WIDTH = 64


@pytest.fixture(scope="module")
def base(small):
    return load_base(small.base, torch.float32, small.tokenizer)


@pytest.fixture(scope="module")
def upgraded(small):
    return load_upgraded(small.upgraded, torch.float32, small.tokenizer)


def vectors(number: int = 2, width: int = WIDTH, seed: int = 1) -> torch.Tensor:
    return 2 * torch.randn(number, width, generator=torch.Generator().manual_seed(seed))


def safe(folder: Path, name: str, **tensors: torch.Tensor) -> Path:
    safetensors.torch.save_file(tensors, folder / f"{name}.safetensors")
    return folder / f"{name}.safetensors"


@pytest.fixture
def folder(tmp_path):
    """A name within a name, one of SDXL, one of no model here, and a broken file."""
    folder = tmp_path / "embeddings"
    (folder / "styles").mkdir(parents=True)
    safe(folder, "ink", emb_params=vectors())
    safe(folder / "styles", "ink wash", emb_params=vectors(3))
    safe(folder, "glow", clip_l=vectors(), clip_g=vectors())
    safe(folder, "wide", emb_params=vectors(width=96))
    (folder / "broken.pt").write_bytes(b"nothing of the kind")
    return folder


@pytest.mark.parametrize(
    ("prompt", "found"),
    [
        ("a cat", []),
        ("ink", ["ink"]),
        ("an ink wash, ink", ["ink wash", "ink"]),
        ("INK", ["ink"]),
        ("glow and wide", []),
    ],
)
def test_the_longest_name_that_fits_is_found(prompt, found, folder, base):
    numbers = base.tokenizer(prompt, add_special_tokens=False)["input_ids"]
    lookup = Lookup(Inversions.below(folder), base.tokenizer, (WIDTH,))
    names, place = [], 0
    while place < len(numbers):
        match = lookup.at(numbers, place)
        names += [match.inversion.name] if match else []
        place += match.tokens if match else 1
    assert names == found


def test_vectors_take_the_place_of_the_name(folder, base):
    """The prompt of the vectors themselves, as tokens would stand there."""
    told = encode_prompt(base, "ink a", embeddings=folder).prompt_embeds
    embeddings = base.text_encoder.get_input_embeddings()
    before = embeddings.weight[:2].clone()
    tokens = torch.tensor([[512, 0, 1, *base.tokenizer("a")["input_ids"][1:], *[513] * 73]])
    with torch.no_grad():
        embeddings.weight[:2] = vectors()
        expected = base.text_encoder(tokens[:, :77]).last_hidden_state
        embeddings.weight[:2] = before
    torch.testing.assert_close(told, expected)


def test_a_file_is_read_only_where_a_prompt_has_its_name(folder, base):
    encode_prompt(base, "a cat", embeddings=folder)
    with pytest.raises(WrongFile, match=r"broken\.pt is cut off or is no PyTorch file of tensors"):
        encode_prompt(base, "a broken cat", embeddings=folder)


def test_names_of_sdxl_are_left_out_for_the_base(folder, base, upgraded):
    models = Models(base, upgraded, inversions=Inversions.below(folder))
    named, without = (
        encode_for_base(models, PromptPair(text, "")).conds[0].at(0).tokens for text in ("a cat, glow", "a cat")
    )
    assert torch.equal(named, without)
    named, without = (
        encode_for_upgraded(models, PromptPair(text, "")).conds[0].at(0) for text in ("a cat, glow", "a cat")
    )
    assert not torch.allclose(named.tokens, without.tokens)
    assert not torch.allclose(named.pooled, without.pooled)


def test_more_vectors_than_a_window_takes_are_refused(tmp_path, base):
    safe(tmp_path, "crowd", emb_params=vectors(76))
    with pytest.raises(DoesNotFit, match=r"'crowd' has 76 vectors, expected up to 75"):
        encode_prompt(base, "crowd", embeddings=tmp_path)


# --- files ------------------------------------------------------------------------------------------------------------


def test_files_of_every_trainer_are_read(tmp_path):
    of_the_webui = {"string_to_token": {"*": 265}, "string_to_param": {"*": vectors()}, "name": "ink", "step": 5}
    first = {"string_to_token": {"*": 265}, "string_to_param": torch.nn.ParameterDict({"*": vectors()})}
    for name, data in (("webui.pt", of_the_webui), ("first.pt", first), ("diffusers.bin", {"<ink>": vectors()[0]})):
        torch.save(data, tmp_path / name)
        (found,) = read_inversion(tmp_path / name).vectors
        assert torch.equal(found, vectors()[: len(found)])
    assert read_inversion(safe(tmp_path, "two", clip_l=vectors(), clip_g=vectors(width=32))).widths == (64, 32)


def test_what_is_no_textual_inversion_is_named(tmp_path):
    path = safe(tmp_path, "lora", one=vectors(), other=vectors())
    with pytest.raises(WrongFile, match=r"lora.safetensors is no textual inversion"):
        read_inversion(path)
    with pytest.raises(WrongFile, match=r"nan.safetensors: 'its vectors' holds NaN"):
        read_inversion(safe(tmp_path, "nan", emb_params=torch.full((1, WIDTH), torch.nan)))


def test_loras_bring_theirs_along_and_files_go_before_them(tmp_path, folder):
    bundle = {
        "bundle_emb.ink.string_to_param.*": vectors(5),
        "bundle_emb.shine.clip_l": vectors(),
        "bundle_emb.shine.clip_g": vectors(),
    }
    path = tmp_path / "lora.safetensors"
    safetensors.torch.save_file(bundle, path)
    assert {one.name: one.widths for one in bundled_inversions(path)} == {"ink": (64,), "shine": (64, 64)}
    known = Inversions.below(folder).with_those_of([path])
    assert known.named("ink").number == 2
    assert known.named("shine").number == 2


# --- the command line -------------------------------------------------------------------------------------------------


def test_they_are_looked_for_in_the_models_folder_and_beside_it(tmp_path):
    models = tmp_path / "webui" / "models"
    for folder in (models / "embeddings", tmp_path / "webui" / "embeddings"):
        folder.mkdir(parents=True)
    assert embedding_folders(models, None) == (models / "embeddings", tmp_path / "webui" / "embeddings")
    assert embedding_folders(None, None) == ()
    with pytest.raises(WrongFile, match="--embeddings: there is no folder nowhere"):
        embedding_folders(None, Path("nowhere"))


def test_a_prompt_names_one_on_the_command_line(generate, folder):
    small = {"steps": "1", "width": "64", "height": "64"}
    assert generate("--embeddings", str(folder), prompt="a cat, ink", **small) == 0
    assert generate(prompt="a cat, ink", **small) == 0
    named, words = (numpy.asarray(Image.open(path)) for path in generate.pictures())
    assert not numpy.array_equal(named, words)


# --- anybody's pipeline -----------------------------------------------------------------------------------------------

SMALL = {"width": 64, "height": 64, "num_inference_steps": 3, "output_type": "latent", "guidance_scale": 4.0}


def painted(pipeline, said, **more) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    return pipeline(**said.arguments, latents=latents, **SMALL, **more).images


@pytest.mark.parametrize("which", ["base", "upgraded"])
def test_embeddings_are_for_any_pipeline_of_diffusers(which, request):
    """Plain words, and what diffusers itself makes of them."""
    pipeline = request.getfixturevalue(which)
    pipeline.set_progress_bar_config(disable=True)
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    own = pipeline("a cat", negative_prompt="a dog", latents=latents, **SMALL).images
    torch.testing.assert_close(painted(pipeline, encode_prompt(pipeline, "a cat", "a dog")), own)


def test_a_prompt_that_changes_on_the_way_is_told_step_by_step(base):
    plain = painted(base, encode_prompt(base, "a cat"))
    for prompt, same in (("[a cat:a cat:2]", True), ("[a cat:a dog:1]", False), ("a cat AND a dog", False)):
        said = encode_prompt(base, prompt, steps=3)
        assert not said.is_plain
        with said.at_each_step(base):
            made = painted(base, said)
        assert torch.allclose(made, plain, atol=1e-4) == same, prompt
    assert torch.equal(painted(base, encode_prompt(base, "a cat")), plain)


def test_a_lora_in_the_words_is_refused(base):
    with pytest.raises(WrongArgument, match=r"the LoRA 'ink' is named, which is to be merged by load_lora"):
        encode_prompt(base, "a cat <lora:ink:0.5>")
