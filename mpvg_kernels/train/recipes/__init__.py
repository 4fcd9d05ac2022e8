"""The recipes: one short file each, whose docstring says command, hardware, time and expected accuracy."""

import importlib
import pkgutil

from .. import InputError, near_matches
from ..config import Config


def names() -> list[str]:
    """Every recipe there is."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def _module(name: str):
    if name not in names():
        close = near_matches(name, names())
        raise InputError(f"unknown recipe {name!r}: there is {', '.join(names())}{close}")
    return importlib.import_module(f"{__name__}.{name}")


def load(name: str) -> Config:
    """The recipe's config.

    Raises:
        InputError: there is no recipe of that name.
    """
    return _module(name).config


def describe(name: str) -> str:
    """The recipe's docstring."""
    return _module(name).__doc__.strip()
