"""Latents of a training's pictures and masks of their size, as every host keeps them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import nn

from .data import Record
from .dataset import TrainingSet
from .loop import Loaded


class PictureLatents(ABC):
    """latents: record's place -> (1, channels, ...) in the model's own space, float32, on the CPU.   masks: the same -> (1, 1, ...)
    or None.   device: where batches are wanted.
    """

    device: torch.device

    def __init__(self) -> None:
        self.latents: dict[tuple, torch.Tensor] = {}
        self.masks: dict[tuple, torch.Tensor | None] = {}

    @abstractmethod
    def latent_of(self, image: torch.Tensor, name: str) -> torch.Tensor:
        """The latent of an IMAGE (1, h, w, 3) as above; name: of the picture, for errors. Raises TrainingError if it is not finite."""

    def encode_pictures(self, of: TrainingSet, report: Callable[[int, int], None] | None = None) -> None:
        """Latents of every record in the model's own space, on the CPU, float32; and masks of their size.

        Raises TrainingError for a picture whose latent is not finite.
        """
        for i, record in enumerate(of.records):
            image, mask = of.load(record)
            latent = self.latent_of(image.unsqueeze(0)[..., :3], record.name)
            key = _place(record)
            self.latents[key] = latent
            self.masks[key] = None
            if mask is not None:
                small = nn.functional.interpolate(
                    mask.permute(2, 0, 1).unsqueeze(0), size=latent.shape[-2:], mode="area"
                )
                self.masks[key] = small.view(1, 1, *latent.shape[2:])
            if report is not None:
                report(i + 1, len(of.records))

    def load_batch(self, records: list[Record]) -> Loaded:
        """Latents and masks of a batch on the device. Items without a mask count everywhere."""
        latents = torch.cat([self.latents[_place(r)] for r in records]).to(self.device)
        masks = [self.masks[_place(r)] for r in records]
        if all(m is None for m in masks):
            return Loaded(latents)
        filled = [torch.ones(1, 1, *latents.shape[2:]) if m is None else m for m in masks]
        return Loaded(latents, torch.cat(filled).to(self.device))

    def keep_latents(self, records: list[Record], latents: torch.Tensor) -> None:
        """Latents of records that have no picture; in the model's own space, (n, channels, ...)."""
        for record, latent in zip(records, latents, strict=True):
            self.latents[_place(record)], self.masks[_place(record)] = latent.unsqueeze(0), None

    def _ratio(self) -> int:
        if self.latents:
            (bucket, latent) = next((k[2], t) for k, t in self.latents.items())
            return bucket[0] // latent.shape[-1]
        return 8


def _place(record: Record) -> tuple:
    return record.name, record.flip, record.bucket
