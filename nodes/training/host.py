"""ComfyUI's MODEL, CLIP and VAE as the training engine wants them.

What ComfyUI's own trainer gets wrong is done here on purpose in another way: captions of a batch are never
combined, latents always pass through `process_latent_in`, no weight is wrapped or patched, and frozen weights are
ordinary tensors, so that any layer can be trained and the base model stays as it was.
"""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.ops
import comfy.sample
import comfy.sampler_helpers
import comfy.samplers
import comfy.utils
import torch
from torch import nn

from ...oft_core import Adapter, Diff, LayerRotation
from ...oft_core.adapter import load_adapter
from ...oft_core.errors import FormatError
from ...oft_core.formats.write import WRITERS, write_adapter
from ...oft_core.names.spelling import is_t5_path
from ...oft_core.training import (
    ConfigError,
    Loaded,
    Noised,
    Objective,
    OFTConfig,
    Record,
    RotationBank,
    TrainingError,
    checkpointing,
)
from ...oft_core.training.dataset import TrainingSet
from ...oft_core.training.layers import plain_weight
from ..binding import names, runtime
from .blocks import InputCopies, blocks_of, inputs_kept, plain_attention
from .mode import ordinary_, own_randomness
from .prediction import Foreseen, foreseen, refuse_unsuited
from .store import Store, fingerprint

log = logging.getLogger("oft")

LOW_VRAM = ("off", "checkpointing", "offload")
# The parts of a model that can be trained. T5 is apart from the CLIP encoders: it is far larger.
UNET, ENCODERS, T5 = "unet", "te", "t5"
# Dialects in the order in which a trained adapter is written: the first that can hold it.
DIALECTS = ("oft_v2", "lycoris", "comfy", "oft_v2_plus")
# What to do about models that overflow.
PRECISE_VAE = "Start ComfyUI with --fp32-vae or --bf16-vae"
PRECISE_TEXT = "Start ComfyUI with --fp32-text-enc or --bf16-text-enc"


# --- sampling -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SamplePlan:
    """How sample pictures are drawn: one for every prompt, all from one seed."""

    prompts: tuple[str, ...] = ()
    negative: str = ""
    seed: int = 0
    steps: int = 20
    cfg: float = 5.0
    sampler: str = "euler"
    scheduler: str = "normal"

    @property
    def drawing(self) -> list[Any]:
        """What class pictures share with samples."""
        return [self.steps, self.cfg, self.sampler, self.scheduler, self.negative]


# --- the model ----------------------------------------------------------------------------------------------


def _is_dynamic(patcher: Any) -> bool:
    return getattr(patcher, "is_dynamic", lambda: False)()


def _with_weights_in_place(patcher: Any) -> Any:
    """A clone whose weights stay on the device while it is loaded, as a backward pass needs them.

    Dynamic VRAM of later hosts lends them to one forward at a time. Raises ConfigError where ComfyUI cannot load
    the model in another way.
    """
    if not _is_dynamic(patcher):
        return patcher.clone()
    if getattr(patcher, "cached_patcher_init", None) is None:
        raise ConfigError(
            "This model cannot be trained while ComfyUI keeps its weights in dynamic VRAM",
            found="a model that its loader cannot load in another way",
            expected="a model from one of ComfyUI's own loaders",
            hint="Use another loader node, or start ComfyUI with --disable-dynamic-vram.",
        )
    return patcher.clone(disable_dynamic=True)


class HostModel:
    """ComfyUI's MODEL, CLIP and VAE as the engine wants them.

    low_vram: one of `LOW_VRAM`.   guidance: of models with distilled guidance (Flux).   train_encoders: the text
    encoders are trained too, so captions are encoded in every step.
    """

    def __init__(
        self,
        model: Any,
        clip: Any,
        vae: Any,
        *,
        low_vram: str = "checkpointing",
        guidance: float = 1.0,
        train_encoders: bool = False,
    ):
        if low_vram not in LOW_VRAM:
            raise ConfigError(
                "Option 'low_vram' has an unknown value", found=low_vram, expected=" or ".join(LOW_VRAM)
            )
        self.patcher = _with_weights_in_place(model)
        self.base = self.patcher.model
        self.clip = clip.clone()
        if train_encoders and _is_dynamic(clip.patcher):
            self.clip.patcher = _with_weights_in_place(clip.patcher)
            self.clip.cond_stage_model = self.clip.patcher.model
        self.vae = vae
        self.low_vram, self.guidance, self.train_encoders = low_vram, guidance, train_encoders
        self.device = self.patcher.load_device
        self.latents: dict[tuple, torch.Tensor] = {}
        self.masks: dict[tuple, torch.Tensor | None] = {}
        self._texts: dict[str, list] = {}
        self._conds: dict[tuple, dict[str, Any]] = {}
        self.objective: Objective | None = None
        self._found: Foreseen | None = None
        self._turned: set[int] = set()
        self.index = None
        self._store: Store | None = None
        self._of_vae = self._of_clip = ""

    @property
    def net(self) -> nn.Module:
        return self.base.diffusion_model

    @property
    def encoders(self) -> nn.Module:
        return self.clip.cond_stage_model

    @property
    def sampling(self) -> Any:
        return self.patcher.get_model_object("model_sampling")

    # --- pictures and texts ---

    def keep_on_disk(self, store: Store, vae: str, clip: str) -> None:
        """Take latents and embeddings from `store`, and put them there. vae, clip: identities of the two models."""
        self._store, self._of_vae, self._of_clip = store, vae, clip

    def encode_pictures(self, of: TrainingSet, report: Callable[[int, int], None] | None = None) -> None:
        """Latents of every record in the model's own space, on the CPU, float32; and masks of their size.

        Raises TrainingError for a picture whose latent is not finite.
        """
        for i, record in enumerate(of.records):
            image, mask = of.load(record)
            latent = self._latent_of(image.unsqueeze(0)[..., :3], record.name)
            latent = comfy.sample.fix_empty_latent_channels(self.patcher, latent)
            self._check_channels(latent)
            latent = self.base.process_latent_in(latent).float().cpu()
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

    def _latent_of(self, image: torch.Tensor, name: str) -> torch.Tensor:
        """The VAE's own latent of an IMAGE (1, h, w, 3); name: of the picture, for errors."""
        place = None
        if self._store is not None:
            how = [self._of_vae, str(getattr(self.vae, "vae_dtype", "")), str(self.device)]
            place = self._store.path("latent", *how, fingerprint(image))
            known = self._store.get(place)
            if known is not None and known.isfinite().all():
                return known
        # Some encoders draw their latents at random.
        with own_randomness(0), torch.no_grad():
            latent = self.vae.encode(image).clone()
        need_finite("The VAE's latent of a picture", latent, file=name, hint=f"{PRECISE_VAE}, or use another VAE.")
        if place is not None:
            self._store.put(place, latent)
        return latent

    def _check_channels(self, latent: torch.Tensor) -> None:
        wanted, form = self.base.latent_format.latent_channels, self._form((1, 1))
        if latent.ndim != len(form) or latent.shape[1] != wanted:
            raise ConfigError(
                "The VAE belongs to another kind of model",
                found=f"latents {tuple(latent.shape)}",
                expected=f"{wanted} channels" + (", with frames" if len(form) == 5 else ""),
                hint="Use the VAE that goes with this model.",
            )

    def _form(self, size: tuple[int, int]) -> tuple[int, ...]:
        """Shape of the latent of one picture, size (height, width); a video model's has one frame."""
        frames = (1,) * (getattr(self.base.latent_format, "latent_dimensions", 2) - 2)
        return (1, self.base.latent_format.latent_channels, *frames, *size)

    def encode_texts(self, texts: Iterable[str]) -> None:
        """Text embeddings of every different text, kept on the CPU. Raises TrainingError for one that is not finite."""
        with torch.no_grad():
            for text in dict.fromkeys(texts):
                if text in self._texts:
                    continue
                tokens = self.clip.tokenize(text)
                place = self._place_of_text(tokens)
                known = None if place is None else self._store.get(place)
                if known is None or not all(v.isfinite().all() for v in _embeddings(known)):
                    known = _ordinary(self.clip.encode_from_tokens_scheduled(tokens, show_pbar=False))
                    self._check_text(text, known, f"{PRECISE_TEXT}, or load other text encoders.")
                    if place is not None:
                        self._store.put(place, known)
                self._texts[text] = known

    def _place_of_text(self, tokens: Any) -> Path | None:
        """Where the embedding of these tokens is kept; None if it may differ from run to run."""
        hooks = self.clip.patcher.forced_hooks is not None or self.clip.apply_hooks_to_conds is not None
        if self._store is None or self.train_encoders or hooks:
            return None
        try:
            # Not the text: words of an embedding file are in the tokens as they are in that file.
            return self._store.path("text", self._of_clip, str(self.clip.patcher.load_device), fingerprint(tokens))
        except TypeError:
            return None

    @staticmethod
    def _check_text(text: str, encoded: list, hint: str) -> None:
        for values in _embeddings(encoded):
            need_finite(f"The text embedding of {text!r}", values, hint=hint)

    def _encode_with_gradient(self, text: str) -> list:
        """As ComfyUI encodes a prompt, with gradients through the text encoders. Raises TrainingError if it is not finite."""
        model = self.encoders
        model.reset_clip_options()
        if self.clip.layer_idx is not None:
            model.set_clip_options({"layer": self.clip.layer_idx})
        model.set_clip_options({"execution_device": self.clip.patcher.load_device})
        cond, pooled, *more = model.encode_token_weights(self.clip.tokenize(text))
        made = [[cond, {"pooled_output": pooled, **(more[0] if more else {})}]]
        # Before the first step it was finite.
        self._check_text(text, made, "Lower the learning rate of the text encoders.")
        return made

    # --- loading ---

    def load(self, batch_size: int = 1) -> None:
        """Put the model on its device with ordinary weights. With `offload`, only as much of it as fits."""
        shapes = [t.shape for t in self.latents.values()]
        largest = max(shapes, key=lambda s: s[-1] * s[-2]) if shapes else (1, 4, 64, 64)
        # Training keeps activations that sampling drops; a measured estimate for UNets with checkpointing.
        need = 3 * self.base.memory_required([2 * batch_size, *largest[1:]])
        patchers = [self.patcher, *([self.clip.patcher] if self.train_encoders else [])]
        whole = self.low_vram != "offload"
        if not whole:
            # Host memory that is pinned for copying must not be replaced while it is.
            comfy.model_management.unload_all_models()
            self._make_ordinary()
        comfy.model_management.load_models_gpu(patchers, memory_required=need, force_full_load=whole)
        if whole:
            self._make_ordinary()

    def _make_ordinary(self) -> None:
        ordinary_(self.base)
        if self.train_encoders:
            ordinary_(self.encoders)

    def bank(self, parts: Mapping[str, OFTConfig], seed: int) -> RotationBank:
        """Rotations for the named parts. Raises ConfigError if nothing can be trained."""
        models = {UNET: self.net, ENCODERS: self.encoders, T5: self.encoders}
        if T5 in parts and not any(is_t5_path(name.split("transformer.")[-1]) for name in self._encoder_names()):
            raise ConfigError(
                "This model has no T5 text encoder to train",
                found=type(self.encoders).__name__,
                expected="SD3 or Flux with its T5",
                hint="Set t5_lr to 0, or load the T5 with the other text encoders.",
            )
        chosen = {part: (models[part], config.select(models[part])) for part, config in parts.items()}
        for model, selection in chosen.values():
            _check_whole(model, selection.modules_to_save)
            self._turned |= {id(model.get_submodule(c.name)) for c in selection.layers}
        return RotationBank(chosen, seed=seed, device=self.device, weight_of=self._weight_of)

    def _encoder_names(self) -> Iterable[str]:
        return (name for name, _ in self.encoders.named_modules())

    def _weight_of(self, module: nn.Module) -> torch.Tensor:
        """A convolution's weight as its forward would use it, with patches of a partly loaded model and turned activations."""
        if getattr(module, "weight_function", None):
            weight, _ = comfy.ops.cast_bias_weight(
                module, dtype=torch.float32, device=self.device, bias_dtype=torch.float32
            )[:2]
            weight = weight.detach()
        else:
            weight = plain_weight(module)
        return runtime.as_turned((self.base, self.encoders), module, weight)

    @property
    def kind(self) -> str:
        """The host's name of this kind of model."""
        return type(self.base.model_config).__name__

    @property
    def usual_cfg(self) -> float:
        """CFG of sample pictures: none for models that have guidance built in."""
        return 1.0 if getattr(getattr(self.net, "params", None), "guidance_embed", False) else 5.0

    @property
    def loss_scale(self) -> float:
        """Gradients of half-precision models need one, since their activations underflow."""
        kind = self.base.manual_cast_dtype or self.base.get_dtype()
        return 4096.0 if kind == torch.float16 else 1.0

    def make_objective(self, **options: Any) -> Objective:
        """The training objective of this model, found by trying which one its sampling turns back into pictures.

        options: for `Objective`; `sampling` may be "auto". Raises ConfigError for kinds that are not supported.
        """
        refuse_unsuited(self.base)
        found = self._found = foreseen(self.sampling)
        if found.prediction == "flow":
            options.setdefault("shift", found.shift)
        else:
            options["alphas_cumprod"], options["data_std"] = found.alphas_cumprod, found.data_std
        if found.prediction == "flow" or found.continuous:
            options.pop("min_snr_gamma", None)
            options.pop("noise_offset", None)
        if options.get("sampling", "auto") == "auto":
            options["sampling"] = "logit_normal" if found.prediction == "flow" or found.continuous else "uniform"
        self.objective = Objective(prediction=found.prediction, **options)
        return self.objective

    # --- one forward ---

    def load_batch(self, records: list[Record]) -> Loaded:
        """Latents and masks of a batch on the device. Items without a mask count everywhere."""
        latents = torch.cat([self.latents[_place(r)] for r in records]).to(self.device)
        masks = [self.masks[_place(r)] for r in records]
        if all(m is None for m in masks):
            return Loaded(latents)
        filled = [torch.ones(1, 1, *latents.shape[2:]) if m is None else m for m in masks]
        return Loaded(latents, torch.cat(filled).to(self.device))

    def predict(self, noised: Noised, records: list[Record]) -> torch.Tensor:
        """The model's prediction in the objective's target space, (batch, channels, ...)."""
        sigma = self._found.sigma_of(noised.sigma)
        x = self.sampling.noise_scaling(sigma, noised.noise.clone(), noised.x0)
        texts = ["" if drop else r.caption for r, drop in zip(records, noised.drop, strict=True)]
        made: dict[str, dict[str, Any]] = {}
        for text in texts:
            if text not in made:
                made[text] = self._cond(text, x[:1], sigma[:1])
        conds = [made[text] for text in texts]
        if all(_fit_together(conds[0], c) for c in conds[1:]):
            denoised = self._denoise(x, sigma, conds)
        else:
            # Prompts of different lengths: one after the other.
            each = [self._denoise(x[i : i + 1], sigma[i : i + 1], [c]) for i, c in enumerate(conds)]
            denoised = torch.cat(each)
        return self.objective.from_denoised(denoised, noised)

    def _denoise(self, x: torch.Tensor, sigma: torch.Tensor, conds: list[dict[str, Any]]) -> torch.Tensor:
        options = {"optimized_attention_override": plain_attention}
        return self.base.apply_model(x, sigma, transformer_options=options, **comfy.samplers.cond_cat(conds))

    def _cond(self, text: str, like: torch.Tensor, sigma: torch.Tensor) -> dict[str, Any]:
        """What the model is told for one text and picture size; `like`: one latent."""
        key = (text, tuple(like.shape))
        if key in self._conds:
            return self._conds[key]
        encoded = self._encode_with_gradient(text) if self.train_encoders else self._texts[text]
        encoded = [[c, {"guidance": self.guidance, **more}] for c, more in encoded]
        converted = comfy.sampler_helpers.convert_cond(encoded)
        empty = torch.zeros_like(like)
        ready = comfy.samplers.process_conds(
            self.base, empty, {"positive": converted}, self.device, empty, None, 0
        )["positive"][0]
        made = comfy.samplers.get_area_and_mult(ready, empty, sigma).conditioning
        if not self.train_encoders:
            self._conds[key] = made
        return made

    # --- around a run ---

    @contextlib.contextmanager
    def around(self) -> Iterator[None]:
        """Gradient checkpointing of the model's blocks, and copies where its code works in place."""
        roots = [self.net, *([self.encoders] if self.train_encoders else [])]
        copies = InputCopies()
        blocks = [b for root in roots for b in blocks_of(root)] if self.low_vram != "off" else []
        handles = []
        try:
            for root in roots:
                handles += [
                    m.register_forward_pre_hook(copies)
                    for m in root.modules()
                    if id(m) in self._turned or "norm" in type(m).__name__.lower() and not isinstance(m, nn.GroupNorm)
                ]
            with copies.of_functions(), inputs_kept(blocks), checkpointing(blocks):
                yield
        finally:
            for handle in handles:
                handle.remove()

    # --- sampling ---

    def sample_latent(self, text: str, plan: SamplePlan, size: tuple[int, int], seed: int) -> torch.Tensor:
        """One picture as a VAE latent of the model's shape, by ComfyUI's own sampler; size: (width, height)."""
        ratio = self._ratio()
        empty = torch.zeros(self._form((size[1] // ratio, size[0] // ratio)))
        self.encode_texts([text, plan.negative])
        with own_randomness(seed), torch.no_grad():
            noise = comfy.sample.prepare_noise(empty, seed)
            return comfy.sample.sample(
                self.patcher,
                noise,
                plan.steps,
                plan.cfg,
                plan.sampler,
                plan.scheduler,
                self._texts[text],
                self._texts[plan.negative],
                empty,
                disable_pbar=True,
                seed=seed,
            ).clone()

    def _ratio(self) -> int:
        if self.latents:
            (bucket, latent) = next((k[2], t) for k, t in self.latents.items())
            return bucket[0] // latent.shape[-1]
        return 8

    def draw(self, plan: SamplePlan, size: tuple[int, int], batch_size: int) -> torch.Tensor:
        """IMAGE (n, h, w, 3) on the CPU, one for every prompt; the model is loaded again for training after it."""
        if self.train_encoders:
            # Their embeddings change while training.
            for text in (*plan.prompts, plan.negative):
                self._texts.pop(text, None)
        latents = [self.sample_latent(text, plan, size, plan.seed) for text in plan.prompts]
        with torch.no_grad():
            images = [self.vae.decode(latent).clone() for latent in latents]
        self.load(batch_size)
        return torch.cat([i.reshape(-1, *i.shape[-3:]) for i in images]).float().cpu()

    # --- files ---

    def write(
        self,
        bank: RotationBank,
        values: Mapping[str, torch.Tensor] | None,
        path: str,
        metadata: Mapping[str, str],
    ) -> tuple[Adapter, str]:
        """Write what the bank has learnt and read it back: (adapter, dialect).

        Raises FormatError with the reasons of all dialects if none can hold it.
        """
        layers: dict[str, LayerRotation] = {}
        beside: dict[str, Diff] = {}
        prefix = {UNET: "diffusion_model.", ENCODERS: "", T5: ""}
        for (part, module), pieces in bank.adapter_tensors(values).items():
            for piece in pieces:
                place = layers if isinstance(piece.op, LayerRotation) else beside
                place[f"{prefix[part]}{module}.{piece.param}"] = piece.op
        if self.index is None:
            self.index = names.index_of(self.patcher, self.clip if self.train_encoders else None)
        refused = []
        for dialect in DIALECTS:
            try:
                written = write_adapter(
                    layers, self.index, path, dialect, beside=beside, metadata=metadata
                )
            except FormatError as error:
                refused.append(str(error))
                continue
            adapter = load_adapter(written)
            patches = adapter.bind(self.index).patches
            missing = {*layers, *beside} - {p.key for p in patches}
            if missing:
                raise FormatError("A layer could not be read back", file=path, module=min(missing))
            turned = Counter(p.key for p in patches if isinstance(p.op, LayerRotation))
            for key, count in turned.items():
                if count != 1 or key not in layers:
                    raise FormatError(
                        "The file turns a weight more often than the training did",
                        file=path,
                        module=key,
                        found=f"{count} rotations",
                        expected=f"{int(key in layers)}",
                    )
            return adapter, WRITERS[dialect].title
        raise FormatError("No file format can hold an adapter with these settings", found=" ".join(refused))


def _check_whole(model: nn.Module, names: Iterable[str]) -> None:
    """Raises ConfigError for modules that cannot be trained whole because their patches are not in their weights."""
    for name in names:
        for inside, module in model.get_submodule(name).named_modules():
            if getattr(module, "weight_function", None) or getattr(module, "bias_function", None):
                raise ConfigError(
                    "A layer of a partly loaded model with patches cannot be trained whole",
                    module=f"{name}.{inside}".rstrip("."),
                    hint="Set low_vram to 'checkpointing', or leave it out of modules_to_save.",
                )


def need_finite(what: str, values: torch.Tensor, *, file: str | None = None, hint: str) -> None:
    """Raises TrainingError if a number is NaN or infinite."""
    if not (fine := values.detach().isfinite()).all():
        raise TrainingError(
            f"{what} is not finite",
            file=file,
            found=f"{int((~fine).sum())} NaN or infinite of {values.numel()} numbers",
            expected="finite numbers",
            hint=hint,
        )


def _embeddings(encoded: list) -> Iterator[torch.Tensor]:
    """What models read of a text: embeddings and pooled ones."""
    for cond, more in encoded:
        yield from (v for v in (cond, more.get("pooled_output")) if v is not None)


def _place(record: Record) -> tuple:
    return record.name, record.flip, record.bucket


def _ordinary(value: Any) -> Any:
    """Copies of tensors that were made under inference mode, on the CPU, inside nested lists and dicts."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone().cpu()
    if isinstance(value, dict):
        return {k: _ordinary(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_ordinary(v) for v in value)
    return value


def _fit_together(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    return a.keys() == b.keys() and all(a[k].can_concat(b[k]) for k in a)
