"""``convert``, ``extract`` and ``blend`` of ``python -m oft_core``: files made from files."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from . import changed, extract
from .adapter import Adapter, load_adapter
from .block_weights import BlockWeights
from .constraint import COFT_CHOICES, MODES, Strength
from .convert import (
    FOLDER,
    about_fits,
    about_lora,
    blended,
    convert,
    convert_near,
    left_out,
    place_of,
    to_lora,
)
from .errors import AdapterError, FileError, FormatError
from .formats.write import WRITERS, write_adapter
from .merge import DTYPES
from .model_file import open_model

LORA = "lora"


def add_strength(command: argparse.ArgumentParser) -> None:
    """The options of a strength that is baked in."""
    command.add_argument("--strength", type=float, default=1.0, metavar="S")
    command.add_argument("--mode", choices=MODES, default="rotation")
    command.add_argument("--coft", default="file", metavar="|".join((*COFT_CHOICES, "DEGREES")))
    command.add_argument("--blocks", default="", metavar="TEXT", help="strength by block, for instance 'all=0, output.3-5=1'")


def with_blocks(adapter: Adapter, args: argparse.Namespace) -> Adapter:
    return replace(adapter, blocks=BlockWeights.parse(args.blocks)) if args.blocks.strip() else adapter


def add_commands(commands: argparse._SubParsersAction, reading: argparse.ArgumentParser, options: Callable) -> None:
    """options: ReadOptions from the parsed arguments."""
    to = commands.add_parser("convert", parents=[reading], help="write an adapter for another tool, or as a LoRA")
    to.add_argument("adapter", metavar="ADAPTER")
    to.add_argument("output", metavar="OUT", help="a new file; for peft a new folder")
    to.add_argument("--to", required=True, choices=(*WRITERS, LORA), help="whose files; lora: of low rank, for tools without OFT")
    to.add_argument("--model", required=True, metavar="BASE", help="the safetensors model that the adapter is for")
    add_strength(to)
    to.add_argument("--approximate", action="store_true", help="where a dialect cannot hold it: the nearest rotations on BASE, with their errors")
    to.add_argument("--rank", type=int, default=32, metavar="R", help="of a LoRA")
    to.add_argument("--error", type=float, metavar="E", help="of a LoRA instead of a rank: share of each change that may be left, 0 to 1")
    to.add_argument("--dtype", choices=tuple(DTYPES), default="fp32", help="of the numbers in OUT")
    to.add_argument("--layers", action="store_true", help="print the error of every layer")
    to.set_defaults(run=lambda args: _convert(args, options(args)))

    out = commands.add_parser("extract", help="find the rotations in a fine-tuned model or a LoRA")
    out.add_argument("tuned", metavar="TUNED", help="a fine-tuned model, or a LoRA, as safetensors")
    out.add_argument("base", metavar="BASE", help="the safetensors model that it was trained from")
    out.add_argument("-o", "--output", required=True, metavar="OUT")
    out.add_argument("--block", type=int, default=32, metavar="B", help="size of blocks; layers take the nearest divisor")
    out.add_argument("--side", choices=("both", "in", "out"), default="both", help="which side is rotated; both: the one that tells more")
    out.add_argument("--rescale", action="store_true", help="row factors too")
    out.add_argument("--to", choices=tuple(WRITERS), help="whose files; by default oft_v2_plus (input side), comfy or lycoris (output side)")
    out.add_argument("--dtype", choices=tuple(DTYPES), default="fp32", help="of the numbers in OUT")
    out.add_argument("--layers", action="store_true", help="print what is left of every layer")
    out.set_defaults(run=_extract)

    mix = commands.add_parser("blend", parents=[reading], help="average several adapters into one file")
    mix.add_argument("adapters", metavar="ADAPTER", nargs="+")
    mix.add_argument("--model", required=True, metavar="BASE", help="the safetensors model that they are for")
    mix.add_argument("-o", "--output", required=True, metavar="OUT")
    mix.add_argument("--strengths", default="", metavar="S,S,...", help="one for each adapter, 1 if not given")
    mix.add_argument("--mode", choices=("rotation", "geodesic"), default="rotation")
    mix.add_argument("--keep-angles", action="store_true", help="turn as far as the adapters do on average; a plain average turns less")
    mix.add_argument("--to", choices=tuple(WRITERS), help="whose files; by default oft_v2_plus (input side), comfy or lycoris (output side)")
    mix.add_argument("--dtype", choices=tuple(DTYPES), default="fp32", help="of the numbers in OUT")
    mix.set_defaults(run=lambda args: _blend(args, options(args)))


def _new(path: str, *inputs: str) -> Path:
    out = Path(path)
    written = (out, place_of(out, FOLDER), place_of(out, FOLDER) / "adapter_model.safetensors")
    for source in inputs:
        if os.path.exists(source) and any(p.exists() and os.path.samefile(p, source) for p in written):
            raise FileError("The output would overwrite an input", file=out, hint="Choose another output name.")
    return out


def _bar(keys):
    return tqdm(keys, unit="layer", disable=None)  # None: only on a terminal


def _convert(args: argparse.Namespace, options) -> int:
    strength = Strength(args.strength, args.mode, args.coft)
    if args.rank < 1 or args.error is not None and not 0 < args.error < 1:
        raise AdapterError("Rank or error is out of range", found=f"{args.rank}, {args.error}", expected="1 or more, and 0 to 1")
    adapter = with_blocks(load_adapter(args.adapter, options), args)
    out = _new(args.output, args.adapter, args.model)
    more = {"metadata": adapter.metadata, "dtype": DTYPES[args.dtype], "strength": strength}
    with open_model(args.model) as model:
        if args.to == LORA:
            path, layers = to_lora(
                adapter, model.index, out, base=model.weight, rank=args.rank, error=args.error, progress=_bar, **more
            )
            print(f"{len(layers)} layers written to {path} as a LoRA, right on {model.path.name} only.")
            print(about_lora(layers))
            if left_out((x.residual, x.size) for x in layers) > 0.5:
                print("WARNING: most of the change is left out. A larger --rank, or --error, keeps more.", file=sys.stderr)
            if args.layers:
                print("\n".join(f"{x.key}: rank {x.rank}, {100 * x.residual:.1f} % left" for x in layers))
            return 0
        if args.approximate:
            path, fits = convert_near(adapter, model.index, out, args.to, base=model.weight, progress=_bar, **more)
        else:
            try:
                path, fits = convert(adapter, model.index, out, args.to, base=model.weight, **more), []
            except FormatError as error:
                error.hint = error.hint or "With --approximate the nearest rotations are written, and their errors printed."
                raise
    print(f"{len(adapter.entries)} layers written to {path} ({WRITERS[args.to].title}), " + ("nearly:" if fits else "exactly."))
    if fits:
        print(about_fits(fits))
        if args.layers:
            print(extract.table(fits))
    return 0


def _blend(args: argparse.Namespace, options) -> int:
    try:
        numbers = [float(s) for s in args.strengths.split(",")] if args.strengths.strip() else [1.0] * len(args.adapters)
    except ValueError:
        numbers = []
    if len(numbers) != len(args.adapters) or len(numbers) < 2:
        raise AdapterError("A blend needs two or more adapters and a strength for each", found=args.strengths or f"{len(args.adapters)} adapter")
    adapters = [load_adapter(name, options) for name in args.adapters]
    out = _new(args.output, *args.adapters, args.model)
    metadata = {"oft_blend_of": ", ".join(f"{a.name} at {s:g}" for a, s in zip(adapters, numbers, strict=True))}
    with open_model(args.model) as model:
        path, dialect, stretched = blended(
            adapters, model.index, out, args.to, strengths=[Strength(s, args.mode) for s in numbers], keep_angles=args.keep_angles,
            base=model.weight, metadata=metadata, dtype=DTYPES[args.dtype],
        )
    print(f"Average of {len(adapters)} adapters written to {path} ({WRITERS[dialect].title}).")
    if stretched:
        print(f"Truncated series in them are taken as rotations: their average is one but for {stretched:.1e}, which is left out.")
    return 0


def _extract(args: argparse.Namespace) -> int:
    if args.block < 2:
        raise AdapterError("This is no size for blocks", found=args.block, expected="2 or more")
    sides = ("in", "out") if args.side == "both" else (args.side,)
    if args.to:
        sides = (WRITERS[args.to].side,)
        if args.side not in ("both", *sides):
            raise AdapterError(f"{WRITERS[args.to].title} files turn the other side", found=f"--side {args.side}", expected=f"--side {sides[0]}")
    out = _new(args.output, args.tuned, args.base)
    with open_model(args.base) as model:
        if changed.holds_lora(args.tuned):
            found = extract.extract(
                model.index, model.weight, changed.of_lora(args.tuned, model.index, model.weight), block=args.block, sides=sides,
                rescale=args.rescale, progress=_bar,
            )
        else:
            with open_model(args.tuned) as other:
                difference = changed.of_model(model.index, model.weight, other.index, other.weight)
                found = extract.extract(
                    model.index, model.weight, difference, block=args.block, sides=sides, rescale=args.rescale, progress=_bar
                )
        dialect = args.to or ("oft_v2_plus" if found.side == "in" else "lycoris" if args.rescale else "comfy")
        path = place_of(out, dialect)
        path = write_adapter(
            found.layers, model.index, path, dialect, beside=found.beside, base=model.weight, dtype=DTYPES[args.dtype],
            metadata={"oft_extracted_from": os.path.basename(args.tuned), "oft_base": os.path.basename(args.base)},
        )
    side = {"in": "input", "out": "output"}[found.side]
    print(f"{len(found.layers)} layers, rotated on the {side} side, written to {path} ({WRITERS[dialect].title}).")
    print(f"Rotations tell {100 * max(0.0, found.explained):.1f} % of the change (of its square, over all weights).")
    if found.beside:
        print(f"Biases and norms beside them, as differences: {len(found.beside)}.")
    if args.layers:
        print(extract.table(found.fits))
    if found.explained < extract.EXPLAINED:
        print(
            "WARNING: a rotation is the wrong tool for most of this change: the file will act much weaker than, and otherwise than, what it "
            "was made from. Larger blocks (--block) tell more; a LoRA or the model itself tells all.", file=sys.stderr,
        )
    if found.left:
        print(f"not told: {len(found.left)} parameters that are no layer's weight, e.g. {found.left[0]}", file=sys.stderr)
    return 0
