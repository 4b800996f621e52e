"""The ways to train that Train OFT offers by name."""

from __future__ import annotations

from typing import Any

#: Layers that read the text (cross-attention keys and values), and the fused projections of models without cross-attention.
READING = r"(.*\.)?(attn2\.to_[kv]|(img_attn|txt_attn|attn)\.qkv|single_blocks\.\d+\.linear1)"
#: target: what ``OFTConfig.target_modules`` takes.  min_snr_gamma: for eps and v models only.  caption_dropout: as in ``Objective``.
#: prior: as in ``TrainSettings``; it needs a class prompt.
TRAIN_PRESETS: dict[str, dict[str, Any]] = {
    "subject": {"target": "attention", "min_snr_gamma": 5.0, "caption_dropout": 0.0, "prior": "match"},
    "style": {"target": "attention+ff", "min_snr_gamma": 5.0, "caption_dropout": 0.1, "prior": "none"},
    "fast": {"target": READING, "min_snr_gamma": 5.0, "caption_dropout": 0.0, "prior": "none"},
}
