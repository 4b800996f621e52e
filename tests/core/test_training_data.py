"""Pictures, captions, buckets and the order in which they are seen."""

from __future__ import annotations

import unicodedata
from collections import Counter

import numpy as np
import pytest
import torch

from oft_core.training import ConfigError, Order, Record, dataset
from oft_core.training.data import (
    filled,
    folder_records,
    load,
    lost,
    make_buckets,
    nearest_bucket,
    with_trigger,
)
from oft_core.training.folder import read_text, scan
from oft_core.training.pictures import Picture, fitted, open_picture, to_tensor

Image = pytest.importorskip("PIL.Image")


def test_buckets_are_multiples_within_the_area_and_ratio():
    for resolution, step in ((512, 64), (1024, 64), (768, 32), (64, 64)):
        buckets = make_buckets(resolution, step)
        assert (resolution, resolution) in buckets and len(set(buckets)) == len(buckets)
        for w, h in buckets:
            assert w % step == 0 == h % step and w * h <= resolution**2 and max(w, h) <= 2 * min(w, h) and (h, w) in buckets
    assert {(512, 512), (640, 384), (384, 640), (704, 320)} & set(make_buckets(512)) == {(512, 512), (640, 384), (384, 640)}
    with pytest.raises(ConfigError):
        make_buckets(32, 64)


def test_nearest_bucket_by_shape():
    buckets = make_buckets(512)
    assert nearest_bucket((3000, 3000), buckets) == (512, 512)
    wide, tall = nearest_bucket((1920, 1080), buckets), nearest_bucket((1080, 1920), buckets)
    assert wide == tall[::-1] and wide[0] > wide[1]


@pytest.fixture
def folder(tmp_path):
    """Four pictures: a wide one with caption, a tall one through EXIF, one with alpha, one grey, and things to pass over."""
    wide = Image.new("RGB", (200, 100), (255, 0, 0))
    wide.paste((0, 0, 255), (100, 0, 200, 100))  # right half blue
    wide.save(tmp_path / "a wide.PNG")
    (tmp_path / "a wide.txt").write_text("﻿a red and\n blue [trigger]\n", "utf-8")
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to see it upright
    wide.save(tmp_path / "b.jpg", exif=exif, quality=95)
    alpha = Image.new("RGBA", (100, 100), (0, 255, 0, 255))
    alpha.paste((0, 0, 0, 0), (0, 0, 50, 100))
    alpha.save(tmp_path / "c.webp", lossless=True)
    Image.new("L", (64, 64), 128).save(tmp_path / "d.png")
    (tmp_path / "notes.md").write_text("no picture")
    (tmp_path / "sub.png").mkdir()
    return tmp_path


def picture(path, size=(64, 64), colour="red"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, format="PNG")


def named(folder):
    return [p.label for p in scan(folder).pictures]


def captions(folder, **options):
    """(label -> caption, notes as one text) of a folder; what has no caption has "-"."""
    notes = []
    records = folder_records(folder, 64, prompt="-", notes=notes, **options)
    labels = named(folder)
    assert [r.name for r in records] == [str(folder / name) for name in labels]
    return {name: r.caption for name, r in zip(labels, records, strict=True)}, "\n".join(notes)


def test_folder_of_pictures(folder):
    assert named(folder) == ["a wide.PNG", "b.jpg", "c.webp", "d.png"]
    records = folder_records(folder, 128, prompt="photo of [trigger] dog", trigger="qwe", step=32, flips=True, repeats=3)
    assert len(records) == 8 and [r.flip for r in records] == [False, True] * 4 and all(r.repeats == 3 for r in records)
    wide, tall, alpha, grey = records[::2]
    assert wide.caption == "a red and blue qwe" and tall.caption == "photo of qwe dog"
    assert wide.bucket[0] > wide.bucket[1] and tall.bucket == wide.bucket[::-1] and grey.bucket == (128, 128)
    assert [r.has_mask for r in (wide, tall, alpha, grey)] == [False, False, True, False]
    assert {r.bucket for r in folder_records(folder, 128, square=True)} == {(128, 128)}
    with pytest.raises(ConfigError, match="no pictures"):
        scan(folder / "sub.png")
    with pytest.raises(ConfigError, match="no such folder"):
        scan(folder / "nowhere")
    with pytest.raises(ConfigError, match="repeats.*found: 0"):
        folder_records(folder, 64, repeats=0)


def test_hidden_files_are_passed_over_and_other_kinds_are_named(folder):
    """macOS keeps a file "._a.jpg" beside "a.jpg" on drives of other systems; it is no picture."""
    for name in ("._b.jpg", ".hidden.png", "._notes.md", "Thumbs.db", "desktop.ini", "e.txt"):
        (folder / name).write_bytes(b"\x00\x05\x16\x07")
    for name in ("f.HEIC", "g.json"):
        (folder / name).write_bytes(b"no kind that is read")
    (folder / "gone.png").symlink_to(folder / "nowhere.png")
    Image.new("RGB", (64, 64), "red").save(folder / "h.jfif", format="JPEG")
    frames = [Image.new("RGB", (64, 64), colour) for colour in ("blue", "red")]
    frames[0].save(folder / "i.gif", save_all=True, append_images=frames[1:])
    assert named(folder) == ["a wide.PNG", "b.jpg", "c.webp", "d.png", "h.jfif", "i.gif"]
    notes = scan(folder).notes
    assert "4 files were left out: f.HEIC, g.json, gone.png, notes.md" in notes and len(notes) == 3, notes
    assert "1 caption file belongs to no picture: e.txt" in notes and "1 subfolder was left out: sub.png" in notes, notes
    by_name = {r.name.rsplit("/", 1)[-1]: r for r in folder_records(folder, 64)}
    assert load(by_name["h.jfif"].name, by_name["h.jfif"])[0][9, 9].tolist() == pytest.approx([1, 0, 0], abs=0.01)
    image, mask = load(by_name["i.gif"].name, by_name["i.gif"])
    assert image[9, 9].tolist() == [0, 0, 1] and mask is None, "not the first frame"
    only = folder / "sub.png"
    (only / "x.heic").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"no pictures.*x\.heic"):
        scan(only)


def test_the_trigger_is_filled_in_without_being_added():
    assert filled("a [trigger] cat,  asleep", "sks") == "a sks cat, asleep"
    assert filled("a cat,  asleep", "sks") == "a cat,  asleep"
    assert filled("a [trigger] cat", "") == "a cat"


def test_pixels_are_upright_cut_in_the_middle_and_mirrored(folder):
    by_name = {r.name.rsplit("/", 1)[-1]: r for r in folder_records(folder, 128, step=32)}
    image, mask = load(by_name["a wide.PNG"].name, by_name["a wide.PNG"])
    w, h = by_name["a wide.PNG"].bucket
    assert image.shape == (h, w, 3) and image.dtype == torch.float32 and mask is None
    assert image[5, 5].tolist() == [1, 0, 0] and image[5, -5].tolist() == [0, 0, 1]
    image, _ = load(by_name["b.jpg"].name, by_name["b.jpg"])
    assert image.shape == (w, h, 3) and image[5, 5, 0] > 0.9 and image[-5, 5, 2] > 0.9
    record = by_name["c.webp"]
    image, mask = load(record.name, record)
    assert mask.shape == (128, 128, 1) and mask[:, :60].max() == 0 and mask[:, 70:].min() == 1
    flipped = Record(record.name, "", record.bucket, flip=True)
    other, other_mask = load(record.name, flipped)
    assert torch.equal(other, image.flip(1)) and torch.equal(other_mask, mask.flip(1))


def test_fitting_covers_without_stretching():
    picture = Image.new("RGB", (400, 100))
    picture.putpixel((200, 50), (255, 255, 255))
    assert fitted(picture, (64, 64)).size == (64, 64)
    circle = Image.new("L", (90, 30), 0)
    circle.paste(255, (40, 10, 50, 20))
    area = to_tensor(fitted(circle, (60, 60)))[:, :, 0] > 0.5
    rows, columns = area.any(1).sum(), area.any(0).sum()
    assert abs(int(rows) - int(columns)) <= 1 and abs(int(rows) - 20) <= 2


def test_captions(tmp_path):
    picture(tmp_path / "x.y.png")

    def caption(prompt="", trigger=""):
        return folder_records(tmp_path, 64, prompt=prompt, trigger=trigger)[0].caption

    assert caption("a cat") == "a cat" and caption("a cat", "sks") == "sks, a cat" and caption("", "sks") == "sks"
    assert caption("a [trigger] cat", "sks") == "a sks cat"
    (tmp_path / "x.y.txt").write_text("ein Käfer\n", "utf-8")
    assert caption("a cat", "sks") == "sks, ein Käfer"
    (tmp_path / "x.y.txt").write_text(" \n", "utf-8")
    assert caption("a cat") == "a cat", "an empty caption counts as none"
    assert "Empty captions count as none: x.y.txt" in captions(tmp_path)[1]


NFC, NFD = (unicodedata.normalize(form, "é ü") for form in ("NFC", "NFD"))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("IMG_1.JPG", "IMG_1.TXT"), ("1.png", "1.png.txt"), ("1.png", "1..txt"), ("Dog.png", "dog.txt"), ("a.png", "a.caption"),
        ("a.png", "A.PNG.Caption"), ("a.png", "a .txt"), ("a .png", "a.txt"), ("1 (1).png", "1 (1).txt"), ("a.png ", "a.txt "),
        (NFC + ".png", NFD + ".txt"), (NFD + ".png", NFC + ".txt"), ("GROẞ.png", "groß.txt"), ("x.y.png", "x.y.txt"), ("a.b.PNG", "a.b.png.txt"),
    ],
)  # fmt: skip
def test_captions_are_found_however_they_are_named(tmp_path, name, text):
    picture(tmp_path / name)
    (tmp_path / text).write_text("its own", "utf-8")
    (tmp_path / "other.txt").mkdir()
    said, notes = captions(tmp_path)
    assert said == {name: "its own"} and "1 of 1 pictures have captions of their own." in notes and "no picture" not in notes


def test_of_several_captions_one_counts_and_the_others_are_named(tmp_path):
    """name.ext.* before name.*, .txt before .caption, the exact spelling before others."""
    picture(tmp_path / "a.png")
    names = ["a.png.txt", "A.PNG.txt", "a.png.caption", "a.txt", "A.txt", "a.caption"]
    for name in names:
        (tmp_path / name).write_text(name, "utf-8")
    for i, name in enumerate(names):
        said, notes = captions(tmp_path)
        assert said == {"a.png": name}, said
        rest = sorted(names[i + 1 :])
        for other in rest:
            assert f"{other} ({name} is)" in notes, notes
        assert (f"{len(rest)} second captions of pictures are not used" in notes) == (len(rest) > 1), notes
        (tmp_path / name).unlink()
    assert captions(tmp_path)[0] == {"a.png": "-"}


def test_captions_of_several_pictures_or_of_none_are_named(tmp_path):
    for name in ("a.png", "a.jpg", "Cat.png", "cat.png", *(f"{i}.png" for i in range(8))):
        picture(tmp_path / name)
    for name in ("a.txt", "cat.txt", *(f"x{i}.txt" for i in range(7))):
        (tmp_path / name).write_text(name, "utf-8")
    said, notes = captions(tmp_path)
    assert said["a.png"] == said["a.jpg"] == "a.txt" and "a.txt (a.jpg, a.png)" in notes and "name.ext.txt" in notes
    assert said["cat.png"] == "cat.txt" and said["Cat.png"] == "-", "it is spelled as the other picture"
    assert "7 caption files belong to no picture: x0.txt, x1.txt, x2.txt, x3.txt, x4.txt, …" in notes, notes
    assert "3 of 12 pictures have captions of their own; the others have the instance prompt." in notes, notes
    (tmp_path / "a.jpg.txt").write_text("the jpg", "utf-8")
    said, notes = captions(tmp_path)
    assert (said["a.png"], said["a.jpg"]) == ("a.txt", "the jpg") and "(a.jpg, a.png)" not in notes and "second" not in notes


def test_everything_that_cannot_be_read_is_named_at_once(tmp_path):
    for name in ("a.png", "a.jpg", "good.png", "m.png"):
        picture(tmp_path / name)
    (tmp_path / "a.txt").write_text("süß", "cp1252")
    (tmp_path / "good.txt").write_bytes(b"with\0 one NUL")
    for name, content in (("bad.png", b"rubbish"), ("empty.webp", b""), ("m-masklabel.png", b"no mask")):
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError) as error:
        folder_records(tmp_path, 64)
    text = str(error.value)
    for name in ("a.txt", "good.txt", "bad.png", "empty.webp (an empty file)", "m-masklabel.png", "NUL", "UTF-8", "There are 5 faults"):
        assert name in text, text
    assert error.value.file == str(tmp_path) and text.count(str(tmp_path)) == 1, text
    for name in ("a.txt", "good.txt", "bad.png", "m-masklabel.png"):
        (tmp_path / name).unlink()
    with pytest.raises(ConfigError, match=r"This picture cannot be read; file: \S*empty\.webp; found: an empty file"):
        folder_records(tmp_path, 64)


def test_masks_of_onetrainer_are_masks(tmp_path):
    grey = Image.new("L", (64, 64), 0)
    grey.paste(128, (0, 0, 32, 64))
    grey.paste(255, (0, 0, 16, 64))
    picture(tmp_path / "1.png")
    grey.save(tmp_path / "1-masklabel.png")
    alpha = Image.new("RGBA", (64, 64), (255, 0, 0, 255))
    alpha.paste((0, 0, 0, 0), (0, 0, 32, 64))
    alpha.save(tmp_path / "2.webp", lossless=True)
    painted = Image.new("RGBA", (32, 32), (255, 255, 255, 0))
    painted.paste((255, 255, 255, 255), (0, 0, 16, 32))  # white on nothing
    painted.save(tmp_path / "2-MaskLabel.PNG")
    picture(tmp_path / "3.png", (128, 64))
    grey.resize((64, 128)).save(tmp_path / "3-masklabel.png")
    Image.new("L", (64, 64), 255).save(tmp_path / "3-masklabel-1.png")
    for name in ("1-condlabel.png", "1-condlabel-2.png", "4-masklabel.png", "4-condlabel.jpg"):
        picture(tmp_path / name)
    notes = []
    records = folder_records(tmp_path, 64, step=32, flips=True, notes=notes)
    assert named(tmp_path) == ["1.png", "2.webp", "3.png"] and len(records) == 6 and all(r.has_mask for r in records)
    _, mask = load(records[0].name, records[0])
    assert mask.shape == (64, 64, 1) and mask.dtype == torch.float32
    assert torch.equal(mask[9, [0, 8, 24, 40], 0], torch.tensor([1, 1, 128 / 255, 0]))
    assert torch.equal(load(records[1].name, records[1])[1], mask.flip(1)), "the mirrored picture's mask"
    _, mask = load(records[2].name, records[2])
    assert mask[:, :28].min() == 1 and mask[:, 36:].max() == 0, "the file counts, and what is transparent in it is black"
    _, mask = load(records[4].name, records[4])
    assert mask.shape == (records[4].bucket[1], records[4].bucket[0], 1)
    text = "\n".join(notes)
    for line in (
        "1 mask file belongs to no picture: 4-masklabel.png", "3 control pictures are not used: 1-condlabel-2.png, 1-condlabel.png, 4-condlabel.jpg",
        "1 second mask of a picture is not used: 3-masklabel-1.png (3-masklabel.png is)",
        "Of mask file and transparency the mask file counts: 2.webp", "Masks of another shape than their pictures are stretched: 3-masklabel.png",
    ):
        assert line in notes, text
    Image.new("L", (64, 64), 0).save(tmp_path / "1-masklabel.png")
    with pytest.raises(ConfigError, match=r"Nothing of this picture.*1\.png.*mask is black everywhere.*invert"):
        folder_records(tmp_path, 64)
    Image.new("RGBA", (64, 64), 0).save(tmp_path / "5.png")
    with pytest.raises(ConfigError, match=r"2 faults.*1\.png \(the mask is black.*5\.png \(the picture is transparent"):
        folder_records(tmp_path, 64)
    for name in ("1.png", "2.webp", "3.png", "5.png"):
        (tmp_path / name).unlink()
    with pytest.raises(ConfigError, match="no pictures.*1-condlabel"):
        scan(tmp_path)


def test_what_is_cut_off_is_said(tmp_path):
    assert lost((200, 100), (100, 100)) == lost((100, 200), (64, 64)) == 0.5 and lost((300, 200), (96, 64)) == 0
    for name, size in (("long", (1000, 100)), ("square", (100, 100)), ("wide", (200, 100)), ("tall", (100, 280))):
        picture(tmp_path / f"{name}.png", size)
    _, notes = captions(tmp_path, step=16)
    assert "More than 20 % is cut off of 2 pictures: long.png 83 %, tall.png 40 %. Buckets go up to 1.7 to 1" in notes, notes
    _, notes = captions(tmp_path, square=True)
    assert "3 pictures: long.png 90 %, tall.png 64 %, wide.png 50 %. With buckets on" in notes, notes
    for name in ("long", "tall"):
        (tmp_path / f"{name}.png").unlink()
    _, notes = captions(tmp_path)
    assert "1 picture: wide.png 50 %. A smaller bucket step" in notes, notes
    assert "cut off" not in captions(tmp_path, step=16)[1]


def test_subfolders_with_repeats_are_read_as_kohya_does(tmp_path):
    for name in ("10_zwx dog/b.png", "10_zwx dog/a.png", "1_dog/a.png", "2_/a.png", "reg_dog/a.png", "0_off/a.png", "2024_summer/a.png"):
        picture(tmp_path / name)
    (tmp_path / "10_zwx dog" / "b.txt").write_text("zwx asleep", "utf-8")
    (tmp_path / "10_zwx dog" / "lost.txt").write_text("whose?", "utf-8")
    (tmp_path / "3_none").mkdir()
    (tmp_path / "1_dog" / "deeper").mkdir()
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "read me.md").write_text("!")
    said, notes = captions(tmp_path, repeats=2)
    assert said == {"10_zwx dog/a.png": "zwx dog", "10_zwx dog/b.png": "zwx asleep", "1_dog/a.png": "dog", "2_/a.png": "-"}
    assert [r.repeats for r in folder_records(tmp_path, 64, repeats=2)] == [20, 20, 2, 4]
    for part in (
        "10_zwx dog (2 pictures, 10 times each), 1_dog (1 picture, 1 time each)", "1 of 4 pictures have captions of their own",
        "the name of their subfolder", "5 subfolders were left out: 0_off, 1_dog/deeper, 2024_summer, 3_none (no pictures), reg_dog",
        "belongs to no picture: 10_zwx dog/lost.txt", "read me.md",
    ):
        assert part in notes, notes
    # One that has pictures itself is trained on these alone.
    picture(tmp_path / "own.png")
    said, notes = captions(tmp_path)
    assert said == {"own.png": "-"} and "subfolders were left out: 0_off, 10_zwx dog, 1_dog" in notes and "kohya" not in notes
    picture(tmp_path / "dates" / "20240131_trip" / "a.png")
    with pytest.raises(ConfigError, match=r"no pictures.*Choose one of its subfolders \(20240131_trip\).*10_name"):
        scan(tmp_path / "dates")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("text", ["eine süße 猫", "a cat’s nap", "a cat", "一只 猫, 坐着"])
def test_captions_of_every_unicode_editor(tmp_path, encoding, text):
    (tmp_path / "a.txt").write_text(text, encoding)
    assert read_text(tmp_path / "a.txt") == text


@pytest.mark.parametrize("content", ["eine süße Katze".encode("cp1252"), b"a cat\0", b"a cat \0\0\0", b"\0\1\2\3\0\5\0\0", "a cat".encode("utf-32-le")])
def test_a_caption_in_another_encoding_is_named(tmp_path, content):
    (tmp_path / "the one.txt").write_bytes(content)
    with pytest.raises(ConfigError, match="caption cannot be read.*the one.txt.*UTF-8"):
        read_text(tmp_path / "the one.txt")


@pytest.mark.parametrize(
    ("text", "trigger", "want"),
    [
        ("a man at two desks", "sks", "sks, a man at two desks"), ("a photo of sks, smiling", "sks", "a photo of sks, smiling"),
        ("sks", "sks", "sks"), ("a sks_2 dog", "sks", "sks, a sks_2 dog"), ("一只小猫坐着", "小猫", "一只小猫坐着"),
        ("photo of <me>.", "<me>", "photo of <me>."), ("a  [trigger]\n dog", "sks", "a sks dog"), ("a dog", "", "a dog"),
    ],
)  # fmt: skip
def test_a_trigger_is_a_word_of_its_own(text, trigger, want):
    assert with_trigger(text, trigger) == want


def test_sixteen_bits_of_grey_become_eight(tmp_path):
    ramp = np.linspace(0, 65535, 256).round().astype(np.uint16).reshape(16, 16)
    for name in ("a.png", "a.tif"):
        Image.fromarray(ramp).save(tmp_path / name)
        picture, alpha = open_picture(tmp_path / name)
        assert picture.mode == "RGB" and alpha is None
        assert np.array_equal(np.asarray(picture)[..., 0].ravel(), np.arange(256)), name
    Image.fromarray(np.arange(256, dtype=np.int32).reshape(16, 16)).save(tmp_path / "eight.tif")
    assert np.array_equal(np.asarray(open_picture(tmp_path / "eight.tif")[0])[..., 2].ravel(), np.arange(256))
    Image.fromarray(np.full((4, 4), 70000, np.int32)).save(tmp_path / "more.tif")
    Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "float.tif")
    for name in ("more", "float"):
        with pytest.raises(ConfigError, match=f"cannot be read.*{name}.tif.*grey values"):
            open_picture(tmp_path / f"{name}.tif")


def test_a_picture_of_too_many_pixels_is_named(tmp_path, monkeypatch):
    """Pillow warns above its limit and refuses above twice as much."""
    for name, width in (("large", 15), ("huge", 25)):
        Image.new("RGB", (width, 10)).save(tmp_path / f"{name}.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.warns(Image.DecompressionBombWarning):
        assert open_picture(tmp_path / "large.png")[0].size == (15, 10)
    with pytest.raises(ConfigError, match=r"too many pixels.*huge\.png.*250"):
        open_picture(tmp_path / "huge.png")


def test_a_damaged_picture_is_named(tmp_path):
    (tmp_path / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\nrubbish")
    with pytest.raises(ConfigError, match="bad.png"):
        open_picture(tmp_path / "bad.png")


def records(*buckets):
    return [Record(f"r{i}", "", b, repeats=1) for i, b in enumerate(buckets)]


def test_order_is_a_function_of_the_seed():
    pictures = records(*[(64, 64)] * 7)
    a, b, c = Order(pictures, 2, 1), Order(pictures, 2, 1), Order(pictures, 2, 2)
    b.batch(30)  # asking in another order does not matter
    assert [a.batch(k) for k in range(20)] == [b.batch(k) for k in range(20)] != [c.batch(k) for k in range(20)]


def test_batches_are_of_one_bucket_whole_and_nothing_is_lost():
    pictures = records((64, 64), (64, 64), (64, 64), (96, 64), (96, 64), (64, 96))
    order = Order(pictures, 2, 0)
    seen = Counter()
    for k in range(300):
        batch = order.batch(k)
        assert len(batch) == 2 and len({r.bucket for r in batch}) == 1
        seen.update(r.name for r in batch)
    assert all(abs(seen[r.name] - 100) <= 2 for r in pictures)


def test_one_big_batch_is_the_small_ones_in_a_row_and_epochs_are_whole():
    pictures = records(*[(64, 64)] * 5)
    one, four = Order(pictures, 1, 3), Order(pictures, 4, 3)
    assert [r for k in range(20) for r in one.batch(k)] == [r for k in range(5) for r in four.batch(k)]
    epochs = [[one.batch(5 * e + k)[0].name for k in range(5)] for e in range(4)]
    assert all(sorted(e) == ["r0", "r1", "r2", "r3", "r4"] for e in epochs) and len({tuple(e) for e in epochs}) > 1


def test_repeats():
    pictures = [Record("often", "", (64, 64), repeats=3), Record("rare", "", (64, 64))]
    seen = Counter(Order(pictures, 1, 0).batch(k)[0].name for k in range(40))
    assert seen == {"often": 30, "rare": 10}
    with pytest.raises(ConfigError, match="no pictures"):
        Order([], 1, 0)


def test_a_set_from_a_folder_or_from_pictures(tmp_path):
    for i, colour in enumerate(["red", "green", "blue"]):
        Image.new("RGB", (96, 64), colour).save(tmp_path / f"{i}.png")
    (tmp_path / "1.txt").write_text("a green wall", "utf-8")
    options = {"instance_prompt": "[trigger] wall", "trigger": "zwx", "resolution": 64, "bucket_step": 16}
    of = dataset.build(folder=tmp_path, **options)
    assert [r.caption for r in of.records] == ["zwx wall", "zwx, a green wall", "zwx wall"] and not of.pictures
    image, mask = of.load(of.records[2])
    assert image.shape == (*reversed(of.main_bucket), 3) and image[0, 0].tolist() == [0, 0, 1] and mask is None

    given = [Picture(f"no {i}", f"no {i}", dataset.to_pillow(torch.full((64, 96, 3), i / 2))) for i in range(3)]
    half = Image.new("L", (2, 2), 0)
    half.paste(255, (0, 0, 1, 2))
    kept = dataset.build(pictures=given, masks=[half], captions=["one", "", "three", ""], **options)
    assert [r.caption for r in kept.records] == ["zwx, one", "zwx wall", "zwx, three"]
    image, mask = kept.load(kept.records[1])
    assert image.mean() == pytest.approx(128 / 255) and mask[0, 0] == 1 and mask[0, -1] == 0
    assert dataset.from_pillow(given[2].image).shape == (1, 64, 96, 3)

    again = dataset.build(pictures=given, masks=[half], captions=["one", "", "three"], **options)
    other = dataset.build(pictures=given, masks=[half], captions=["one", "", "four"], **options)
    assert again.digest == kept.digest != other.digest
    noted = dataset.build(folder=tmp_path, masks=[half], **options)
    Image.new("L", (96, 64), 255).save(tmp_path / "1-masklabel.png")
    assert not [n for n in noted.notes if "masklabel" in n]
    noted = dataset.build(folder=tmp_path, masks=[half], **options)
    assert "Masks are given, so mask files are not used: 1-masklabel.png" in noted.notes
    for wrong in ({}, {"folder": tmp_path, "pictures": given}, {"pictures": given, "captions": ["a"] * 4}, {"pictures": []},
                  {"pictures": given, "masks": [half] * 2}, {"pictures": given, "masks": [Image.new("L", (2, 2), 0)]}):
        with pytest.raises(ConfigError):
            dataset.build(**wrong, **options)
