"""What training does to a tiny model of a family: the figures for the table of families, and for its test."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import folder_paths
import torch
from comfyui_oft.nodes import dataset
from comfyui_oft.nodes.binding import apply as host
from comfyui_oft.nodes.binding import folders
from comfyui_oft.nodes.training import mode
from comfyui_oft.nodes.training.host import HostModel
from comfyui_oft.nodes.training.run import Run
from comfyui_oft.oft_core import Adapter, Strength
from comfyui_oft.oft_core.training.plan import make_config, make_plan
from comfyui_oft.oft_core.training.run import Outcome
from every_family import Family, PictureStandIn
from safetensors.torch import load_file

folders.register()

STEPS = 20


@dataclass(frozen=True)
class Learnt:
    """before, after: mean error over a fixed batch.   layers: how many are turned.   without: largest relative
    difference of the first losses where no block is computed twice.   picture: largest difference (0..1) of a sample
    drawn with the file to the one drawn while training, and moved: to the one of the untrained model.   resumed: the
    file of a run that was stopped half way and went on is the same, bit by bit.   read_back: so is what the file
    holds.   unchanged: the base is bit by bit what it was.
    """

    before: float
    after: float
    layers: int
    without: float
    picture: float
    moved: float
    resumed: bool
    read_back: bool
    unchanged: bool


def learnt(family: Family) -> Learnt:
    """Train the family's tiny model. Raises ConfigError where it is refused."""
    user, before = Path(tempfile.mkdtemp(prefix="user-")), folder_paths.get_user_directory()
    folder_paths.set_user_directory(str(user))
    try:
        return _Trial(family, user).learnt()
    finally:
        folder_paths.set_user_directory(before)
        shutil.rmtree(user)


class _Trial:
    def __init__(self, family: Family, user: Path):
        self.family, self.user = family, user
        # Eight cells wide, unless the family needs more.
        self.size = family.size if family.size > 128 else max(64, 8 * family.ratio)
        with torch.inference_mode():
            self.parts = (family.build(), family.clip(), PictureStandIn(family))
            rough = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
            size = (self.size, self.size)
            smooth = torch.nn.functional.interpolate(rough, size=size, mode="bilinear").permute(0, 2, 3, 1)
            self.set = dataset.build(
                instance_prompt="a photo of [trigger]", trigger="ohwx", resolution=self.size, pictures=[smooth]
            )

    def run(self, steps: int, low_vram: str = "checkpointing") -> tuple[Run, Outcome]:
        config = make_config(sample_steps=2, sample_cfg=1.0, prior="none")
        with mode.training_mode():
            plan = make_plan(
                dataset=self.set, preset="subject", steps=steps, learning_rate=0.02, block_size=8, coft="off",
                coft_degrees=15.0, coft_eps=1.0, seed=3, sample_prompts="", sample_every=0, save_every=0,
                low_vram=low_vram, resume=True, name=f"families/{self.family.name}", config=config,
            )  # fmt: skip
            run = Run(plan, self.set, *self.parts, None)
        with torch.inference_mode(), mode.training_mode():
            return run, run()

    def forget(self) -> None:
        shutil.rmtree(self.user)
        self.user.mkdir()

    def learnt(self) -> Learnt:
        base = {k: v.clone() for k, v in self.parts[0].model.state_dict().items()}
        run, outcome = self.run(STEPS)
        bank = run.bank
        nothing = {n: torch.zeros_like(p) for n, p in bank.parameters.items()}
        before, after = self.fixed_loss(run, nothing), self.fixed_loss(run, None)
        trained, plain = self.drawn(run, outcome), self.drawn(run, None)
        shown = outcome.samples[-1]
        read_back = self.holds(outcome.adapter, run)
        # Two short runs without recomputed blocks: what a stopped one goes on to, and the losses of the other.
        self.forget()
        self.run(2, "off")
        half = load_file(self.run(4, "off")[1].adapter.path)
        self.forget()
        short = self.run(4, "off")[1]
        whole = load_file(short.adapter.path)
        now = self.parts[0].model.state_dict()
        return Learnt(
            before,
            after,
            len(run.bank.parts["unet"][1].layers),
            max(abs(a - b) / a for a, b in zip(outcome.losses, short.losses, strict=False)),
            float((trained - shown).abs().max()),
            float((plain - shown).abs().max()),
            whole.keys() == half.keys() and all(torch.equal(v, half[k]) for k, v in whole.items()),
            read_back,
            base.keys() == now.keys() and all(torch.equal(v, now[k]) for k, v in base.items()),
        )

    @staticmethod
    def holds(adapter: Adapter, run: Run) -> bool:
        """Every rotation that was trained is read back from the file, number by number, and no other."""
        read = {p.key: p.op.generator for p in adapter.bind(run.host.index).patches}
        trained = {
            f"diffusion_model.{module}.{piece.param}": piece.op.generator
            for (_, module), pieces in run.bank.adapter_tensors(run.trainer.values()).items()
            for piece in pieces
        }
        return read.keys() == trained.keys() and all(torch.equal(g, read[k]) for k, g in trained.items())

    @staticmethod
    def fixed_loss(run: Run, values: dict[str, torch.Tensor] | None) -> float:
        """Mean error at four fixed noises and levels, with these rotations (None: those that were learnt)."""
        records = list(run.dataset.records)
        total = 0.0
        with mode.training_mode(), torch.no_grad(), run.bank.installed(), run.bank.evaluation(values):
            for k in range(4):
                one = [records[k % len(records)]]
                noised = run.objective.noised(run.host.load_batch(one).latents, 77, k, [0])
                noised.drop[:] = [False]
                total += float((run.host.predict(noised, one) - run.objective.target(noised)).square().mean())
        return total / 4

    def drawn(self, run: Run, outcome: Outcome | None) -> torch.Tensor:
        """The sample as the file gives it through Load OFT's way, or as the model draws it without."""
        model, plan, size = self.parts[0], run.plan.samples, (self.size, self.size)
        with torch.inference_mode(), mode.training_mode(), torch.no_grad():
            if outcome is not None:
                model = host.apply(outcome.adapter, model, None, Strength(1.0), Strength(1.0)).model
            other = HostModel(model, *self.parts[1:])
            other.encode_pictures(self.set)  # tells it the ratio of pixels to latents
            return self.parts[2].decode(other.sample_latent(plan.prompts[0], plan, size, plan.seed))[0]
