"""The tiny model that is shipped: its files, its text encoder, its pictures."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from embedded import model, text_encoder
from embedded.autoencoder import decoder, encoder, stock_state
from embedded.captions import COLOURS, PLACES, caption, concepts
from embedded.pictures import HELD_VIEWS, TRAIN_VIEWS, subjects, view, views


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


def test_no_qk_norm_and_the_padding_is_zero() -> None:
    weights = model.transformer()
    assert not [k for k in weights if ".ln_q." in k or ".ln_k." in k]
    assert weights["context_embedder.weight"].shape == (192, 4096)
    assert not weights["context_embedder.weight"][:, 768:].any()


def test_zero_channels_change_nothing() -> None:
    """The narrow autoencoder and its stock layout give the same pictures."""
    narrow = model.read("autoencoder.safetensors")
    stock = stock_state(narrow)
    x = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    results = []
    for weights, top in ((narrow, 32), (stock, 64)):
        parts = encoder(top), decoder(top)
        for name, part in zip(("taesd_encoder.", "taesd_decoder."), parts, strict=True):
            part.load_state_dict({k.removeprefix(name): v.float() for k, v in weights.items() if k.startswith(name)})
        with torch.no_grad():
            z = parts[0](x)
            results.append((z, parts[1](z)))
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


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
    from embedded.pictures import cutout

    art = cutout(subjects()[0])
    for colour, value in COLOURS.items():
        assert tuple(view(art, colour=colour, place="center")[0, 0]) == value
    for place, (x, y) in PLACES.items():
        rows, columns = np.nonzero((view(art, place=place) != 255).any(-1))
        assert x <= columns.min() and columns.max() < x + 36 and y <= rows.min() and rows.max() < y + 36
