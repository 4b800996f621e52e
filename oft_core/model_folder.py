"""Bake an adapter into a model folder of Hugging Face's form: text models, and the parts of diffusers' pipelines."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from .adapter import Adapter, Binding
from .atomic import PARTIAL, sync
from .constraint import Strength
from .errors import FileError, ModelMismatch
from .merge import DTYPES, METADATA_KEY, Stored, history, layout, planned, read_header, record, tensor_bytes

#: Files of weights: those of the model are written anew, others would be those of the base.
_OTHER_WEIGHTS = re.compile(r"\.(safetensors|bin|pt|pth|ckpt|h5|msgpack|onnx|gguf)$|\.(bin|pt)\.index\.json$", re.IGNORECASE)
_INDEX = ".safetensors.index.json"
_OUTPUT_LAYER = re.compile(r"(^|\.)(lm_head|embed_out|output_projection)$")


@dataclass(frozen=True)
class Folder:
    """The safetensors files of a model folder.

    shards: file name -> its tensors and metadata.   index: name of the list of shards, "" where there is one file.
    config: of config.json, {} without one.
    """

    path: Path
    shards: Mapping[str, tuple[dict[str, Stored], dict[str, str]]]
    index: str
    config: Mapping[str, object]

    @property
    def stored(self) -> dict[str, Stored]:
        return {key: item for tensors, _ in self.shards.values() for key, item in tensors.items()}


def read_folder(path: Path) -> Folder:
    """Raises FileError for folders without safetensors weights, lists that name files elsewhere, and files that are missing."""
    lists = sorted(p.name for p in path.glob(f"*{_INDEX}"))
    if len(lists) > 1:
        raise FileError("The folder has several lists of shards", file=path, found=", ".join(lists), expected="one")
    if lists:
        names = _shards(path / lists[0])
    else:
        names = sorted(p.name for p in path.glob("*.safetensors"))
        if len(names) != 1:
            parts = sorted({p.parent.name for p in path.glob("*/*.safetensors")})
            raise FileError(
                "The folder is no model with one safetensors file or a list of shards", file=path,
                found=f"{len(names)} safetensors files" + (f"; folders {', '.join(parts[:6])}" if parts else ""),
                expected=f"one file, or a file that ends with {_INDEX}",
                hint="Of a pipeline name the part's folder, such as its transformer or unet." if parts else None,
            )
    shards = {name: read_header(path / name) for name in names}
    return Folder(path, shards, lists[0] if lists else "", _json(path / "config.json") if (path / "config.json").is_file() else {})


def _json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise FileError("The file cannot be read", file=path, found=str(error), expected="JSON") from error
    if not isinstance(content, dict):
        raise FileError("The file holds something else than expected", file=path, found=type(content).__name__, expected="a JSON object")
    return content


def _shards(index: Path) -> list[str]:
    """File names that a list of shards names, each in the list's own folder."""
    weights = _json(index).get("weight_map")
    if not isinstance(weights, dict) or not weights or not all(isinstance(name, str) for name in weights.values()):
        raise FileError("The list of shards names no files", file=index, expected="weight_map: tensor -> file")
    names = sorted(set(weights.values()))
    for name in names:
        if os.path.basename(name) != name or "\\" in name or not name.endswith(".safetensors"):
            raise FileError("The list of shards names something else than a file beside it", file=index, found=repr(name))
        if not (index.parent / name).is_file():
            raise FileError("A file of the model is missing", file=index.parent / name, hint="Download the model again.")
    return names


def merge_folder(
    adapter: Adapter,
    base: str | os.PathLike,
    out: str | os.PathLike,
    strength: Strength,
    *,
    dtype: str = "keep",
    progress: Callable[[int, int], None] | None = None,
    allow_partial: bool = False,
) -> Binding:
    """As ``merge_file``, for a folder: writes a complete one (shards, list, config, tokenizer ...), shard by shard.

    Files that nothing changes are copied as they are; weights in other forms (``.bin`` ...) are left out, since they would be the
    base's. The folder appears under its name when it is complete; it must not be there before. Raises AdapterError kinds.
    """
    base, out = Path(base), Path(out)
    if out.exists():
        raise FileError("There is something of this name already", file=out, hint="Choose another output name; nothing was written.")
    folder = read_folder(base)
    if "quantization_config" in folder.config:
        found = folder.config["quantization_config"]
        raise FileError(
            "The base is quantised, and its codes cannot be rotated", file=base / "config.json",
            found=str(found.get("quant_method", "quantization_config") if isinstance(found, dict) else found),
            expected="floating-point weights", hint="Merge into the unquantised model, and quantise that.",
        )
    stored = folder.stored
    try:
        binding, jobs = planned(adapter, stored, base, strength, allow_partial)
    except ModelMismatch as error:
        if folder.config.get("tie_word_embeddings") and any(map(_OUTPUT_LAYER.search, adapter.entries)):
            error.hint = (
                "This model's output layer is its embedding (tie_word_embeddings), so it has no weight of its own to turn. "
                "Untie it and save the model, or use --allow-partial."
            )
        raise
    target = None if dtype == "keep" else DTYPES[dtype]
    total = sum(item.end - item.begin for item in stored.values())
    done = 0

    def written(name: str, place: Path) -> int:
        """One shard; returns the bytes of its tensors in the new file."""
        nonlocal done
        tensors, metadata = folder.shards[name]
        metadata = {**metadata, METADATA_KEY: json.dumps(history(metadata) + [record(adapter, strength, binding)])}
        header, _ = layout(tensors, metadata, target)
        size = 0
        with open(place, "wb") as sink, open(base / name, "rb") as source:
            sink.write(header)
            for key, item in tensors.items():
                for part in tensor_bytes(source, item, jobs.get(key, []), target, base / name):
                    size += len(part) if isinstance(part, bytes) else part.nbytes
                    sink.write(part)
                done += item.end - item.begin
                if progress is not None:
                    progress(done, total)
        sync(str(place))
        return size

    _all_of(base, out, folder, written)
    return binding


def _all_of(base: Path, out: Path, folder: Folder, written: Callable[[str, Path], int]) -> None:
    """The new folder, made under another name beside ``out`` and renamed."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=PARTIAL, dir=out.parent))
    except OSError as error:
        raise FileError("The folder cannot be written", file=out, found=error.strerror or str(error)) from error
    try:
        for path in sorted(base.iterdir()):
            if path.is_file() and path.name != folder.index and not _OTHER_WEIGHTS.search(path.name):
                shutil.copyfile(path, made / path.name)
        size = sum(written(name, made / name) for name in folder.shards)
        if folder.index:
            content = _json(base / folder.index)
            metadata = content.get("metadata")
            content["metadata"] = {**(metadata if isinstance(metadata, dict) else {}), "total_size": size}
            (made / folder.index).write_text(json.dumps(content, indent=2) + "\n", "utf-8")
        os.chmod(made, 0o755)
        os.replace(made, out)
    except OSError as error:
        raise FileError("The folder cannot be written", file=out, found=error.strerror or str(error)) from error
    finally:
        shutil.rmtree(made, ignore_errors=True)


__all__ = ["Folder", "merge_folder", "read_folder"]
