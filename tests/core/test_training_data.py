"""Pictures, captions, buckets and the order in which they are seen."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from oft_core.training import ConfigError, Order, Record
from oft_core.training.data import (
    caption_of,
    filled,
    find_pictures,
    fitted,
    folder_records,
    left_out,
    load,
    make_buckets,
    nearest_bucket,
    open_picture,
    to_tensor,
    with_trigger,
)

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


def test_folder_of_pictures(folder):
    assert [p.name for p in find_pictures(folder)] == ["a wide.PNG", "b.jpg", "c.webp", "d.png"]
    records = folder_records(folder, 128, prompt="photo of [trigger] dog", trigger="qwe", step=32, flips=True, repeats=3)
    assert len(records) == 8 and [r.flip for r in records] == [False, True] * 4 and all(r.repeats == 3 for r in records)
    wide, tall, alpha, grey = records[::2]
    assert wide.caption == "a red and blue qwe" and tall.caption == "photo of qwe dog"
    assert wide.bucket[0] > wide.bucket[1] and tall.bucket == wide.bucket[::-1] and grey.bucket == (128, 128)
    assert [r.has_mask for r in (wide, tall, alpha, grey)] == [False, False, True, False]
    assert {r.bucket for r in folder_records(folder, 128, square=True)} == {(128, 128)}
    with pytest.raises(ConfigError, match="no pictures"):
        find_pictures(folder / "sub.png")
    with pytest.raises(ConfigError, match="no such folder"):
        find_pictures(folder / "nowhere")


def test_hidden_files_are_passed_over_and_other_kinds_are_named(folder):
    """macOS keeps a file "._a.jpg" beside "a.jpg" on drives of other systems; it is no picture."""
    for name in ("._b.jpg", ".hidden.png", "._notes.md", "Thumbs.db", "desktop.ini", "e.txt"):
        (folder / name).write_bytes(b"\x00\x05\x16\x07")
    for name in ("f.HEIC", "g.caption"):
        (folder / name).write_bytes(b"no kind that is read")
    Image.new("RGB", (64, 64), "red").save(folder / "h.jfif", format="JPEG")
    frames = [Image.new("RGB", (64, 64), colour) for colour in ("blue", "red")]
    frames[0].save(folder / "i.gif", save_all=True, append_images=frames[1:])
    assert [p.name for p in find_pictures(folder)] == ["a wide.PNG", "b.jpg", "c.webp", "d.png", "h.jfif", "i.gif"]
    assert [p.name for p in left_out(folder)] == ["f.HEIC", "g.caption", "notes.md"]
    by_name = {r.name.rsplit("/", 1)[-1]: r for r in folder_records(folder, 64)}
    assert load(by_name["h.jfif"].name, by_name["h.jfif"])[0][9, 9].tolist() == pytest.approx([1, 0, 0], abs=0.01)
    image, mask = load(by_name["i.gif"].name, by_name["i.gif"])
    assert image[9, 9].tolist() == [0, 0, 1] and mask is None, "not the first frame"
    only = folder / "sub.png"
    (only / "x.heic").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"no pictures.*x\.heic"):
        find_pictures(only)


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
    picture = tmp_path / "x.y.png"
    assert caption_of(picture, "a cat") == "a cat"
    assert caption_of(picture, "a cat", "sks") == "sks, a cat" and caption_of(picture, "", "sks") == "sks"
    assert caption_of(picture, "a [trigger] cat", "sks") == "a sks cat"
    (tmp_path / "x.y.txt").write_text("ein Käfer\n", "utf-8")
    assert caption_of(picture, "a cat", "sks") == "sks, ein Käfer"


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


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_captions_of_every_unicode_editor(tmp_path, encoding):
    (tmp_path / "a.txt").write_text("eine süße 猫", encoding)
    assert caption_of(tmp_path / "a.png") == "eine süße 猫"


def test_a_caption_in_another_encoding_is_named(tmp_path):
    (tmp_path / "the one.txt").write_text("eine süße Katze", "cp1252")
    with pytest.raises(ConfigError, match="caption cannot be read.*the one.txt.*UTF-8"):
        caption_of(tmp_path / "the one.png")


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
