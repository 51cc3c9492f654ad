"""Finds the functions that a worker or an engine offers: in modules that are named, and in entry points.

Nothing that was not named is imported, and nothing that comes over a wire names a module.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable, Iterator, Sequence
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

from slosched.discovery import imported
from slosched.errors import ExtensionError, shown_name
from slosched.functions.errors import FunctionError
from slosched.functions.function import Function

#: The group of entry points; each names a module with functions, or "module:function".
GROUP = "slosched.functions"
#: The spec that stands for all entry points; `entry-points:NAME` stands for one of them.
ENTRY_POINTS = "entry-points"
MOST_FUNCTIONS = 1_000


def find(specs: Sequence[str], *, folder: str | None = None) -> dict[str, Function[Any]]:
    """The functions of `specs`, by name, in the order in which they were found.

    A spec is "package.module" (all functions that are attributes of it), "package.module:function",
    "entry-points" (of all installed packages) or "entry-points:NAME". Modules that are not installed are
    looked for in `folder`, by default the current one; last of all, so that no file there takes the place of an
    installed module.

    Raises FunctionError for a spec that names none, for two functions of one name and for more than 1,000;
    ExtensionError for a module that cannot be imported.
    """
    looked_in = _current_folder() if folder is None else folder
    return collected(each for spec in specs for each in _of_spec(spec, looked_in))


def collected(functions: Iterable[Function[Any]]) -> dict[str, Function[Any]]:
    """Functions by name. Raises FunctionError for two of one name, more than 1,000, and for other things."""
    found: dict[str, Function[Any]] = {}
    for each in functions:
        if not isinstance(each, Function):
            raise FunctionError(f"{each!r} is not a function; decorate it with @slosched.function")
        other = found.setdefault(each.name, each)
        if other is not each:
            raise FunctionError(
                f"two functions are called {each.name!r}: {other.target} and {each.target}; give one of them "
                "another name=..."
            )
        if len(found) > MOST_FUNCTIONS:
            raise FunctionError(
                f"there are more than {MOST_FUNCTIONS:,} functions; name fewer modules"
            )
    return found


def _of_spec(spec: str, folder: str) -> Iterator[Function[Any]]:
    if not isinstance(spec, str) or not spec.strip():
        raise FunctionError(f"{spec!r} is not a module with functions")
    kind, _, name = spec.partition(":")
    if kind == ENTRY_POINTS:
        for entry in _entries(name):
            target = entry.value.partition("[")[0].replace(" ", "")
            try:
                yield from _of_target(target, "")
            except (FunctionError, ExtensionError) as error:
                raise type(error)(f"the entry point {shown_name(entry.name)}: {error}") from None
    else:
        yield from _of_target(spec, folder)


def _entries(name: str) -> list[EntryPoint]:
    """All entry points of the group, by name; or the one of that name."""
    offered = sorted(entry_points(group=GROUP), key=lambda each: (each.name, each.value))
    if not name:
        return offered
    found = [each for each in offered if each.name == name]
    if not found:
        known = ", ".join(each.name for each in offered) or "none"
        raise FunctionError(
            f"no installed package has an entry point {shown_name(name)} in the group {GROUP}; there: {known}"
        )
    return found


def _of_target(target: str, folder: str) -> list[Function[Any]]:
    module_name, colon, attribute = target.partition(":")
    parts = [*module_name.split("."), *(attribute.split(".") if colon else ())]
    if not all(part.isidentifier() for part in parts):
        raise FunctionError(
            f"{shown_name(target)} is not a module with functions; write package.module, "
            f"package.module:function or {ENTRY_POINTS}"
        )
    looked_in = f"; looked in {folder}, too" if folder else ""
    if not colon:
        return _of_module(_module(module_name, folder, looked_in))
    try:
        found = imported(target, folder, looked_in=looked_in)
    except ExtensionError as error:
        raise ExtensionError(f"{shown_name(target)} {error}") from None
    if isinstance(found, ModuleType):
        return _of_module(found)
    if isinstance(found, Function):
        return [found]
    raise FunctionError(
        f"{target} is a {type(found).__name__} and not a function; decorate it with @slosched.function"
    )


def _module(name: str, folder: str, looked_in: str) -> ModuleType:
    if folder and folder not in sys.path:
        sys.path.append(folder)
    try:
        return import_module(name)
    except (Exception, SystemExit) as error:  # the module's own code may raise anything
        raise ExtensionError(
            f"module {shown_name(name)} cannot be imported ({type(error).__name__}: {error}){looked_in}"
        ) from None


def _of_module(module: ModuleType) -> list[Function[Any]]:
    """The functions that are attributes of a module, each once."""
    found = [each for each in vars(module).values() if isinstance(each, Function)]
    if not found:
        plain = [
            name
            for name, each in vars(module).items()
            if inspect.isfunction(each) and each.__module__ == module.__name__
        ]
        hint = f"; it has {', '.join(plain[:8])}, which are not decorated" if plain else ""
        raise FunctionError(
            f"module {module.__name__!r} has no functions{hint}; decorate them with @slosched.function"
        )
    return list(dict.fromkeys(found))


def _current_folder() -> str:
    """Empty if the folder was deleted."""
    try:
        return str(Path.cwd())
    except OSError:
        return ""
