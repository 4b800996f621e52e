"""What Train OFT is asked to do: preset, settings node and knobs made into one plan."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from ...oft_core.training import ConfigError, OFTConfig, TrainSettings
from ...oft_core.training.data import filled
from ...oft_core.training.dataset import TrainingSet
from ...oft_core.training.presets import TRAIN_PRESETS
from ...oft_core.training.selection import PRESETS as TARGETS
from .host import ENCODERS, T5, UNET, SamplePlan

# What is trained of text encoders: the attention layers, as they are called in CLIP (and language models) and in T5.
ENCODER_TARGETS = {ENCODERS: r"(.*\.)?self_attn\.([qkv]_proj|out_proj)", T5: r"(.*\.)?SelfAttention\.[qkvo]"}


@dataclass(frozen=True)
class TrainConfig:
    """What OFT Training Settings gives on: keyword arguments by the part they are for."""

    oft: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)
    objective: dict[str, Any] = field(default_factory=dict)
    run: dict[str, Any] = field(default_factory=dict)


# --- texts to settings --------------------------------------------------------------------------------------


def _layers(text: str) -> list[str] | str | None:
    """Names separated by commas, a preset, 'all-...' or a regular expression; None for nothing."""
    text = text.strip()
    if not text:
        return None
    if text in TARGETS or text in ("all-linear", "all-conv"):
        return text
    names = [n.strip() for n in text.split(",") if n.strip()]
    if all(re.fullmatch(r"[\w.\-]+", n) for n in names):
        return names
    try:
        re.compile(text)
    except re.error as error:
        raise ConfigError(
            "This is neither names nor a regular expression", found=text, expected=str(error)
        ) from error
    return text


def _names(text: str) -> list[str] | None:
    """Names separated by commas; None for nothing."""
    return [n.strip() for n in text.split(",") if n.strip()] or None


def _json(name: str, text: str) -> dict[str, Any]:
    if not text.strip():
        return {}
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"Option '{name}' is not JSON", found=text, expected='such as {"a": 1}') from error
    if not isinstance(value, dict):
        raise ConfigError(f"Option '{name}' is not a JSON object", found=text, expected='such as {"a": 1}')
    return value


def _whole_numbers(text: str) -> list[int] | None:
    parts = [p for p in re.split(r"[,\s]+", text.strip()) if p]
    if not all(p.isdigit() for p in parts):
        raise ConfigError(
            "Option 'layers_to_transform' is not a list of numbers", found=text, expected="0, 1, 2"
        )
    return [int(p) for p in parts] or None


# --- a run --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """Everything that one press of the button asks for."""

    oft: OFTConfig
    settings: TrainSettings
    objective: dict[str, Any]
    samples: SamplePlan
    prior: str
    class_pictures: int
    guidance: float
    encoders: tuple[str, ...]
    low_vram: str
    name: str
    resume: bool
    preset: str
    #: whether the loss scale is left to the model's precision
    usual_loss_scale: bool = True

    def parts(self) -> dict[str, OFTConfig]:
        """What is trained of each part. Choices of layers are for the diffusion model, and so are whole modules."""
        own = {
            "exclude_modules": None,
            "conv_modules": None,
            "layers_to_transform": None,
            "layers_pattern": None,
            "modules_to_save": None,
        }
        out = {UNET: self.oft}
        for part in self.encoders:
            # T5 has no biases; named here too, CLIP's would be trained twice.
            bias = "none" if part == T5 else self.oft.bias
            out[part] = replace(self.oft, target_modules=ENCODER_TARGETS[part], bias=bias, **own)
        return out

    def fixed(self) -> dict[str, Any]:
        """What a run that goes on must share with the one before."""
        return {
            "oft": self.oft.to_dict(),
            "settings": self.settings.fingerprint(),
            "objective": self.objective,
            "prior": self.prior if self.prior != "pictures" else ["pictures", self.class_pictures, *self.samples.drawing],
            "guidance": self.guidance,
            "encoders": list(self.encoders),
            # Checkpointing repeats the same arithmetic; weights that are not merged do not.
            "offload": self.low_vram == "offload",
        }


def make_plan(
    *,
    dataset: TrainingSet,
    preset: str,
    steps: int,
    learning_rate: float,
    block_size: int,
    coft: str,
    coft_degrees: float,
    coft_eps: float,
    seed: int,
    sample_prompts: str,
    sample_every: int,
    save_every: int,
    low_vram: str,
    resume: bool,
    name: str,
    config: TrainConfig | None,
) -> Plan:
    """Preset, then the settings node, then the main node's own knobs. Raises ConfigError."""
    if preset not in TRAIN_PRESETS:
        raise ConfigError("Unknown preset", found=preset, expected=" or ".join(TRAIN_PRESETS))
    given, base = config or TrainConfig(), TRAIN_PRESETS[preset]
    oft, train = dict(given.oft), dict(given.train)
    if not oft.get("target_modules"):
        oft["target_modules"] = base["target"]
    if oft.get("module_dropout", -1) < 0:
        oft["module_dropout"] = base["module_dropout"]
    if train.get("weight_decay", -1) < 0:
        train["weight_decay"] = base["weight_decay"]
    if not oft.get("r"):
        oft["oft_block_size"] = block_size
    else:
        oft["oft_block_size"] = 0
    if coft == "angle":
        oft["angle_cap"] = coft_degrees
    oft["coft"] = coft == "eps"
    if coft == "eps":
        oft["eps"] = coft_eps
    objective = {k: base[k] for k in ("min_snr_gamma", "caption_dropout")}
    objective |= {k: v for k, v in given.objective.items() if not (k in objective and v < 0)}
    run = given.run
    prior = run.get("prior", "preset")
    if prior == "preset":
        prior = base["prior"] if dataset.class_prompt else "none"
    if prior != "none" and not dataset.class_prompt:
        raise ConfigError(
            "Prior preservation needs a class prompt",
            found="none",
            hint="Write one into OFT Dataset, such as 'a photo of a dog', or set prior to none.",
        )
    rates = {ENCODERS: run.get("text_encoder_lr", 0.0), T5: run.get("t5_lr", 0.0)}
    rates = {part: lr for part, lr in rates.items() if lr}
    settings = TrainSettings(
        **{
            **train,
            "steps": steps,
            "lr": learning_rate,
            "seed": seed,
            "sample_every": sample_every,
            "save_every": save_every,
            "prior": prior,
            "part_lr": rates,
        }
    )
    prompts = tuple(filled(p.strip(), dataset.trigger) for p in sample_prompts.splitlines() if p.strip())
    sample_seed = run.get("sample_seed", -1)
    samples = SamplePlan(
        prompts or (dataset.records[0].caption,),
        filled(run.get("sample_negative", ""), dataset.trigger),
        seed if sample_seed < 0 else sample_seed,
        run.get("sample_steps", 20),
        run.get("sample_cfg", 0.0),
        run.get("sample_sampler", "euler"),
        run.get("sample_scheduler", "normal"),
    )
    return Plan(
        OFTConfig(**oft),
        settings,
        objective,
        samples,
        prior,
        run.get("class_pictures", 16),
        run.get("guidance", 1.0),
        tuple(rates),
        low_vram,
        name,
        resume,
        preset,
        "loss_scale" not in train,
    )


def make_config(**given: Any) -> TrainConfig:
    """The settings node's inputs, any of them, as a TrainConfig. Raises ConfigError for texts that are not understood."""
    texts: dict[str, Callable[[str], Any]] = {
        "target_modules": _layers,
        "exclude_modules": _layers,
        "conv_modules": _layers,
        "layers_to_transform": _whole_numbers,
        "layers_pattern": _names,
        "rank_pattern": lambda t: _json("rank_pattern", t),
        "alpha_pattern": lambda t: _json("alpha_pattern", t),
        "modules_to_save": _names,
    }
    oft = {k: read(given[k]) for k, read in texts.items() if k in given}
    plain = (
        *("module_dropout", "side", "rescale", "scaled", "block_share", "use_cayley_neumann", "angle_cap"),
        *("num_cayley_neumann_terms", "bias", "fan_in_fan_out", "init_weights"),
    )
    oft |= {k: given[k] for k in plain if k in given}
    oft["r"] = given.get("blocks", 0)
    oft["spectral_clip"] = given.get("spectral_clip") or None
    names = ("optimizer", "schedule", "warmup", "weight_decay", "clip", "ema", "batch_size", "accumulation")
    train = {k: given[k] for k in (*names, "prior_weight") if k in given}
    if "optimizer_args" in given:
        train["optimizer_args"] = _json("optimizer_args", given["optimizer_args"])
    if given.get("loss_scale"):
        train["loss_scale"] = given["loss_scale"]
    objective = {k: given[k] for k in ("min_snr_gamma", "noise_offset", "caption_dropout") if k in given}
    for mine, theirs in (("timesteps", "sampling"), ("timestep_low", "low"), ("timestep_high", "high")):
        if mine in given:
            objective[theirs] = given[mine]
    run = {
        k: v
        for k, v in given.items()
        if k in ("prior", "class_pictures", "text_encoder_lr", "t5_lr", "guidance") or k.startswith("sample_")
    }
    return TrainConfig(oft, train, objective, run)
