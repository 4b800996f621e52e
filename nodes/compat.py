"""Newer node API keywords, used where the running ComfyUI knows them and left out where it does not."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from comfy_api.latest import io

T = TypeVar("T")

# The keywords of later hosts that this pack uses. Anything else is passed through unchanged, so that a
# misspelt keyword still raises.
OPTIONAL_KEYWORDS = frozenset({"search_aliases", "advanced"})


def known(factory: Any, keywords: dict[str, Any]) -> dict[str, Any]:
    """Drop those of `OPTIONAL_KEYWORDS` that `factory` does not accept."""
    accepted = inspect.signature(factory).parameters
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in accepted.values()):
        return keywords
    return {k: v for k, v in keywords.items() if k in accepted or k not in OPTIONAL_KEYWORDS}


def schema(**keywords: Any) -> io.Schema:
    """`io.Schema(...)`, without the optional keywords that this host lacks."""
    return io.Schema(**known(io.Schema, keywords))


def entry(factory: type[T], *args: Any, **keywords: Any) -> T:
    """`factory(...)`, an input class such as `io.Combo.Input`, without what this host lacks."""
    return factory(*args, **known(factory, keywords))


def explained(tips: dict[str, str]) -> Callable[..., Any]:
    """`entry` for inputs whose tooltip stands in `tips` under their name: (input class, name, ...) -> input."""

    def make(factory: Any, name: str, **keywords: Any) -> Any:
        return entry(factory, name, tooltip=tips[name], **keywords)

    return make
