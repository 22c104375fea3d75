"""Settings as a command line gives them, NAME=VALUE, and the recipes that they make."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from ..hf.method import METHODS, Method
from ..hf.noise import DRAW_SCOPES
from .recipe import Recipe

# Fields of the recipe that are tables, with names below them, and the others.
_TABLES = ("options", "lora")
FIELDS = tuple(f.name for f in dataclasses.fields(Recipe) if f.name not in _TABLES)

# Where recipes start: word to the fields of a method's recipe that differ from the defaults.
PRESETS: dict[str, Callable[[Method], Mapping[str, Any]]] = {
    "default": lambda method: {},
    "published": lambda method: method.published,
}


class Setting(NamedTuple):
    """A value for one field of a recipe, or for one name in a table of the recipe.

    Attributes:
        where: What messages call it.
        method: The method that it is for; None for all.
        path: Field of the recipe, and in ``options`` and ``lora`` the name.
        value: Its value.
    """

    where: str
    method: str | None
    path: tuple[str, ...]
    value: Any


def parse_value(text: str) -> Any:
    """JSON where the text can be read as such, else the text."""
    try:
        return json.loads(text.lower() if text in ("True", "False") else text)
    except (ValueError, RecursionError):
        return text


def split_items(items: Iterable[str]) -> Iterator[tuple[str, str, Any]]:
    """Texts of ``--set``: each as it is, its name in lower bars, and its value.

    Raises:
        ValueError: One is not NAME=VALUE.
    """
    for item in items:
        name, equals, text = item.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or not name:
            raise ValueError(f"--set: expected NAME=VALUE, got {item!r}")
        yield f"--set {item}", name, parse_value(text)


def parse_settings(items: Iterable[str], methods: Sequence[str]) -> list[Setting]:
    """Texts of ``--set``: NAME=VALUE, METHOD.NAME=VALUE or lora.NAME=VALUE.

    A NAME is a field of the recipe, or else an option of the method; options.NAME is always the latter.

    Args:
        items: The texts.
        methods: The methods that are run.

    Raises:
        ValueError: A text has another form, or names a method that is not run.
    """
    found = []
    for where, name, value in split_items(items):
        first, *rest = name.split(".")
        word = first.replace("_", "-")
        method = word if rest and word in METHODS else None
        path = tuple(rest) if method else (first, *rest)
        if len(path) == 1 and path[0] not in (*FIELDS, *_TABLES):
            path = ("options", *path)
        if len(path) != (2 if path[0] in _TABLES else 1):
            raise ValueError(
                f"{where}: expected NAME, METHOD.NAME or lora.NAME before =, got {name}"
            )
        if method is not None and method not in methods:
            raise ValueError(
                f"{where}: expected a method that is run ({', '.join(methods)}), got {method}"
            )
        found.append(Setting(where, method, path, value))
    return found


def method_options(items: Iterable[str], method: str) -> dict[str, Any]:
    """Texts of ``--set`` whose names are all options of one method.

    Args:
        items: The texts.
        method: The method.

    Raises:
        ValueError: A text is not NAME=VALUE, or a name comes twice.
    """
    found: dict[str, Any] = {}
    for where, name, value in split_items(items):
        if name in found:
            raise ValueError(f"{where}: expected a setting once, got it twice")
        found[name] = _option_value(method, name, value)
    return found


def recipes_of(
    fields: Mapping[str, Any], items: Iterable[str], methods: Sequence[str], preset: str = "default"
) -> dict[str, Recipe]:
    """The recipes of methods that run together, from the options of a command.

    Args:
        fields: Fields of the recipe that have an option of the command; None where it is not given.
        items: Texts of ``--set``.
        methods: The methods.
        preset: A word of `PRESETS`, whose recipe is what the settings change.

    Raises:
        ValueError: The preset is unknown, or as `parse_settings` and `make_recipes`.
    """
    if preset not in PRESETS:
        raise ValueError(f"recipe: expected {' or '.join(PRESETS)}, got {preset!r}")
    given = [
        Setting(name.replace("_", "-"), None, (name,), value)
        for name, value in fields.items()
        if value is not None
    ]
    return make_recipes([*given, *parse_settings(items, methods)], methods, preset)


def make_recipes(
    settings: Iterable[Setting], methods: Sequence[str], preset: str = "default"
) -> dict[str, Recipe]:
    """The recipes of methods that run together.

    What is set for all goes to the methods that have it, and to one at least. What is set for one
    method stands, whatever is said of all.

    Args:
        settings: What differs from the preset.
        methods: The methods.
        preset: A word of `PRESETS`.

    Raises:
        ValueError: No method uses a setting, one is given twice, or a value is out of range.
    """
    fields: dict[str, dict[str, Any]] = {
        name: {
            field: dict(value) if field in _TABLES else value
            for field, value in PRESETS[preset](METHODS[name]).items()
        }
        for name in methods
    }
    seen: set[tuple[str | None, tuple[str, ...]]] = set()
    for one in sorted(settings, key=lambda one: one.method is not None):
        if (one.method, one.path) in seen:
            raise ValueError(f"{one.where}: expected a setting once, got it twice")
        seen.add((one.method, one.path))
        takers = [name for name in ([one.method] if one.method else methods) if _uses(name, one)]
        if not takers:
            raise ValueError(f"{one.where}: {_unused(one, methods)}")
        for taker in takers:
            field, *name = one.path
            table = fields[taker].setdefault(field, {}) if name else fields[taker]
            value = _option_value(taker, name[0], one.value) if field == "options" else one.value
            table[name[0] if name else field] = value
    return {name: Recipe(**values) for name, values in fields.items()}


def _option_value(method: str, name: str, value: Any) -> Any:
    """A value as the option takes it: true and false are words for one whose values are texts."""
    option = METHODS[method].options.get(name)
    if isinstance(value, bool) and option is not None and option.type.startswith("text"):
        return json.dumps(value)
    return value


def _uses(method: str, one: Setting) -> bool:
    """Whether a setting changes what a method does."""
    row = METHODS[method]
    if one.path[0] == "options":
        return one.path[1] in row.options
    if one.path in (("n_samples",), ("scale",)):  # those of an ensemble are its members
        return row.bayesian and row.made != "join"
    if one.path in (("draws",), ("draw_scope",)):
        known = one.path == ("draws",) or one.value not in DRAW_SCOPES
        return bool(row.draw_scopes) if known else one.value in row.draw_scopes
    # What converts or joins is made of plain LoRA, which is trained once, with its own settings.
    return one.method is None or row.made == "train" or one.path == ("eval_batch_size",)


def _unused(one: Setting, methods: Sequence[str]) -> str:
    """What to say of a setting that none of the methods uses."""
    whom = [one.method] if one.method else methods
    having = [name for name in METHODS if _uses(name, one._replace(method=name))]
    if having:
        same = any(one.path[-1] in METHODS[name].options for name in whom)
        hint = f"; use options.{one.path[-1]} for the method's option of that name" if same else ""
        return f"expected a setting that {' or '.join(whom)} uses, got one of {', '.join(having)}{hint}"
    options = "see the command methods"
    if len(whom) == 1:
        options = ", ".join(METHODS[whom[0]].options) or "none"
    return (
        f"expected a field of the recipe ({', '.join(FIELDS)}) or an option of "
        f"{' or '.join(whom)} ({options}), got {one.path[-1]}"
    )
