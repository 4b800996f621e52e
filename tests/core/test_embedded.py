"""The tiny model that is shipped: its files, its text encoder, its pictures."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from embedded import model, text_encoder
from embedded.autoencoder import decoder, encoder
from embedded.captions import COLOURS, PLACES, SMALL, caption, concepts
from embedded.make.autoencoder import psnr
from embedded.pictures import HELD_VIEWS, TRAIN_VIEWS, cutout, subjects, view, views

PSNR = 25.0  # dB, mean over the pictures; the model card has 25.5


def test_the_weights_are_those_that_were_made_and_small() -> None:
    files = sorted(model.WEIGHTS.glob("*.safetensors"))
    assert [f.name for f in files] == sorted(model.checksums())
    assert sum(f.stat().st_size for f in files) <= 16e6
    for file in files:
        assert model.read(file.name).keys() == load_file(file).keys()


def test_damaged_weights_are_named(tmp_path, monkeypatch) -> None:
    for file in model.WEIGHTS.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    monkeypatch.setattr(model, "WEIGHTS", tmp_path)
    path = tmp_path / "autoencoder.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    with pytest.raises(ValueError, match=r"autoencoder\.safetensors.*damaged"):
        model.vae()


def test_a_checkpoint_of_other_weights_is_not_current(tmp_path, monkeypatch) -> None:
    path = model.build(tmp_path / "emoji.safetensors")
    assert model.is_current(path) and not model.is_current(tmp_path / "none.safetensors")
    monkeypatch.setattr(model, "checksums", lambda: {"transformer.safetensors": "other"})
    assert not model.is_current(path)


def test_no_qk_norm_and_the_padding_is_zero() -> None:
    weights = model.transformer()
    assert not [k for k in weights if ".ln_q." in k or ".ln_k." in k]
    assert weights["context_embedder.weight"].shape == (192, 4096)
    assert not weights["context_embedder.weight"][:, 768:].any()


def test_the_autoencoder_gives_back_what_it_reads() -> None:
    """Pictures of things it never saw, as well as the model card says."""
    weights = model.vae()
    pictures = torch.from_numpy(np.stack([view(cutout(s)) for s in subjects()])).permute(0, 3, 1, 2).float() / 255
    parts = encoder(), decoder()
    for name, part in zip(("taesd_encoder.", "taesd_decoder."), parts, strict=True):
        part.load_state_dict({k.removeprefix(name): v.float() for k, v in weights.items() if k.startswith(name)})
    with torch.no_grad():
        again = parts[1](parts[0](pictures)).clamp(0, 1)
    assert np.mean([psnr(one, other) for one, other in zip(again, pictures, strict=True)]) >= PSNR


def test_the_text_encoder_is_always_the_same_and_nowhere_zero() -> None:
    weights = text_encoder.state_dict()
    assert torch.equal(weights["text_model.embeddings.token_embedding.weight"], text_encoder.token_table())
    assert abs(float(text_encoder.token_table()[320, 0]) + 1.697265625) < 1e-6
    for name, value in weights.items():
        if name.endswith("_proj.weight") and "layers.11" not in name:
            assert value.any(), name
            assert torch.linalg.matrix_rank(value.float()) >= 384 if "layers.0.self" in name else True


def test_captions_and_views() -> None:
    assert caption("red apple", "blue", "left") == "small red apple on a blue background, left"
    assert caption("red apple", "blue", mirrored=True) == "mirrored red apple on a blue background"
    with pytest.raises(KeyError):
        caption("red apple", "ultraviolet")
    assert len(subjects()) == 24 and len({c.name for c in concepts()}) == len(concepts())
    known = {c.kind for c in concepts() if not c.held}
    for subject in subjects():
        assert subject.kind in known
        trained, held = views(subject, TRAIN_VIEWS), views(subject, HELD_VIEWS)
        assert all(p.shape == (64, 64, 3) and p.dtype == np.uint8 for p in trained + held)
        assert not any(np.array_equal(a, b) for a in trained for b in held)


def test_a_view_is_what_its_caption_says() -> None:
    art = cutout(subjects()[0])
    for colour, value in COLOURS.items():
        assert tuple(view(art, colour=colour, place="center")[0, 0]) == value
    for place, (x, y) in PLACES.items():
        rows, columns = np.nonzero((view(art, place=place) != 255).any(-1))
        assert x <= columns.min() and columns.max() < x + SMALL and y <= rows.min() and rows.max() < y + SMALL
