"""Policies, workloads and devices by name: the built-in ones, and those that other packages add.

A `Registry` is the one place where a name of its kind becomes a thing. It looks among the built-in names, then
among the entry points of installed packages; and `module:attribute` names a thing of any module, also of one in
the current folder, for a quick try. A package is imported when its name is asked for, or when everything is
listed, and never to serve another name. So a package that is broken, or whose name is taken, costs only itself.

Entry points are read from the disk once per process, when a name is asked for that is not built in.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from slosched.discovery import imported
from slosched.errors import ExtensionError, UnknownName, shown_name

if TYPE_CHECKING:
    from importlib.metadata import Distribution, EntryPoint

#: The groups of entry points.
_GROUPS = ("slosched.policies", "slosched.workloads", "slosched.backends")
#: What a name may be, so that commands, lists with commas, files and addresses can be told from it.
_NAME = re.compile(r"(?!.*\.toml$)[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_MODULE_AND_ATTRIBUTE = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")

_Thing = TypeVar("_Thing")


@dataclass(frozen=True)
class Origin:
    """Where a thing from outside comes from.

    `package` and `version` are the distribution's; of a module that is not installed, `package` is its name and
    `version` is empty. `target` is "module:attribute".
    """

    package: str
    version: str
    target: str

    @property
    def text(self) -> str:
        """ "my-package 1.0", or "my_module" for a module that is not installed."""
        return f"{self.package} {self.version}".rstrip()


@dataclass(frozen=True)
class Outside(Generic[_Thing]):
    """One entry point in a list. `thing` is None where `problem` says why it cannot be used."""

    name: str
    origin: Origin
    thing: _Thing | None
    problem: str = ""


class Registry(Generic[_Thing]):
    """All things of one `kind`, such as "workload", by name.

    `group`, one of `_GROUPS`, names the entry points. `built_in` returns slosched's own things and is called at
    every look-up. `check` gets the name, empty for `module:attribute`, and what a package offers under it, and
    returns the thing; it raises ExtensionError with what is wrong, the rest of a sentence ("is not a class").
    """

    def __init__(
        self,
        kind: str,
        group: str,
        built_in: Callable[[], Mapping[str, _Thing]],
        check: Callable[[str, object], _Thing],
    ) -> None:
        self.kind = kind
        assert group in _GROUPS, group
        self.group = group
        self._built_in = built_in
        self._check = check
        self._loaded: dict[str, _Thing] = {}

    def __contains__(self, name: str) -> bool:
        """Whether `name` is built in or offered by a package, which is not imported."""
        return name in self._built_in() or any(e.name == name for e in self._offered())

    def names(self) -> list[str]:
        """The built-in names in their order, then those of packages, none of which is imported."""
        return list(dict.fromkeys([*self._built_in(), *sorted(e.name for e in self._offered())]))

    def get(self, name: str) -> _Thing:
        """The thing called `name`. Raises UnknownName; ExtensionError for a package's that cannot be used."""
        built_in = self._built_in()
        if name in built_in:
            return built_in[name]
        if name not in self._loaded:
            self._loaded[name] = self._load(name)
        return self._loaded[name]

    def origin(self, name: str) -> Origin | None:
        """Where `name` comes from; None for a built-in. Raises as `get`, except for what an import finds."""
        if name in self._built_in():
            return None
        if is_target(name) and name not in self:
            return origin_of(name)
        return _origin(self._entry(name))

    def outside(self) -> Iterator[Outside[_Thing]]:
        """Every entry point of the group, by name. Each is imported; an error becomes its `problem`."""
        built_in = self._built_in()
        offered = sorted(self._offered(), key=lambda each: (each.name, each.value))
        for entry in offered:
            problem = f"slosched has a {self.kind} of its own with this name"
            if entry.name not in built_in:
                try:
                    yield Outside(entry.name, _origin(entry), self.get(entry.name))
                    continue
                except ExtensionError as error:
                    problem = str(error)
            yield Outside(entry.name, _origin(entry), None, problem)
        for package, problem in _installed(self.group).unreadable:
            yield Outside(package, Origin(package, "", ""), None, problem)

    def _offered(self) -> Sequence[EntryPoint]:
        return _installed(self.group).entries

    def _entry(self, name: str) -> EntryPoint:
        """The one entry point called `name`. Raises UnknownName, or ExtensionError if there are several."""
        found = [each for each in self._offered() if each.name == name]
        if not found:
            raise UnknownName(self.kind, name, self.names())
        if len(found) > 1:
            origins = [_origin(each) for each in found]
            raise ExtensionError(
                f"{self.kind} {name!r} is offered by {' and by '.join(o.text for o in origins)}; uninstall "
                f"all but one, or name the one you mean: {', '.join(o.target for o in origins)}"
            )
        return found[0]

    def _load(self, name: str) -> _Thing:
        if is_target(name) and name not in self:
            folder = _current_folder()
            looked_in = f"; looked in the current folder, too, {folder}"
            try:
                return self._checked("", imported(name, folder, looked_in=looked_in))
            except ExtensionError as error:
                raise ExtensionError(f"{self.kind} {name!r} {error}") from None
        entry = self._entry(name)
        target = _target(entry)
        try:
            if not _NAME.fullmatch(name):
                raise ExtensionError(
                    "its name must be letters, digits, '.', '_' and '-', 64 at most"
                )
            return self._checked(name, imported(target, "", looked_in=""))
        except ExtensionError as error:
            raise ExtensionError(
                f"{self.kind} {shown_name(name)} of the package {_origin(entry).text} cannot be used: "
                f"{target} {error}"
            ) from None

    def _checked(self, name: str, thing: object) -> _Thing:
        try:
            return self._check(name, thing)
        except ExtensionError:
            raise
        except Exception as error:  # an attribute of another's class may raise anything
            raise ExtensionError(f"cannot be looked at ({type(error).__name__}: {error})") from None


def _current_folder() -> str:
    """Empty if the folder was deleted."""
    try:
        return str(Path.cwd())
    except OSError:
        return ""


def outside_row(each: Outside[Any], summary: str) -> tuple[str, str]:
    """Name and text of a thing of another package in a list; why it cannot be used, if it cannot."""
    if each.thing is None:
        return each.name, f"CANNOT BE USED: {each.problem} (from {each.origin.text})"
    return each.name, f"{summary} (from {each.origin.text})"


def is_target(name: str) -> bool:
    """True for "module:attribute", which no name of a registry is, nor host:port."""
    return _MODULE_AND_ATTRIBUTE.fullmatch(name) is not None


def check_interface(stated: object, current: int) -> None:
    """Raise ExtensionError unless a thing from outside states the version of the interface that there is."""
    if stated is None:
        raise ExtensionError(f"does not state its interface; give it interface={current}")
    if stated != current:
        raise ExtensionError(
            f"is written for version {stated} of the interface, and this slosched has {current}"
        )


def missing_from(protocol: type[Any], thing: object) -> list[str]:
    """The methods of `protocol` that `thing` lacks."""
    wanted = [
        name
        for name, each in vars(protocol).items()
        if callable(each) or isinstance(each, property)
    ]
    return [name for name in wanted if not name.startswith("_") and not hasattr(thing, name)]


def origin_of(module_or_target: str) -> Origin | None:
    """Where the code of a module comes from; None for slosched's own and Python's."""
    spawned = "__mp_main__"  # what a spawned process calls the main module of its parent
    if module_or_target.startswith(spawned):
        module_or_target = module_or_target.replace(spawned, "__main__", 1)
    top = module_or_target.partition(":")[0].partition(".")[0]
    if top in ("slosched", "builtins"):
        return None
    for group in _GROUPS:
        for entry in _installed(group).entries:
            if _target(entry).partition(":")[0].partition(".")[0] == top:
                found = _origin(entry)
                return Origin(found.package, found.version, module_or_target)
    return Origin(top, "", module_or_target)


def _origin(entry: EntryPoint) -> Origin:
    package, version = _package(entry.dist) if entry.dist is not None else ("unknown package", "")
    return Origin(package, version, _target(entry))


def _target(entry: EntryPoint) -> str:
    """What the entry point names, without the extras that it may ask for; it may be no module:attribute."""
    return entry.value.partition("[")[0].replace(" ", "")


def _package(distribution: Distribution) -> tuple[str, str]:
    """Name and version, as far as its metadata can be read."""
    try:
        return str(distribution.name), str(distribution.version)
    except Exception:  # metadata that was removed by half, or is not text
        return "unreadable package", ""


@dataclass(frozen=True)
class _Installed:
    """The entry points of a group, and (package, problem) of each package whose entry points cannot be read."""

    entries: Sequence[EntryPoint]
    unreadable: Sequence[tuple[str, str]] = ()


@functools.cache
def _installed(group: str) -> _Installed:
    from importlib.metadata import distributions, entry_points  # 20 ms, which few commands need

    try:
        return _Installed(entry_points(group=group))
    except Exception:  # one package's file, whatever its group; so the packages are read one by one
        entries: list[EntryPoint] = []
        unreadable: list[tuple[str, str]] = []
        for each in distributions():
            try:
                entries += [e for e in each.entry_points.select(group=group) if e not in entries]
            except Exception as error:
                problem = f"its entry points cannot be read ({type(error).__name__}: {error})"
                unreadable.append((_package(each)[0], problem))
        return _Installed(entries, unreadable)


def forget_installed() -> None:
    """Read the entry points again when a name is next asked for; for tests and notebooks."""
    _installed.cache_clear()
