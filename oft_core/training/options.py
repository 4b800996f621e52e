"""What can be set for a training: the fields of PEFT's ``OFTConfig`` with the same names and meaning, and ours."""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass, field

from .errors import ConfigError


def _option(text: str, **limits: object) -> dict[str, object]:
    """Metadata of a field: its help text and its limits (min, max, above, below, choices)."""
    return {"help": text, **limits}


@dataclass
class OFTOptions:
    """Settings of the trained rotations. The first group is PEFT's, the second is ours; every field carries its help text.

    Raises ConfigError (field, value, what is allowed) when a value cannot be used.
    """

    r: int = field(
        default=0,
        metadata=_option("Number of blocks per layer. Give this or oft_block_size and set the other to 0.", min=0),
    )
    oft_block_size: int = field(
        default=32,
        metadata=_option(
            "Size of the rotated blocks. Larger blocks learn more and cost more: parameters and time grow "
            "in proportion.",
            min=0,
        ),
    )
    module_dropout: float = field(
        default=0.0,
        metadata=_option(
            "Share of the blocks that stay at identity during a training step, chosen anew each step.",
            min=0.0,
            below=1.0,
        ),
    )
    target_modules: list[str] | str | None = field(
        default="attention",
        metadata=_option(
            "Which layers: a list of names (a layer whose name is or ends with one of them), a regular "
            "expression over the whole name, 'all-linear', or one of the presets 'text-attention' (what "
            "attention takes from the text; all attention where a model has no such layers), 'attention' and "
            "'attention+ff'.",
        ),
    )
    exclude_modules: list[str] | str | None = field(
        default=None,
        metadata=_option("Layers to leave out, as a list of names, a regular expression or a preset."),
    )
    layers_to_transform: list[int] | int | None = field(
        default=None,
        metadata=_option("Numbers of the blocks to train, where target_modules is a list; empty for all."),
    )
    layers_pattern: list[str] | str | None = field(
        default=None,
        metadata=_option(
            "Name of the module list that layers_to_transform counts in, or several, for example "
            "'transformer_blocks'.",
        ),
    )
    rank_pattern: dict[str, int] = field(
        default_factory=dict,
        metadata=_option("Another r for some layers: {name or regular expression: r}."),
    )
    alpha_pattern: dict[str, float] = field(
        default_factory=dict,
        metadata=_option(
            "Accepted so that configurations of other methods can be read. OFT has no alpha, so it has no "
            "effect.",
        ),
    )
    fan_in_fan_out: bool = field(
        default=False,
        metadata=_option(
            "The layers store their weight as (input, output), as GPT-2's Conv1D does. Ordinary linear layers do not, "
            "and are taken as they are, as PEFT does.",
        ),
    )
    bias: str = field(
        default="none",
        metadata=_option(
            "Train biases too: 'none', 'all' of the model, or 'oft_only' those of the rotated layers.",
            choices=("none", "all", "oft_only"),
        ),
    )
    init_weights: bool = field(
        default=True,
        metadata=_option("Start at the unchanged model. Off: random rotations, for tests only."),
    )
    modules_to_save: list[str] | None = field(
        default=None,
        metadata=_option("Whole modules that are trained freely as well, by name."),
    )
    coft: bool = field(
        default=False,
        metadata=_option(
            "Constrained OFT as PEFT computes it: no block may leave a small ball around the identity.",
        ),
    )
    eps: float = field(
        default=6e-05,
        metadata=_option(
            "Radius of that ball, shared by the blocks of a layer (each has eps / sqrt(blocks)). Used "
            "with coft only.",
            above=0.0,
        ),
    )
    block_share: bool = field(
        default=False,
        metadata=_option("One rotation for all blocks of a layer: far fewer parameters."),
    )
    use_cayley_neumann: bool = field(
        default=False,
        metadata=_option(
            "Approximate the rotation by a series. Off is exact, stays orthogonal at every angle, and "
            "costs about the same here.",
        ),
    )
    num_cayley_neumann_terms: int = field(
        default=5,
        metadata=_option("Number of terms of that series.", min=1, max=20),
    )

    side: str = field(
        default="input",
        metadata=_option(
            "Which side of the weight is rotated. 'input' keeps the length of every neuron and the angles "
            "between neurons.",
            choices=("input", "output"),
        ),
    )
    rescale: bool = field(
        default=False,
        metadata=_option("Also train a magnitude for every output row."),
    )
    scaled: bool = field(
        default=True,
        metadata=_option(
            "Divide the parameters by 2 sqrt(block size - 1), so that one learning rate suits every block "
            "size.",
        ),
    )
    angle_cap: float | None = field(
        default=60.0,
        metadata=_option(
            "No plane may turn further than this many degrees; None for no limit.",
            above=0.0,
            max=180.0,
        ),
    )
    spectral_clip: float | None = field(
        default=None,
        metadata=_option(
            "The same limit as the largest singular value of a block's generator (tan of half the angle); "
            "None for none.",
            above=0.0,
        ),
    )
    conv_modules: list[str] | str | None = field(
        default=None,
        metadata=_option(
            "Convolutions to train in addition, as a list of names, a regular expression or 'all-conv'.",
        ),
    )

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            self._check(f, getattr(self, f.name))
        if (self.r == 0) == (self.oft_block_size == 0):
            raise ConfigError(
                "Exactly one of 'r' and 'oft_block_size' must be non-zero",
                found=f"r = {self.r}, oft_block_size = {self.oft_block_size}", expected="one of them 0",
                hint="r times oft_block_size is the width of a layer, so one follows from the other.",
            )
        if self.oft_block_size == 1:
            raise ConfigError("Option 'oft_block_size' is too small", found=1, expected="2 or more (a block of 1 cannot turn)")
        if self.use_cayley_neumann and self.num_cayley_neumann_terms < 2:
            raise ConfigError(
                "Option 'num_cayley_neumann_terms' is too small", found=self.num_cayley_neumann_terms,
                expected="2 or more (one term alone is no rotation)",
            )
        if not self.target_modules and not self.conv_modules:
            raise ConfigError("Option 'target_modules' is empty", expected="names, a regular expression, 'all-linear' or a preset")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ConfigError("Option 'layers_pattern' needs 'layers_to_transform'", found=self.layers_pattern)
        if self.layers_to_transform is not None and not isinstance(self.target_modules, (list, tuple, set)):
            raise ConfigError(
                "Option 'layers_to_transform' needs 'target_modules' as a list of names", found=repr(self.target_modules),
                hint="Or put the block numbers into the regular expression.",
            )
        for pattern, r in self.rank_pattern.items():
            if isinstance(r, bool) or not isinstance(r, int) or r < 1:
                raise ConfigError("Option 'rank_pattern' needs numbers of blocks", found=f"{pattern!r}: {r!r}", expected="1 or more")
            try:
                re.compile(pattern)
            except re.error as error:
                raise ConfigError(
                    "Option 'rank_pattern' has a name that is no regular expression", found=f"{pattern!r}: {error}"
                ) from error

    def _check(self, f: dataclasses.Field, value: object) -> None:
        """Raises ConfigError if the value breaks the limits that the field's metadata declares, or has another type."""
        meta = f.metadata
        default = f.default
        if isinstance(default, bool) and not isinstance(value, bool):
            raise ConfigError(f"Option '{f.name}' is a switch", found=repr(value), expected="True or False")
        if "choices" in meta and value not in meta["choices"]:
            raise ConfigError(f"Option '{f.name}' has an unknown value", found=repr(value), expected=" or ".join(meta["choices"]))
        ranged = {"min", "max", "above", "below"} & set(meta)
        if not ranged or value is None and "None" in str(f.type):
            return
        whole = isinstance(default, int)
        if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)) or not math.isfinite(value):
            raise ConfigError(f"Option '{f.name}' is not a number", found=repr(value), expected="a whole number" if whole else "a number")
        words = {"min": "at least", "max": "at most", "above": "more than", "below": "less than"}
        expected = " and ".join(f"{words[k]} {meta[k]:g}" for k in words if k in meta)
        if (
            value < meta.get("min", value) or value > meta.get("max", value)
            or "above" in meta and value <= meta["above"] or "below" in meta and value >= meta["below"]
        ):
            raise ConfigError(f"Option '{f.name}' is out of range", found=value, expected=expected)

    @classmethod
    def help(cls) -> dict[str, str]:
        """Field -> one sentence for people."""
        return {f.name: f.metadata["help"] for f in dataclasses.fields(cls)}

    def to_dict(self) -> dict[str, object]:
        """Plain values, JSON-ready; ``OFTConfig(**...)`` rebuilds it."""
        out = dataclasses.asdict(self)
        return {k: sorted(v) if isinstance(v, set) else v for k, v in out.items()}

    def remarks(self) -> list[str]:
        """Settings that are accepted but deserve a word."""
        notes = []
        if self.alpha_pattern:
            notes.append("alpha_pattern has no effect: OFT has no alpha.")
        if not self.coft and self.eps != type(self).eps:
            notes.append("eps has no effect without coft.")
        if not self.init_weights:
            notes.append("init_weights is off: training begins at random rotations, not at the model as it is.")
        if self.side == "output":
            notes.append("Output-side rotations mix rows, so the lengths of neurons are not kept.")
        if self.coft and self.angle_cap is not None and self.angle_cap < 180:
            notes.append(f"Both COFT and the angle cap ({self.angle_cap:g} degrees) limit the rotation.")
        return notes

    @property
    def largest_lam(self) -> float | None:
        """Upper limit on a generator's singular values from ``angle_cap`` and ``spectral_clip``; None without one."""
        limits = []
        if self.angle_cap is not None and self.angle_cap < 180:
            limits.append(math.tan(math.radians(self.angle_cap) / 2))
        if self.spectral_clip is not None:
            limits.append(float(self.spectral_clip))
        return min(limits) if limits else None
