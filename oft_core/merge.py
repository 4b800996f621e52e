"""Bake an adapter into a safetensors model file, tensor by tensor."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open

from .adapter import Adapter, Binding, Patch
from .atomic import atomically, check_target
from .blocks import store_
from .constraint import Strength
from .errors import FileError, ModelMismatch
from .names import NameIndex, guess_family, is_language_model

#: Bytes copied at once for tensors that stay as they are.
_COPY = 1 << 24
#: What stands beside a quantised weight: the stored numbers are then codes, and turned codes would leave their range.
SCALES = ("scale_weight", "weight_scale", "comfy_quant")
#: What bitsandbytes stores beside its codes: 4 bits, and 8 bits.
_BITSANDBYTES = (".quant_state.bitsandbytes__nf4", ".quant_state.bitsandbytes__fp4", ".SCB")
#: Names of the files of a model that is stored in several.
SHARD = re.compile(r"-(\d{5})-of-(\d{5})\.safetensors$")
#: Key in the output's metadata: a JSON list of what was merged, oldest first.
METADATA_KEY = "oft_merge"
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_NAMES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}
_CODES = {dtype: code for code, dtype in _NAMES.items()}


#: One change of a tensor and its strength.
Job = tuple[Patch, Strength]


@dataclass(frozen=True)
class Stored:
    """Where one tensor lies in a safetensors file: dtype code, shape, first and last+1 byte of the file."""

    code: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def dtype(self) -> torch.dtype | None:
        """torch dtype of a floating-point tensor, None for others."""
        return _NAMES.get(self.code)


#: Kinds of model files that are not read here -> what they are and the way out.
_OTHER_BASES = {
    ".gguf": ("a GGUF file, whose weights are quantised", "Merge into the unquantised model and quantise that, or load the file at run time."),
    **dict.fromkeys(
        (".ckpt", ".pt", ".pth", ".bin"),
        ("a pickle, which can run code when it is read", "Save the model as safetensors first (most tools and web UIs can)."),
    ),
}


def _check_kind(path: Path) -> None:
    """Raises FileError for what is no safetensors file, saying what it is and what to do."""
    if path.is_dir():
        raise FileError("This is a folder", file=path, expected="one safetensors file")
    if not path.is_file():
        raise FileError("There is no such file", file=path)
    kind, hint = _OTHER_BASES.get(path.suffix.lower(), ("", ""))
    if path.name.lower().endswith(".index.json"):
        kind, hint = "the list of a sharded model's files", "Name the folder that it is in."
    if kind:
        raise FileError("The base is not a safetensors file", file=path, found=kind, expected="one safetensors file", hint=hint)


def read_header(path: str | os.PathLike) -> tuple[dict[str, Stored], dict[str, str]]:
    """Where the tensors of a safetensors file lie, in file order, and its metadata. Raises FileError for a damaged or other file."""
    path = Path(path)
    _check_kind(path)
    try:
        with safe_open(path, "pt"):  # the library checks the header, every offset and the file's size
            pass
    except SafetensorError as error:
        found = f"{path.stat().st_size} bytes ({error})"
        raise FileError("The file is damaged, truncated or not a safetensors file", file=path, found=found) from error
    with open(path, "rb") as f:
        length = int.from_bytes(f.read(8), "little")
        header = json.loads(f.read(length))
    metadata = header.pop("__metadata__", None) or {}
    start = 8 + length
    stored = {
        k: Stored(v["dtype"], tuple(v["shape"]), start + v["data_offsets"][0], start + v["data_offsets"][1])
        for k, v in header.items()
    }
    return dict(sorted(stored.items(), key=lambda item: item[1].begin)), metadata


def merge_file(
    adapter: Adapter,
    base: str | os.PathLike,
    out: str | os.PathLike,
    strength: Strength,
    *,
    dtype: str = "keep",
    progress: Callable[[int, int], None] | None = None,
    allow_partial: bool = False,
) -> Binding:
    """Write ``base`` with the adapter's influence to ``out``; returns what was placed; ``idle`` are the layers that nothing changed.

    The adapter's block strengths count.   base: any safetensors model file or part of one.   dtype: ``keep``, or ``fp32``/``fp16``/``bf16`` for every floating-point tensor.
    progress: called with (bytes done, bytes in all). Every key and all metadata of the base stay; what was merged is added to the
    metadata. With ``keep`` untouched tensors are copied byte for byte. Memory: the adapter and about three times the largest tensor.
    The file is written under a temporary name beside ``out`` and renamed when it is complete. allow_partial: also merge what fits of
    an adapter of which layers find no place in a part that the base has, or whose metadata names another family. Raises AdapterError
    kinds.
    """
    base, out = Path(base), Path(out)
    check_target(out)
    for source in (base, Path(adapter.path)):
        if out.exists() and source.exists() and os.path.samefile(out, source):
            raise FileError("The output would overwrite an input", file=out, hint="Choose another output name.")
    stored, metadata = read_header(base)
    binding, jobs = planned(adapter, stored, base, strength, allow_partial)
    target = None if dtype == "keep" else DTYPES[dtype]
    metadata[METADATA_KEY] = json.dumps(history(metadata) + [record(adapter, strength, binding)])
    header, total = layout(stored, metadata, target)

    def write(temporary: str) -> None:
        done = 0
        with open(temporary, "wb") as sink, open(base, "rb") as source:
            sink.write(header)
            for key, item in stored.items():
                sink.writelines(tensor_bytes(source, item, jobs.get(key, []), target, base))
                done += item.end - item.begin
                if progress is not None:
                    progress(done, total)

    atomically(out, write)
    return binding


def planned(
    adapter: Adapter, stored: Mapping[str, Stored], base: Path, strength: Strength, allow_partial: bool
) -> tuple[Binding, dict[str, list[Job]]]:
    """Where the adapter's layers go, and key -> changes of each tensor. Raises as `merge_file` for what cannot be merged.

    stored: all tensors of the base, in one file or several.   base: the file or folder, for messages.
    """
    quantised = next((k for k in stored if k.endswith(_BITSANDBYTES)), None)
    if quantised is not None:
        raise FileError(
            "The base is quantised by bitsandbytes, and its codes cannot be rotated", file=base, module=quantised,
            expected="floating-point weights", hint="Merge into the unquantised model.",
        )
    index = NameIndex({k: s.shape for k, s in stored.items()})
    binding = adapter.bind(index)
    if not allow_partial:
        _check_whole(binding, base)
    jobs: dict[str, list[Job]] = {}
    for patch, at in binding.strengths(index, strength):
        scale = next((s for s in SCALES if patch.key.removesuffix("weight") + s in stored), None)
        if stored[patch.key].dtype is None or scale is not None:
            raise FileError(
                "A layer of the base is stored in a form that cannot be rotated", file=base, module=patch.key,
                found=stored[patch.key].code + (f" with {scale}" if scale else ""), expected="floating-point weights",
                hint="Use an unquantised model file.",
            )
        if at.value != 0:
            jobs.setdefault(patch.key, []).append((patch, at))
    changed = {patch.module for tensor_jobs in jobs.values() for patch, _ in tensor_jobs}
    binding.idle = [m for m in binding.matched if m not in changed]
    return binding, jobs


def _check_whole(binding: Binding, base: Path) -> None:
    """Raises ModelMismatch for an adapter of another family, or of which a part that the base has takes only some layers."""
    adapter, hint = binding.adapter, "If that is meant, use --allow-partial."
    if SHARD.search(base.name):
        hint = f"This file is one of several of a model: name the folder that it is in. {hint}"
    if binding.other_family:
        raise ModelMismatch(
            "The adapter's metadata names another kind of model", file=adapter.path, found=f"made for {binding.other_family}",
            expected=f"{binding.family}, as {base.name}", hint=hint,
        )
    language = is_language_model(adapter.entries)
    # A language model is one part; of diffusion models a base may lack the text encoders.
    missing = list(binding.unmatched) if language else binding.missing
    if missing:
        kind = "a language model" if language else guess_family(adapter.entries)
        raise ModelMismatch(
            "Not all layers of this adapter have a place in the base", file=adapter.path, module=missing[0],
            found=f"{len(binding.matched)} of {len(binding.matched) + len(missing)} layers fit, a file for {kind}",
            expected=f"all of them in {base.name}, a model of {binding.family}", hint=hint,
        )


def history(metadata: dict[str, str]) -> list:
    try:
        earlier = json.loads(metadata.get(METADATA_KEY, "[]"))
    except (ValueError, RecursionError):
        return []
    return earlier if isinstance(earlier, list) else []


def record(adapter: Adapter, strength: Strength, binding: Binding) -> dict:
    blocks = {} if adapter.blocks is None else {"blocks": str(adapter.blocks)}
    return {
        "adapter": adapter.name, "dialect": adapter.dialect, "strength": strength.value, "mode": strength.mode,
        "coft": strength.coft, **blocks, "layers": len(binding.matched) - len(binding.idle), "layers_not_found": len(binding.unmatched),
    }


def layout(stored: dict[str, Stored], metadata: dict[str, str], target: torch.dtype | None) -> tuple[bytes, int]:
    """The output's header as bytes, and the number of bytes to read for the progress."""
    header: dict[str, object] = {"__metadata__": metadata}
    at = 0
    for key, item in stored.items():
        size = item.end - item.begin
        code = item.code
        if target is not None and item.dtype is not None:
            size = size // item.dtype.itemsize * target.itemsize
            code = _CODES[target]
        header[key] = {"dtype": code, "shape": list(item.shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, sum(s.end - s.begin for s in stored.values())


def tensor_bytes(
    source: BinaryIO, item: Stored, patches: list[Job], target: torch.dtype | None, file: Path
) -> Iterator[bytes | memoryview]:
    """The bytes of one tensor of the output."""
    source.seek(item.begin)
    size = item.end - item.begin
    convert = target is not None and item.dtype is not None and item.dtype != target
    if not convert and not patches:
        while size:
            part = source.read(min(_COPY, size))
            if not part:
                raise FileError("The file ended early", file=file)
            size -= len(part)
            yield part
        return
    buffer = bytearray(size)
    if source.readinto(buffer) != size:
        raise FileError("The file ended early", file=file)
    weight = torch.frombuffer(buffer, dtype=item.dtype).view(item.shape) if size else torch.empty(item.shape, dtype=item.dtype)
    if convert and target.itemsize >= weight.dtype.itemsize:
        weight = weight.to(target)  # upwards first, so that the result is rounded once
    measured = [patch.measure(weight) for patch, _ in patches]
    for (patch, at), of_base in zip(patches, measured, strict=True):
        patch.apply_(weight, at, measured=of_base)
    if target is not None and weight.dtype != target:
        narrow = torch.empty(weight.shape, dtype=target)
        store_(narrow, weight)
        weight = narrow
    yield memoryview(weight.reshape(-1).view(torch.uint8).numpy())


__all__ = ["DTYPES", "METADATA_KEY", "Stored", "merge_file", "planned", "read_header"]
