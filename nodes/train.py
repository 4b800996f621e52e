"""The training nodes: Train OFT and its settings."""

from __future__ import annotations

from typing import Any

import comfy.samplers
from comfy_api.latest import io, ui

from ..oft_core.training import OPTIMIZERS, SCHEDULES, ConfigError, OFTConfig, TrainSettings
from ..oft_core.training.plan import LOW_VRAM, make_config, make_plan
from ..oft_core.training.presets import TRAIN_PRESETS
from ..oft_core.training.run import loss_curve
from . import compat
from .dataset import CATEGORY, OFTDataset
from .inputs import OFTAdapter
from .training import mode
from .training.run import Run

OFTTrainConfig = io.Custom("OFT_TRAIN_CONFIG")
COFT = ("off", "angle", "eps")
PRIORS = ("preset", "none", "match", "pictures")
AUTO = "auto"

TIPS = {
    "model": "The model to train for. It is not changed; patches that it carries are trained on top of.",
    "clip": "Its text encoders, for the captions and the sample prompts.",
    "vae": "Its VAE: turns the pictures into latents, and samples into pictures.",
    "dataset": "The pictures and captions, from OFT Dataset.",
    "preset": (
        "subject: attention layers; keeps the class if the dataset has a class prompt. style: also the "
        "feed-forward layers, and captions are left out now and then. fast: only what attention takes from the text."
    ),
    "steps": "Training steps. For a subject of 5 to 20 pictures 800; in a hurry 200, with learning rate 0.003.",
    "learning_rate": "How far every step goes. The default suits every block size.",
    "block_size": "Channels that are turned together. Larger: learns more, larger file, slower.",
    "coft": (
        "A limit on how far the model may be turned. off: only the wide default of 60 degrees. angle: no plane "
        "turns further than coft_degrees. eps: constrained OFT as PEFT computes it."
    ),
    "coft_degrees": "The largest angle in degrees, used with coft = angle.",
    "coft_eps": "The radius of PEFT's constraint, shared by the blocks of a layer, used with coft = eps.",
    "seed": "Of order, noise and samples. The same inputs with the same seed give the same file.",
    "sample_prompts": (
        "One prompt a line for the sample pictures; [trigger] stands for the trigger word. Empty: the first caption."
    ),
    "sample_every": "Steps between sample pictures; 0: only at the end.",
    "save_every": "Steps between saves of state and file; 0: only at the end and on stop.",
    "low_vram": (
        "off: fastest. checkpointing: computes parts of each step twice and needs far less memory. offload: in "
        "addition, weights stay in main memory as far as they do not fit."
    ),
    "resume": (
        "Go on from the last saved state of the same run: stopped, failed, or with fewer steps if the schedule is constant. "
        "Off: start anew. A run that is complete is not repeated as long as it is among the 10 newest complete ones; "
        "one that can go on is kept for 30 days."
    ),
    "name": "Name of the file in models/oft; may contain a subfolder. A number is added.",
    "config": "All other settings, from OFT Training Settings.",
    "out_adapter": "What was learnt, for Apply OFT and Save OFT.",
    "out_samples": "The sample pictures in the order in which they were drawn, the last ones at the end.",
    "out_curve": "The loss over the steps, and its running mean.",
    "out_report": "Layers, settings, losses, time, and what to look at.",
    "out_name": "The file as Load OFT lists it.",
}
CONFIG_TIPS = {
    "module_dropout": "Share of the blocks that stay at identity during a training step, chosen anew each step. -1 by preset.",
    "target_modules": (
        "Which layers, instead of the preset's: 'attention', 'text-attention' (only what attention takes from the text), "
        "'attention+ff', 'all-linear', names separated by commas, or a regular expression over whole names. Empty: by preset. "
        "Of the diffusion model only: text encoders are trained in their attention."
    ),
    "exclude_modules": (
        "Layers of the diffusion model to leave out: names separated by commas, a regular expression, or one of the choices of "
        "target_modules. Has no effect on text encoders."
    ),
    "conv_modules": (
        "Convolutions of the diffusion model to train as well: 'all-conv', names, or a regular expression. Empty: none."
    ),
    "layers_to_transform": (
        "Numbers of the blocks to train, separated by commas. Needs target_modules as names, and layers_pattern. Has no effect on "
        "text encoders."
    ),
    "layers_pattern": (
        "Names of the module lists that those numbers count in, separated by commas. ComfyUI's models need it, such as "
        "'joint_blocks', 'double_blocks' or 'transformer_blocks'."
    ),
    "rank_pattern": 'Other numbers of blocks for some layers, as JSON: {"to_q": 8}.',
    "alpha_pattern": "Accepted, so that settings of other methods can be used as they are. OFT has no alpha: no effect.",
    "modules_to_save": (
        "Whole modules that are trained freely as well: names separated by commas, such as 'out'. Large, and held by some "
        "file formats only. Not in text encoders."
    ),
    "blocks": "Number of blocks of every layer, instead of a block size (PEFT's r). 0: use the block size.",
    "spectral_clip": "Largest singular value of a block's generator; 0: none.",
    "angle_cap": "No plane turns further than this many degrees, unless coft = angle; 180: no limit.",
    "optimizer": (
        "adamw is the safe choice. prodigy wants learning rate 1, lion a third of adamw's, came a tenth. All but "
        "adamw and adafactor need their package in ComfyUI's Python."
    ),
    "optimizer_args": (
        'Arguments of the optimizer, as JSON: {"betas": [0.9, 0.99]}. Learning rate and weight decay have inputs of their own.'
    ),
    "schedule": "Of the learning rate after the warm-up.",
    "warmup": "Steps in which the learning rate rises.",
    "weight_decay": "Pulls rotations back to none: how far they turn ends where this and the gradient balance. -1 by preset.",
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
    "text_encoder_lr": "Learning rate of the CLIP text encoders; 0: not trained.",
    "t5_lr": (
        "Learning rate of the T5 text encoder of SD3 and Flux; 0: not trained. It is as large as the model itself, so this "
        "needs far more memory; captions are then encoded anew in every step."
    ),
    "guidance": "Guidance value while training, for models that have one built in (Flux).",
    "loss_scale": "For half-precision models; 0: by the model.",
    "sample_steps": "Steps of a sample picture.",
    "sample_cfg": "CFG of sample pictures; 0: by the model (5, and 1 for Flux).",
    "sample_sampler": "Sampler of sample pictures.",
    "sample_scheduler": "Scheduler of sample pictures.",
    "sample_negative": "Negative prompt of sample pictures; [trigger] stands for the trigger word.",
    "sample_seed": "Seed of sample pictures; -1: the training's.",
}


class OFTTrainConfigNode(io.ComfyNode):
    """OFT Training Settings: everything that is not on Train OFT."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        tips = {**OFTConfig.help(), **CONFIG_TIPS}
        entry = compat.explained(tips)
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
            description="All settings of a training that are not on Train OFT. The defaults are a start.",
            search_aliases=["oft", "training", "optimizer"],
            inputs=[
                text("target_modules"),
                text("exclude_modules"),
                text("conv_modules"),
                text("layers_to_transform"),
                text("layers_pattern"),
                text("rank_pattern"),
                text("alpha_pattern"),
                whole("blocks", 0, 0, 4096),
                number("module_dropout", -1.0, -1.0, 0.99),
                choice("side", ("input", "output"), default.side),
                switch("rescale"),
                switch("scaled"),
                switch("block_share"),
                switch("use_cayley_neumann"),
                whole("num_cayley_neumann_terms", default.num_cayley_neumann_terms, 2, 20),
                choice("bias", ("none", "all", "oft_only"), default.bias),
                text("modules_to_save"),
                switch("fan_in_fan_out"),
                switch("init_weights"),
                number("angle_cap", 60.0, 0.1, 180.0, 0.1),
                number("spectral_clip", 0.0, 0.0, 100.0),
                choice("optimizer", OPTIMIZERS, settings.optimizer),
                text("optimizer_args"),
                choice("schedule", SCHEDULES, settings.schedule),
                whole("warmup", 0, 0, 100000),
                number("weight_decay", -1.0, -1.0, 10.0, 0.001),
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
                number("t5_lr", 0.0, 0.0, 1.0, 0.000001),
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


class OFTTrain(io.ComfyNode):
    """Train OFT: from pictures to an adapter, in the graph."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        entry = compat.explained(TIPS)
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
                entry(io.Combo.Input, "preset", options=list(TRAIN_PRESETS), default="subject"),
                entry(io.Int.Input, "steps", default=800, min=1, max=1000000),
                entry(
                    io.Float.Input, "learning_rate", default=1e-3, min=1e-7, max=10.0, step=1e-5, round=False
                ),
                entry(io.Int.Input, "block_size", default=32, min=2, max=1024),
                entry(io.Combo.Input, "coft", options=list(COFT), default="off"),
                entry(io.Float.Input, "coft_degrees", default=15.0, min=0.1, max=180.0, step=0.1),
                entry(io.Float.Input, "coft_eps", default=0.3, min=1e-8, max=100.0, step=1e-5, round=False),
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
                entry(io.Combo.Input, "low_vram", options=list(LOW_VRAM), default="checkpointing"),
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
            hidden=[io.Hidden.unique_id, io.Hidden.prompt],
        )

    @classmethod
    def execute(cls, model, clip, vae, dataset, config=None, **knobs: Any) -> io.NodeOutput:
        for given, what in ((model, "MODEL"), (clip, "CLIP"), (vae, "VAE")):
            if given is None:
                raise ConfigError(
                    f"Train OFT got no {what}", found="None", hint="The checkpoint may lack that part."
                )
        with mode.training_mode():
            plan = make_plan(dataset=dataset, config=config, **knobs)
            done = Run(plan, dataset, model, clip, vae, cls.hidden.unique_id, cls.hidden.prompt)()
        return io.NodeOutput(
            done.adapter,
            done.samples,
            loss_curve(done.losses),
            done.report,
            done.name,
            ui=ui.PreviewText(done.report),
        )


NODES = (OFTTrain, OFTTrainConfigNode)
