"""``python -m oft_core``: inspect files, merge one into a model, convert, extract."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from . import profile
from .adapter import Adapter, load_adapter
from .atomic import atomically
from .cli_files import add_commands, add_strength, with_blocks
from .constraint import Strength
from .errors import AdapterError, printable
from .formats import ReadOptions
from .merge import DTYPES, merge_file
from .model_file import open_model
from .model_folder import merge_folder
from .report import describe


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 done, 1 an error that is printed, 2 wrong usage (by argparse)."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # Windows' own encodings know few trigger words: what is redirected is UTF-8, a terminal shows what it can.
            stream.reconfigure(errors="replace") if stream.isatty() else stream.reconfigure(encoding="utf-8", errors="backslashreplace")
    args = _parser().parse_args(argv)
    try:
        code = args.run(args)
        sys.stdout.flush()
        return code
    except AdapterError as error:
        print(f"error: {error}", file=sys.stderr)
    except OSError as error:
        print(f"error: {error.strerror or error}; file: {error.filename or 'standard output'}", file=sys.stderr)
        if error.filename is None and isinstance(sys.stdout, io.TextIOWrapper):
            # What could not be printed would be tried, and complained of, once more at the end of the process.
            with contextlib.suppress(OSError):  # it may stand for something without a number
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m oft_core", description="Orthogonal Fine-Tuning files: inspect, merge, convert, extract.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    reading = argparse.ArgumentParser(add_help=False)
    group = reading.add_argument_group("reading (what tensors alone cannot tell; auto follows the file's metadata)")
    group.add_argument("--allow-pickle", action="store_true", help="also read .bin/.pt files, tensors only")
    for name, choices in ReadOptions.CHOICES.items():
        group.add_argument(f"--{name.replace('_', '-')}", choices=choices, default="auto")
    group.add_argument("--peft-terms", type=int, default=0, metavar="N", help="terms of PEFT's series (0: as the config says, or 5)")
    group.add_argument("--peft-coft", type=float, default=0.0, metavar="EPS", help="PEFT's COFT limit (0: as the config says, or none)")
    group.add_argument("--adapter-name", default="", metavar="NAME", help="which one of several PEFT adapters in a file")

    inspect = commands.add_parser("inspect", parents=[reading], help="say what a file is and holds")
    inspect.add_argument("file", metavar="FILE")
    inspect.add_argument("--json", action="store_true", help="print the whole report as JSON")
    inspect.add_argument("--layers", action="store_true", help="angles of every layer; with --json of every block")
    inspect.add_argument("--against", metavar="OTHER", help="compare with another file, layer by layer")
    inspect.add_argument("--base", metavar="MODEL", help="a safetensors model: what the file keeps of its neurons' geometry")
    inspect.add_argument("--plot", metavar="OUT.png", help="draw the angles of all layers and blocks (needs Pillow)")
    inspect.set_defaults(run=_inspect)

    merge = commands.add_parser("merge", parents=[reading], help="bake an adapter into a model file")
    merge.add_argument("adapter", metavar="ADAPTER")
    merge.add_argument("base", metavar="BASE", help="any safetensors model file or part of one, or a folder of Hugging Face's form")
    merge.add_argument("-o", "--output", required=True, metavar="OUT")
    add_strength(merge)
    merge.add_argument("--dtype", choices=("keep", *DTYPES), default="keep", help="of every floating-point tensor in OUT")
    merge.add_argument("--allow-partial", action="store_true", help="merge what fits of an adapter for another or a larger model")
    merge.set_defaults(run=_merge)
    add_commands(commands, reading, _options)
    return parser


def _options(args: argparse.Namespace) -> ReadOptions:
    names = (*ReadOptions.CHOICES, "peft_terms", "peft_coft", "adapter_name")
    try:
        return ReadOptions(args.allow_pickle, **{name: getattr(args, name) for name in names})
    except ValueError as error:
        raise AdapterError("A read option is out of range", found=str(error)) from error


def _inspect(args: argparse.Namespace) -> int:
    adapter = load_adapter(args.file, _options(args))
    other = load_adapter(args.against, _options(args)) if args.against else None
    report, tables = describe(adapter), {}
    if args.layers or args.plot and other is None:
        layers = profile.profile(adapter)
        if args.layers:
            tables["layers"] = profile.table(layers), [p.to_dict() for p in layers]
    if other is not None:
        found = profile.between(adapter, other)
        plain = [{**asdict(b), "angle": None if b.angle is None else b.angle.tolist()} for b in found]
        tables["against"] = profile.table_between(found), plain
    if args.base:
        kept = _kept(adapter, args.base)
        tables["base"] = profile.table_kept(kept), [asdict(k) for k in kept]
    if args.plot:
        _plot(Path(args.plot), adapter, other, None if other is not None else layers)
    if args.json:
        print(json.dumps({**report.to_dict(), **{name: plain for name, (_, plain) in tables.items()}}, indent=2, ensure_ascii=False))
    else:
        print("\n\n".join([report.to_text(), *(text for text, _ in tables.values())]))
    return 0


def _kept(adapter: Adapter, base: str) -> list[profile.Kept]:
    with open_model(base) as model:
        return list(profile.kept(adapter.bind(model.index), model.weight))


def _plot(path: Path, adapter: Adapter, other: Adapter | None, layers: list[profile.LayerProfile] | None) -> None:
    try:
        from . import pictures
    except ImportError as error:
        raise AdapterError("Drawing needs the package Pillow", found=str(error), hint="pip install Pillow") from error
    picture = pictures.adapter_picture(adapter, layers) if other is None else pictures.comparison_picture(adapter, other)
    atomically(path, lambda part: picture.save(part, "PNG"))


def _merge(args: argparse.Namespace) -> int:
    strength = Strength(args.strength, args.mode, args.coft)
    adapter = with_blocks(load_adapter(args.adapter, _options(args)), args)
    with tqdm(unit="B", unit_scale=True, disable=None) as bar:  # None: only on a terminal

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        merge = merge_folder if os.path.isdir(args.base) else merge_file
        binding = merge(
            adapter, args.base, args.output, strength, dtype=args.dtype, progress=progress, allow_partial=args.allow_partial
        )
    merged = len(binding.matched) - len(binding.idle)
    print(f"{adapter.title} ({adapter.dialect}): {merged} of {len(adapter.entries)} layers merged into {args.output}")
    if binding.idle:
        print(f"note: {len(binding.idle)} layers have strength 0 and were left as they are.")
    if not merged:
        print("WARNING: nothing was changed; the output is a copy of the base.", file=sys.stderr)
    if binding.other_family:
        print(f"WARNING: the adapter was made for {binding.other_family}, the base is {binding.family}.", file=sys.stderr)
    for note in adapter.notes:
        print(f"note: {printable(note, 1000)}")
    for module, reason in binding.unmatched.items():
        print(f"not applied: {printable(module)}: {printable(reason, 1000)}", file=sys.stderr)
    return 0
