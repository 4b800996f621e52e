"""Writing what was trained beside the rotations: biases, norms, and layers that were trained whole.

Tools differ. ComfyUI keeps differences of any parameter (``diff``, ``diff_b``). LyCORIS has them for whole layers and for norms
(``w_norm``, ``b_norm``), but not for the bias of a rotated layer. PEFT keeps the new values themselves under the model's own names.
Every function here adds to the tensors of the rotations, and raises FormatError with the reason where its tool has no place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..adapter import bias_key
from ..errors import FormatError, ShapeError
from ..layer import Diff, LayerRotation
from ..names import NameIndex, Spelling

#: Parameter key -> the model's own value (any float dtype and device).
BaseWeights = Callable[[str], Tensor]
#: A weight's names in a file, each with its rows (start, length) or None, and whether the halves of the rows are exchanged.
Names = Callable[[str, Spelling], list[tuple[str, tuple[int, int] | None, bool]]]
#: (differences, layers, index, base, tensors, PEFT config or None): adds to the last two.
Beside = Callable[
    [Mapping[str, Diff], Mapping[str, LayerRotation], NameIndex, "BaseWeights | None", dict[str, Tensor], "dict | None"], None
]


def refused(title: str, key: str, why: str) -> FormatError:
    """The error for an adapter that a dialect cannot hold."""
    return FormatError(f"{title} files cannot hold this adapter: {why}", module=key)


@dataclass(frozen=True)
class Part:
    """One difference under the module name that it gets in the file.

    weight: the key of the module's weight in the model.   rows: (start, length) of the model's parameter, None for all.
    """

    name: str
    key: str
    weight: str
    diff: Diff
    rows: tuple[int, int] | None = None

    @property
    def bias(self) -> bool:
        return self.key != self.weight


def _parts(diffs: Mapping[str, Diff], index: NameIndex, title: str, names: Names) -> Iterator[Part]:
    """Every difference under its names, taken apart where the file's layout keeps apart what is one in the model."""
    weights = {bias_key(k): k for k in index.shapes if k.endswith("weight")}
    for key, diff in diffs.items():
        weight = key if index.spelling(key) is not None else weights.get(key)
        spelling = None if weight is None else index.spelling(weight)
        if spelling is None:
            raise refused(title, key, "this parameter belongs to no layer of the model")
        shaped = Diff(diff.delta.reshape(index.shapes[key]), whole=diff.whole)
        for name, rows, swap in names(weight, spelling):
            if swap:
                raise refused(title, key, "its rows are stored in another order there")
            yield Part(name, key, weight, shaped if rows is None else shaped.rows_slice(*rows), rows)


def _difference(part: Part, index: NameIndex, base: BaseWeights | None, title: str) -> Tensor:
    """The difference to the model's own value, float32."""
    if not part.diff.whole:
        return part.diff.delta.float()
    return part.diff.delta.float() - _own(part.key, part.rows, index, base, title)


def _own(key: str, rows: tuple[int, int] | None, index: NameIndex, base: BaseWeights | None, title: str) -> Tensor:
    """The model's own value of a parameter or of some of its rows, float32 on the CPU."""
    if base is None:
        raise refused(title, key, "the model's own weights are needed to write this, and are not at hand")
    own = base(key).detach().float().cpu()
    if tuple(own.shape) != tuple(index.shapes[key]):
        raise ShapeError(
            "The model's own weight has another form than its layer", module=key, found=tuple(own.shape),
            expected=tuple(index.shapes[key]), hint="Use a model file that is not quantised.",
        )
    return own if rows is None else own.narrow(0, *rows)


def beside_comfy(
    diffs: Mapping[str, Diff], layers: Mapping[str, LayerRotation], index: NameIndex, base: BaseWeights | None,
    tensors: dict[str, Tensor], config: dict | None, *, names: Names, core: bool,
) -> None:
    """``diff`` and ``diff_b``. core: also what ComfyUI's own loader asks for, else only what ours does."""
    title = "ComfyUI core" if core else "OFT v2"
    for part in _parts(diffs, index, title, names):
        if part.key in layers:
            raise refused(title, part.key, "a weight is both rotated and changed by a difference")
        if core and not part.weight.endswith(".weight") and not part.name.startswith("diffusion_model."):
            raise refused(title, part.key, "ComfyUI's loader has no name for this parameter")
        tensors[f"{part.name}.{'diff_b' if part.bias else 'diff'}"] = _difference(part, index, base, title)


def beside_lycoris(
    diffs: Mapping[str, Diff], layers: Mapping[str, LayerRotation], index: NameIndex, base: BaseWeights | None,
    tensors: dict[str, Tensor], config: dict | None, *, names: Names,
) -> None:
    """``diff`` and ``diff_b`` of whole layers (LyCORIS's algorithm "full"), ``w_norm`` and ``b_norm`` of norms."""
    for part in _parts(diffs, index, "LyCORIS", names):
        if not part.weight.endswith(".weight"):
            raise refused("LyCORIS", part.key, "it is not a layer's weight or bias")
        if part.weight in layers:
            raise refused("LyCORIS", part.key, "beside a rotation there is no place for a trained bias")
        norm = len(index.shapes[part.weight]) == 1
        if part.bias and not norm and part.weight not in diffs:
            raise refused("LyCORIS", part.key, "a bias alone has no place there, only together with the whole layer")
        if norm:
            tensors.setdefault(f"{part.name}.w_norm", torch.zeros(index.shapes[part.weight]))
        suffix = ("b_norm" if part.bias else "w_norm") if norm else ("diff_b" if part.bias else "diff")
        tensors[f"{part.name}.{suffix}"] = _difference(part, index, base, "LyCORIS")


def beside_peft(
    diffs: Mapping[str, Diff], layers: Mapping[str, LayerRotation], index: NameIndex, base: BaseWeights | None,
    tensors: dict[str, Tensor], config: dict | None, *, names: Names,
) -> None:
    """New values under the model's names; the config says ``bias`` and ``modules_to_save`` as PEFT's loader needs them."""
    whole: dict[str, Part] = {}
    biases: set[str] = set()
    for part in _parts(diffs, index, "PEFT", names):
        if part.key in layers:
            raise refused("PEFT", part.key, "a weight is both rotated and changed by a difference")
        if not part.weight.endswith(".weight"):
            raise refused("PEFT", part.key, "it is not a layer's weight or bias")
        value = part.diff.delta.float()
        if not part.diff.whole:
            value = value + _own(part.key, part.rows, index, base, "PEFT")
        if not part.bias:
            whole[part.name] = part
        if part.weight in layers:
            biases.add("oft_only")
            tensors[f"{part.name}.base_layer.bias"] = value
        else:
            if part.bias and part.weight not in diffs:
                biases.add("all")
            tensors[f"{part.name}.{'bias' if part.bias else 'weight'}"] = value
    for name, part in whole.items():
        # PEFT expects every parameter of a module that it keeps whole.
        key = bias_key(part.key)
        if key in index.shapes and f"{name}.bias" not in tensors:
            tensors[f"{name}.bias"] = _own(key, part.rows, index, base, "PEFT")
    config["bias"] = "all" if "all" in biases else "oft_only" if biases else "none"
    config["modules_to_save"] = sorted(n.removeprefix("base_model.model.") for n in whole) or None
