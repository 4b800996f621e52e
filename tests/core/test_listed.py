"""Files that a host lists: which one a name means, what a header tells, and reading once."""

import json
import os

import pytest
import torch
from safetensors.torch import save_file

from oft_core import FileError, listed

NAMES = ["koala.safetensors", "animals/koala.safetensors", "animals/Dog.safetensors", "style/ink v2.safetensors"]


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("koala.safetensors", ["koala.safetensors"]),
        ("koala", ["koala.safetensors"]),
        ("KOALA.SAFETENSORS", ["koala.safetensors"]),
        ("animals\\koala.safetensors", ["animals/koala.safetensors"]),
        ("dog", ["animals/Dog.safetensors"]),
        ("ink v2", ["style/ink v2.safetensors"]),
        ("cat", []),
        ("", []),
        ("../koala", []),
    ],
)
def test_a_name_means_the_file_that_it_fits_best(name, found):
    assert listed.meant(name, NAMES) == found


def test_an_ambiguous_name_means_all_of_them():
    assert listed.meant("a.safetensors", ["x/a.safetensors", "y/a.safetensors"]) == ["x/a.safetensors", "y/a.safetensors"]


def test_nearest_names_come_first():
    assert listed.nearest("koalla", NAMES)[0] == "koala.safetensors"
    assert listed.nearest("zzzz", NAMES) == []


def _file(path, tensors, metadata=None):
    save_file(tensors, path, metadata)
    return str(path)


def test_a_header_is_read_without_its_tensors(tmp_path):
    path = _file(tmp_path / "a.safetensors", {"x.oft_blocks": torch.zeros(2, 4, 4)}, {"ss_output_name": "koala"})
    with open(path, "r+b") as file:
        file.truncate(os.path.getsize(path) - 64)
    assert listed.header(path) == (["x.oft_blocks"], {"ss_output_name": "koala"})
    assert listed.is_oft(path)


def test_a_lora_is_no_oft(tmp_path):
    path = _file(tmp_path / "l.safetensors", {"lora_unet_a.lora_up.weight": torch.zeros(2), "soft_blocks": torch.zeros(1)})
    assert not listed.is_oft(path)


@pytest.mark.parametrize(
    "raw", [b"", b"PK\x03\x04", (1 << 60).to_bytes(8, "little") + b"{}", (4).to_bytes(8, "little") + b"[1]\n",
            (200_000).to_bytes(8, "little") + b"[" * 200_000]
)
def test_what_is_no_safetensors_file_is_no_oft(tmp_path, raw):
    path = tmp_path / "broken.safetensors"
    path.write_bytes(raw)
    assert not listed.is_oft(path)
    with pytest.raises(ValueError, match="."):
        listed.header(path)


def test_metadata_that_is_no_text_is_left_out(tmp_path):
    raw = json.dumps({"__metadata__": {"a": "b", "c": 1}, "x.oft_diag": {}}).encode()
    path = tmp_path / "odd.safetensors"
    path.write_bytes(len(raw).to_bytes(8, "little") + raw)
    assert listed.header(path) == (["x.oft_diag"], {"a": "b"})


def test_a_file_is_read_again_when_it_changes(tmp_path, monkeypatch):
    path = _file(tmp_path / "a.safetensors", {"lora_unet_x.oft_blocks": torch.zeros(2, 4, 4)})
    readings = listed.Readings()
    first = readings.read(path)
    assert readings.read(path) is first
    _file(path, {"lora_unet_x.oft_blocks": torch.zeros(3, 4, 4)})
    os.utime(path, ns=(1, 1))
    second = readings.read(path)
    assert second is not first and len(readings._kept) == 1
    other = _file(tmp_path / "b.safetensors", {"lora_unet_x.oft_blocks": torch.zeros(2, 4, 4)})
    readings.limit = 1
    readings.read(other)
    assert [key[0][0] for key in readings._kept] == [other], "the newest one always stays"


def test_a_missing_file_is_an_error(tmp_path):
    with pytest.raises((FileError, OSError)):
        listed.Readings().read(str(tmp_path / "none.safetensors"))
