"""The training nodes: Train OFT, its settings, and Save OFT."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import comfy.samplers
import comfy.utils
import folder_paths
import numpy as np
import torch
from comfy_api.latest import io, ui
from PIL import Image, ImageDraw
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ..oft_core import Adapter, AdapterError, describe
from ..oft_core.adapter import load_adapter
from ..oft_core.errors import FormatError
from ..oft_core.formats.write import WRITERS, write_adapter
from ..oft_core.training import (
    OPTIMIZERS,
    SCHEDULES,
    ConfigError,
    OFTConfig,
    Progress,
    Record,
    Trainer,
    TrainSettings,
)
from ..oft_core.training.checkpoint import saved_states
from ..oft_core.training.config import PRESETS as TARGETS
from . import compat, folders, host, train_host
from .dataset import CATEGORY, OFTDataset, TrainingSet, from_pillow, to_pillow
from .load import OFTAdapter
from .train_host import ENCODERS, UNET, HostModel, SamplePlan, Stopped

log = logging.getLogger("oft")

OFTTrainConfig = io.Custom("OFT_TRAIN_CONFIG")
COFT = ("off", "angle", "eps")
PRIORS = ("preset", "none", "match", "pictures")
AUTO = "auto"
AS_IS = "as it is"
PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
FAST = r"(.*\.)?(attn2\.to_[kv]|(img_attn|txt_attn|attn)\.qkv|single_blocks\.\d+\.linear1)"
PRESETS: dict[str, dict[str, Any]] = {
    "subject": {"target": "attention", "min_snr_gamma": 5.0, "caption_dropout": 0.0, "prior": "match"},
    "style": {"target": "attention+ff", "min_snr_gamma": 5.0, "caption_dropout": 0.1, "prior": "none"},
    "fast": {"target": FAST, "min_snr_gamma": 5.0, "caption_dropout": 0.0, "prior": "none"},
}
# Pictures that the node puts out at most; all are in the run's folder.
MOST_SAMPLES = 64

TIPS = {
    "model": "The model to train for. It is not changed; patches that it carries are trained on top of.",
    "clip": "Its text encoders, for the captions and the sample prompts.",
    "vae": "Its VAE: turns the pictures into latents, and samples into pictures.",
    "dataset": "The pictures and captions, from OFT Dataset.",
    "preset": (
        "subject: attention layers; keeps the class if the dataset has a class prompt. style: also the "
        "feed-forward layers, and captions are left out now and then. fast: only some attention layers."
    ),
    "steps": "Training steps. For a subject about 100 for every picture, at least 400.",
    "learning_rate": "How far every step goes. The default suits every block size.",
    "block_size": "Channels that are turned together. Larger: learns more, larger file, slower.",
    "coft": (
        "A limit on how far the model may be turned. off: only the wide default of 60 degrees. angle: no plane "
        "turns further than coft_degrees. eps: constrained OFT as PEFT computes it."
    ),
    "coft_degrees": "The largest angle in degrees, used with coft = angle.",
    "coft_eps": "The radius of PEFT's constraint, shared by the blocks of a layer, used with coft = eps.",
    "seed": "Of order, noise and samples. The same inputs with the same seed give the same file.",
    "sample_prompts": "One prompt a line for the sample pictures. Empty: the first caption.",
    "sample_every": "Steps between sample pictures; 0: only at the end.",
    "save_every": "Steps between saves of state and file; 0: only at the end and on stop.",
    "low_vram": (
        "off: fastest. checkpointing: computes parts of each step twice and needs far less memory. offload: in "
        "addition, weights stay in main memory as far as they do not fit."
    ),
    "resume": (
        "Go on from the last saved state of the same run (stopped, failed, or with fewer steps). Off: start anew. "
        "A run that is already complete is never repeated."
    ),
    "name": "Name of the file in models/oft; may contain a subfolder. A number is added.",
    "config": "All other settings, from OFT Training Settings.",
    "out_adapter": "What was learnt, for Apply OFT and Save OFT.",
    "out_samples": "The sample pictures in the order in which they were drawn, the last ones at the end.",
    "out_curve": "The loss over the steps, and its running mean.",
    "out_report": "Layers, settings, losses, time, and what to look at.",
    "out_name": "The file as Load OFT lists it.",
    "adapter": "The adapter to write.",
    "save_model": "The model that the adapter is for. Needed for any dialect but 'as it is'.",
    "save_clip": "Its text encoders, if the adapter has layers for them.",
    "dialect": (
        "Whose format to write. oft_v2: OneTrainer. peft: a folder with its config. lycoris: Diag-OFT. kohya, "
        "comfy: those tools' own. A dialect that cannot hold the adapter is refused with the reason."
    ),
    "precision": "Of the numbers in the file. fp16 halves its size and is precise enough for pictures.",
    "folder": "oft: models/oft, where Load OFT finds it at once. output: ComfyUI's output folder.",
}
CONFIG_TIPS = {
    "target_modules": (
        "Which layers, instead of the preset's: 'attention', 'attention+ff', 'all-linear', names separated by "
        "commas, or a regular expression over whole names. Empty: by preset."
    ),
    "exclude_modules": "Layers to leave out: names separated by commas, or a regular expression.",
    "conv_modules": "Convolutions to train as well: 'all-conv', names, or a regular expression. Empty: none.",
    "layers_to_transform": "Numbers of the blocks to train, separated by commas. Needs target_modules as names.",
    "layers_pattern": "Name of the module list that those numbers count in, such as 'transformer_blocks'.",
    "rank_pattern": 'Other numbers of blocks for some layers, as JSON: {"to_q": 8}.',
    "blocks": "Number of blocks of every layer, instead of a block size (PEFT's r). 0: use the block size.",
    "spectral_clip": "Largest singular value of a block's generator; 0: none.",
    "angle_cap": "No plane turns further than this many degrees, unless coft = angle; 180: no limit.",
    "optimizer": "Optimizers other than adamw and adafactor need their package in ComfyUI's Python.",
    "optimizer_args": 'Arguments of the optimizer, as JSON: {"betas": [0.9, 0.99]}.',
    "schedule": "Of the learning rate after the warm-up.",
    "warmup": "Steps in which the learning rate rises.",
    "weight_decay": "Pulls rotations back to none.",
    "clip": "Largest norm of the gradient; 0: no limit.",
    "ema": "Decay of a running mean of the rotations, which is then what is saved; 0: none. 0.99 for 500 steps.",
    "batch_size": "Pictures in one forward.",
    "accumulation": "Forwards in one step.",
    "min_snr_gamma": "Weight of low noise levels (not for flow models). 5 is usual, 0 is none, -1 by preset.",
    "noise_offset": "Helps with very dark and bright pictures (not for flow models).",
    "caption_dropout": "Share of examples without caption; -1 by preset.",
    "timesteps": "How noise levels are drawn. auto: uniform, and logit_normal for flow models.",
    "timestep_low": "Lowest noise level that is trained, 0 to 1.",
    "timestep_high": "Highest noise level that is trained, 0 to 1.",
    "prior": (
        "Keeping the class: match the untrained model's answer to the class prompt, or train on pictures that it "
        "draws once. preset: 'match' for subjects, if there is a class prompt."
    ),
    "prior_weight": "Weight of the class beside the subject.",
    "class_pictures": "How many class pictures are drawn, with prior = pictures.",
    "text_encoder_lr": "Learning rate of the text encoders (CLIP); 0: not trained.",
    "guidance": "Guidance value while training, for models that have one built in (Flux).",
    "loss_scale": "For half-precision models; 0: by the model.",
    "sample_steps": "Steps of a sample picture.",
    "sample_cfg": "CFG of sample pictures; 0: by the model (5, and 1 for Flux).",
    "sample_sampler": "Sampler of sample pictures.",
    "sample_scheduler": "Scheduler of sample pictures.",
    "sample_negative": "Negative prompt of sample pictures.",
    "sample_seed": "Seed of sample pictures; -1: the training's.",
}


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
    encoders: bool
    low_vram: str
    name: str
    resume: bool
    preset: str

    def fixed(self) -> dict[str, Any]:
        """What a run that goes on must share with the one before."""
        return {
            "oft": self.oft.to_dict(),
            "settings": self.settings.fingerprint(),
            "objective": self.objective,
            "prior": [self.prior, self.class_pictures] if self.prior == "pictures" else self.prior,
            "guidance": self.guidance,
            "encoders": self.encoders,
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
    if preset not in PRESETS:
        raise ConfigError("Unknown preset", found=preset, expected=" or ".join(PRESETS))
    given, base = config or TrainConfig(), PRESETS[preset]
    oft = dict(given.oft)
    if not oft.get("target_modules"):
        oft["target_modules"] = base["target"]
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
    encoder_lr = run.get("text_encoder_lr", 0.0)
    settings = TrainSettings(
        **{
            **given.train,
            "steps": steps,
            "lr": learning_rate,
            "seed": seed,
            "sample_every": sample_every,
            "save_every": save_every,
            "prior": prior,
            "part_lr": {ENCODERS: encoder_lr} if encoder_lr else {},
        }
    )
    prompts = tuple(p.strip() for p in sample_prompts.splitlines() if p.strip())
    sample_seed = run.get("sample_seed", -1)
    samples = SamplePlan(
        prompts or (dataset.records[0].caption,),
        run.get("sample_negative", ""),
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
        bool(encoder_lr),
        low_vram,
        name,
        resume,
        preset,
    )


def _state_root() -> Path:
    """Where runs keep their state: a private folder of the user directory."""
    own = getattr(folder_paths, "get_system_user_directory", None)
    root = own("oft") if own else os.path.join(folder_paths.get_user_directory(), "__oft")
    return Path(root) / "training"


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:24]


def _write_json(path: Path, value: Any) -> None:
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    with os.fdopen(handle, "w", encoding="utf-8") as f:
        json.dump(value, f, indent=1)
    os.replace(temporary, path)


def _new_file(prefix: str, root: str) -> Path:
    """A free path `root/prefix_00001_.safetensors`, the number one above the highest. Raises ConfigError."""
    try:
        folder, name, counter, _, _ = folder_paths.get_save_image_path(prefix, root)
    except Exception as error:  # the host raises plain Exception for paths outside
        raise ConfigError("A file cannot be saved under this name", found=prefix, hint=str(error)) from error
    return Path(folder) / f"{name}_{counter:05}_.safetensors"


def _listed(path: Path) -> str:
    """The path as the loader's list shows it."""
    for root in folder_paths.get_folder_paths(folders.FOLDER):
        if os.path.commonpath((os.path.abspath(root), os.path.abspath(path))) == os.path.abspath(root):
            return os.path.relpath(path, root)
    return str(path)


@dataclass
class Outcome:
    """What Train OFT puts out."""

    adapter: Adapter
    samples: torch.Tensor
    losses: list[float]
    report: str
    name: str


class Run:
    """One training run of the node: from inputs to files. Everything it changes on the model is undone."""

    def __init__(self, plan: Plan, dataset: TrainingSet, model: Any, clip: Any, vae: Any, node_id: Any):
        self.plan, self.dataset, self.node_id = plan, dataset, node_id
        self.host = HostModel(
            model,
            clip,
            vae,
            low_vram=plan.low_vram,
            guidance=plan.guidance,
            train_encoders=plan.encoders,
        )
        if not plan.samples.cfg:
            samples = dataclasses.replace(plan.samples, cfg=self.host.usual_cfg)
            self.plan = dataclasses.replace(plan, samples=samples)
        self.identity = {
            "model": train_host.identity(model),
            "clip": f"{train_host.identity(clip.patcher)} {clip.layer_idx}",
            "vae": train_host.identity(vae.patcher),
            "pictures": dataset.digest,
        }
        # Also depends on nodes before this one that change how the model samples.
        self.objective = self.host.make_objective(**plan.objective)
        self.key = _digest({**plan.fixed(), **self.identity, "found": self.objective.fingerprint()})
        self.folder = _state_root() / self.key
        self.pictures: list[torch.Tensor] = []
        self.sample_files: list[str] = []
        self.bar = comfy.utils.ProgressBar(plan.settings.steps, node_id=node_id)
        self.said = 0.0
        self.trainer: Trainer | None = None
        self.dialect = ""

    # --- results of earlier runs ---

    @property
    def result_file(self) -> Path:
        wanted = [self.plan.settings.steps, dataclasses.asdict(self.plan.samples), self.plan.name]
        wanted.append(self.plan.settings.sample_every)
        return self.folder / f"result-{_digest(wanted)}.json"

    def earlier(self) -> Outcome | None:
        """The result of the same run, if it was completed before."""
        if not self.result_file.is_file():
            return None
        try:
            saved = json.loads(self.result_file.read_text("utf-8"))
            path = Path(saved["file"])
            if not path.is_file():
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes((self.folder / saved["copy"]).read_bytes())
            samples = [from_pillow(Image.open(self.folder / s)) for s in saved["samples"]]
            adapter = load_adapter(path)
        except (OSError, KeyError, ValueError, AdapterError) as error:
            log.warning("OFT: an earlier result cannot be used, training again: %s", error)
            return None
        report = saved["report"] + "\nThe same inputs were trained before; nothing was trained again."
        return Outcome(adapter, torch.cat(samples), saved["losses"], report, _listed(path))

    # --- the run ---

    def __call__(self) -> Outcome:
        found = self.earlier()
        if found is not None:
            return found
        self.folder.mkdir(parents=True, exist_ok=True)
        states = self._states()
        if not self.plan.resume:
            for old in saved_states(states) if states.is_dir() else []:
                old.unlink()
        self.path = self._file()
        plan, host_model = self.plan, self.host
        with train_host.memory_explained():
            self._say("Encoding pictures and captions")
            host_model.encode_pictures(self.dataset)
            texts = [r.caption for r in self.dataset.records]
            host_model.encode_texts([*texts, "", self.dataset.class_prompt, *plan.samples.prompts])
            class_records = self._class_records()
            host_model.load(plan.settings.batch_size)
            parts = {UNET: plan.oft}
            if plan.encoders:
                parts[ENCODERS] = dataclasses.replace(
                    plan.oft,
                    target_modules="attention",
                    exclude_modules=None,
                    conv_modules=None,
                    layers_to_transform=None,
                    layers_pattern=None,
                )
            bank = host_model.bank(parts, plan.settings.seed)
        with tempfile.TemporaryDirectory(prefix="oft") as scratch:
            # A run whose result no file can hold must not begin.
            host_model.write(bank, None, os.path.join(scratch, "probe.safetensors"), {})
        settings = plan.settings
        if settings.loss_scale == 1.0 and host_model.loss_scale > 1:
            settings = dataclasses.replace(settings, loss_scale=host_model.loss_scale)
        self.bank = bank
        trainer = self.trainer = Trainer(
            bank,
            settings,
            self.objective,
            list(self.dataset.records),
            load=host_model.load_batch,
            predict=host_model.predict,
            class_records=class_records,
            state_dir=states,
            around=host_model.around,
            progress=self._progress,
            sample=self._sample,
            fingerprint=self.identity,
        )
        self.resumed = trainer.step if plan.resume and trainer.resume() else 0
        began = time.monotonic()
        try:
            result = trainer.run()
        except Stopped:
            self._keep_what_there_is("stopped")
            raise
        except train_host.TrainingError:
            train_host.free_memory()
            raise
        if not result.losses:
            raise ConfigError("Nothing was trained")
        # The file first: a stop or a lack of memory in the last samples must not cost it.
        adapter = self._write(self.path)
        with train_host.memory_explained(), bank.installed(), bank.evaluation(trainer.values()):
            self._sample(trainer.step, None)
        report = self._report(adapter, time.monotonic() - began)
        samples = torch.cat(self.pictures[-MOST_SAMPLES:])
        copy = self.folder / f"adapter-{trainer.step:08d}.safetensors"
        copy.write_bytes(self.path.read_bytes())
        _write_json(
            self.result_file,
            {
                "file": str(self.path),
                "copy": copy.name,
                "losses": result.losses,
                "report": report,
                "samples": self.sample_files[-MOST_SAMPLES:],
                "steps": trainer.step,
            },
        )
        return Outcome(adapter, samples, result.losses, report, _listed(self.path))

    def _states(self) -> Path:
        """Where this run's states are. A run that was longer keeps its own; a shorter one then has another place."""
        saved = saved_states(self.folder)
        if saved and int(saved[0].stem.rpartition("-")[2]) > self.plan.settings.steps:
            return self.folder / f"{self.plan.settings.steps} steps"
        return self.folder

    def _class_records(self) -> list[Record]:
        prompt, count = self.dataset.class_prompt, self.plan.class_pictures
        if self.plan.prior == "match":
            return [Record("class", prompt, (0, 0), role="class")]
        if self.plan.prior != "pictures":
            return []
        size, plan = self.dataset.main_bucket, self.plan.samples
        wanted = [self.identity["model"], self.identity["clip"], prompt, count, size, self.plan.settings.seed]
        wanted += [plan.steps, plan.cfg, plan.sampler, plan.scheduler, plan.negative]
        cache = _state_root() / "class" / f"{_digest(wanted)}.safetensors"
        if cache.is_file():
            latents = load_file(cache)["latents"]
        else:
            drawn = []
            for i in range(count):
                self._say(f"Drawing class picture {i + 1} of {count}")
                drawn.append(self.host.sample_latent(prompt, plan, size, self.plan.settings.seed + i))
            latents = self.host.base.process_latent_in(torch.cat(drawn)).float().cpu().contiguous()
            cache.parent.mkdir(parents=True, exist_ok=True)
            part = cache.with_suffix(".part")
            save_file({"latents": latents}, part)
            os.replace(part, cache)
        records = [Record(f"class {i}", prompt, size, role="class") for i in range(count)]
        for record, latent in zip(records, latents, strict=True):
            place = train_host._place(record)
            self.host.latents[place], self.host.masks[place] = latent.unsqueeze(0), None
        return records

    # --- told while it runs ---

    def _say(self, text: str) -> None:
        """A line under the node; not more often than the page can show."""
        # Not imported: without a running server there is nobody to tell.
        server = getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)
        send = getattr(server, "send_progress_text", None)
        if send is not None and self.node_id is not None:
            send(text, self.node_id)

    def _progress(self, p: Progress) -> None:
        if self.plan.settings.save_every and p.step % self.plan.settings.save_every == 0 and p.step < p.steps:
            self._write(self.path.with_name(f"{self.path.stem}step{p.step:06d}.safetensors"))
        now = time.monotonic()
        if now - self.said > 0.5 or p.step == p.steps:
            self.said = now
            done = p.step - self.resumed
            left = p.seconds / max(done, 1) * (p.steps - p.step)
            self._say(f"Step {p.step} of {p.steps}, loss {p.loss:.4f}, {_duration(left)} left")
        # Raises where the run was stopped on the page.
        self.bar.update_absolute(p.step, p.steps)

    def _sample(self, step: int, _: Any) -> None:
        """Sample pictures of the rotations that are active, shown on the node."""
        known = [f"samples/step{step:08d}-{i}.png" for i in range(len(self.plan.samples.prompts))]
        if self.pictures and self.sample_files[-len(known) :] == known:
            return
        images = self.host.draw(self.plan.samples, self.dataset.main_bucket, self.plan.settings.batch_size)
        (self.folder / "samples").mkdir(exist_ok=True)
        for name, image in zip(known, images, strict=True):
            picture = to_pillow(image)
            picture.save(self.folder / name)
            self.sample_files.append(name)
            self.pictures.append(from_pillow(picture))
            self.bar.update_absolute(step, self.plan.settings.steps, ("JPEG", picture, 512))

    # --- files ---

    def _file(self) -> Path:
        """The file of this run: the same one again where a stopped run goes on."""
        mark = self.folder / "files.json"
        names = json.loads(mark.read_text("utf-8")) if mark.is_file() else {}
        key = f"{self.plan.settings.steps} {self.plan.name}"
        if key not in names:
            root = folder_paths.get_folder_paths(folders.FOLDER)[0]
            names[key] = str(_new_file(self.plan.name, root))
            _write_json(mark, names)
        return Path(names[key])

    def _write(self, path: Path) -> Adapter:
        adapter, self.dialect = self.host.write(self.bank, self.trainer.values(), str(path), self._metadata())
        return adapter

    def _keep_what_there_is(self, why: str) -> None:
        """After a stop: the state is on disk already, the file is written here."""
        if self.trainer.step:
            self._write(self.path)
            done = f"{self.trainer.step} of {self.plan.settings.steps} steps"
            log.info("OFT: %s after %s; kept in %s", why, done, self.path)
            self._say(f"Stopped after {done}. Kept as {_listed(self.path)}; queue again to go on.")

    def _metadata(self) -> dict[str, str]:
        plan, trainer, base = self.plan, self.trainer, self.host.base
        captions = sorted({r.caption for r in self.dataset.records})
        settings = {
            "oft": plan.oft.to_dict(),
            "training": dataclasses.asdict(plan.settings),
            "objective": {k: v for k, v in trainer.objective.fingerprint().items()},
            "preset": plan.preset,
            "prior": plan.prior,
            "class_prompt": self.dataset.class_prompt,
        }
        losses = trainer.losses
        return {
            "modelspec.sai_model_spec": "1.0.0",
            "modelspec.title": self.path.stem.rstrip("_"),
            "modelspec.architecture": f"{type(base.model_config).__name__}/oft",
            "modelspec.trigger_phrase": self.dataset.trigger,
            "modelspec.prediction_type": trainer.objective.prediction,
            "modelspec.resolution": f"{self.dataset.resolution}x{self.dataset.resolution}",
            "ss_base_model_version": type(base.model_config).__name__,
            "ss_network_module": "oft",
            "ss_steps": str(trainer.step),
            "ss_learning_rate": f"{plan.settings.lr:g}",
            "ss_seed": str(plan.settings.seed),
            "ss_num_train_images": str(len(self.dataset.records)),
            "ss_tag_frequency": json.dumps({"captions": {c: 1 for c in captions[:200]}}),
            "oft_settings": json.dumps(settings, default=str),
            "oft_model": json.dumps(self.identity),
            "oft_losses": json.dumps([round(x, 5) for x in losses[:: max(1, len(losses) // 500)]]),
        }

    def _report(self, adapter: Adapter, seconds: float) -> str:
        trainer = self.trainer
        done = trainer.step - self.resumed
        losses = trainer.losses
        few = max(1, len(losses) // 10)
        lines = [
            f"{trainer.step} steps"
            + (f", {self.resumed} of them from an earlier run" if self.resumed else ""),
            f"Loss {np.mean(losses[:few]):.4f} at first, {np.mean(losses[-few:]):.4f} at the end.",
            f"{_duration(seconds)}, {seconds / max(done, 1):.2f} s a step." if done else "",
            f"Prediction: {trainer.objective.prediction}. Prior: {self.plan.prior}.",
        ]
        for _, selection in self.bank.parts.values():
            lines.append(selection.report())
        lines += trainer.notes
        lines += self.dataset.notes
        lines.append(f"File: {_listed(self.path)} ({self.dialect})")
        lines.append(describe(adapter, adapter.bind(self.host.index)).to_text())
        return "\n".join(line for line in lines if line)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def loss_curve(losses: list[float], size: tuple[int, int] = (640, 320)) -> torch.Tensor:
    """IMAGE (1, h, w, 3): the loss of every step in grey, its running mean in colour."""
    width, height = size
    left, bottom = 56, 24
    picture = Image.new("RGB", size, (255, 255, 255))
    pen = ImageDraw.Draw(picture)
    values = np.asarray(losses, dtype=np.float64)
    span = max(1, len(values) // 20)
    mean = np.array([values[max(0, i - span) : i + 1].mean() for i in range(len(values))])
    # Single steps may stick out; the mean must stay readable.
    low, high = min(values.min(), 0.0), max(float(np.quantile(values, 0.98)), float(mean.max()))
    high = high if high > low else low + 1.0

    def place(i: int, value: float) -> tuple[float, float]:
        x = left + (width - left - 8) * (i / max(1, len(values) - 1))
        y = height - bottom - (height - bottom - 8) * (min(value, high) - low) / (high - low)
        return x, y

    for k in range(5):
        value = low + (high - low) * k / 4
        y = place(0, value)[1]
        pen.line([(left, y), (width - 8, y)], fill=(225, 225, 225))
        pen.text((4, y - 6), f"{value:.3g}", fill=(60, 60, 60))
    for series, colour in ((values, (190, 190, 190)), (mean, (200, 70, 20))):
        points = [place(i, v) for i, v in enumerate(series)]
        pen.line(points if len(points) > 1 else points * 2, fill=colour, width=2)
    pen.text((left, height - 16), "1", fill=(60, 60, 60))
    pen.text((width - 60, height - 16), f"{len(values)}", fill=(60, 60, 60))
    return from_pillow(picture)


# --- the nodes ----------------------------------------------------------------------------------------------


def _entry(tips: dict[str, str]) -> Callable[..., io.Input]:
    def entry(kind: Any, name: str, **more: Any) -> io.Input:
        return compat.entry(kind, name, tooltip=tips[name], **more)

    return entry


class OFTTrainConfigNode(io.ComfyNode):
    """OFT Training Settings: everything that is not on Train OFT."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        tips = {**OFTConfig.help(), **CONFIG_TIPS}
        entry = _entry(tips)
        default = OFTConfig()
        settings = TrainSettings()

        def number(name: str, value: float, low: float, high: float, step: float = 0.01) -> io.Input:
            return entry(io.Float.Input, name, default=value, min=low, max=high, step=step, optional=True)

        def whole(name: str, value: int, low: int, high: int) -> io.Input:
            return entry(io.Int.Input, name, default=value, min=low, max=high, optional=True)

        def text(name: str, **more: Any) -> io.Input:
            return entry(io.String.Input, name, default="", optional=True, **more)

        def switch(name: str) -> io.Input:
            return entry(io.Boolean.Input, name, default=getattr(default, name), optional=True)

        def choice(name: str, options: Any, value: str) -> io.Input:
            return entry(io.Combo.Input, name, options=list(options), default=value, optional=True)

        return compat.schema(
            node_id="OFT_TrainConfig",
            display_name="OFT Training Settings",
            category=CATEGORY,
            description="All settings of a training that are not on Train OFT. The defaults are good.",
            search_aliases=["oft", "training", "optimizer"],
            inputs=[
                text("target_modules"),
                text("exclude_modules"),
                text("conv_modules"),
                text("layers_to_transform"),
                text("layers_pattern"),
                text("rank_pattern"),
                whole("blocks", 0, 0, 4096),
                number("module_dropout", 0.0, 0.0, 0.99),
                choice("side", ("input", "output"), default.side),
                switch("rescale"),
                switch("scaled"),
                switch("block_share"),
                switch("use_cayley_neumann"),
                number("angle_cap", 60.0, 0.1, 180.0, 0.1),
                number("spectral_clip", 0.0, 0.0, 100.0),
                choice("optimizer", OPTIMIZERS, settings.optimizer),
                text("optimizer_args"),
                choice("schedule", SCHEDULES, settings.schedule),
                whole("warmup", 0, 0, 100000),
                number("weight_decay", settings.weight_decay, 0.0, 10.0, 0.001),
                number("clip", settings.clip, 0.0, 1000.0),
                number("ema", 0.0, 0.0, 0.9999, 0.0001),
                whole("batch_size", 1, 1, 64),
                whole("accumulation", 1, 1, 256),
                number("min_snr_gamma", -1.0, -1.0, 100.0),
                number("noise_offset", 0.0, 0.0, 1.0),
                number("caption_dropout", -1.0, -1.0, 1.0),
                choice("timesteps", (AUTO, "uniform", "logit_normal"), AUTO),
                number("timestep_low", 0.0, 0.0, 1.0),
                number("timestep_high", 1.0, 0.0, 1.0),
                choice("prior", PRIORS, "preset"),
                number("prior_weight", 1.0, 0.0, 10.0),
                whole("class_pictures", 16, 1, 1000),
                number("text_encoder_lr", 0.0, 0.0, 1.0, 0.000001),
                number("guidance", 1.0, 0.0, 100.0),
                number("loss_scale", 0.0, 0.0, 65536.0),
                whole("sample_steps", 20, 1, 200),
                number("sample_cfg", 0.0, 0.0, 30.0),
                choice("sample_sampler", comfy.samplers.KSampler.SAMPLERS, "euler"),
                choice("sample_scheduler", comfy.samplers.KSampler.SCHEDULERS, "normal"),
                text("sample_negative"),
                whole("sample_seed", -1, -1, 2**31 - 1),
            ],
            outputs=[OFTTrainConfig.Output(display_name="config", tooltip=TIPS["config"])],
        )

    @classmethod
    def execute(cls, **given: Any) -> io.NodeOutput:
        return io.NodeOutput(make_config(**given))


def make_config(**given: Any) -> TrainConfig:
    """The settings node's inputs, any of them, as a TrainConfig. Raises ConfigError for texts that are not understood."""
    texts: dict[str, Callable[[str], Any]] = {
        "target_modules": _layers,
        "exclude_modules": _layers,
        "conv_modules": _layers,
        "layers_to_transform": _whole_numbers,
        "layers_pattern": lambda t: t.strip() or None,
        "rank_pattern": lambda t: _json("rank_pattern", t),
    }
    oft = {k: read(given[k]) for k, read in texts.items() if k in given}
    plain = ("module_dropout", "side", "rescale", "scaled", "block_share", "use_cayley_neumann", "angle_cap")
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
        if k in ("prior", "class_pictures", "text_encoder_lr", "guidance") or k.startswith("sample_")
    }
    return TrainConfig(oft, train, objective, run)


class OFTTrain(io.ComfyNode):
    """Train OFT: from pictures to an adapter, in the graph."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        entry = _entry(TIPS)
        return compat.schema(
            node_id="OFT_Train",
            display_name="Train OFT",
            category=CATEGORY,
            description=(
                "Trains an OFT adapter on a set of pictures. Shows samples while it runs; stop keeps the work, "
                "and the next run goes on from there."
            ),
            search_aliases=["oft", "dreambooth", "train", "fine-tune", "lora training"],
            is_output_node=True,
            inputs=[
                entry(io.Model.Input, "model"),
                entry(io.Clip.Input, "clip"),
                entry(io.Vae.Input, "vae"),
                OFTDataset.Input("dataset", tooltip=TIPS["dataset"]),
                entry(io.Combo.Input, "preset", options=list(PRESETS), default="subject"),
                entry(io.Int.Input, "steps", default=800, min=1, max=1000000),
                entry(
                    io.Float.Input, "learning_rate", default=1e-3, min=1e-7, max=10.0, step=1e-5, round=False
                ),
                entry(io.Int.Input, "block_size", default=32, min=2, max=1024),
                entry(io.Combo.Input, "coft", options=list(COFT), default="off"),
                entry(io.Float.Input, "coft_degrees", default=15.0, min=0.1, max=180.0, step=0.1),
                entry(io.Float.Input, "coft_eps", default=6e-5, min=1e-8, max=100.0, step=1e-5, round=False),
                entry(
                    io.Int.Input,
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=False,
                ),
                entry(io.String.Input, "sample_prompts", default="", multiline=True),
                entry(io.Int.Input, "sample_every", default=100, min=0, max=100000),
                entry(io.Int.Input, "save_every", default=200, min=0, max=100000),
                entry(io.Combo.Input, "low_vram", options=list(train_host.LOW_VRAM), default="checkpointing"),
                entry(io.Boolean.Input, "resume", default=True),
                entry(io.String.Input, "name", default="training/subject"),
                OFTTrainConfig.Input("config", optional=True, tooltip=TIPS["config"]),
            ],
            outputs=[
                OFTAdapter.Output(display_name="adapter", tooltip=TIPS["out_adapter"]),
                io.Image.Output(display_name="samples", tooltip=TIPS["out_samples"]),
                io.Image.Output(display_name="loss_curve", tooltip=TIPS["out_curve"]),
                io.String.Output(display_name="report", tooltip=TIPS["out_report"]),
                io.String.Output(display_name="file_name", tooltip=TIPS["out_name"]),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model, clip, vae, dataset, config=None, **knobs: Any) -> io.NodeOutput:
        for given, what in ((model, "MODEL"), (clip, "CLIP"), (vae, "VAE")):
            if given is None:
                raise ConfigError(
                    f"Train OFT got no {what}", found="None", hint="The checkpoint may lack that part."
                )
        with train_host.training_mode():
            plan = make_plan(dataset=dataset, config=config, **knobs)
            done = Run(plan, dataset, model, clip, vae, cls.hidden.unique_id)()
        return io.NodeOutput(
            done.adapter,
            done.samples,
            loss_curve(done.losses),
            done.report,
            done.name,
            ui=ui.PreviewText(done.report),
        )


class OFTSave(io.ComfyNode):
    """Save OFT: an adapter as a file of a chosen tool."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        entry = _entry({**TIPS, "model": TIPS["save_model"], "clip": TIPS["save_clip"]})
        return compat.schema(
            node_id="OFT_Save",
            display_name="Save OFT",
            category=CATEGORY,
            description="Writes an OFT adapter to a file that a chosen tool reads.",
            search_aliases=["oft", "save", "convert", "export"],
            is_output_node=True,
            inputs=[
                OFTAdapter.Input("adapter", tooltip=TIPS["adapter"]),
                entry(io.Model.Input, "model", optional=True),
                entry(io.Clip.Input, "clip", optional=True),
                entry(io.String.Input, "name", default="oft"),
                entry(io.Combo.Input, "dialect", options=[AS_IS, *WRITERS], default=AS_IS),
                entry(io.Combo.Input, "precision", options=list(PRECISIONS), default="fp32"),
                entry(io.Combo.Input, "folder", options=["oft", "output"], default="oft"),
            ],
            outputs=[io.String.Output(display_name="file_name", tooltip=TIPS["out_name"])],
        )

    @classmethod
    def execute(
        cls, adapter: Adapter, name, dialect, precision, folder, model=None, clip=None
    ) -> io.NodeOutput:
        root = folder_paths.get_folder_paths(folders.FOLDER)[0]
        path = _new_file(name, folder_paths.get_output_directory() if folder == "output" else root)
        with host.normal_tensors():
            if dialect == AS_IS:
                written = _copy(adapter, path, PRECISIONS[precision])
            else:
                written = _convert(adapter, model, clip, path, dialect, PRECISIONS[precision])
        shown = (
            _listed(written)
            if folder == "oft"
            else os.path.relpath(written, folder_paths.get_output_directory())
        )
        return io.NodeOutput(shown, ui=ui.PreviewText(f"Saved: {shown}"))


def _copy(adapter: Adapter, path: Path, dtype: torch.dtype) -> Path:
    """The adapter's own file again, numbers in another precision."""
    if not os.path.isfile(adapter.path) or not adapter.path.endswith(".safetensors"):
        raise FormatError(
            "The file that this adapter was read from is not there any more",
            file=adapter.path,
            hint="Choose a dialect and connect the model.",
        )
    with safe_open(adapter.path, "pt") as f:
        metadata = dict(f.metadata() or {})
        tensors = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118 (not a dict)
    tensors = {
        k: (t.to(dtype) if t.is_floating_point() and t.numel() > 1 else t).contiguous()
        for k, t in tensors.items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    save_file(tensors, part, metadata or None)
    os.replace(part, path)
    return path


def _convert(adapter: Adapter, model: Any, clip: Any, path: Path, dialect: str, dtype: torch.dtype) -> Path:
    if model is None and clip is None:
        raise ConfigError(
            "Writing another dialect needs the model that the adapter is for",
            found="no model",
            hint="Connect MODEL (and CLIP), or choose 'as it is'.",
        )
    sides = [host._model_side(model)] if model is not None else []
    if clip is not None:
        sides.append(host._clip_side(clip))
    shapes = {key: shape for side in reversed(sides) for key, shape in side.shapes.items()}
    aliases = {name: target for side in reversed(sides) for name, target in side.aliases.items()}
    index = host.HostIndex(shapes, aliases)
    binding = adapter.bind(index)
    if binding.unmatched:
        raise FormatError(
            "Not every layer of this adapter belongs to the connected model",
            module=next(iter(binding.unmatched)),
            hint="Connect the model (and CLIP) that it was made for.",
        )
    layers: dict[str, Any] = {}
    for patch in binding.patches:
        if (
            not isinstance(patch.op, host.LayerRotation)
            or patch.rows
            or patch.swap_halves
            or patch.key in layers
        ):
            raise FormatError(
                "This adapter has a layer that cannot be written in another dialect", module=patch.module
            )
        layers[patch.key] = patch.op
    target = path.with_suffix("") if dialect == "peft" else path
    return write_adapter(layers, index, target, dialect, metadata=adapter.metadata, dtype=dtype)


NODES = (OFTTrain, OFTTrainConfigNode, OFTSave)
