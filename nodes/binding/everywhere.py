"""OFT files in everybody's LoRA loaders, by choice.

While switched on, some of ComfyUI's own functions are exchanged: `comfy.sd.load_lora_for_models`, which its LoRA
loader nodes and those of most packs call; the weight hook's `add_hook_patches`, which "Create Hook LoRA" ends in;
and `comfy.lora.load_lora`, which loaders with block weights call themselves. That one is given names only, while
most dialects need the layers' shapes: so the two functions that make the names hand on the model with them. What
is no OFT, and OFT that ComfyUI reads rightly itself, goes through unchanged. Switched off, ComfyUI has its own
function objects back.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any

import comfy.hooks
import comfy.lora
import comfy.lora_convert
import comfy.model_management
import comfy.sd
import comfy.utils
import folder_paths
import torch
from safetensors import SafetensorError, safe_open

from ...oft_core import (
    Adapter,
    AdapterError,
    LayerRotation,
    ModelMismatch,
    ShapeError,
    Strength,
    read_tensors,
)
from ...oft_core.formats.keys import holds_oft
from ...oft_core.tensors import normal_tensors
from . import folders, names
from .apply import apply, patch_for_hook, place
from .patch import make_patches
from .plan import HOOK_WAY_OUT, WEIGHTS, plan, weights_out_of_reach

log = logging.getLogger("oft")

SETTING = "OFT.everywhere"
ROUTE = "/oft/everywhere"
ENVIRONMENT = "OFT_EVERYWHERE"
# All that ComfyUI's OFT classes look at in a layer, and a buffer without meaning.
CORE_SUFFIXES = frozenset({"oft_blocks", "alpha", "I"})

Tensors = Mapping[str, torch.Tensor]

_by_comfyui: ContextVar[bool] = ContextVar("by_comfyui", default=False)


@contextlib.contextmanager
def left_to_comfyui() -> Iterator[None]:
    """Inside, ComfyUI's functions do what they always did: they call each other."""
    token = _by_comfyui.set(True)
    try:
        yield
    finally:
        _by_comfyui.reset(token)


# --- reading what a loader was given ------------------------------------------------------------------------


def is_oft(lora: Any) -> bool:
    """Whether a loader's dictionary of tensors has OFT layers, by its names."""
    return isinstance(lora, Mapping) and holds_oft(key for key in lora if isinstance(key, str))


def read(lora: Tensors) -> tuple[Adapter, dict[str, torch.Tensor]]:
    """The OFT layers of a loader's dictionary, and its remaining tensors, for ComfyUI.

    Loaders pass on neither the file's name nor its metadata, and some dialects need them: the file with just
    these tensors is looked for in the listed folders. Raises what `read_tensors` and `folders.read` raise.
    """
    lora = {key: value for key, value in lora.items() if isinstance(value, torch.Tensor)}
    name = file_of(lora)
    if name is not None:
        adapter = folders.read(name)
    else:
        log.info("OFT everywhere: no listed safetensors file has these tensors; read without metadata and config.")
        with normal_tensors():
            own = {key: value.clone() if value.is_inference() else value for key, value in lora.items()}
            adapter = read_tensors(own, name="tensors from a LoRA loader")
    return adapter, _rest(lora, adapter)


def _rest(lora: Tensors, adapter: Adapter) -> dict[str, torch.Tensor]:
    """What the reader has not understood, with the alphas that belong to it."""
    unknown, layers = set(adapter.unknown), {name.replace(".", "_") for name in adapter.entries}

    def is_rest(key: str) -> bool:
        stem, _, suffix = key.rpartition(".")
        return key in unknown or (suffix == "alpha" and stem.replace(".", "_") not in layers)

    return {key: value for key, value in lora.items() if is_rest(key)} if unknown else {}


def file_of(lora: Tensors) -> str | None:
    """Name of the listed safetensors file that holds exactly these tensors, or None."""
    size = sum(value.numel() * value.element_size() for value in lora.values())
    for name in folders.names():
        path = folders.find(name)
        if path is not None and _holds(path, lora, size):
            return name
    return None


def _holds(path: str, lora: Tensors, size: int) -> bool:
    """Whether a file has these tensors and no others. size: their bytes; few other files pass that test."""
    try:
        with open(path, "rb") as file:
            header = int.from_bytes(file.read(8), "little")
        if os.path.getsize(path) != 8 + header + size:
            return False
        with safe_open(path, "pt") as stored:
            if set(stored.keys()) != set(lora):
                return False
            for key, value in lora.items():
                own = stored.get_tensor(key)
                if own.dtype != value.dtype or not torch.equal(own, value.to(own.device)):
                    return False
    except (OSError, SafetensorError):
        return False  # a damaged or vanished file is not the one that was just loaded
    return True


def core_is_right(
    adapter: Adapter, lora: Tensors, model: Any | None, clip: Any | None, at_model: Strength, at_clip: Strength
) -> bool:
    """Whether ComfyUI's own loader does with this file what the file says.

    It does for `oft_blocks` without row factors, at strength 1, with no limit or one that both take alike, on
    layers whose names it knows, none of them chunk-swapped, in models that are stored and computed in float32:
    in half precision it fails on every layer of a partly loaded model, and on some versions of a full one.
    """
    if any(at.value != 1 for part, at in ((model, at_model), (clip, at_clip)) if part is not None):
        return False
    if not all(key.rpartition(".")[2] in CORE_SUFFIXES for key in lora):
        return False
    sides = names.sides_of(model, clip)
    try:
        with normal_tensors():
            patches = adapter.bind(names.index_of(model, clip), strict=False).patches
            right = bool(patches) and all(
                isinstance(p.op, LayerRotation) and not p.swap_halves and p.op.as_core() for p in patches
            )
    except ShapeError:
        return False
    if not right or not all(_in_float32(side, {p.key for p in patches} & set(side.shapes)) for side in sides):
        return False
    with left_to_comfyui():
        loaded = comfy.lora.load_lora(comfy.lora_convert.convert_lora(dict(lora)), _table(model, clip), False)
    return set(loaded) == {p.key if p.rows is None else (p.key, (0, *p.rows)) for p in patches}


def _table(model: Any | None, clip: Any | None) -> dict[str, Any]:
    table: dict[str, Any] = {}
    if model is not None:
        table = comfy.lora.model_lora_keys_unet(model.model, table)
    if clip is not None:
        table = comfy.lora.model_lora_keys_clip(clip.cond_stage_model, table)
    return table


def _in_float32(side: names.Side, keys: Iterable[str]) -> bool:
    """Whether these weights are stored, computed and patched in float32."""
    # Later hosts may patch in half precision.
    patching = getattr(comfy.model_management, "lora_compute_dtype", None)
    kinds = {torch.float32 if patching is None else patching(side.patcher.load_device)}
    kinds.add(getattr(side.patcher.model, "manual_cast_dtype", None) or torch.float32)
    kinds |= {comfy.utils.get_attr(side.patcher.model, key).dtype for key in keys}
    return kinds == {torch.float32}


# --- the functions that take the place of ComfyUI's ---------------------------------------------------------


def _loader(original: Callable[..., Any]) -> Callable[..., Any]:
    """In the place of `comfy.sd.load_lora_for_models`.

    Raises what reading and applying raise for a file that has OFT layers for this model but is faulty; one
    without layers for what the loader has connected is left to ComfyUI, whose loader does nothing then.
    """

    stock = _in_comfyui(original)

    @functools.wraps(original)
    def load_lora_for_models(model, clip, lora, strength_model, strength_clip, *more, **named):
        if not _on or not is_oft(lora):
            return stock(model, clip, lora, strength_model, strength_clip, *more, **named)
        adapter, rest = read(lora)
        at_model, at_clip = Strength(float(strength_model)), Strength(float(strength_clip))
        if core_is_right(adapter, lora, model, clip, at_model, at_clip):
            log.info("OFT everywhere: %s left to ComfyUI's own loader, which reads it rightly here.", adapter.name)
            return stock(model, clip, lora, strength_model, strength_clip, *more, **named)
        try:
            applied = apply(adapter, model, clip, at_model, at_clip)
        except ModelMismatch as error:
            log.warning("OFT everywhere: %s left to ComfyUI's own loader: %s", adapter.name, error)
            return stock(model, clip, lora, strength_model, strength_clip, *more, **named)
        _tell(adapter, rest, f"strength {at_model.value:g} and {at_clip.value:g}")
        # Callers may change what they get, so it must be a clone even where nothing is patched.
        model, clip = (
            given.clone() if given is not None and given is before else given
            for given, before in ((applied.model, model), (applied.clip, clip))
        )
        if not rest:
            return model, clip
        return stock(model, clip, rest, strength_model, strength_clip, *more, **named)

    return load_lora_for_models


def _hook(original: Callable[..., Any]) -> Callable[..., Any]:
    """In the place of `comfy.hooks.WeightHook.add_hook_patches`. Raises what `_loader`'s function raises.

    Never yields to ComfyUI for being right: keyframes change a hook's strength later.
    """

    stock = _in_comfyui(original)

    @functools.wraps(original)
    def add_hook_patches(self, model, model_options, target_dict, registered):
        if not _on or not self.need_weight_init or not is_oft(self.weights):
            return stock(self, model, model_options, target_dict, registered)
        if not self.should_register(model, model_options, target_dict, registered):
            return False
        for_text = target_dict.get("target") == comfy.hooks.EnumWeightTarget.Clip
        at = Strength(float(self._strength_clip if for_text else self._strength_model))
        # The reference is one for all clones of a hook, which share the tensors too.
        known = getattr(self.hook_ref, "oft_everywhere", None)
        if known is None or known[0] is not self.weights:
            known = (self.weights, *read(self.weights))
            self.hook_ref.oft_everywhere = known
            _tell(*known[1:], "as a hook")
        _, adapter, rest = known
        if at.value != 0 and for_text in {part != "unet" for part in adapter.components}:
            side = names.text_side(model) if for_text else names.model_side(model)
            try:
                placed = place(adapter, [side], at, at, {k.strength for k in self.hook_keyframe.keyframes})
            except ModelMismatch as error:
                log.warning("OFT everywhere: %s left to ComfyUI's own hook: %s", adapter.name, error)
                return stock(self, model, model_options, target_dict, registered)
            keepers = {**getattr(self.hook_ref, "oft_keepers", {})}
            keepers[side.name] = patch_for_hook(self, side, placed.patches[side.name])
            self.hook_ref.oft_keepers = keepers
        if rest:
            keys_of = comfy.lora.model_lora_keys_clip if for_text else comfy.lora.model_lora_keys_unet
            with left_to_comfyui():
                loaded = comfy.lora.load_lora(rest, keys_of(model.model, {}), log_missing=False)
            if loaded and (why_not := weights_out_of_reach(model)) is not None:
                raise AdapterError(
                    "A hook cannot apply the other tensors of this file in this model", file=adapter.path,
                    module=next(iter(rest)), found=why_not, hint=HOOK_WAY_OUT,
                )
            model.add_hook_patches(hook=self, patches=loaded, strength_patch=at.value)
        registered.add(self)
        return True

    return add_hook_patches


class Names(dict):
    """ComfyUI's key table with the models that it names: what `comfy.lora.load_lora` is given."""

    models: tuple[Any, ...] = ()


def _names(original: Callable[..., Any]) -> Callable[..., Any]:
    """In the place of `comfy.lora.model_lora_keys_unet` and `model_lora_keys_clip`: the same table, with its model."""

    @functools.wraps(original)
    def model_lora_keys(model, key_map=None):
        before = getattr(key_map, "models", ())
        # Without a table of its own, ComfyUI's function would fill one that all such calls share.
        table = Names(original(model, {} if key_map is None else key_map))
        table.models = (*before, model)
        return table

    return model_lora_keys


def _by_names(original: Callable[..., Any]) -> Callable[..., Any]:
    """In the place of `comfy.lora.load_lora`: patches by weight key, for packs that add them themselves.

    Always weight patches, and never left to ComfyUI for being right: the strength is known to the caller alone.
    Raises what `_loader`'s function raises, and `AdapterError` for layers whose weights cannot be patched and for a
    file that has more than one change for the same rows.
    """

    @functools.wraps(original)
    def load_lora(lora, to_load, log_missing=True):
        if not _on or _by_comfyui.get() or not is_oft(lora):
            return original(lora, to_load, log_missing)
        sides = [names.bare_side(model) for model in getattr(to_load, "models", ())]
        if not sides:
            log.warning("OFT everywhere: left to ComfyUI: a pack gave names only, without the model behind them.")
            return original(lora, to_load, log_missing)
        adapter, rest = read(lora)
        full = Strength(1.0)
        try:
            placed = place(adapter, sides, full, full)
        except ModelMismatch as error:
            log.warning("OFT everywhere: %s left to ComfyUI's own loader: %s", adapter.name, error)
            return original(lora, to_load, log_missing)
        _tell(adapter, rest, "as patches for another pack")
        found: dict[Any, Any] = {}
        for side in sides:
            try:
                notes = plan(side, placed.patches[side.name], WEIGHTS).notes
            except AdapterError as error:
                error.file, error.hint = adapter.path, "This loader can only patch weights. Use Load OFT."
                raise
            for note in notes:
                log.info("OFT everywhere: %s", note)
            mine = [patch for patch, _ in placed.patches[side.name]]
            dictionaries, keeper = make_patches(side, mine, full.mode, full.coft)
            if len(dictionaries) > 1:
                raise AdapterError(
                    "This loader cannot apply a file that changes the same rows twice",
                    file=adapter.path,
                    found=f"two changes of {next(iter(dictionaries[1]))}",
                    hint="Use Load OFT.",
                )
            for made in dictionaries:
                for patch in made.values():
                    patch.keeper = keeper  # what was built lives as long as the patches
                found |= made
        with left_to_comfyui():
            return found | (original(rest, to_load, log_missing) if rest else {})

    return load_lora


def _in_comfyui(original: Callable[..., Any]) -> Callable[..., Any]:
    """ComfyUI's function with all that it calls left to ComfyUI."""

    @functools.wraps(original)
    def stock(*given, **named):
        with left_to_comfyui():
            return original(*given, **named)

    return stock


def _tell(adapter: Adapter, rest: Tensors, how: str) -> None:
    layers = f"{adapter.title}, {len(adapter.entries)} layers"
    log.info("OFT everywhere: %s (%s) read by the OFT pack, %s.", adapter.name, layers, how)
    if rest:
        example = next(iter(rest))
        log.info("OFT everywhere: %d other tensors (%s) go to ComfyUI's own loader.", len(rest), example)


# --- the switch ---------------------------------------------------------------------------------------------


class Exchange:
    """One of ComfyUI's functions and ours in its place. owner: the module or class; make: original -> ours."""

    def __init__(self, owner: Any, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]):
        self.owner, self.name, self.make = owner, name, make
        self.original: Callable[..., Any] | None = None
        self.ours: Callable[..., Any] | None = None

    @property
    def words(self) -> str:
        return f"{self.owner.__name__}.{self.name}"

    def put(self) -> None:
        """Our function in place; nothing to do where it still lies under another pack's."""
        now = vars(self.owner)[self.name]
        if self.ours is None or now is self.original:
            self.original, self.ours = now, self.make(now)
            setattr(self.owner, self.name, self.ours)

    def take_back(self) -> bool:
        """ComfyUI's function in place again; False if another pack has put its own over ours meanwhile."""
        if self.ours is None or vars(self.owner)[self.name] is self.original:
            return True
        if vars(self.owner)[self.name] is not self.ours:
            return False
        setattr(self.owner, self.name, self.original)
        self.original = self.ours = None
        return True


EXCHANGES = (
    Exchange(comfy.sd, "load_lora_for_models", _loader),
    Exchange(comfy.hooks.WeightHook, "add_hook_patches", _hook),
    Exchange(comfy.lora, "model_lora_keys_unet", _names),
    Exchange(comfy.lora, "model_lora_keys_clip", _names),
    Exchange(comfy.lora, "load_lora", _by_names),
)
_on = False


def is_on() -> bool:
    """Whether other loaders read our dialects now."""
    return _on


def turn(on: bool) -> list[str]:
    """Switch on or off, for everything that is loaded from now on; returns remarks for the user, if any.

    Off, a function over which another pack has put its own stays, but only hands on what it is given.
    """
    global _on
    _on = on
    if on:
        for exchange in EXCHANGES:
            exchange.put()
        log.info("OFT everywhere: on. LoRA loaders of ComfyUI and other packs read OFT files.")
        return []
    stuck = [exchange.words for exchange in EXCHANGES if not exchange.take_back()]
    log.info("OFT everywhere: off. LoRA loaders are as they were.")
    notes = [f"Another pack has replaced {words}; ours below it does nothing now." for words in stuck]
    for note in notes:
        log.warning("OFT everywhere: %s", note)
    return notes


def wanted_at_start() -> bool:
    """What the environment variable says, else the default user's setting; off if neither says anything."""
    said = os.environ.get(ENVIRONMENT, "").strip().lower()
    if said:
        return said in ("1", "true", "on", "yes")
    path = os.path.join(folder_paths.get_user_directory(), "default", "comfy.settings.json")
    try:
        with open(path, encoding="utf-8") as file:
            settings = json.load(file)
    except FileNotFoundError:
        return False
    except (OSError, ValueError) as error:
        log.warning("OFT everywhere: off, because the settings cannot be read: %s", error)
        return False
    return isinstance(settings, dict) and settings.get(SETTING) is True


def start() -> None:
    """Take over the setting and, where there is a server, add the route that the settings dialog calls.

    GET answers {"on": bool}; POST takes that and answers it with "notes", a list of remarks.
    """
    if wanted_at_start():
        turn(True)
    server = getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)
    if server is None:
        return
    from aiohttp import web

    @server.routes.get(ROUTE)
    async def get_everywhere(_request: Any) -> Any:
        return web.json_response({"on": is_on()})

    @server.routes.post(ROUTE)
    async def post_everywhere(request: Any) -> Any:
        try:
            asked = await request.json()
        except ValueError:
            asked = None
        if not isinstance(asked, dict) or not isinstance(asked.get("on"), bool):
            return web.json_response({"error": 'expected {"on": true} or {"on": false}'}, status=400)
        notes: list[str] = []
        if asked["on"] != is_on():
            notes = turn(asked["on"])
            # What nodes gave in earlier runs was made the other way.
            server.prompt_queue.set_flag("free_memory", True)
        return web.json_response({"on": is_on(), "notes": notes})
