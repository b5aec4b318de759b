"""Reading a folder of pictures with captions beside them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from loha_core import LoHaError
from loha_core.training.data.folder import read_folder, without_caption

from .processes import PATIENCE

ROOT = Path(__file__).parents[2]


def save(path: Path, color: object = (255, 0, 0), size: tuple[int, int] = (6, 4), mode: str = "RGB", **rest) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, color).save(path, **rest)
    return path


def test_pictures_captions_and_repeats(tmp_path):
    save(tmp_path / "b.png")
    save(tmp_path / "a.JPG")
    (tmp_path / "a.txt").write_bytes("\ufeffein Bär, läuft \n".encode())
    save(tmp_path / "10_sks cat" / "x.webp")
    save(tmp_path / "10_sks cat" / "y.bmp")
    (tmp_path / "10_sks cat" / "y.txt").write_text("sitting")
    save(tmp_path / "more" / "z.tif")
    save(tmp_path / ".thumbnails" / "x.png")
    save(tmp_path / ".hidden.png")
    (tmp_path / "notes.txt").write_text("nothing")
    found = [(entry.name, entry.caption, entry.repeats, entry.mask) for entry in read_folder(tmp_path)]
    assert found == [
        ("10_sks cat/x.webp", "sks cat", 10, None),
        ("10_sks cat/y.bmp", "sitting", 10, None),
        ("a.JPG", "ein Bär, läuft", 1, None),
        ("b.png", "", 1, None),
        ("more/z.tif", "", 1, None),
    ]


@pytest.mark.parametrize(
    "name", ["a.txt", "a.caption", "a.TXT", "a.Caption", "a.png.txt", "a.png.caption", "a.png.TXT"]
)
def test_every_place_of_a_caption(tmp_path, name):
    """Row 11 of issue 14: these were trained on an empty caption, silently."""
    save(tmp_path / "a.png")
    save(tmp_path / "b [1.5] x.png")
    (tmp_path / name).write_text("a cat")
    (tmp_path / name.replace("a", "b [1.5] x", 1)).write_text("a dog")
    (tmp_path / "ab.txt").write_text("not mine")
    assert [entry.caption for entry in read_folder(tmp_path)] == ["a cat", "a dog"]


def test_captions_that_differ_are_not_chosen_from(tmp_path):
    save(tmp_path / "a.png")
    for name in ("a.txt", "a.png.txt"):
        (tmp_path / name).write_text("a cat")
    assert read_folder(tmp_path)[0].caption == "a cat"
    (tmp_path / "a.caption").write_text("cat, sitting")
    with pytest.raises(LoHaError, match=r"a\.png: has captions that differ, in a\.caption and a\.txt; keep"):
        read_folder(tmp_path)


def test_a_folder_without_captions_is_spoken_of(tmp_path):
    for name in "abc":
        save(tmp_path / f"{name}.png")
    assert "3 of 3 pictures have no caption (a.png, …)" in (without_caption(read_folder(tmp_path)) or "")
    (tmp_path / "a.txt").write_text("cat")
    assert "2 of 3 pictures" in (without_caption(read_folder(tmp_path)) or "")
    (tmp_path / "b.caption").write_text("cat")
    assert without_caption(read_folder(tmp_path)) is None


def test_the_folder_s_own_name_is_no_count(tmp_path):
    save(tmp_path / "5_top" / "a.png")
    assert [(e.caption, e.repeats) for e in read_folder(tmp_path / "5_top")] == [("", 1)]


@pytest.mark.parametrize(
    ("mode", "color", "wanted"),
    [
        ("RGB", (255, 0, 51), (1, 0, 0.2)),
        ("L", 51, (0.2, 0.2, 0.2)),
        ("1", 1, (1, 1, 1)),
        ("RGBA", (255, 0, 0, 0), (1, 1, 1)),
        ("RGBA", (255, 0, 0, 51), (1, 0.8, 0.8)),
        ("LA", (0, 51), (0.8, 0.8, 0.8)),
        ("P", 0, (0, 0, 0)),
        ("I;16", 13107, (0.2, 0.2, 0.2)),
    ],
)
def test_every_kind_of_pixel(tmp_path, mode, color, wanted):
    save(tmp_path / "a.png", color, mode=mode)
    [entry] = read_folder(tmp_path)
    picture, mask = entry.load()
    assert picture.dtype == torch.float32 and mask is None
    torch.testing.assert_close(picture, torch.tensor(wanted).float().expand(4, 6, 3), atol=1e-4, rtol=0)


def test_a_palette_with_a_transparent_colour(tmp_path):
    image = Image.new("P", (6, 4), 1)
    image.putpalette([0, 0, 0, 255, 0, 0])
    image.save(tmp_path / "a.png", transparency=1)
    assert read_folder(tmp_path)[0].load()[0].min() == 1


def test_the_orientation_of_the_camera(tmp_path):
    image = Image.new("RGB", (6, 4), (0, 0, 0))
    image.putpixel((0, 0), (255, 255, 255))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned right
    image.save(tmp_path / "a.png", exif=exif)
    [entry] = read_folder(tmp_path)
    picture, _ = entry.load()
    assert picture.shape == (6, 4, 3) and picture[0, 3].min() == 1 and picture.sum() == 3


def test_masks(tmp_path):
    save(tmp_path / "a.png")
    save(tmp_path / "2_b" / "b.jpg")
    save(tmp_path / "masks" / "a.png", 51, mode="L")
    save(tmp_path / "masks" / "2_b" / "b.webp", 255, mode="L", lossless=True)
    entries = read_folder(tmp_path, tmp_path / "masks")
    assert [entry.name for entry in entries] == ["2_b/b.jpg", "a.png"]
    masks = [entry.load()[1] for entry in entries]
    assert [mask.shape for mask in masks] == [(4, 6), (4, 6)]
    torch.testing.assert_close([mask.mean().item() for mask in masks], [1.0, 0.2])


def bad(folder: Path, what: str) -> Path | None:
    save(folder / "good.png")
    if what == "text":
        (folder / "bad.png").write_text("no picture")
    elif what == "empty":
        (folder / "bad.jpg").write_bytes(b"")
    elif what == "caption":
        (folder / "good.txt").write_bytes(b"\xff\xfe\xfd")
    elif what == "zero":
        save(folder / "0_x" / "a.png")
    elif what == "mask":
        (folder / "masks").mkdir()
        return folder / "masks"
    elif what == "nothing":
        (folder / "good.png").rename(folder / "good.svg")
    elif what == "no masks":
        return folder / "nowhere"
    return None


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("text", r"bad\.png: cannot be read as a picture.*replace it or take it out"),
        ("empty", r"bad\.jpg: cannot be read"),
        ("caption", r"good\.txt: cannot be read as UTF-8"),
        ("zero", "0_x: the name asks for 0 repeats"),
        ("mask", r"no mask for good\.png"),
        ("nothing", r"there is no picture in it; these are read: \.png"),
        ("no masks", "nowhere: there is no such folder"),
    ],
)
def test_what_stops_the_run_before_it_begins(tmp_path, what, message):
    masks = bad(tmp_path, what)
    with pytest.raises(LoHaError, match=message):
        read_folder(tmp_path, masks)


def test_what_is_found_out_when_it_is_read(tmp_path):
    whole = save(tmp_path / "cut.png", size=(300, 300)).read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    save(tmp_path / "size.png")
    save(tmp_path / "masks" / "size.png", size=(5, 4))
    save(tmp_path / "masks" / "cut.png")
    cut, size = read_folder(tmp_path, tmp_path / "masks")
    with pytest.raises(LoHaError, match=r"cut\.png: cannot be read as a picture"):
        cut.load()
    with pytest.raises(LoHaError, match=r"size\.png: the mask has 5×4 pixels, its picture size\.png 6×4"):
        size.load()


def test_a_picture_that_would_fill_the_memory(tmp_path, monkeypatch):
    save(tmp_path / "bomb.png", size=(100, 100))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(LoHaError, match=r"bomb\.png: cannot be read"):
        read_folder(tmp_path)


def test_without_pillow_it_names_the_extra(tmp_path):
    save(tmp_path / "a.png")
    code = (
        "import sys; sys.modules['PIL'] = None; from pathlib import Path; from loha_core.training.data import folder\n"
    )
    code += f"folder.read_folder(Path({str(tmp_path)!r}))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=PATIENCE)
    assert "LoHaError: reading pictures needs Pillow: pip install 'comfyui-loha[train]'" in found.stderr
