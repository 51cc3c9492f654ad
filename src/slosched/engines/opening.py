"""Opens an engine by its name."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any, cast

from slosched.engines.engine import Engine, Offered
from slosched.errors import UnknownName

#: Name -> (module, class); a class takes functions and options of its own.
ENGINES = {
    "local": ("slosched.engines.local", "LocalEngine"),
    "dask": ("slosched.engines.dask_engine", "DaskEngine"),
    "slosched": ("slosched.engines.live", "LiveEngine"),
}


def open(name: str, functions: Sequence[Offered], **options: Any) -> Engine:
    """Open the engine `name` with these functions: modules, "module:function", or functions themselves.

    `local` runs each call at once, in this process. `dask` needs the package of that name (extra dask), and
    `slosched` starts a controller and a worker on this host or uses the controller at `address`. What `options`
    there are, their classes say. Raises UnknownName, FunctionError or ExtensionError for functions that cannot
    be used, MissingPackage, and what the engine raises when it cannot start.
    """
    if name not in ENGINES:
        raise UnknownName("engine", name, list(ENGINES))
    module, attribute = ENGINES[name]
    return cast(Engine, getattr(import_module(module), attribute)(functions, **options))
