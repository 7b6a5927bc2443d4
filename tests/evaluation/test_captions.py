"""Captions of three kinds of sources, and captions as prompts."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from lib_xadapter.errors import WrongArgument, WrongFile
from lib_xadapter.evaluation.captions import Caption, literal, read_captions
from lib_xadapter.headless.prompt_grammar import combined_prompts, prompt_schedule
from lib_xadapter.headless.prompts import split_into_windows
from lib_xadapter.headless.tokenizers import load_tokenizer


@pytest.fixture
def coco(tmp_path):
    """Two pictures with several captions, one of the pictures missing, and one picture without any."""
    told = {
        "images": [{"id": 9, "file_name": "9.jpg"}, {"id": 4, "file_name": "4.jpg"}, {"id": 5, "file_name": "5.jpg"}],
        "annotations": [
            {"image_id": 4, "id": 30, "caption": "Later"},
            {"image_id": 9, "id": 20, "caption": "A dog\nruns."},
            {"image_id": 4, "id": 10, "caption": "First "},
        ],
    }
    path = tmp_path / "captions.json"
    path.write_text(json.dumps(told))
    (tmp_path / "pictures").mkdir()
    for name in ("4.jpg", "5.jpg"):
        Image.new("RGB", (8, 8)).save(tmp_path / "pictures" / name)
    return path


def test_a_text_file_has_a_caption_a_line(tmp_path):
    path = tmp_path / "captions.txt"
    path.write_text("A cat\n\n# a remark\n  two   dogs \n")
    assert [caption.text for caption in read_captions(path).usable] == ["A cat", "two dogs"]
    assert [caption.text for caption in read_captions(path, limit=1).usable] == ["A cat"]


def test_a_caption_keeps_its_key_when_others_are_added_behind_it(tmp_path):
    path = tmp_path / "captions.txt"
    path.write_text("A cat\nA cat\n")
    before = [caption.key for caption in read_captions(path).usable]
    path.write_text("A cat\nA cat\nA dog\n")
    after = [caption.key for caption in read_captions(path).usable]
    assert after[:2] == before
    assert len(set(after)) == 3
    path.write_text("Another cat\nA cat\n")
    assert read_captions(path).usable[0].key != before[0]


def test_cocos_first_caption_of_each_picture_is_taken(coco):
    found = read_captions(coco, coco.parent / "pictures")
    assert [(caption.name, caption.text) for caption in found.usable] == [
        ("000000000004", "First"),
        ("000000000009", "A dog runs."),
    ]
    assert found.usable[0].picture == coco.parent / "pictures" / "4.jpg"
    assert found.usable[1].picture is None
    assert found.skipped == {"empty caption": ("000000000005",)}


def test_what_has_no_picture_is_skipped_by_name_where_pictures_are_needed(coco):
    found = read_captions(coco, coco.parent / "pictures", needs_pictures=True)
    assert [caption.name for caption in found.usable] == ["000000000004"]
    assert found.skipped["no picture"] == ("000000000009",)


def test_a_folder_has_pictures_with_captions_beside_them_and_captions_alone(captioned, tmp_path):
    found = read_captions(captioned)
    assert [caption.picture.name for caption in found.usable] == ["ball.png", "moon.png"]
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "alone.txt").write_text("a cat")
    Image.new("RGB", (8, 8)).save(tmp_path / "silent.png")
    found = read_captions(tmp_path)
    assert found.usable == (Caption("deep/alone", "a cat"),)
    assert found.skipped == {"empty caption": ("silent",)}


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("{}", "is no captions JSON of COCO"),
        ("[]", "is no captions JSON of COCO"),
        ("no json", "is no captions JSON of COCO"),
        ('{"images": [{"id": 1}], "annotations": []}', "is no captions JSON of COCO"),
        ('{"images": [], "annotations": []}', "has no caption that can be used"),
        ('{"images": [{"id": 1, "file_name": "a"}], "annotations": []}', "1 with empty caption"),
    ],
)
def test_what_is_no_captions_file_is_refused_in_a_sentence(tmp_path, content, told):
    path = tmp_path / "captions.json"
    path.write_text(content)
    with pytest.raises((WrongFile, WrongArgument), match=told):
        read_captions(path)


def test_missing_sources_are_named(tmp_path, coco):
    with pytest.raises(WrongFile, match="--captions: .*nowhere.txt cannot be read"):
        read_captions(tmp_path / "nowhere.txt")
    with pytest.raises(WrongFile, match="--pictures: there is no folder"):
        read_captions(coco, tmp_path / "nowhere")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00a")
    with pytest.raises(WrongFile, match="is no text in UTF-8"):
        read_captions(tmp_path / "bytes.txt")


@pytest.mark.parametrize(
    "text",
    [
        "A man (left) AND a [red|blue] dog BREAK",
        "a clock that shows 10:30",
        "a score of 3: 0.5",
        r"back\slash (a:1.2) [b:c:0.5] :(",
        "((((",
    ],
)
def test_a_caption_is_told_to_the_models_word_for_word(small, text):
    tokenizer = load_tokenizer(small.tokenizer)
    (prompt,) = combined_prompts(literal(text))
    assert prompt.weight == 1
    (stretch,) = prompt_schedule(prompt.text, 10)
    (window,) = split_into_windows(stretch.text, tokenizer)
    whole = tokenizer(text)["input_ids"]
    assert list(window.tokens[: len(whole)]) == whole
    assert set(window.weights) == {1}
