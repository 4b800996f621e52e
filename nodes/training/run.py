"""One training run: from a plan and pictures to files, samples and a report; stop, resume and earlier results."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.utils
import folder_paths
import numpy as np
import torch
from PIL import Image, ImageDraw

from ...oft_core import Adapter, AdapterError, describe
from ...oft_core.adapter import load_adapter
from ...oft_core.atomic import atomically, remove_partials
from ...oft_core.training import ConfigError, Progress, Record, StateError, Trainer, TrainingError
from ...oft_core.training.checkpoint import saved_states
from ...oft_core.training.dataset import TrainingSet, from_pillow, to_pillow
from ...oft_core.training.distilled import few_steps, remark
from ...oft_core.training.selection import Selection
from ..binding import folders
from ..binding.files import RUN, header, listed, new_file
from . import host, mode
from .host import HostModel
from .identity import file_hash, identity, model_file
from .mode import Stopped
from .plan import Plan
from .store import Store, digest, prune_runs, state_root

log = logging.getLogger("oft")

# Pictures that the node puts out at most; all are in the run's folder.
MOST_SAMPLES = 64
# What of the objective comes from the model's way of sampling; the rest does not change what the model draws.
SAMPLED_BY = ("prediction", "shift", "alphas_cumprod")
# What to do about a model that overflows.
PRECISE_MODEL = "Load the model in bfloat16 or float32, and look for patches on it that damage it."


def write_json(path: Path, value: Any) -> None:
    atomically(path, lambda part: Path(part).write_text(json.dumps(value, indent=1), "utf-8"))


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

    def __init__(
        self,
        plan: Plan,
        dataset: TrainingSet,
        model: Any,
        clip: Any,
        vae: Any,
        node_id: Any,
        prompt: Any = None,
    ):
        self.plan, self.dataset, self.node_id = plan, dataset, node_id
        self.base_file = model_file(model, prompt, node_id)
        self.base_metadata: dict[str, str] = {}
        self.host = HostModel(
            model,
            clip,
            vae,
            low_vram=plan.low_vram,
            guidance=plan.guidance,
            train_encoders=bool(plan.encoders),
        )
        self.few_steps = few_steps(self.base_file.name if self.base_file else "", self.host.kind)
        if not plan.samples.cfg:
            samples = dataclasses.replace(plan.samples, cfg=1.0 if self.few_steps else self.host.usual_cfg)
            self.plan = dataclasses.replace(plan, samples=samples)
        self.identity = {
            "model": identity(model),
            "clip": f"{identity(clip.patcher)} {clip.layer_idx}",
            "vae": identity(vae.patcher),
            "pictures": dataset.digest,
        }
        # Also depends on nodes before this one that change how the model samples.
        self.objective = self.host.make_objective(**plan.objective)
        self.key = digest({**self.plan.fixed(), **self.identity, "found": self.objective.fingerprint()})
        self.folder = state_root() / self.key
        self.store = Store(state_root() / "cache")
        self.host.keep_on_disk(self.store, self.identity["vae"], self.identity["clip"])
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
        return self.folder / f"result-{digest(wanted)}.json"

    def earlier(self) -> Outcome | None:
        """The result of the same run, if it was completed before."""
        if not self.result_file.is_file():
            return None
        try:
            saved = json.loads(self.result_file.read_text("utf-8"))
            path = self._file()
            # Also written again where the same run was begun anew and stopped on the way.
            if header(path).get("ss_steps") != str(saved["steps"]):
                atomically(path, lambda part: shutil.copyfile(self.folder / saved["copy"], part))
            samples = [from_pillow(Image.open(self.folder / s)) for s in saved["samples"]]
            adapter = load_adapter(path)
        except (OSError, KeyError, ValueError, AdapterError) as error:
            log.warning("OFT: an earlier result cannot be used, training again: %s", error)
            return None
        report = saved["report"] + "\nThe same inputs were trained before; nothing was trained again."
        if listed(path) not in saved["report"]:
            report += f" The file is now {listed(path)}."
        return Outcome(adapter, torch.cat(samples), saved["losses"], report, listed(path))

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
        remove_partials(self.path.parent, self.path.stem)
        if self.base_file is not None:
            self._say(f"Reading the hash of {self.base_file.name}")
            self.base_metadata = {
                "ss_sd_model_name": self.base_file.name,
                "ss_new_sd_model_hash": file_hash(self.base_file, Store(self.store.folder)),
            }
        plan, host_model = self.plan, self.host
        with mode.memory_explained():
            self._say("Encoding pictures and captions")
            host_model.encode_pictures(self.dataset)
            texts = [r.caption for r in self.dataset.records]
            host_model.encode_texts([*texts, "", self.dataset.class_prompt, *plan.samples.prompts])
            class_records = self._class_records()
            self.store.prune()
            host_model.load(plan.settings.batch_size)
            bank = host_model.bank(plan.parts(), plan.settings.seed)
        with tempfile.TemporaryDirectory(prefix="oft") as scratch:
            # A run whose result no file can hold must not begin.
            host_model.write(bank, None, os.path.join(scratch, "probe.safetensors"), {})
        settings = plan.settings
        if plan.usual_loss_scale:
            settings = dataclasses.replace(settings, loss_scale=host_model.loss_scale)
        self.bank = bank
        for selection, found in self._selections():
            for line in selection.unmatched(found):
                log.warning("OFT: %s", line)
        for line in self._remarks():
            log.warning("OFT: %s", line)
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
        except TrainingError:
            mode.free_memory()
            raise
        except StateError as error:
            # The disk of the states is full; that of the files may not be, and a file is smaller than a state.
            if trainer.step > self.resumed:
                self._write(self.path)
                error.hint = f"{error.hint or ''} What was learnt in {trainer.step} steps is in {listed(self.path)}.".strip()
            raise
        if not result.losses:
            raise ConfigError("Nothing was trained")
        # The file first: a stop or a lack of memory in the last samples must not cost it.
        adapter = self._write(self.path)
        with mode.memory_explained(), bank.installed(), bank.evaluation(trainer.values()):
            self._sample(trainer.step, None)
        report = self._report(adapter, time.monotonic() - began)
        samples = torch.cat(self.pictures[-MOST_SAMPLES:])
        copy = self.folder / f"adapter-{trainer.step:08d}.safetensors"
        atomically(copy, lambda part: shutil.copyfile(self.path, part))
        write_json(
            self.result_file,
            {
                "copy": copy.name,
                "losses": result.losses,
                "report": report,
                "samples": self.sample_files[-MOST_SAMPLES:],
                "steps": trainer.step,
            },
        )
        return Outcome(adapter, samples, result.losses, report, listed(self.path))

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
        wanted += plan.drawing
        sampling = self.objective.fingerprint()
        wanted += [sampling.get(name) for name in SAMPLED_BY]
        place = self.store.path("class", *wanted)
        latents = self.store.get(place)
        if latents is None or not latents.isfinite().all():
            drawn = []
            for i in range(count):
                self._say(f"Drawing class picture {i + 1} of {count}")
                drawn.append(self.host.sample_latent(prompt, plan, size, (self.plan.settings.seed + i) % 2**64))
                host.need_finite(f"Class picture {i + 1}, as the model draws it,", drawn[-1], hint=PRECISE_MODEL)
            latents = self.host.base.process_latent_in(torch.cat(drawn)).float().cpu().contiguous()
            self.store.put(place, latents)
        records = [Record(f"class {i}", prompt, size, role="class") for i in range(count)]
        for record, latent in zip(records, latents, strict=True):
            place = host._place(record)
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

    def _sample_names(self, step: int) -> list[str]:
        """Names in the run's folder, one for every prompt. The same run may be asked for other samples later."""
        plan = self.plan.samples
        return [
            f"samples/step{step:08d}-{i}-{digest(dataclasses.asdict(plan))[:8]}.png"
            for i in range(len(plan.prompts))
        ]

    def _sample(self, step: int, _: Any) -> None:
        """Sample pictures of the rotations that are active, shown on the node; not those that are drawn already."""
        known = self._sample_names(step)
        if self.pictures and self.sample_files[-len(known) :] == known:
            return
        # A run that goes on is asked for the samples of its first step too, since it may have been stopped while it drew them.
        goes_on = step == self.resumed and step < self.plan.settings.steps
        if goes_on and all((self.folder / name).is_file() for name in known):
            return
        images = self.host.draw(self.plan.samples, self.dataset.main_bucket, self.plan.settings.batch_size)
        (self.folder / "samples").mkdir(exist_ok=True)
        remove_partials(self.folder / "samples", "step")
        for name, image in zip(known, images, strict=True):
            picture = to_pillow(image)
            atomically(self.folder / name, lambda part, picture=picture: picture.save(part, "PNG"))
            self.sample_files.append(name)
            self.pictures.append(from_pillow(picture))
            self.bar.update_absolute(step, self.plan.settings.steps, ("JPEG", picture, 512))

    # --- files ---

    @property
    def mark(self) -> str:
        """How this run's file is known again: the run and its number of steps."""
        return f"{self.key} {self.plan.settings.steps}"

    def _file(self) -> Path:
        """The file of this run: the same one again where a stopped run goes on, unless another file has taken its place.

        Numbers are given again once their files are deleted or moved. A file without a mark is not touched either: it
        is of a version that wrote none, or of another tool, and what this run learnt is in its own folder.
        """
        remembered = self.folder / "files.json"
        names = json.loads(remembered.read_text("utf-8")) if remembered.is_file() else {}
        key = f"{self.plan.settings.steps} {self.plan.name}"
        path = Path(names[key]) if key in names else None
        if path is None or (os.path.lexists(path) and header(path).get(RUN) != self.mark):
            root = folder_paths.get_folder_paths(folders.FOLDER)[0]
            path = new_file(self.plan.name, root)
            names[key] = str(path)
            write_json(remembered, names)
        return path

    def _write(self, path: Path) -> Adapter:
        adapter, self.dialect = self.host.write(self.bank, self.trainer.values(), str(path), self._metadata())
        return adapter

    def _keep_what_there_is(self, why: str) -> None:
        """After a stop: the state is on disk already, the file is written here."""
        if self.trainer.step:
            self._write(self.path)
            done = f"{self.trainer.step} of {self.plan.settings.steps} steps"
            log.info("OFT: %s after %s; kept in %s", why, done, self.path)
            self._say(f"Stopped after {done}. Kept as {listed(self.path)}; queue again to go on.")

    def _metadata(self) -> dict[str, str]:
        plan, trainer = self.plan, self.trainer
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
            "modelspec.architecture": f"{self.host.kind}/oft",
            "modelspec.trigger_phrase": self.dataset.trigger,
            "modelspec.prediction_type": trainer.objective.prediction,
            "modelspec.resolution": f"{self.dataset.resolution}x{self.dataset.resolution}",
            "ss_base_model_version": self.host.kind,
            **self.base_metadata,
            "ss_network_module": "oft",
            "ss_steps": str(trainer.step),
            "ss_learning_rate": f"{plan.settings.lr:g}",
            "ss_seed": str(plan.settings.seed),
            "ss_num_train_images": str(len(self.dataset.records)),
            "ss_tag_frequency": json.dumps({"captions": {c: 1 for c in captions[:200]}}),
            "oft_settings": json.dumps(settings, default=str),
            "oft_model": json.dumps(self.identity),
            RUN: self.mark,
            "oft_losses": json.dumps([round(x, 5) for x in losses[:: max(1, len(losses) // 500)]]),
        }

    def _selections(self) -> Iterator[tuple[Selection, set[tuple[str, str]]]]:
        """What is trained of each part, and the patterns of the settings of which nothing is left to say there."""
        selections = [selection for _, selection in self.bank.parts.values()]
        found = {p for s in selections for p, matched in s.patterns.items() if matched}
        for selection in selections:
            yield selection, found
            found = found | set(selection.patterns)

    def _remarks(self) -> list[str]:
        """What is to be known of this model."""
        return [remark(self.few_steps)] if self.few_steps else []

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
        lines += [selection.report(found) for selection, found in self._selections()]
        lines += self._remarks()
        lines += trainer.notes
        lines += self.dataset.notes
        if self.store.found:
            lines.append(
                f"Latents, captions and class pictures: {self.store.found} read from the cache, "
                f"{self.store.made} made now."
            )
        lines.append(prune_runs(state_root(), self.folder))
        lines.append(f"File: {listed(self.path)} ({self.dialect})")
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
