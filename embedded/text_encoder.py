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
WIDTH, HEADLESS, VOCABULARY, POSITIONS, LAYERS = 768, 3072, 49408, 77, 12
BEGIN, END = 49406, 49407  # CLIP's marks of begin and end; the latter also fills up


def token_table() -> Tensor:
    """Vectors of all tokens, float16 [49408, 768]. The frozen legacy generator gives the same everywhere."""
    table = np.random.RandomState(SEED).standard_normal((VOCABULARY, WIDTH)).astype(np.float32)
    table[[BEGIN, END]] *= 0.1
    return torch.from_numpy(table).half()


def pooled(rows: Tensor) -> Tensor:
    """What the encoder pools from token vectors [n, 768] that include begin and one end: float32 [768]."""
    rows = rows.float()
    mean = torch.nn.functional.layer_norm(rows, (WIDTH,)).mean(0)
    return torch.nn.functional.layer_norm(rows[-1] + 4 * mean, (WIDTH,))


def state_dict() -> dict[str, Tensor]:
    """The whole encoder as float16 tensors (about 250 MB) under CLIP's own names."""
    random = np.random.RandomState(SEED + 1)

    def matrix(rows: int, columns: int) -> Tensor:
        values = random.standard_normal((rows, columns)).astype(np.float32) / np.sqrt(columns)
        return torch.from_numpy(values).half()

    out = {
        "text_model.embeddings.token_embedding.weight": token_table(),
        "text_model.embeddings.position_embedding.weight": torch.zeros(POSITIONS, WIDTH).half(),
        "text_model.final_layer_norm.weight": torch.ones(WIDTH).half(),
        "text_model.final_layer_norm.bias": torch.zeros(WIDTH).half(),
        "text_projection.weight": torch.eye(WIDTH).half(),
    }
    for layer in range(LAYERS):
        prefix = f"text_model.encoder.layers.{layer}."
        parts = {
            **{f"self_attn.{n}_proj": matrix(WIDTH, WIDTH) for n in ("q", "k", "v", "out")},
            "mlp.fc1": matrix(HEADLESS, WIDTH),
            "mlp.fc2": matrix(WIDTH, HEADLESS),
        }
        parts["mlp.fc1"][1::2] = 0
        parts["mlp.fc2"][:, ::2] = 0
        if layer < LAYERS - 1:
            parts["self_attn.v_proj"][1::2] = 0
            parts["self_attn.out_proj"][:, ::2] = 0
        else:  # equal attention to every token so far: their mean
            for name, value in (("q", 0), ("k", 0), ("v", 1), ("out", 4)):
                parts[f"self_attn.{name}_proj"] = value * torch.eye(WIDTH).half()
        for name, weight in parts.items():
            out[f"{prefix}{name}.weight"] = weight
            out[f"{prefix}{name}.bias"] = torch.zeros(len(weight)).half()
        for name in ("layer_norm1", "layer_norm2"):
            out[f"{prefix}{name}.weight"] = torch.ones(WIDTH).half()
            out[f"{prefix}{name}.bias"] = torch.zeros(WIDTH).half()
    return out
