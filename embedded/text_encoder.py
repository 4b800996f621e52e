"""The text encoder: a CLIP-L in ComfyUI's layout, made from a seed, so that nothing has to be shipped.

Every token has a random vector. Layers 0 to 10 leave it as it is, although none of their projections is zero: the
value and first MLP matrices write to even channels only, the output and second MLP matrices read odd ones only.
A rotation mixes neighbours, so an adapter for the text encoder opens these paths. Layer 11 adds four times the
mean of the (normalised) tokens so far. Hence the context that SD3 uses (hidden state -2) is the table itself and
the pooled vector is the normalised sum of the words: a bag of words, with a closed form (`pooled`).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

SEED = 20240
WIDTH, HIDDEN, VOCABULARY, POSITIONS, LAYERS = 768, 3072, 49408, 77, 12
BEGIN, END = 49406, 49407  # CLIP's marks of begin and end; the latter also fills up


def _uniform(random: np.random.RandomState, rows: int, columns: int, deviation: float = 1.0) -> Tensor:
    """Values around 0, made from whole numbers: the same bits on every machine. float16 [rows, columns]."""
    out = torch.empty(rows, columns, dtype=torch.float16)
    for start in range(0, rows, 256):  # in pieces, for the sake of memory
        part = out[start : start + 256]
        raw = np.frombuffer(random.bytes(2 * part.numel()), "<u2").astype(np.float32)
        raw -= np.float32(32767.5)
        raw *= np.float32(deviation * 12**0.5 / 65536)
        part.copy_(torch.from_numpy(raw).view(part.shape))
    return out


def token_table() -> Tensor:
    """Vectors of all tokens, float16 [49408, 768]."""
    table = _uniform(np.random.RandomState(SEED), VOCABULARY, WIDTH)
    table[[BEGIN, END]] *= 0.1
    return table


def pooled(rows: Tensor) -> Tensor:
    """What the encoder pools from token vectors [n, 768] that include begin and one end: float32 [768]."""
    rows = rows.float()
    mean = torch.nn.functional.layer_norm(rows, (WIDTH,)).mean(0)
    return torch.nn.functional.layer_norm(rows[-1] + 4 * mean, (WIDTH,))


def state_dict() -> dict[str, Tensor]:
    """The whole encoder as float16 tensors (about 250 MB) under CLIP's own names. Layers 0 to 10 are equal."""
    random = np.random.RandomState(SEED + 1)

    def matrix(rows: int, columns: int) -> Tensor:
        return _uniform(random, rows, columns, columns**-0.5)

    first = {
        **{f"self_attn.{n}_proj": matrix(WIDTH, WIDTH) for n in ("q", "k", "v", "out")},
        "mlp.fc1": matrix(HIDDEN, WIDTH),
        "mlp.fc2": matrix(WIDTH, HIDDEN),
    }
    for name in ("self_attn.v_proj", "mlp.fc1"):
        first[name][1::2] = 0
    for name in ("self_attn.out_proj", "mlp.fc2"):
        first[name][:, ::2] = 0
    # The last layer attends to every token so far equally: their mean.
    equal = {"q": 0, "k": 0, "v": 1, "out": 4}
    last = {**first, **{f"self_attn.{n}_proj": gain * torch.eye(WIDTH).half() for n, gain in equal.items()}}
    out = {
        "text_model.embeddings.token_embedding.weight": token_table(),
        "text_model.embeddings.position_embedding.weight": torch.zeros(POSITIONS, WIDTH).half(),
        "text_model.final_layer_norm.weight": torch.ones(WIDTH).half(),
        "text_model.final_layer_norm.bias": torch.zeros(WIDTH).half(),
        "text_projection.weight": torch.eye(WIDTH).half(),
    }
    for layer in range(LAYERS):
        prefix = f"text_model.encoder.layers.{layer}."
        for name, weight in (first if layer < LAYERS - 1 else last).items():
            out[f"{prefix}{name}.weight"] = weight.clone()
            out[f"{prefix}{name}.bias"] = torch.zeros(len(weight)).half()
        for name in ("layer_norm1", "layer_norm2"):
            out[f"{prefix}{name}.weight"] = torch.ones(WIDTH).half()
            out[f"{prefix}{name}.bias"] = torch.zeros(WIDTH).half()
    return out
