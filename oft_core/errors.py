"""What can go wrong with an adapter, as named errors that a person can act on."""

from __future__ import annotations


def printable(value: object, limit: int = 300) -> str:
    """Text from a file, safe to show: control characters replaced, overlong text cut. Names and metadata are not to be trusted."""
    text = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in str(value))
    return text if len(text) <= limit else text[: limit - 1] + "\N{HORIZONTAL ELLIPSIS}"


class AdapterError(Exception):
    """Base of all errors of this library.

    Every field but ``message`` is optional; ``str()`` joins those that are known into one readable text.

    message: what happened, one sentence.   file: path or name of the file concerned.
    module: the layer concerned, as spelled in the file.   found / expected: the two sides of a mismatch.
    hint: what the user can do about it.
    """

    def __init__(
        self,
        message: str,
        *,
        file: object = None,
        module: str | None = None,
        found: object = None,
        expected: object = None,
        hint: str | None = None,
    ):
        self.message = message
        self.file = None if file is None else str(file)
        self.module = module
        self.found = found
        self.expected = expected
        self.hint = hint
        super().__init__(message)

    def __str__(self) -> str:
        parts = [self.message.rstrip(".")]
        if self.file:
            parts.append(f"file: {printable(self.file, 1000)}")
        if self.module:
            parts.append(f"module: {printable(self.module)}")
        if self.found is not None:
            parts.append(f"found: {printable(self.found, 600)}")
        if self.expected is not None:
            parts.append(f"expected: {printable(self.expected)}")
        text = "; ".join(parts) + "."
        return f"{text} {self.hint}" if self.hint else text


class FileError(AdapterError):
    """The file is missing, truncated, not safetensors, or a pickle that was not allowed."""


class FormatError(AdapterError):
    """The file is readable but is not an OFT adapter, or contradicts itself."""


class ShapeError(AdapterError):
    """Tensor shapes do not fit each other or the layer they are for."""


class ValueFault(AdapterError):
    """The file holds NaN or infinite numbers."""


class ModelMismatch(AdapterError):
    """Nothing in the file belongs to the given model."""


class StrengthError(AdapterError):
    """The mode or strength is not defined for this file."""


class StackError(AdapterError):
    """These adapters cannot be averaged into one."""


class BlockError(AdapterError):
    """A text of block strengths that cannot be read, or that names blocks which do not exist."""


class ScheduleError(AdapterError):
    """A text of a strength schedule that cannot be read."""
