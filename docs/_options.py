"""Describes the options of configurations in the reference: the fields that `option(default, help)` makes."""

from __future__ import annotations

import ast
from typing import Any

import griffe


class Options(griffe.Extension):
    """Gives fields their default in place of the call, and classes a list of their options."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Look at all classes of the package, before their parameters are made of their fields."""
        helps: dict[str, dict[str, str]] = {}
        classes = list(_classes(pkg))
        for one in classes:
            helps[one.path] = {
                name: text for name, field in one.attributes.items() if (text := _take_help(field))
            }
        for one in classes:
            # Those of the bases first, as the parameters are.
            bases = [base for base in reversed(one.mro()) if base.path in helps]
            found = {
                name: text for base in (*bases, one) for name, text in helps[base.path].items()
            }
            if found and one.docstring is not None and "\nArgs:\n" not in one.docstring.value:
                listed = "\n".join(f"    {name}: {text}" for name, text in found.items())
                one.docstring.value += f"\n\nArgs:\n{listed}\n"


def _classes(module: griffe.Module) -> list[griffe.Class]:
    found = list(module.classes.values())
    for inner in module.modules.values():
        if not inner.is_alias:
            found += _classes(inner)
    return [one for one in found if not one.is_alias]


def _take_help(field: griffe.Attribute) -> str:
    """The help of a field that is `option(default, help, ...)`, which then has its default alone."""
    call = field.value
    if not isinstance(call, griffe.ExprCall) or call.canonical_path.rpartition(".")[2] != "option":
        return ""
    default, help, *_ = call.arguments
    field.value = default
    return str(ast.literal_eval(str(help)))
