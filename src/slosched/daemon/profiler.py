"""Measure models on a worker's device: what `slosched profile` writes into a TOML profile."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from slosched.config import LIBRARIES, LIBRARY_PREFIXES, ModelProfile, WorkerConfig, canonical_model
from slosched.config_file import load_profile
from slosched.daemon.backends.devices import cuda_device, on_cpu
from slosched.daemon.repository.listing import offered
from slosched.daemon.repository.watcher import list_once
from slosched.errors import InvalidConfig, SloschedError, UnknownName
from slosched.model_source import is_version_of, newest_version

if TYPE_CHECKING:
    from slosched.daemon.backends.cpu.backend import CpuBench
    from slosched.daemon.backends.cuda.measuring import GpuBench

#: No batch class is left out for being slow: the profile should say how slow it is.
_ANY_EXEC_NS = 2**62


class Profiler:
    """Measures what a worker of `config` would serve, on `config.device`.

    `extra` are names of libraries' models to be known beside the config's. Raises MissingPackage,
    InvalidConfig or UnknownName if the device or the config cannot be used. An emulated device answers
    from its profile. `close` it, or use it in a `with`.
    """

    def __init__(self, config: WorkerConfig, extra: Sequence[str] = ()) -> None:
        self._config = config
        self._known: dict[str, ModelProfile] = {}
        self._bench: GpuBench | CpuBench | None = None
        self._versions: tuple[str, ...] = ()  # of the repository
        self._left_out: dict[str, str] = {}
        if config.device == "emulated":
            self._known = load_profile(config.profile).models
            self.names = tuple(self._known)
            return
        wanted = {*config.libraries, *(n.partition("/")[0] for n in extra if _of_library(n))}
        libraries = tuple(library for library in LIBRARIES if library in wanted)
        config = replace(config, libraries=libraries)
        if on_cpu(config.device):
            from slosched.daemon.backends.cpu.backend import CpuBench

            self._bench = CpuBench(config)
        else:
            device = cuda_device(config.device)  # says first if there is no such GPU
            from slosched.daemon.backends.cuda.measuring import GpuBench

            self._bench = GpuBench(config, device)
        if config.repository:
            self._open_repository(config.repository, self._bench)
        own = {canonical_model(source.name) for source in config.models}
        self.names = tuple(
            name for name in self._bench.loadable if name in own or not _of_library(name)
        )

    #: Canonical names of the zoo's models and the config's; not those of libraries and of a repository, which
    #: may be thousands.
    names: tuple[str, ...]

    def _open_repository(self, folder: str, bench: GpuBench | CpuBench) -> None:
        listing = offered(list_once(folder), bench.loadable, bench.no_cupy)
        bench.offer(listing.versions)
        self._versions = tuple(version.name for version in listing.versions)
        self._left_out = dict(listing.left_out)

    def close(self) -> None:
        """End what it started; idempotent."""
        if self._bench is not None:
            self._bench.close()

    def __enter__(self) -> Profiler:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def canonical(self, name: str) -> str:
        """The name under which `name` is measured: of a repository's model, its newest version.

        Raises UnknownName, and InvalidConfig for a version that is left out.
        """
        known = (*(self._known if self._bench is None else self._bench.loadable), *self._versions)
        if canonical_model(name) in known:
            return canonical_model(name)
        newest = newest_version(name, self._versions)
        if newest:
            return newest
        for each, reason in self._left_out.items():
            if each == name or is_version_of(each, name):
                raise InvalidConfig(f"{each} of the repository is left out: {reason}")
        raise UnknownName("model", name, list(known))

    def measure(
        self, name: str, batches: Sequence[int], *, progress: Callable[[str], None] | None = None
    ) -> ModelProfile:
        """The times of `name`: exec for each batch size of `batches` and 1, transfer of weights, ns.

        Medians of about ten runs each, bounded to seconds per batch size. A batch size that fails ends
        the list (a profile says so by leaving it out). Raises UnknownName, InvalidConfig for a model
        that does not run, and whatever an operator's own code raises.
        """
        canonical = self.canonical(name)
        wanted = sorted({1, *batches})
        if wanted[0] < 1:
            raise InvalidConfig(f"batch sizes must be at least 1, not {wanted[0]}")
        if self._known:
            known = self._known[canonical]
            by_length = {length: _only(known.times(length), wanted) for length in known.exec_ns_at}
            return replace(known, exec_ns=_only(known.exec_ns, wanted), exec_ns_at=by_length)
        assert self._bench is not None
        measured = self._bench.measure(
            canonical, wanted, max_exec_ns=_ANY_EXEC_NS, progress=progress
        )
        return replace(measured, name=canonical)  # a config may name a model by its alias


def _only(exec_ns: Mapping[int, int], batches: Sequence[int]) -> dict[int, int]:
    return {batch: ns for batch, ns in exec_ns.items() if batch in batches}


def _of_library(name: str) -> bool:
    return name.startswith(LIBRARY_PREFIXES)


def profile_model(
    name: str,
    config: WorkerConfig,
    batches: Sequence[int],
    *,
    progress: Callable[[str], None] | None = None,
) -> ModelProfile:
    """One model of `config`; see Profiler, which raises."""
    with Profiler(config, [name]) as profiler:
        return profiler.measure(name, batches, progress=progress)


def profile_models(
    profiler: Profiler,
    names: Sequence[str],
    batches: Sequence[int],
    *,
    keep: Callable[[ModelProfile], None],
    progress: Callable[[str], None],
) -> list[str]:
    """Measure each of `names` and give it to `keep` at once. Returns those that failed.

    A model that fails is told to `progress`, and the others go on: a long job should lose nothing to
    one of them. Raises what `keep` raises.
    """
    failed = []
    for place, name in enumerate(names, start=1):
        progress(f"{name} ({place} of {len(names)})")
        try:
            measured = profiler.measure(name, batches, progress=progress)
        except Exception as error:  # a model's own code may raise anything
            reason = str(error) if isinstance(error, SloschedError) else repr(error)
            progress(f"{name} failed: {reason}")
            failed.append(name)
            continue
        keep(measured)
    return failed
