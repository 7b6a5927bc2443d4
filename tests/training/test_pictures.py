"""Sources of pictures: what is read, what is skipped and named, what is refused in one sentence."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile

import numpy
import pytest
from PIL import Image

pytest.importorskip("datasets", reason="needs the extra 'train'")

import pyarrow
import pyarrow.parquet

from lib_xadapter.errors import WrongArgument, WrongFile
from lib_xadapter.training.pictures import BasePictures, PictureOptions, open_pictures


def picture(number: int, size=(48, 32)) -> Image.Image:
    width, height = size
    noise = numpy.random.default_rng(number).integers(0, 255, (height, width, 3), dtype=numpy.uint8)
    return Image.fromarray(noise)


def png(number: int, size=(48, 32)) -> bytes:
    file = io.BytesIO()
    picture(number, size).save(file, "PNG")
    return file.getvalue()


def write_tar(path, files):
    with tarfile.open(path, "w") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def shard(path, numbers, **columns):
    """As img2dataset writes them: 000000000.jpg, .txt, .json."""
    files = {}
    for number in numbers:
        told = {"caption": f"caption {number}", "key": f"{number:09d}", "status": "success", **columns}
        files[f"{number:09d}.jpg"] = png(number)
        files[f"{number:09d}.txt"] = f"caption {number}".encode()
        files[f"{number:09d}.json"] = json.dumps(told).encode()
    return write_tar(path, files)


def parquet(path, rows, group=2):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=group)
    return path


@pytest.fixture
def folder(tmp_path):
    """Three pictures with captions, one of them in a folder below."""
    root = tmp_path / "pictures"
    (root / "more").mkdir(parents=True)
    for number, name in enumerate(("a", "b", "more/c")):
        (root / f"{name}.png").write_bytes(png(number))
        (root / f"{name}.txt").write_text(f"caption {number}\n")
    return root


def captions(pictures):
    return [example.caption for example in pictures]


def same(first: Image.Image, second: Image.Image) -> bool:
    return first.size == second.size and first.tobytes() == second.tobytes()


# --- one picture for each model ---------------------------------------------------------------------------------------


def test_the_bases_pictures_in_parquet_files_are_found_by_file_and_row(tmp_path):
    for name, first in (("data", 0), ("base", 10)):
        (tmp_path / name).mkdir()
        rows = [{"caption": "a", "jpg": png(first + number)} for number in range(3)]
        parquet(tmp_path / name / "a.parquet", rows)
    pictures, others = (open_pictures(str(tmp_path / name)) for name in ("data", "base"))
    beside = BasePictures.beside(pictures, others)
    assert all(same(beside[number].picture, picture(10 + number)) for number in range(3))


def test_two_pictures_of_one_name_for_the_base_are_refused(folder, tmp_path):
    pictures = open_pictures(str(folder))
    (folder / "a.jpg").write_bytes(png(7))
    with pytest.raises(WrongFile, match=r"a\.jpg and a\.png have one name"):
        BasePictures.beside(pictures, open_pictures(str(folder)))


# --- what is read -----------------------------------------------------------------------------------------------------


def test_a_folder_gives_pictures_with_the_text_files_beside_them(folder):
    pictures = open_pictures(str(folder))
    assert [example.name for example in pictures] == ["a.png", "b.png", "more/c.png"]
    assert captions(pictures) == ["caption 0", "caption 1", "caption 2"]
    assert all(same(example.picture, picture(number)) for number, example in enumerate(pictures))
    assert pictures.sizes.tolist() == [[48, 32]] * 3
    assert not pictures.skipped


def test_metadata_jsonl_gives_captions_too(folder):
    for path in folder.rglob("*.txt"):
        path.unlink()
    rows = [{"file_name": "b.png", "text": "of b"}, {"file_name": "more/c.png", "text": "of c"}]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    pictures = open_pictures(str(folder))
    assert captions(pictures) == ["of b", "of c"]
    assert pictures.skipped == {"without a caption": ("a.png",)}


def test_a_picture_that_metadata_names_and_nobody_has_is_named(folder):
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "gone.png", "text": "x"}))
    assert open_pictures(str(folder)).skipped == {"not there": ("gone.png",)}


@pytest.mark.parametrize("as_named", ["one path", "a pattern", "a folder"])
def test_shards_are_read_by_path_pattern_or_folder(tmp_path, as_named):
    first, _ = shard(tmp_path / "00000.tar", range(3)), shard(tmp_path / "00001.tar", range(3, 5))
    # img2dataset leaves these beside its shards
    parquet(tmp_path / "00000.parquet", [{"url": "https://example.org", "caption": "caption 0"}])
    source, many = {
        "one path": (first, 3),
        "a pattern": (tmp_path / "*.tar", 5),
        "a folder": (tmp_path, 5),
    }[as_named]
    pictures = open_pictures(str(source))
    assert captions(pictures) == [f"caption {number}" for number in range(many)]
    assert same(pictures[many - 1].picture, picture(many - 1))
    assert pictures[0].name == "00000.tar/000000000.jpg"


def test_shards_without_text_files_take_the_caption_of_their_json(tmp_path):
    path = write_tar(tmp_path / "a.tar", {"x.jpg": png(0), "x.json": json.dumps({"caption": "from json"}).encode()})
    assert captions(open_pictures(str(path))) == ["from json"]


@pytest.mark.parametrize("as_stored", ["img2dataset", "Hugging Face"])
def test_parquet_files_hold_pictures_as_bytes(tmp_path, as_stored):
    def row(number):
        if as_stored == "img2dataset":
            return {"caption": f"caption {number}", "jpg": png(number)}
        return {"image": {"bytes": png(number), "path": f"{number}.png"}, "text": f"caption {number}"}

    path = parquet(tmp_path / "a.parquet", [row(number) for number in range(5)])
    pictures = open_pictures(str(path))
    assert captions(pictures) == [f"caption {number}" for number in range(5)]
    assert all(same(pictures[number].picture, picture(number)) for number in (4, 0, 3))


def test_the_last_picture_of_a_large_row_group_is_found(tmp_path):
    rows = [{"caption": f"caption {number}", "jpg": png(number, (8, 8))} for number in range(70)]
    pictures = open_pictures(str(parquet(tmp_path / "a.parquet", rows, group=50)))
    assert same(pictures[49].picture, picture(49, (8, 8)))
    assert same(pictures[-1].picture, picture(69, (8, 8)))


def test_pictures_are_turned_as_their_exif_says(folder):
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(0).save(folder / "a.png", exif=exif)
    pictures = open_pictures(str(folder))
    assert pictures[0].picture.size == (32, 48)
    assert pictures.sizes[0].tolist() == [32, 48]


def test_what_is_transparent_becomes_white(folder):
    Image.new("RGBA", (48, 32), (255, 0, 0, 0)).save(folder / "a.png")
    assert open_pictures(str(folder))[0].picture.getpixel((0, 0)) == (255, 255, 255)


def test_the_size_before_a_data_set_was_resized_is_known(tmp_path):
    path = shard(tmp_path / "a.tar", range(1), original_width=4000, original_height=3000)
    pictures = open_pictures(str(path))
    assert pictures.original_sizes.tolist() == [[4000, 3000]]
    assert pictures.sizes.tolist() == [[48, 32]]


# --- what is skipped --------------------------------------------------------------------------------------------------


def test_broken_pictures_and_empty_captions_are_counted_named_and_skipped(folder, caplog):
    (folder / "a.png").write_bytes(png(0)[:-200])
    (folder / "b.txt").write_text(" \n")
    pictures = open_pictures(str(folder))
    assert captions(pictures) == ["caption 2"]
    assert pictures.skipped == {"broken": ("a.png",), "without a caption": ("b.png",)}
    assert "2 of 3 pictures are skipped: 1 broken (a.png), 1 without a caption (b.png)." in caplog.text


def test_rows_without_bytes_are_named(tmp_path):
    rows = [{"caption": "a", "jpg": None}, {"caption": "b", "jpg": png(1)}]
    assert open_pictures(str(parquet(tmp_path / "a.parquet", rows))).skipped == {"not there": ("a.parquet, row 0",)}


def test_small_pictures_are_left_out_where_that_is_wanted(folder):
    (folder / "b.png").write_bytes(png(1, (100, 16)))
    pictures = open_pictures(str(folder), PictureOptions(minimum_size=32))
    assert pictures.skipped == {"smaller than 32 pixels": ("b.png",)}


@pytest.mark.parametrize("column", ["aesthetic", "AESTHETIC_SCORE"])
def test_laions_aesthetics_are_looked_at(tmp_path, column):
    shard(tmp_path / "a.tar", [0], **{column: 4.5})
    shard(tmp_path / "b.tar", [1], **{column: 6.5})
    shard(tmp_path / "c.tar", [2])
    pictures = open_pictures(str(tmp_path), PictureOptions(minimum_aesthetics=5))
    assert captions(pictures) == ["caption 1", "caption 2"]
    assert list(pictures.skipped) == ["with aesthetics below 5"]


def test_laions_watermark_is_looked_at(tmp_path):
    rows = [{"TEXT": f"{value}", "jpg": png(0), "pwatermark": value} for value in (0.9, 0.2, None)]
    path = parquet(tmp_path / "a.parquet", rows)
    pictures = open_pictures(str(path), PictureOptions(maximum_watermark=0.5))
    assert captions(pictures) == ["0.2", "None"]
    assert list(pictures.skipped) == ["with a watermark likelier than 0.5"]


def test_a_filter_whose_column_is_nowhere_says_so(folder, tmp_path, caplog):
    for _ in range(2):
        open_pictures(str(folder), PictureOptions(minimum_aesthetics=5), tmp_path / "cache")
    told = "is filtered by aesthetics: it has no column aesthetic or aesthetic_score or aesthetics."
    assert caplog.text.count(told) == 2
    assert "watermark" not in caplog.text


def test_a_caption_can_come_from_a_column_of_ones_own(tmp_path):
    path = shard(tmp_path / "a.tar", range(1), alt="an alternative")
    assert captions(open_pictures(str(path), PictureOptions(caption_column="alt"))) == ["an alternative"]


# --- what is kept -----------------------------------------------------------------------------------------------------


def test_a_source_is_gone_over_once_where_there_is_a_cache(folder, tmp_path, monkeypatch):
    first = open_pictures(str(folder), cache=tmp_path / "cache")
    monkeypatch.setattr("lib_xadapter.training.pictures.samples_of", None)
    again = open_pictures(str(folder), cache=tmp_path / "cache")
    assert captions(again) == captions(first)
    assert again.fingerprint == first.fingerprint
    assert [path.name[:9] for path in (tmp_path / "cache").iterdir()] == ["pictures-"]


def test_a_source_that_has_changed_is_gone_over_again(folder, tmp_path):
    before = open_pictures(str(folder), cache=tmp_path / "cache")
    (folder / "b.txt").write_text("another caption")
    after = open_pictures(str(folder), cache=tmp_path / "cache")
    assert captions(after)[1] == "another caption"
    assert after.fingerprint != before.fingerprint


def test_the_fingerprint_is_of_the_contents_and_not_of_the_place(folder):
    before = open_pictures(str(folder)).fingerprint
    moved = folder.rename(folder.with_name("elsewhere"))
    assert open_pictures(str(moved)).fingerprint == before
    (moved / "a.png").write_bytes(png(7))
    assert open_pictures(str(moved)).fingerprint != before


def test_an_index_that_fails_half_way_leaves_nothing_behind(tmp_path):
    (tmp_path / "shards").mkdir()
    shard(tmp_path / "shards" / "a.tar", range(3))
    (tmp_path / "shards" / "b.tar").write_text("no tar" * 200)
    with pytest.raises(WrongFile):
        open_pictures(str(tmp_path / "shards"), cache=tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


LOOKS = """
import sys, tracemalloc
import pyarrow
from lib_xadapter.training.pictures import open_pictures

def look(source):
    pictures = open_pictures(source)
    for number in range(0, len(pictures), 199):
        pictures[number]
    return len(pictures)

tracemalloc.start()
for source in sys.argv[1:]:
    tracemalloc.reset_peak()
    pictures = look(source)
    print(pictures, tracemalloc.get_traced_memory()[1], pyarrow.default_memory_pool().max_memory())
"""
"""Pictures, and the largest memory of Python and of Arrow, for one source after the other."""


def test_memory_does_not_grow_with_the_pictures_bytes(tmp_path):
    """Through the index and back: 30 MB of pictures after 0.3 MB."""
    sources, picture_bytes = [], png(0, (100, 100))
    for many in (10, 1000):
        # what follows a picture's end is not looked at, and lets no file store it once for all
        rows = [(f"{row:06d}", picture_bytes + row.to_bytes(4, "big")) for row in range(many)]
        files = {f"{key}{end}": part for key, data in rows for end, part in ((".png", data), (".txt", b"x"))}
        sources.append(write_tar(tmp_path / f"{many}.tar", files))
        table = [{"caption": "x", "png": data} for _, data in rows]
        sources.append(parquet(tmp_path / f"{many}.parquet", table, group=50))
    assert all(source.stat().st_size > 30e6 for source in sources[2:])
    ended = subprocess.run([sys.executable, "-c", LOOKS, *sources], capture_output=True, text=True, check=True)
    looks = [tuple(map(int, line.split())) for line in ended.stdout.splitlines()]
    assert [pictures for pictures, *_ in looks] == [10, 10, 1000, 1000]
    for (_, *before), (_, *after) in zip(looks[:2], looks[2:], strict=True):
        assert all(late - early < 5e6 for early, late in zip(before, after, strict=True))


# --- what is refused --------------------------------------------------------------------------------------------------


def refused(source, options=None) -> str:
    with pytest.raises(WrongFile) as caught:
        open_pictures(str(source), options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_source_that_is_not_there_is_refused(tmp_path):
    assert refused(tmp_path / "nothing").startswith(f"There is no {tmp_path / 'nothing'}")


def test_a_folder_without_pictures_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("no picture")
    assert "holds no pictures" in refused(tmp_path)


def test_captions_that_are_missing_altogether_are_asked_for(folder):
    for path in folder.rglob("*.txt"):
        path.unlink()
    assert "holds no usable picture: 3 without a caption (a.png, b.png, more/c.png); a caption stands in a .txt" in (
        refused(folder)
    )


def test_no_usable_picture_is_told_with_the_reasons(folder):
    (folder / "a.png").write_bytes(b"no picture")
    told = refused(folder, PictureOptions(minimum_size=64))
    assert "holds no usable picture: 1 broken (a.png), 2 smaller than 64 pixels (b.png, more/c.png)." in told


@pytest.mark.parametrize("kind", ["text", "empty", "compressed", "cut off in a picture", "cut off in a header"])
def test_a_wrong_shard_is_refused_by_name(tmp_path, kind):
    path = shard(tmp_path / "00007.tar", range(4))
    whole = path.read_bytes()
    if kind == "compressed":
        with tarfile.open(path, "w:gz") as archive:
            archive.addfile(tarfile.TarInfo("x.jpg"))
    else:
        cut = {"text": b"words " * 400, "empty": b"", "cut off in a picture": whole[:1000]}
        header = whole.index(b"000000002.jpg")
        path.write_bytes(cut.get(kind, whole[:header] + b"#" * 600))
    assert refused(path).startswith(f"{path} is cut off or is no .tar")


def test_a_wrong_parquet_file_is_refused_by_name(tmp_path):
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1 or so")
    assert refused(path).startswith(f"{path} is cut off or is no .parquet")


def test_parquet_without_bytes_is_refused_with_the_columns_it_has(tmp_path):
    path = parquet(tmp_path / "a.parquet", [{"url": "https://example.org", "caption": "x"}])
    assert "expected a column of bytes called image or jpg or jpeg, it has url, caption." in refused(path)


def test_metadata_that_is_no_json_is_refused_by_its_line(folder):
    (folder / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "x"}\n{"text": "x"}\n')
    assert "metadata.jsonl, line 2: expected an object with 'file_name'" in refused(folder)


def test_a_picture_that_has_changed_since_is_refused(folder):
    pictures = open_pictures(str(folder))
    (folder / "a.png").write_bytes(png(5))
    with pytest.raises(WrongFile, match=r"a\.png is no longer the picture"):
        pictures[0]
    (folder / "b.png").unlink()
    with pytest.raises(WrongFile, match="cannot be read any more"):
        pictures[1]


@pytest.mark.parametrize(("option", "value"), [("minimum_size", -1), ("maximum_watermark", 1.5)])
def test_options_out_of_range_are_refused_by_name(option, value):
    with pytest.raises(WrongArgument, match=f"'{option}' is {value}, expected"):
        PictureOptions(**{option: value})
