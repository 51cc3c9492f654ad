"""The Python files of a version, imported under a name that no other version has.

Two models may each have a model.py: they are modules of two packages. The sources are read once, before any of
them is imported, so that nothing is opened by name later. A file imports another one of its folder with
`from . import other`; `import other` finds installed packages alone.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from importlib.abc import InspectLoader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_loader
from itertools import count
from types import CodeType, ModuleType

_PREFIX = "_slosched_repository_"
#: Numbers of packages: all Packages of a process share sys.modules, so no number is used twice.
_NUMBERS = count(1)


class _Sources(InspectLoader):
    """Loads the modules of one version from memory. `files` has their sources by path in the folder."""

    def __init__(self, package: str, folder: str, files: Mapping[str, str]) -> None:
        self.package, self._folder, self._files = package, folder, files

    def path_of(self, name: str) -> str | None:
        """The path of the module `name` in the folder; None: there is none. Empty: the folder itself."""
        if name == self.package:
            return "__init__.py" if "__init__.py" in self._files else ""
        stem = name.removeprefix(f"{self.package}.").replace(".", "/")
        for path in (f"{stem}/__init__.py", f"{stem}.py"):
            if path in self._files:
                return path
        return "" if any(path.startswith(f"{stem}/") for path in self._files) else None

    def is_package(self, fullname: str) -> bool:
        path = self.path_of(fullname)
        return path is not None and (not path or path.endswith("__init__.py"))

    def get_source(self, fullname: str) -> str:
        return self._files.get(self.path_of(fullname) or "", "")

    def get_code(self, fullname: str) -> CodeType:
        return self.source_to_code(self.get_source(fullname), self.file_of(fullname))

    def file_of(self, name: str) -> str:
        """The path of the file that `name` was read from, for tracebacks and __file__."""
        return f"{self._folder}/{self.path_of(name) or '__init__.py'}"

    def spec(self, name: str) -> ModuleSpec | None:
        if self.path_of(name) is None:
            return None
        spec = spec_from_loader(
            name, self, origin=self.file_of(name), is_package=self.is_package(name)
        )
        if spec is not None:
            spec.has_location = True  # so that the module has a __file__
        return spec


class _Finder(MetaPathFinder):
    """Finds the modules of all versions that were taken, and nothing else."""

    def __init__(self) -> None:
        self.sources: dict[str, _Sources] = {}  # by package

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        found = self.sources.get(fullname.partition(".")[0])
        return None if found is None else found.spec(fullname)


class Packages:
    """The packages of the versions in this process. One that is loaded again gets a new package."""

    def __init__(self) -> None:
        self._finder = _Finder()
        self._by_name: dict[str, str] = {}

    def take(self, name: str, folder: str, files: Mapping[str, str]) -> str:
        """Make a package of the `files` of the version `name`; returns its name. Nothing is imported yet."""
        if self._finder not in sys.meta_path:
            sys.meta_path.append(self._finder)
        self.drop(name)
        package = f"{_PREFIX}{next(_NUMBERS)}"
        self._finder.sources[package] = _Sources(package, folder, files)
        self._by_name[name] = package
        return package

    def drop(self, name: str) -> None:
        """Forget the version `name`. What was made of its classes lives on."""
        package = self._by_name.pop(name, None)
        if package is None:
            return
        self._finder.sources.pop(package, None)
        for each in [m for m in sys.modules if m == package or m.startswith(f"{package}.")]:
            del sys.modules[each]
