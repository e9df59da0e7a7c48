"""A recipe, a YAML file of settings, and the command line that goes before it."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import yaml


def read_recipe(path: Path) -> dict[str, object]:
    """The fields of a recipe.

    Raises:
        ValueError: there is no such file, or it is no YAML of fields.
    """
    if not path.is_file():
        raise ValueError(f"--config {path}: there is no such file.")
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, ValueError, RecursionError, OverflowError, AttributeError, TypeError) as error:
        raise ValueError(f"--config {path} is no recipe: {error or type(error).__name__}.") from error
    if not isinstance(recipe, dict):
        raise ValueError(f"--config {path} holds a {type(recipe).__name__}, expected lines of `setting: value`.")
    return recipe


def as_options(recipe: dict[str, object]) -> list[str]:
    """A recipe as on the command line, where each value is checked; a list as several values, a mapping as JSON."""
    options = []
    for key, value in recipe.items():
        if isinstance(value, list):
            options += [f"--{key}", *map(str, value)]
        elif value is not None:
            options.append(f"--{key}={json.dumps(value, default=str) if isinstance(value, dict) else value}")
    return options


def without_none(argv: list[str]) -> tuple[list[str], dict[str, None]]:
    """The command line without the options whose value is `None`, and these: they unset what a recipe sets."""
    kept, unset = [], {}
    for part in argv:
        if part == "None" and kept and kept[-1].startswith("--") and "=" not in kept[-1]:
            unset[kept.pop()[2:]] = None
        elif part.startswith("--") and part.endswith("=None"):
            unset[part[2 : -len("=None")]] = None
        else:
            kept.append(part)
    return kept, unset


def option(argv: list[str], name: str) -> str | None:
    """What one option has on the command line; None where it is not given."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(f"--{name}")
    return getattr(parser.parse_known_args(argv)[0], name)
