"""A web UI's loaded model as the training engine wants it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ...oft_core import Adapter, NameIndex
from ...oft_core.training import Noised, Objective, OFTConfig, Record, RotationBank, checkpointing, euler
from ...oft_core.training.blocks import InputCopies, blocks_of, copies_for_norms, inputs_kept
from ...oft_core.training.latents import PictureLatents
from ...oft_core.training.plan import UNET, SamplePlan
from ...oft_core.training.run import need_finite
from ...oft_core.training.seeds import own_randomness
from ...oft_core.training.store import Store, fingerprint
from ...oft_core.training.writing import write_bank
from ..hosts.contract import Part, Trainee

#: How much of the memory is spent for speed; the others are of ComfyUI's node.
LOW_VRAM = ("off", "checkpointing")


class WebModel(PictureLatents):
    """trainee: of the host.   parts: of the host, for the names in the file.   interrupted: raises to stop while a sample is drawn."""

    def __init__(self, trainee: Trainee, parts: list[Part], *, low_vram: str = "checkpointing", interrupted: Callable[[], object] = lambda: None):
        super().__init__()
        self.trainee, self.low_vram, self.interrupted = trainee, low_vram, interrupted
        self.device, self.net, self.kind = trainee.device, trainee.net, trainee.kind
        self.index = NameIndex({key: shape for part in parts if part.name == "model" for key, shape in part.shapes.items()})
        self.usual_cfg = 5.0
        self.objective: Objective | None = None
        self._store: Store | None = None
        self._of_vae = ""
        self._texts: dict[tuple[str, int, int], dict[str, Tensor]] = {}
        self._turned: set[int] = set()

    @property
    def loss_scale(self) -> float:
        """Gradients of half-precision models need one, since their activations underflow."""
        return 4096.0 if next(self.net.parameters()).dtype == torch.float16 else 1.0

    def make_objective(self, **options: Any) -> Objective:
        """The model's own prediction and noise levels; options: for `Objective`, ``sampling`` may be "auto"."""
        if options.get("sampling", "auto") == "auto":
            options["sampling"] = "uniform"
        self.objective = Objective(prediction=self.trainee.prediction, alphas_cumprod=self.trainee.alphas_cumprod, **options)
        return self.objective

    # --- pictures and texts ---

    def keep_on_disk(self, store: Store, vae: str, clip: str) -> None:
        """Take latents from `store`, and put them there. vae: identity of the VAE. Texts are encoded anew: embeddings may be words."""
        self._store, self._of_vae = store, vae

    def latent_of(self, image: Tensor, name: str) -> Tensor:
        place = None
        if self._store is not None:
            place = self._store.path("web latent", self._of_vae, str(self.device), fingerprint(image))
            known = self._store.get(place)
            if known is not None and known.isfinite().all():
                return known
        # Latents are drawn at random.
        with own_randomness(0), torch.no_grad():
            latent = self.trainee.encode(image.movedim(-1, 1)).float().cpu().clone()
        need_finite("The VAE's latent of a picture", latent, file=name, hint="Start the web UI with --no-half-vae, or use another VAE.")
        if place is not None:
            self._store.put(place, latent)
        return latent

    def encode_texts(self, texts: list[str]) -> None:
        """Embeddings of all texts for all sizes of pictures, before the network needs the place of the text encoders."""
        for size in sorted({bucket for *_, bucket in self.latents}):
            for text in dict.fromkeys(texts):
                self._cond(text, size)

    def _cond(self, text: str, size: tuple[int, int]) -> dict[str, Tensor]:
        """size: (width, height) of the picture."""
        key = (text, *size)
        if key not in self._texts:
            with torch.no_grad():
                made = {name: value.detach().float().cpu().clone() for name, value in self.trainee.text(text, *size).items()}
            for value in made.values():
                need_finite(f"The text embedding of {text!r}", value, hint="Start the web UI with --no-half.")
            self._texts[key] = made
        return {name: value.to(self.device) for name, value in self._texts[key].items()}

    def for_training(self, latents: Tensor) -> Tensor:
        return latents.float().cpu()

    # --- a step ---

    def load(self, batch_size: int = 1) -> None:
        """The network to its device; a batch size is not asked for there."""
        self.trainee.load()

    def bank(self, parts: Mapping[str, OFTConfig], seed: int) -> RotationBank:
        """Rotations for the diffusion model. Raises ConfigError if nothing can be trained."""
        chosen = {part: (self.net, config.select(self.net)) for part, config in parts.items()}
        for _, selection in chosen.values():
            self._turned |= {id(self.net.get_submodule(c.name)) for c in selection.layers}
        return RotationBank(chosen, seed=seed, device=self.device)

    def predict(self, noised: Noised, records: list[Record]) -> Tensor:
        """The network's output, which is the objective's target: (batch, channels, h, w)."""
        texts = ["" if drop else r.caption for r, drop in zip(records, noised.drop, strict=True)]
        sizes = [r.bucket if r.bucket[0] else self._size_of(noised.x0) for r in records]
        conds = [self._cond(text, size) for text, size in zip(texts, sizes, strict=True)]
        if len({tuple(v.shape for v in c.values()) for c in conds}) == 1:
            joined = {name: torch.cat([c[name] for c in conds]) for name in conds[0]}
            return self.trainee.call(noised.x_t, noised.timestep, joined).float()
        # Prompts of different lengths: one after the other.
        each = [self.trainee.call(noised.x_t[i : i + 1], noised.timestep[i : i + 1], c) for i, c in enumerate(conds)]
        return torch.cat(each).float()

    def _size_of(self, latents: Tensor) -> tuple[int, int]:
        ratio = self._ratio()
        return latents.shape[-1] * ratio, latents.shape[-2] * ratio

    @contextlib.contextmanager
    def around(self) -> Iterator[None]:
        """Gradient checkpointing of the model's blocks, and copies where its code may work in place."""
        blocks = blocks_of(self.net) if self.low_vram != "off" else []
        with copies_for_norms([self.net], self._turned, InputCopies()), inputs_kept(blocks), checkpointing(blocks):
            yield

    # --- samples ---

    def sample_latent(self, text: str, plan: SamplePlan, size: tuple[int, int], seed: int) -> Tensor:
        """One picture as a latent (1, 4, h, w) of the network; size: (width, height)."""
        ratio = self._ratio()
        with torch.no_grad():
            return euler.sample(
                lambda x, t, prompt: self.trainee.call(x, t, self._cond(prompt, size)), self.trainee.alphas_cumprod, self.trainee.prediction,
                (1, 4, size[1] // ratio, size[0] // ratio), text=text, negative=plan.negative, steps=plan.steps, cfg=plan.cfg, seed=seed,
                device=self.device, each=self.interrupted,
            )

    def draw(self, plan: SamplePlan, size: tuple[int, int], batch_size: int) -> Tensor:
        """IMAGE (n, h, w, 3) on the CPU, one for every prompt."""
        for text in (*plan.prompts, plan.negative):
            self._cond(text, size)
        self.load()
        latents = [self.sample_latent(text, plan, size, plan.seed) for text in plan.prompts]
        with torch.no_grad():
            images = [self.trainee.decode(latent).float().cpu().clone().clamp(0, 1) for latent in latents]
        self.load()
        return torch.cat(images).movedim(1, -1)

    # --- files ---

    def write(self, bank: RotationBank, values: Mapping[str, Tensor] | None, path: str, metadata: Mapping[str, str]) -> tuple[Adapter, str]:
        """Write what the bank has learnt and read it back: (adapter, dialect). Raises FormatError if no dialect can hold it."""
        return write_bank(bank, values, path, metadata, self.index, {UNET: self.trainee.prefix})
