"""Customary words for the same layer: what a name means when no module and no layout bears it.

Attention's projections are called ``to_q``, ``q_proj``, ``wq`` and more, one by one or fused; files and models
choose differently. A name that is found nowhere is looked up again under the other words for its last part, beside the
same parent: a single projection leads to its rows of a fused matrix, a fused one to the single matrices, stacked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from .layout import attention_sizes

# Underscored last parts, longer ones before those that they end in.
QUERY = ("to_q", "q_proj", "q_linear", "wq", "q")
KEY = ("to_k", "k_proj", "k_linear", "wk", "k")
VALUE = ("to_v", "v_proj", "v_linear", "wv", "v")
QUERY_KEY_VALUE = ("to_qkv", "qkv_proj", "in_proj", "Wqkv", "qkv")
KEY_VALUE = ("to_kv", "kv_proj", "kv_linear", "kv")
OUT = ("to_out_0", "to_out", "out_proj", "output_proj", "o_proj", "wo", "out", "proj", "o")
_ADDED = ("add_q_proj", "add_k_proj", "add_v_proj")
#: Single projections: words -> their place in (query, key, value).
_SINGLE = (QUERY, KEY, VALUE)
#: Layers in the same place under other words; a pair counts only if the model has both of one spelling.
_PAIRS = (
    (("net_0_proj", "net_2"), ("fc1", "fc2"), ("fc0", "fc2"), ("layer1", "layer2"), ("linear_in", "linear_out"), ("0", "2")),
    (("in_layer", "out_layer"), ("linear_1", "linear_2"), ("mlp_0", "mlp_2")),
)
_SAME = (("linear", "lin"), ("linear2_fc", "linear2_linear", "linear2"))

Piece = tuple[str, tuple[int, int] | None, bool]  # parameter key, rows (start, length) or all, halves exchanged
Look = Callable[[str], list[Piece]]


def other_words(path: str, look: Look, shapes: Mapping[str, Sequence[int]]) -> list[Piece]:
    """Where an underscored path leads under other customary words; [] if nowhere or if its rows cannot be known.

    look: the pieces of an underscored path that the model has.   shapes: parameter key -> shape.
    """
    found = next((pieces for pieces in _readings(path, look, shapes) if pieces), [])
    return _joined(found, shapes)


def _readings(path: str, look: Look, shapes: Mapping[str, Sequence[int]]) -> Iterator[list[Piece]]:
    """What the path may mean, the plainest reading first; [] where a reading leads nowhere."""
    for parent in _cut(path, OUT):
        if _first(parent, look, (*QUERY, *QUERY_KEY_VALUE)):
            yield _first(parent, look, OUT)
    for place, words in enumerate(_SINGLE):
        # OMI files number the parts: `qkv.0`.
        numbered = [f"{word}_{place}" for word in QUERY_KEY_VALUE] + [f"{word}_{place - 1}" for word in KEY_VALUE]
        for parent in _cut(path, (*words, *numbered)):
            yield _first(parent, look, words) or _slice(parent, place, look, shapes)
    for parent in _cut(path, QUERY_KEY_VALUE):
        yield _first(parent, look, QUERY_KEY_VALUE) or _stack(parent, look, _SINGLE)
    for parent in _cut(path, KEY_VALUE):
        yield _first(parent, look, KEY_VALUE) or _stack(parent, look, _SINGLE[1:])
    for parent in _cut(path, ("to_added_qkv",)):
        yield _stack(parent, look, [(word,) for word in _ADDED])
    for parent in _cut(path, ("attn_to_qkv_mlp_proj",)):
        yield _stack(parent, look, [("attn_to_q",), ("attn_to_k",), ("attn_to_v",), ("proj_mlp",)])
    for spellings in _PAIRS:
        for i in (0, 1):
            for parent in _cut(path, [pair[i] for pair in spellings]):
                yield next((look(f"{parent}_{pair[i]}") for pair in spellings if all(look(f"{parent}_{w}") for w in pair)), [])
    for words in _SAME:
        for parent in _cut(path, words):
            yield _first(parent, look, words)


def _cut(path: str, words: Sequence[str]) -> Iterator[str]:
    """What stands before every one of the words that the path ends in."""
    return (path[: -len(word) - 1] for word in words if path.endswith(f"_{word}"))


def _first(parent: str, look: Look, words: Sequence[str]) -> list[Piece]:
    return next((found for word in words if (found := look(f"{parent}_{word}"))), [])


def _slice(parent: str, place: int, look: Look, shapes: Mapping[str, Sequence[int]]) -> list[Piece]:
    """One projection out of a fused matrix of this parent, or out of rows that are one."""
    for words, count, at in ((QUERY_KEY_VALUE, 3, place), (KEY_VALUE, 2, place - 1)):
        whole = _first(parent, look, words) if at >= 0 else []
        if len(whole) != 1 or whole[0][2] or not shapes[whole[0][0]]:
            continue
        key, rows, _ = whole[0]
        begin, length = rows or (0, shapes[key][0])
        out = _first(parent, look, OUT)
        sizes = attention_sizes(length, count, shapes[out[0][0]] if len(out) == 1 and out[0][1] is None else ())
        if sizes:
            return [(key, (begin + sum(sizes[:at]), sizes[at]), False)]
    return []


def _stack(parent: str, look: Look, roles: Sequence[Sequence[str]]) -> list[Piece]:
    """The single matrices of a fused one, in row order; [] unless all are there."""
    parts = [_first(parent, look, words) for words in roles]
    return [piece for part in parts for piece in part] if all(parts) else []


def _joined(pieces: list[Piece], shapes: Mapping[str, Sequence[int]]) -> list[Piece]:
    """Neighbouring rows of one matrix as one piece, all of its rows as the whole."""
    out: list[Piece] = []
    for key, rows, swap in pieces:
        last = out[-1] if out else None
        if rows and last and last[0] == key and last[1] and not swap and not last[2] and sum(last[1]) == rows[0]:
            out[-1] = (key, (last[1][0], last[1][1] + rows[1]), False)
        else:
            out.append((key, rows, swap))
    return [(k, None if rows == (0, shapes[k][0]) else rows, swap) for k, rows, swap in out]
