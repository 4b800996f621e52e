"""Strength that changes while a picture is made: an adapter's factor at this moment, and weights that follow it.

ComfyUI merges patches into the weights once, when a model is loaded. A scheduled patch multiplies its
strength by the factor of its `Track`; before every evaluation of the model the `Conductor` sets the factors
and merges those weights again that stand merged at another one. Patches of partly loaded models are applied
in every forward and follow by themselves, and so do turned activations. Outside of sampling every factor is
1 and merged weights are at the full strength.
"""

from __future__ import annotations

import itertools
import threading
import uuid
from collections.abc import Iterable, Sequence
from typing import Any
from weakref import WeakValueDictionary

import comfy.utils
from comfy.patcher_extension import WrappersMP

from ...oft_core import Schedule, cache
from ...oft_core.schedule import Cursor, progress_of

KEY = "oft_schedule"
_counter = itertools.count(1)
_tracks: WeakValueDictionary[int, Track] = WeakValueDictionary()
_lock = threading.Lock()


class Track:
    """One application of a scheduled adapter: `now` is the factor on its strength at this moment."""

    comes_back = False

    def __init__(self, schedule: Schedule):
        self.schedule = schedule
        self.token = next(_counter)
        self.now = 1.0
        self.cursor: Cursor | None = None
        _tracks[self.token] = self

    def seek(self, progress: float) -> None:
        """Set the factor for a model evaluation at this progress; the first call of a run begins it."""
        if self.cursor is None:
            self.cursor = Cursor(self.schedule, progress)
        self.now = self.cursor.at(progress)

    def rest(self) -> None:
        """Back to the full strength; the next run begins anew."""
        self.cursor, self.now = None, 1.0


def now(token: int) -> float:
    """The current factor of a track; 1 if nothing follows it any more."""
    track = _tracks.get(token)
    return 1.0 if track is None else track.now


class Conductor:
    """Moves all tracks of one patcher. Shared by its clones; immutable.

    tracks: each with the parameter keys whose weight patches follow it, and the tokens of their batches.
    """

    def __init__(self, tracks: Sequence[tuple[Track, frozenset[str], frozenset[int]]]):
        self.tracks = tuple(tracks)

    def sampling(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """Wrapper around one run of sampling: afterwards, also after an error, everything is at full
        strength.
        """
        patcher = executor.class_obj.model_patcher
        for track, *_ in self.tracks:
            track.rest()
        try:
            return executor(*args, **kwargs)
        finally:
            self._move(patcher, Track.rest)

    def evaluation(self, executor: Any, model: Any, conds: Any, x: Any, timestep: Any, options: dict) -> Any:
        """Wrapper around one evaluation of the model for all conditionings, which have one noise level in
        common.
        """
        sigma = float(timestep.max())
        progress = progress_of(sigma, lambda percent: float(model.model_sampling.percent_to_sigma(percent)))
        self._move(model.current_patcher, lambda track: track.seek(progress))
        return executor(model, conds, x, timestep, options)

    def _move(self, patcher: Any, step: Any) -> None:
        """Let every track take a step, then merge again the weights whose factor has changed."""
        stale: set[str] = set()
        tokens: set[int] = set()
        for track, keys, batches in self.tracks:
            before = track.now
            step(track)
            if track.now != before:
                stale |= keys
                tokens |= batches
        if not stale:
            return
        try:
            merge_again(patcher, stale)
        except BaseException:
            # What is merged now is neither here nor there: have ComfyUI patch everything anew
            # at the next load.
            patcher.model.current_weight_patches_uuid = uuid.uuid4()
            raise
        if not getattr(patcher.model, "model_lowvram", False):
            cache.release(tokens)


def merge_again(patcher: Any, keys: Iterable[str]) -> None:
    """Patch those of the parameters that stand merged in the model anew, from their originals.

    The result is what a load gives, bit for bit. Weights of hooks lie over merged ones, so they are taken off
    first; ComfyUI puts them on again when it needs them. Dynamic VRAM patches a weight when it is first used
    and keeps it: there the weights are only marked as stale.
    """
    keys = list(keys)
    for key in keys:
        layer = comfy.utils.get_attr(patcher.model, key.rpartition(".")[0]) if "." in key else patcher.model
        if getattr(layer, "_v_signature", None) is not None:
            layer._v_signature = None  # as ComfyUI marks the weights of another patcher
    merged = [key for key in keys if key in patcher.backup]
    if not merged:
        return
    if patcher.hook_backup or patcher.cached_hook_patches:
        patcher.clean_hooks()
    for key in merged:
        saved = patcher.backup.pop(key)
        device = comfy.utils.get_attr(patcher.model, key).device
        if saved.inplace_update:
            comfy.utils.copy_to_param(patcher.model, key, saved.weight)
        else:
            comfy.utils.set_attr_param(patcher.model, key, saved.weight)
        patcher.patch_weight_to_device(key, device_to=device)


def attach(patcher: Any, track: Track, keys: Iterable[str], tokens: Iterable[int]) -> None:
    """Let a fresh clone of a patcher follow a track.

    keys: parameters whose changes follow it.   tokens: of the batches of rotations behind them.
    """
    old = patcher.get_wrappers(WrappersMP.OUTER_SAMPLE, KEY)
    before = old[0].__self__.tracks if old else ()
    for kind in (WrappersMP.OUTER_SAMPLE, WrappersMP.CALC_COND_BATCH):
        patcher.remove_wrappers_with_key(kind, KEY)
    conductor = Conductor([*before, (track, frozenset(keys), frozenset(tokens))])
    patcher.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, conductor.sampling)
    patcher.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, KEY, conductor.evaluation)
