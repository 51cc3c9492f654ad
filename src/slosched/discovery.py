"""Finds what registers itself by being there: the classes of a package's modules.

So a policy or a kind of action is one file, and no list of them has to be edited.
"""

from __future__ import annotations

import inspect
from importlib import import_module
from pkgutil import iter_modules
from typing import Any


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
