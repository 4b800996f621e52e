"""Module names: which parameter of a model does a module name in an adapter file mean?

Adapter files come in a dozen spellings (kohya underscores, diffusers, the model authors' own names, text
encoder prefixes), and so do the models. `NameIndex` reads the parameter names of one model and answers
`resolve(module name)` with a dictionary look-up. Pure Python.
"""

from .families import DECLARED, declared_family, guess_family, is_language_model
from .index import NameIndex, Spelling, Target
from .spelling import component, loose_clip

__all__ = [
    "DECLARED", "NameIndex", "Spelling", "Target", "component", "declared_family", "guess_family", "is_language_model",
    "loose_clip",
]
