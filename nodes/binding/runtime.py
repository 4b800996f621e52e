"""Rotations at run time: layers whose input and output are turned, while weights stay as they are stored.

For weights that a patch would round again, that it cannot reach, or that would be patched anew in every
forward. An application of a file is a `PatcherInjection` with a key of its own, so any number of them stack, in
the order of the nodes. Which patcher's applications are in force is decided per loaded model, never by what was
injected last: see `_Live.in_force`.
"""

from __future__ import annotations

import functools
import itertools
import logging
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import comfy.model_management
import torch
from comfy.patcher_extension import CallbacksMP, PatcherInjection
from torch import nn

from ...oft_core import AdapterError
from .layers import layer_of, patchable, stored_as
from .turned import Entry, TurnedLayer

log = logging.getLogger("oft")

CALLBACKS, MERGING, HOOKED = "oft_runtime", "oft_merging", "oft_hooked"
_MISSING = object()
_count = itertools.count(1)


# --- one application of a file ------------------------------------------------------------------------------


class Application(PatcherInjection):
    """One file on one model. Shared by all clones of the patcher that it was added to; immutable.

    layers: parameter key -> changes in the file's order.   after: key -> how many weight patches of the layer
    came before.   keeps: what must live as long.
    """

    def __init__(self, entries: Iterable[Entry], patcher: Any, keeps: Sequence[Any]):
        super().__init__(inject=_inject, eject=_eject)
        self.key = f"oft:{next(_count)}"
        self.layers: dict[str, list[Entry]] = {}
        for entry in entries:
            self.layers.setdefault(entry.patch.key, []).append(entry)
        self.after = {key: len(patcher.patches.get(key, ())) for key in self.layers}
        self.unpatchable = {key for key in self.layers if not patchable(layer_of(patcher.model, key)[0])}
        self.keeps = tuple(keeps)

    def in_weights(self, key: str, patches: Sequence[tuple]) -> bool:
        """Whether this layer's changes already stand in its list of weight patches."""
        return any(p[1] is entry.as_weight for p in patches for entry in self.layers[key])


class HookFactor:
    """The factor of a hook on its changes: its strength while it is in force for the patcher in use, else 0."""

    comes_back = True

    def __init__(self, hook_ref: Any, model: nn.Module):
        self.hook_ref, self.model = hook_ref, weakref.ref(model)

    @property
    def now(self) -> float:
        live = _current.get(self.model())
        patcher = None if live is None else live.owner()
        hooks = getattr(getattr(patcher, "current_hooks", None), "hooks", ())
        # The reference is one for all clones of a hook.
        return next((float(hook.strength) for hook in hooks if hook.hook_ref is self.hook_ref), 0.0)


class HookApplication(Application):
    """What a hook does to activations. It is not part of the model: no save, merge or later patch knows of it."""

    def __init__(self, entries: Iterable[Entry], patcher: Any, keeps: Sequence[Any], hook_ref: Any):
        super().__init__(entries, patcher, (*keeps, hook_ref))
        self.key = f"oft hook:{id(hook_ref)}"  # one for a hook, however often it is registered


def hang_on(patcher: Any, application: HookApplication, stays: bool) -> None:
    """Add a hook's application to the patcher that the hook is registered with.

    stays: as ComfyUI has it for text encoders; else it is taken off when ComfyUI takes off the hooks' patches.
    """
    with patcher.use_ejected():
        patcher.set_injections(application.key, [application])
    if not patcher.get_callbacks(CallbacksMP.ON_CLONE, HOOKED):
        patcher.add_callback_with_key(CallbacksMP.ON_CLONE, HOOKED, _not_injected)
        patcher.add_callback_with_key(CallbacksMP.ON_DETACH, HOOKED, _on_detach)
    if not stays:
        owner = weakref.ref(patcher)

        def restore_hook_patches() -> None:
            me = owner()
            del me.restore_hook_patches
            _take_off_hooks(me)
            me.restore_hook_patches()

        patcher.restore_hook_patches = restore_hook_patches


def _take_off_hooks(patcher: Any) -> None:
    with patcher.use_ejected():
        for application in applications(patcher):
            if isinstance(application, HookApplication):
                patcher.remove_injections(application.key)
    _lives.pop(patcher, None)


def applications(patcher: Any) -> list[Application]:
    """The patcher's applications, in the order in which they act."""
    return [i for group in patcher.injections.values() for i in group if isinstance(i, Application)]


def lasting(patcher: Any) -> list[Application]:
    """Those of the patcher's applications that belong to the model."""
    return [a for a in applications(patcher) if not isinstance(a, HookApplication)]


def live_entries(patcher: Any, hooks: bool = False) -> dict[str, list[Entry]]:
    """Parameter key -> changes that are made on activations, in order. hooks: those of hooks too, in force or not."""
    out: dict[str, list[Entry]] = {}
    for application in applications(patcher) if hooks else lasting(patcher):
        for key, entries in application.layers.items():
            if not application.in_weights(key, patcher.patches.get(key, ())):
                out.setdefault(key, []).extend(entries)
    return out


def attach(patcher: Any, application: Application) -> None:
    """Add an application to a fresh clone of a patcher."""
    patcher.set_injections(application.key, [application])
    if not patcher.get_callbacks(CallbacksMP.ON_CLONE, CALLBACKS):
        patcher.add_callback_with_key(CallbacksMP.ON_CLONE, CALLBACKS, _on_clone)
        patcher.add_callback_with_key(CallbacksMP.ON_LOAD, CALLBACKS, _on_load)
        patcher.add_callback_with_key(CallbacksMP.ON_DETACH, CALLBACKS, _on_detach)
    _on_clone(None, patcher)
    watch_merging(patcher)


def watch_merging(patcher: Any) -> None:
    """Let nodes that merge this model into another get its turned activations as weight patches.

    They ask for its patches by name; what they do not learn, such as a schedule, is said in the log.
    """
    if not patcher.get_callbacks(CallbacksMP.ON_CLONE, MERGING):
        patcher.add_callback_with_key(CallbacksMP.ON_CLONE, MERGING, _guard_merging)
    _guard_merging(None, patcher)


def _not_injected(_: Any, patcher: Any) -> None:
    # ComfyUI copies this flag although the clone has injected nothing; it would then inject while another
    # clone is loaded, or take that clone's injections away when it is dropped.
    patcher.is_injected = False


def _on_clone(_: Any, patcher: Any) -> None:
    _not_injected(None, patcher)
    if not isinstance(patcher.patches, OrderedPatches):
        patcher.patches = OrderedPatches(patcher.patches, patcher)
    _guard_saving(patcher)


class OrderedPatches(dict):
    """A patcher's weight patches. A patch that comes after turned activations keeps its place.

    Turned activations always act after all weight patches of their layer. So where a later node adds a patch
    (a LoRA) to the weight of such a layer, the application goes into that layer's weight too, before the new
    patch; the weight is patched there anyway.
    """

    def __init__(self, patches: dict, patcher: Any):
        super().__init__(patches)
        self._patcher = weakref.ref(patcher)

    def __setitem__(self, key: str, patches: list[tuple]) -> None:
        patcher = self._patcher()
        if patcher is not None:
            patches = _in_order(key, patches, lasting(patcher))
        super().__setitem__(key, patches)

    def __reduce__(self) -> tuple:
        return dict, (dict(self),)


def _in_order(key: str, patches: list[tuple], apps: Iterable[Application]) -> list[tuple]:
    waiting = [
        a for a in apps if key in a.layers and key not in a.unpatchable and not a.in_weights(key, patches)
    ]
    if not any(len(patches) > a.after[key] for a in waiting):
        return patches
    out, shift = list(patches), 0
    for a in waiting:
        mine = [entry.for_host() for entry in a.layers[key]]
        at = a.after[key] + shift
        out[at:at] = mine
        shift += len(mine)
    return out


def _on_load(
    patcher: Any, device: Any = None, budget: Any = 0, force_patch_weights: bool = False, *_: Any
) -> None:
    """ComfyUI forces patches on weights to save them; loaders that always do so have a `load` of their own."""
    if force_patch_weights and type(patcher).load.__module__.startswith("comfy."):
        _refuse_saving(patcher)


def _refuse_saving(patcher: Any) -> None:
    if layers := live_entries(patcher):
        raise AdapterError(
            "The model cannot be saved with this OFT file in it, because it is applied while the model runs",
            found=f"activations of {len(layers)} layers are turned, for instance of {next(iter(layers))}",
            expected="a file applied to the weights",
            hint="Set 'runtime' to 'weights' in the OFT node. Quantised weights are then rounded again.",
        )


def _guard_saving(patcher: Any) -> None:
    """Later hosts save without forcing patches; their save nodes ask the patcher for its state dict."""
    name = "model_state_dict_for_saving"
    if not hasattr(type(patcher), name):
        return
    owner = weakref.ref(patcher)

    def asked(*args: Any, **kwargs: Any) -> Any:
        _refuse_saving(owner())
        return getattr(type(owner()), name)(owner(), *args, **kwargs)

    setattr(patcher, name, asked)


def _guard_merging(_: Any, patcher: Any) -> None:
    owner = weakref.ref(patcher)

    def asked(filter_prefix: str | None = None) -> dict[str, list]:
        me = owner()
        found = type(me).get_key_patches(me, filter_prefix)
        if filter_prefix is None and not getattr(me, "is_clip", False):
            return found  # the patcher itself asks so, for the weights alone
        live = {key: entries for key, entries in live_entries(me).items() if key in found}
        for key, entries in live.items():
            module, _ = layer_of(me.model, key)
            if not patchable(module):
                raise AdapterError(
                    "The model cannot be merged with this OFT file in it", module=entries[0].patch.module,
                    found=f"a weight stored as {stored_as(module)}, of which activations are turned",
                    expected="a weight of floating-point numbers", hint="Use another version of the model.",
                )
            found[key] = [*found[key], *(entry.for_host() for entry in entries)]
        if any(getattr(p[1], "oft_factor", None) is not None for patches in found.values() for p in patches[1:]):
            log.warning("OFT: a merge takes an adapter with a schedule from its second model at the full strength.")
        return found

    patcher.get_key_patches = asked


# --- putting it into the layers' forwards -------------------------------------------------------------------


class _Live:
    """All turned activations of one patcher, installed in its model's layers or not."""

    def __init__(self, patcher: Any):
        self.owner = weakref.ref(patcher)
        self.owner_id = id(patcher)
        self.model = weakref.ref(patcher.model)
        self.of = _signature(patcher)
        self.layers = []
        for key, entries in live_entries(patcher, hooks=True).items():
            module, _ = layer_of(patcher.model, key)
            rows = getattr(module, "out_features", None) or module.weight.shape[0]
            self.layers.append(TurnedLayer(module, entries, rows, functools.partial(_weight_state, self.owner, key)))
        self.undo: list[tuple[nn.Module, Any, Callable]] = []
        self.installed = False

    def install(self) -> None:
        self.installed = True
        for layer in self.layers:
            module = layer.module
            before = module.__dict__.get("forward", _MISSING)
            wrapper = self._wrap(layer, module.forward)
            module.__dict__["forward"] = wrapper
            self.undo.append((module, before, wrapper))

    def withdraw(self) -> None:
        """Every forward as it was. Where something else has wrapped ours meanwhile, ours only passes on."""
        self.installed = False
        for module, before, wrapper in reversed(self.undo):
            if module.__dict__.get("forward") is not wrapper:
                continue
            if before is _MISSING:
                del module.__dict__["forward"]
            else:
                module.__dict__["forward"] = before
        self.undo = []

    def _wrap(self, layer: TurnedLayer, original: Callable) -> Callable:
        def forward(*args: Any, **kwargs: Any) -> torch.Tensor:
            if not self.in_force():
                return original(*args, **kwargs)
            x = args[0] if args else kwargs.pop(next(iter(kwargs)))
            return layer(original, x, args[1:], kwargs)

        return forward

    def in_force(self) -> bool:
        """Whether the model is loaded for this patcher: a failed load can leave its forwards behind."""
        if not self.installed:
            return False
        if torch.compiler.is_compiling():
            return True
        model = self.model()
        for loaded in comfy.model_management.current_loaded_models:
            patcher = loaded.model
            if patcher is None or id(patcher) == self.owner_id:
                continue
            if getattr(patcher, "model", None) is model:
                self.withdraw()
                _current.pop(model, None)
                return False
        return True


def _weight_state(owner: Callable[[], Any], key: str) -> tuple:
    """What changes a weight while sampling: the factors of scheduled patches, and the hooks in force."""
    patcher = owner()
    factors = tuple(getattr(p[1], "oft_factor", None) for p in patcher.patches.get(key, ()))
    hooks = getattr(patcher.current_hooks, "hooks", ())
    return factors, tuple((id(hook.hook_ref), hook.strength) for hook in hooks)


_lives: weakref.WeakKeyDictionary[Any, _Live] = weakref.WeakKeyDictionary()
_current: weakref.WeakKeyDictionary[nn.Module, _Live] = weakref.WeakKeyDictionary()


def _signature(patcher: Any) -> tuple:
    return tuple((key, tuple(map(id, entries))) for key, entries in live_entries(patcher, hooks=True).items())


def _inject(patcher: Any) -> None:
    """Put all of the patcher's applications in place; ComfyUI calls this once for each of them."""
    now, mine = _current.get(patcher.model), _lives.get(patcher)
    if now is not None and now is mine and now.installed and now.of == _signature(patcher):
        return
    if now is not None:
        now.withdraw()
    if mine is None or mine.of != _signature(patcher):
        mine = _lives[patcher] = _Live(patcher)
        _tell_about_order(patcher)
    mine.install()
    _current[patcher.model] = mine


def _eject(patcher: Any) -> None:
    now = _current.get(patcher.model)
    if now is not None and now.owner_id == id(patcher):
        now.withdraw()
        del _current[patcher.model]


def as_turned(models: Iterable[nn.Module], module: nn.Module, weight: torch.Tensor) -> torch.Tensor:
    """A layer's weight with what is at present made of its activations, for code that computes with weights.

    models: those to which the layer may belong.
    """
    for live in filter(None, map(_current.get, models)):
        for layer in live.layers:
            if layer.module is module and live.in_force():
                return layer.turned(weight, [e.built(weight.device) for e in layer.entries])
    return weight


def _on_detach(patcher: Any, *_: Any) -> None:
    """The model is not loaded for this patcher any more: what was built for its device goes."""
    _eject(patcher)
    _lives.pop(patcher, None)


def _tell_about_order(patcher: Any) -> None:
    late = []
    for a in lasting(patcher):
        for key in a.layers:
            patches = patcher.patches.get(key, ())
            if len(patches) > a.after[key] and not a.in_weights(key, patches):
                late.append(key)
    if late:
        log.warning(
            "OFT: weight patches that another node added later to %d layers (%s) act before the OFT file's "
            "turned activations.",
            len(late),
            late[0],
        )
