"""Which layers of a model a configuration rotates, with which block sizes; and what it leaves out, and why."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from .errors import ConfigError
from .options import OFTOptions
from .roles import ATTENTION, FEED_FORWARD, TEXT, roles

ALL_LINEAR, ALL_CONV = "all-linear", "all-conv"
#: Layers to train by what they are for. text-attention: what attention takes from the text: keys and values of cross-attention (the
#: layers of Custom Diffusion, Kumari et al. 2023, arXiv 2212.04488), or the text's own projections where text and picture attend
#: jointly (SD3, Flux, Qwen-Image).
PRESETS: dict[str, tuple[str, ...]] = {
    "text-attention": (TEXT,),
    "attention": (ATTENTION,),
    "attention+ff": (ATTENTION, FEED_FORWARD),
}
#: Preset -> what is taken for a model without such layers.
WIDER = {"text-attention": "attention"}


@dataclass(frozen=True)
class LayerChoice:
    """One layer to rotate.

    length: of the rotated axis (input: in, or in*kh*kw; output: out).   rows: output size.   block, count: block size and number.
    stored: blocks with parameters of their own (1 with block_share).   wanted: the block size that was asked for.
    transposed: the weight is stored as (in, out).
    """

    name: str
    kind: str
    side: str
    length: int
    rows: int
    block: int
    count: int
    stored: int
    wanted: float
    transposed: bool = False

    @property
    def adjusted(self) -> bool:
        return self.block != self.wanted

    @property
    def parameters(self) -> int:
        return self.stored * self.block * (self.block - 1) // 2


@dataclass(frozen=True)
class Selection:
    """What of one model is trained: rotated layers, modules trained whole, biases; and what was left out, with the reason.

    note: where other layers were taken than those asked for; empty otherwise.   patterns: (option, name or pattern that it holds) ->
    whether it matched a layer.
    """

    config: OFTOptions
    layers: list[LayerChoice]
    skipped: dict[str, str]
    modules_to_save: list[str]
    biases: list[str]
    note: str = ""
    patterns: Mapping[tuple[str, str], bool] = field(default_factory=dict)

    @property
    def parameters(self) -> int:
        """Number of trained rotation parameters."""
        return sum(c.parameters for c in self.layers)

    def adjusted(self) -> list[LayerChoice]:
        """Layers whose block size is not the one asked for, because it does not divide their width."""
        return [c for c in self.layers if c.adjusted]

    def report(self, found: Collection[tuple[str, str]] = ()) -> str:
        """A few lines for people. found: patterns that have matched in another part of the same training."""
        return "\n".join([*self._lines(), *self.unmatched(found)])

    def unmatched(self, found: Collection[tuple[str, str]] = ()) -> list[str]:
        """A line for every name and pattern of the settings that matched no layer here, and that is not in ``found``."""
        return [
            f"Option '{option}': '{pattern}' matched no layer, so it has no effect."
            for (option, pattern), matched in self.patterns.items() if not matched and (option, pattern) not in found
        ]

    def _lines(self) -> Iterator[str]:
        sizes: dict[int, int] = {}
        for c in self.layers:
            sizes[c.block] = sizes.get(c.block, 0) + 1
        blocks = ", ".join(f"{n} with blocks of {b}" for b, n in sorted(sizes.items()))
        yield f"{len(self.layers)} layers ({blocks}), {self.parameters:,} parameters"
        if self.note:
            yield self.note
        changed: dict[tuple[float, int, int], list[str]] = {}
        for c in self.adjusted():
            changed.setdefault((c.wanted, c.block, c.length), []).append(c.name)
        for (wanted, block, length), names in changed.items():
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            yield f"Block size {wanted:g} does not divide width {length}: {block} is used in {names[0]}{more}"
        for name, reason in self.skipped.items():
            yield f"Left out: {name} ({reason})"
        if self.modules_to_save:
            yield f"Trained whole: {', '.join(self.modules_to_save)}"
        if self.biases:
            yield f"{len(self.biases)} biases are trained"
        if self.config.fan_in_fan_out and not any(c.transposed for c in self.layers):
            yield "fan_in_fan_out has no effect: no chosen layer stores its weight as (input, output)."
        yield from self.config.remarks()


def select(config: OFTOptions, model: nn.Module) -> Selection:
    """The layers of ``model`` that the settings rotate, each with its block size.

    Raises ConfigError if nothing matches, or if a chosen layer is of a kind that cannot be rotated.
    """
    target = config.target_modules
    wider = WIDER.get(target) if isinstance(target, str) else None
    chooser = _Chooser(config, model)
    if wider and not chooser.presets[target]:
        note = f"This model has no layers for '{target}': '{wider}' is trained."
        return dataclasses.replace(select(dataclasses.replace(config, target_modules=wider), model), config=config, note=note)
    chosen: list[LayerChoice] = []
    skipped: dict[str, str] = {}
    attention_children = _projections_of_attention(model)
    saved = [n for n, m in model.named_modules() if n and _saved_whole(config.modules_to_save, n) and _has_parameters(m)]
    saved = [n for n in saved if not any(n.startswith(other + ".") for other in saved)]
    for name, module in model.named_modules():
        if not name or not chooser.wants(name, module):
            continue
        if _saved_whole(config.modules_to_save, name):
            skipped[name] = "trained whole (modules_to_save)"
            continue
        if not _has_own_weight(module):
            continue
        if name in attention_children:
            raise _refused(name, module, "torch's MultiheadAttention does not call its projection layers")
        choice = chooser.choice(name, module)
        if isinstance(choice, str):
            skipped[name] = choice
        else:
            chosen.append(choice)
    if not chosen and not saved:
        chooser.refuse_numbers(model)
        have = [n for n, m in model.named_modules() if _kind(m) == "linear"]
        raise ConfigError(
            "No layer of this model matches 'target_modules'", found=repr(config.target_modules),
            expected="names of layers such as " + ", ".join(have[:3]) if have else "a model with linear layers",
            hint="; ".join(f"{k}: {v}" for k, v in list(skipped.items())[:3]) or None,
        )
    missing = [m for m in config.modules_to_save or [] if not any(_saved_whole([m], n) for n in saved)]
    if missing:
        raise ConfigError("'modules_to_save' names modules that the model does not have", found=", ".join(missing))
    biases = _biases(config, model, chosen, saved)
    return Selection(config, chosen, skipped, saved, biases, patterns=chooser.patterns(model, chosen))


class _Chooser:
    """How one configuration judges the layers of a model."""

    def __init__(self, config: OFTOptions, model: nn.Module):
        self.config = config
        by_role = roles(model, (n for n, m in model.named_modules() if _kind(m) == "linear"))
        self.presets = {preset: frozenset().union(*(by_role[r] for r in wanted)) for preset, wanted in PRESETS.items()}

    def patterns(self, model: nn.Module, chosen: list[LayerChoice]) -> dict[tuple[str, str], bool]:
        """(option, one of its names, numbers or patterns) -> whether it has chosen, left out or set anything."""
        layers = {n: m for n, m in model.named_modules() if n and _has_own_weight(m)}
        # What would be trained if nothing was left out.
        offered = {n: m for n, m in layers.items() if self._targeted(n, m) or self._conv_wanted(n, m)}
        # Without the limit to blocks of some numbers: a name may be right and the number wrong.
        targets = {n: m for n, m in layers.items() if self._named(n, m)}
        found: dict[tuple[str, str], bool] = {}
        for option, among in (
            ("target_modules", targets), ("exclude_modules", offered),
            ("conv_modules", {n: m for n, m in layers.items() if _is_conv(m)}),
        ):
            given = getattr(self.config, option)
            for one in [given] if isinstance(given, str) else given or ():
                each = given if isinstance(given, str) else [one]
                found[option, one] = any(self._chosen_by(each, n, m) for n, m in among.items())
        for pattern in self.config.rank_pattern:
            found["rank_pattern", pattern] = any(_rank_named(pattern, c.name) for c in chosen)
        if self.config.layers_to_transform is not None:
            numbers = {self._layer_number(n) for n in targets}
            for number in self._wanted_numbers():
                found["layers_to_transform", str(number)] = number in numbers
            for pattern in self._layer_lists():
                found["layers_pattern", pattern] = any(re.match(_in_list(pattern), n) for n in targets)
        return found

    def _chosen_by(self, patterns: Sequence[str] | str, name: str, module: nn.Module) -> bool:
        """Whether a layer is of those that an option names: as ``_matches``, or by 'all-linear', 'all-conv' or a preset."""
        if isinstance(patterns, str):
            if patterns.lower() == ALL_LINEAR:
                return _kind(module) == "linear"
            if patterns.lower() == ALL_CONV:
                return _is_conv(module)
            if patterns in self.presets:
                return name in self.presets[patterns]
        return _matches(patterns, name)

    def refuse_numbers(self, model: nn.Module) -> None:
        """Raises ConfigError if 'target_modules' alone had found layers, so that the numbers of blocks are at fault."""
        layers = [(n, m) for n, m in model.named_modules() if n and _has_own_weight(m)]
        targets = [n for n, m in layers if self._named(n, m)]
        if not targets or any(self._targeted(n, m) for n, m in layers):
            return
        numbers = sorted({k for n in targets if (k := self._layer_number(n)) is not None})
        lists = list(dict.fromkeys(m[1] for n in targets for m in re.finditer(r"(?:^|\.)([^.]*[^.\d][^.]*)\.\d+(?=\.)", n)))
        raise ConfigError(
            "No layer of 'target_modules' is in a block that 'layers_to_transform' and 'layers_pattern' name",
            found=f"layers_to_transform = {self._wanted_numbers()}, layers_pattern = {self.config.layers_pattern!r}",
            expected=f"some of the blocks {', '.join(map(str, numbers))}" if numbers else "a list of blocks that the layers are in",
            hint=f"The layers are in {', '.join(lists[:5])}: name one of them in 'layers_pattern'." if lists
            else "These layers are in no numbered blocks.",
        )

    def wants(self, name: str, module: nn.Module) -> bool:
        if self.config.exclude_modules and self._chosen_by(self.config.exclude_modules, name, module):
            return False
        return self._conv_wanted(name, module) or self._targeted(name, module)

    def _conv_wanted(self, name: str, module: nn.Module) -> bool:
        return bool(self.config.conv_modules) and _is_conv(module) and self._chosen_by(self.config.conv_modules, name, module)

    def _named(self, name: str, module: nn.Module) -> bool:
        """Whether 'target_modules' names it, in a block of any number."""
        return bool(self.config.target_modules) and self._chosen_by(self.config.target_modules, name, module)

    def _targeted(self, name: str, module: nn.Module) -> bool:
        return self._named(name, module) and (not self._wanted_numbers() or self._layer_number(name) in self._wanted_numbers())

    def _wanted_numbers(self) -> list[int]:
        """Numbers of the blocks to train; empty for all."""
        wanted = self.config.layers_to_transform
        return [wanted] if isinstance(wanted, int) else list(wanted or ())

    def _layer_lists(self) -> list[str]:
        return [self.config.layers_pattern] if isinstance(self.config.layers_pattern, str) else list(self.config.layers_pattern or ())

    def _layer_number(self, name: str) -> int | None:
        """The number of the block that a layer is in; None if it is in none that counts."""
        # As PEFT: the first number in the name counts, or the one behind the named list.
        for pattern in [_in_list(p) for p in self._layer_lists()] or [r".*?\.[^.]*\.(\d+)\."]:
            match = re.match(pattern, name)
            if match:
                return int(match[1])
        return None

    def choice(self, name: str, module: nn.Module) -> LayerChoice | str:
        """The choice for one layer, or the reason why it stays as it is. Raises ConfigError for a kind that cannot be rotated."""
        kind = _kind(module)
        if kind is None:
            raise _refused(name, module, _why_not(module))
        rows, columns = _sizes(module, kind)
        groups = module.groups if kind == "conv" else 1
        if self.config.side == "input" and groups != 1:
            raise _refused(name, module, "a grouped convolution has no common input side")
        length = columns if self.config.side == "input" else rows
        r = next((v for p, v in self.config.rank_pattern.items() if _rank_named(p, name)), self.config.r)
        if groups != 1:
            # Rows of different groups read different channels: only turned among their own are they still a weight of this layer.
            wanted = length / r if r else self.config.oft_block_size
            block = nearest_divisor(length // groups, round(wanted))
        elif r:
            count = nearest_divisor(length, r)
            wanted, block = (length / r), length // count
        else:
            block = nearest_divisor(length, self.config.oft_block_size)
            wanted = self.config.oft_block_size
        if block < 2:
            each = f"{groups} groups of {length // groups}" if groups != 1 else f"width {length}"
            return f"{each} {'have' if groups != 1 else 'has'} no block size near {wanted:g}"
        return LayerChoice(
            name=name, kind=kind, side=self.config.side, length=length, rows=rows, block=block, count=length // block,
            stored=1 if self.config.block_share else length // block, wanted=wanted,
            transposed=kind == "linear" and _stores_transposed(module, self.config.fan_in_fan_out),
        )


def _biases(config: OFTOptions, model: nn.Module, chosen: list[LayerChoice], saved: list[str]) -> list[str]:
    if config.bias == "none":
        return []
    if config.bias == "oft_only":
        modules = dict(model.named_modules())
        return [c.name for c in chosen if getattr(modules[c.name], "bias", None) is not None]
    return [
        n for n, m in model.named_modules()
        if n and getattr(m, "bias", None) is not None and hasattr(m.bias, "shape") and not _saved_whole(saved, n)
    ]


def nearest_divisor(length: int, wanted: int) -> int:
    """The divisor of ``length`` nearest to ``wanted``, the smaller one of two equally near, as PEFT chooses it."""
    if wanted >= length:
        return length
    higher = wanted
    while length % higher:
        higher += 1
    lower = wanted
    while length % lower:
        lower -= 1
    return lower if wanted - lower <= higher - wanted else higher


def _matches(patterns: Sequence[str] | str, name: str) -> bool:
    """PEFT's rule: a regular expression over the whole name, or a list of names and endings."""
    if isinstance(patterns, str):
        return re.fullmatch(patterns, name) is not None
    return any(name == p or name.endswith("." + p) for p in patterns)


def _in_list(pattern: str) -> str:
    """The regular expression for the number behind a module list's name."""
    return rf"(?:^|.*?\.){pattern}\.(\d+)\."


def _rank_named(pattern: str, name: str) -> bool:
    """Whether a name of 'rank_pattern' is for this layer: it or its end, as PEFT matches them."""
    return re.fullmatch(rf"(.*\.)?({pattern})", name) is not None


def _saved_whole(modules: Sequence[str] | None, name: str) -> bool:
    return any(re.match(rf"(^|.*\.){m}($|\..*)", name) for m in modules or ())


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _has_own_weight(module: nn.Module) -> bool:
    return getattr(module, "weight", None) is not None or "qweight" in dict(module.named_buffers(recurse=False))


def _is_conv(module: nn.Module) -> bool:
    return isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))


def _is_conv1d_of_transformers(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def _kind(module: nn.Module) -> str | None:
    """``linear`` (also quantised ones that only have in_features and out_features), ``conv``, or None."""
    if _is_conv(module):
        return "conv"
    if isinstance(module, nn.Bilinear):
        return None
    if isinstance(module, nn.Linear) or _is_conv1d_of_transformers(module):
        return "linear"
    own = isinstance(getattr(module, "in_features", None), int) and isinstance(getattr(module, "out_features", None), int)
    return "linear" if own and _has_own_weight(module) else None


def _sizes(module: nn.Module, kind: str) -> tuple[int, int]:
    """(output size, size of the flattened input side)."""
    if kind == "conv":
        return module.out_channels, module.in_channels // module.groups * math.prod(module.kernel_size)
    if _is_conv1d_of_transformers(module):
        return module.nf, module.weight.shape[0]
    return module.out_features, module.in_features


def _stores_transposed(module: nn.Module, fan_in_fan_out: bool) -> bool:
    """Whether a linear layer keeps its weight as (input, output). As in PEFT, the layer's own kind goes before the setting."""
    if _is_conv1d_of_transformers(module):
        return True
    return fan_in_fan_out and not isinstance(module, nn.Linear)


def _projections_of_attention(model: nn.Module) -> set[str]:
    return {
        f"{name}.out_proj" if name else "out_proj" for name, m in model.named_modules() if isinstance(m, nn.MultiheadAttention)
    }


def _why_not(module: nn.Module) -> str:
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return "word embeddings are left alone (to teach a new word is textual inversion's work)"
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        return "transposed convolutions are not supported"
    return "only linear layers and convolutions can be rotated"


def _refused(name: str, module: nn.Module, why: str) -> ConfigError:
    return ConfigError(
        f"This layer cannot be rotated: {why}", module=name, found=type(module).__name__, expected="a linear layer or convolution",
        hint="Leave it out with 'exclude_modules', or choose others with 'target_modules'.",
    )
