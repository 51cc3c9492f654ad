"""Finds code by where it stands: the classes of a package's modules, and what "module:attribute" names.

So a policy or a kind of action is one file, and no list of them has to be edited.
"""

from __future__ import annotations

import inspect
import sys
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

from slosched.errors import ExtensionError


def classes_in(package: str) -> list[type[Any]]:
    """Return the concrete classes that the modules of `package` define, by module and place.

    Imports each module of the package, and not those of packages within it.
    """
    found: list[type[Any]] = []
    for info in iter_modules(import_module(package).__path__, f"{package}."):
        if not info.ispkg:
            module = import_module(info.name)
            found += [
                each
                for each in vars(module).values()
                if inspect.isclass(each)
                and each.__module__ == info.name
                and not inspect.isabstract(each)
            ]
    return found


def imported(target: str, folder: str, *, looked_in: str) -> Any:
    """What `target`, "package.module:attribute", names. Raises ExtensionError, the rest of a sentence.

    A module that is not installed is looked for in `folder`, unless that is empty: last of all, so that no file
    there takes the place of an installed module. `looked_in` says so in the error.
    """
    module_name, _, attribute = target.partition(":")
    if folder and folder not in sys.path:
        sys.path.append(folder)
    try:
        found: Any = import_module(module_name)
        for name in attribute.split("."):
            found = getattr(found, name)
        return found
    except (Exception, SystemExit) as error:  # the module's own code may raise anything
        raise ExtensionError(
            f"cannot be imported ({type(error).__name__}: {error})"
            f"{_taken_elsewhere(module_name, folder) or looked_in}"
        ) from None


def _taken_elsewhere(module_name: str, folder: str) -> str:
    """A note for an error, where another module of that name was found before the one in `folder`."""
    top = module_name.partition(".")[0]
    module = sys.modules.get(top)
    if not folder or module is None:
        return ""
    there = [path for path in (Path(folder, f"{top}.py"), Path(folder, top)) if path.exists()]
    taken = [getattr(module, "__file__", None), *getattr(module, "__path__", ())]
    files = [Path(path).resolve() for path in taken if path]
    if not there or any(file.is_relative_to(Path(folder).resolve()) for file in files):
        return ""
    found = files[0] if files else "a module built into Python"
    return f"; the module {top!r} was taken from {found}, not from {there[0]}: rename yours"
