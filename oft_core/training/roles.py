"""What the layers of a model are for: attention, what attention takes from the text, feed-forward. Found by structure.

Every family names these layers in its own way (``to_q``, ``q_proj``, ``Wqkv``, ``w1q``, ``kv_linear`` ...), but all put them into a
module that is called attention, or feed-forward in the neighbourhood of one. That, and widths, is what is read here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

from torch import nn

ATTENTION, TEXT, FEED_FORWARD = "attention", "text", "feed-forward"

_ATTENTION = re.compile(r"(^|_)(attn|(self)?attention)[a-z]?\d*(_|$)", re.IGNORECASE)
_CROSS = re.compile(r"(^|_)(cross|encoder|enc)_?(attn|attention)|^attn2$", re.IGNORECASE)
_FORWARD = re.compile(r"^((img|txt|x|y)_)?(ff|ffn|mlp|feed_?forward)(\d|[A-Z]|_[a-z]+)?$")
_FORWARD_CLASS = re.compile(r"FeedForward")
#: Layers inside such modules that are for something else.
_OTHER = re.compile(r"norm|modulation|(^|_)mod(_|$)|adaln|embed|(^|_)gate(_|$)|(^|_)bias", re.IGNORECASE)
_KEYS = re.compile(r"^(to_|w)?(k|v|kv|key|value|key_value)(_proj|_linear|_img|_layer)?$")
_QUERIES = re.compile(r"^(to_|w)?(q|query)(_proj|_linear|_layer)?$")
#: Attention over the text alone, which then meets the picture's (SD3, Flux, HunyuanVideo).
_TEXT_ATTENTION = re.compile(r"(^|\.)(txt_attn|context_block\.attn)$")
#: The text's own projections beside the picture's in one attention (Qwen-Image, HiDream, Mochi).
_TEXT_SIDE = re.compile(r"^(add_[qkv]_proj|to_add_out|to_[qkv]_t|to_out_t|(qkv|kv|q|k|v|proj|out)_(y|txt))$")
#: Attention and feed-forward in one matrix, in and out (blocks of one stream of Flux and its kin).
_FUSED_IN, _FUSED_OUT = "linear1", "linear2"


def roles(model: nn.Module, linear: Iterable[str]) -> dict[str, frozenset[str]]:
    """`ATTENTION`, `TEXT` (what of it is the text's) and `FEED_FORWARD` -> names of layers.

    model: a UNet, transformer or text encoder.   linear: names of its linear layers, as in ``named_modules``.
    """
    modules = dict(model.named_modules())
    linear = [name for name in linear if name]
    attention: dict[str, list[str]] = {}
    for name in linear:
        container = next((c for c in _above(name) if _is_attention(c)), None)
        if container is not None and not _OTHER.search(name[len(container) :]):
            attention.setdefault(container, []).append(name)
    text = {n for container, names in attention.items() for n in _of_text(container, names, modules)}
    around = {a for container in attention for a in _above(container)}
    forward = {n for n in linear if _in_feed_forward(n, modules, around)}
    inside = {n for names in attention.values() for n in names}
    for name in linear:
        block, _, last = name.rpartition(".")
        if last == _FUSED_IN and f"{block}.{_FUSED_OUT}" in modules and block.rpartition(".")[2].isdigit() and block not in around:
            inside.add(name)
            forward.add(f"{block}.{_FUSED_OUT}")
    return {ATTENTION: frozenset(inside), TEXT: frozenset(text), FEED_FORWARD: frozenset(forward - inside)}


def _above(name: str) -> Iterator[str]:
    """Names of the modules that a module is in, outermost first; not the model itself."""
    for i, letter in enumerate(name):
        if letter == ".":
            yield name[:i]


def _is_attention(name: str) -> bool:
    last = name.rpartition(".")[2]
    return bool(_ATTENTION.search(last)) and not _OTHER.search(last)


def _of_text(container: str, names: list[str], modules: Mapping[str, nn.Module]) -> set[str]:
    if _TEXT_ATTENTION.search(container):
        return set(names)
    inner = {name: name[len(container) + 1 :].split(".") for name in names}
    keys = [n for n, parts in inner.items() if any(_KEYS.match(p) for p in parts)]
    queries = [n for n, parts in inner.items() if any(_QUERIES.match(p) for p in parts)]
    # Keys of something that is not as wide as what the queries are made of.
    widths = {_width(modules[n]) for n in queries}
    crossed = _CROSS.search(container.rpartition(".")[2]) or (widths and any(_width(modules[n]) not in widths for n in keys))
    found = set(keys) if crossed else set()
    found |= {n for n, parts in inner.items() if any(_TEXT_SIDE.match(p) for p in parts)}
    # AuraFlow: w1 for the text and w2 for the picture; its blocks of one stream have w1 alone.
    if any(parts == ["w2q"] for parts in inner.values()):
        found |= {n for n, parts in inner.items() if parts[0].startswith("w1")}
    return found


def _width(module: nn.Module) -> int | None:
    """Of the layer's input; None for kinds that do not tell."""
    return getattr(module, "in_features", None)


def _in_feed_forward(name: str, modules: Mapping[str, nn.Module], around: set[str]) -> bool:
    """around: every module with attention in it. A model's own embedders are called feed-forward too, but lie in none."""
    above = list(_above(name))
    for i, one in enumerate(above):
        if _FORWARD.match(one.rpartition(".")[2]) or _FORWARD_CLASS.search(type(modules[one]).__name__):
            return any(a in around for a in above[:i]) and not _OTHER.search(name)
    return False
