"""The ways to train that Train OFT offers by name."""

from __future__ import annotations

from typing import Any

#: target: what ``OFTConfig.target_modules`` takes.  module_dropout: as in ``OFTConfig``.  weight_decay: as in ``TrainSettings``;
#: how far a plane turns ends where decay and gradient balance, at any learning rate, so a long training does not wander off.
#: min_snr_gamma: for eps and v models only.  caption_dropout: as in ``Objective``.  prior: as in ``TrainSettings``; it needs a
#: class prompt.  Measured in docs/evaluation.md and docs/training.md.
TRAIN_PRESETS: dict[str, dict[str, Any]] = {
    "subject": {
        "target": "attention",
        "module_dropout": 0.2,
        "weight_decay": 1.0,
        "min_snr_gamma": 5.0,
        "caption_dropout": 0.0,
        "prior": "match",
    },
    "style": {
        "target": "attention+ff",
        "module_dropout": 0.0,
        "weight_decay": 0.01,
        "min_snr_gamma": 5.0,
        "caption_dropout": 0.1,
        "prior": "none",
    },
    "fast": {
        "target": "text-attention",
        "module_dropout": 0.2,
        "weight_decay": 1.0,
        "min_snr_gamma": 5.0,
        "caption_dropout": 0.0,
        "prior": "none",
    },
}
