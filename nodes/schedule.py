"""Schedules: nodes that let an adapter's strength change while a picture is made, alone or as ComfyUI's hook."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import comfy.hooks
import comfy.lora
from comfy_api.latest import io, ui

from ..oft_core import Adapter, Schedule, ScheduleError, Strength
from ..oft_core.schedule import from_keyframes
from . import compat, inputs
from .binding import names
from .binding.apply import patch_for_hook, place

TIPS = {
    "adapter": "The adapter, from Load OFT Adapter, OFT Block Strengths, Train OFT and others.",
    "start_percent": (
        "Before this share of the sampling the strength is 0, as in ComfyUI's own start percents."
    ),
    "end_percent": "After this share of the sampling the strength is 0.",
    "curve": (
        "The factor on the strength: constant; linear or cosine (from 0 at the start to 1 at the end); or "
        "points progress:factor such as '0:0, 0.3:1, 1:0.5', joined by straight lines, or with 'cosine' or "
        "'step' before them."
    ),
    "hook_kf": "Keyframes of ComfyUI's hook nodes; used instead of curve, start and end.",
    "out_adapter": "The adapter with this schedule, for Apply OFT, OFT Stack or Create Hook OFT.",
    "out_kf": "The same schedule as ComfyUI's keyframes, for other hooks.",
    "out_report": "The schedule in words, with its factor at some moments.",
    "prev_hooks": "Hooks to add this one to.",
    "out_hooks": "A hook for ComfyUI's hook nodes: it acts on the conditionings that it is attached to.",
}


def keyframes(schedule: Schedule) -> comfy.hooks.HookKeyframeGroup:
    """A schedule as hook keyframes; a curve becomes steps."""
    group = comfy.hooks.HookKeyframeGroup()
    if schedule.hold:
        steps = [(p, s, n) for (p, s), n in zip(schedule.points, schedule.hold, strict=True)]
    else:
        steps = [(p, s, 0) for p, s in schedule.sampled()]
    for percent, strength, wanted in steps:
        group.add(comfy.hooks.HookKeyframe(strength, start_percent=min(percent, 1.0), guarantee_steps=wanted))
    return group


def _from_host(group: comfy.hooks.HookKeyframeGroup) -> Schedule:
    return from_keyframes([(k.start_percent, float(k.strength), k.guarantee_steps) for k in group.keyframes])


class OFTSchedule(io.ComfyNode):
    """Attach a schedule to an adapter."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        percent = {"min": 0.0, "max": 1.0, "step": 0.001}
        return compat.schema(
            node_id="OFT_Schedule",
            display_name="OFT Schedule",
            category=inputs.CATEGORY,
            description=(
                "Lets the strength of an adapter on the diffusion model change while a picture is made: from "
                "a start to an end, along a curve, or by ComfyUI's keyframes."
            ),
            search_aliases=[*inputs.ALIASES, "schedule", "keyframe", "start", "end"],
            inputs=[
                inputs.OFTAdapter.Input("adapter", tooltip=TIPS["adapter"]),
                io.Float.Input("start_percent", default=0.0, tooltip=TIPS["start_percent"], **percent),
                io.Float.Input("end_percent", default=1.0, tooltip=TIPS["end_percent"], **percent),
                io.String.Input("curve", default="constant", tooltip=TIPS["curve"]),
                io.HookKeyframes.Input("hook_kf", optional=True, tooltip=TIPS["hook_kf"]),
            ],
            outputs=[
                inputs.OFTAdapter.Output(display_name="adapter", tooltip=TIPS["out_adapter"]),
                io.HookKeyframes.Output(display_name="HOOK_KF", tooltip=TIPS["out_kf"]),
                io.String.Output(display_name="report", tooltip=TIPS["out_report"]),
            ],
        )

    @classmethod
    def validate_inputs(
        cls,
        curve: str | None = None,
        start_percent: float | None = None,
        end_percent: float | None = None,
    ) -> bool | str:
        try:
            Schedule.parse(curve or "", start_percent or 0.0, 1.0 if end_percent is None else end_percent)
        except ScheduleError as error:
            return str(error)
        return True

    @classmethod
    def execute(cls, adapter: Adapter, start_percent, end_percent, curve, hook_kf=None) -> io.NodeOutput:
        if hook_kf is None:
            schedule, group = Schedule.parse(curve, start_percent, end_percent), None
        else:
            schedule, group = _from_host(hook_kf), hook_kf
        places = sorted({0.0, 0.25, 0.5, 0.75, 1.0, schedule.start, schedule.end})
        lines = [
            "Keyframes:" if group else f"From {schedule.start:g} to {schedule.end:g}:",
            str(schedule),
            "Progress -> factor: " + ", ".join(f"{p:g} -> {schedule.at(p):.3g}" for p in places),
        ]
        text = "\n".join(lines)
        group = group or keyframes(schedule)
        return io.NodeOutput(replace(adapter, schedule=schedule), group, text, ui=ui.PreviewText(text))


class OFTHook(comfy.hooks.WeightHook):
    """ComfyUI's weight hook with an adapter that finds its layers when the hook meets a model."""

    def __init__(self, strength_model: float = 1.0, strength_clip: float = 1.0):
        super().__init__(strength_model=strength_model, strength_clip=strength_clip)
        self.need_weight_init = False
        self.adapter: Adapter | None = None
        self.mode: str = "rotation"
        self.coft: str | float = "file"

    def clone(self) -> OFTHook:
        copy = super().clone()
        copy.adapter, copy.mode, copy.coft = self.adapter, self.mode, self.coft
        return copy

    def add_hook_patches(self, model: Any, model_options: dict, target_dict: dict, registered: Any) -> bool:
        """Register the patches for a diffusion model or for text encoders, as ComfyUI's hooks do.

        Raises what `place` and `patch_for_hook` raise.
        """
        if not self.should_register(model, model_options, target_dict, registered):
            return False
        for_text = target_dict.get("target") == comfy.hooks.EnumWeightTarget.Clip
        value = self._strength_clip if for_text else self._strength_model
        parts = {part != "unet" for part in self.adapter.components}
        if for_text in parts and value != 0:
            side = names.text_side(model) if for_text else names.model_side(model)
            at = Strength(value, self.mode, self.coft)
            keyframes = {k.strength for k in self.hook_keyframe.keyframes}
            placed = place(replace(self.adapter, schedule=None), [side], at, at, keyframes)
            # The hook's reference lives as long as its patches do, and is the same in all clones of the hook, which
            # may reach the model and the text encoder.
            keepers = {**getattr(self.hook_ref, "oft_keepers", {})}
            keepers[side.name] = patch_for_hook(self, side, placed.patches[side.name])
            self.hook_ref.oft_keepers = keepers
        registered.add(self)
        return True


class OFTCreateHook(io.ComfyNode):
    """An adapter as ComfyUI's hook."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return compat.schema(
            node_id="OFT_Hook",
            display_name="Create Hook OFT",
            category=inputs.CATEGORY,
            description=(
                "Makes a hook of an adapter, for ComfyUI's hook nodes: it acts only on the conditionings "
                "that it is attached to, and follows their keyframes or the adapter's own schedule."
            ),
            search_aliases=[*inputs.ALIASES, "hook", "keyframe"],
            inputs=[
                inputs.OFTAdapter.Input("adapter", tooltip=TIPS["adapter"]),
                inputs.strength("strength_model"),
                inputs.strength("strength_clip"),
                *inputs.how(),
                io.Hooks.Input("prev_hooks", optional=True, tooltip=TIPS["prev_hooks"]),
            ],
            outputs=[io.Hooks.Output(display_name="HOOKS", tooltip=TIPS["out_hooks"])],
        )

    @classmethod
    def execute(
        cls, adapter: Adapter, strength_model, strength_clip, prev_hooks=None, **how
    ) -> io.NodeOutput:
        at = inputs.How(**how).at(1.0)
        hook = OFTHook(float(strength_model), float(strength_clip))
        hook.adapter, hook.mode, hook.coft = adapter, at.mode, at.coft
        group = comfy.hooks.HookGroup()
        group.add(hook)
        if adapter.schedule is not None:
            group.set_keyframes_on_hooks(keyframes(adapter.schedule))
        return io.NodeOutput(group if prev_hooks is None else prev_hooks.clone_and_combine(group))


NODES = (OFTSchedule, OFTCreateHook)
