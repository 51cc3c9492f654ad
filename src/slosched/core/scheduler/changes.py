"""The change feed: what became different in the cluster since a consumer looked last.

A consumer follows a subject and gets a dict of its own, into which each thing that changed is put under its
number. It takes out what it has dealt with, when it next decides; a thing that changed twice is there once.
Nothing runs when something changes, so that the order in which consumers were made means nothing.
"""

from __future__ import annotations

from typing import TypeVar

from slosched.core.scheduler.state import Gpu, Instance, Worker

_Thing = TypeVar("_Thing")

#: All that changed in one subject since its consumer last looked, by number.
Dirty = dict[int, _Thing]


class Changes:
    """Four subjects, each a list of its consumers' dicts; `follow_*` adds one."""

    __slots__ = ("_execs", "_loads", "_paths", "_unloaded")

    def __init__(self) -> None:
        self._execs: list[Dirty[Gpu]] = []
        self._loads: list[Dirty[Gpu]] = []
        self._paths: list[Dirty[Worker]] = []
        self._unloaded: list[Dirty[Instance]] = []

    # ----------------------------------------------------------------------------- consumers

    def follow_execs(self) -> Dirty[Gpu]:
        """GPUs, by index, whose outstanding Infers or resident weights changed, that joined or left."""
        return _followed(self._execs)

    def follow_loads(self) -> Dirty[Gpu]:
        """GPUs, by index, on which loads began or ended, that joined or left."""
        return _followed(self._loads)

    def follow_paths(self) -> Dirty[Worker]:
        """Workers, by id, whose predicted latency changed."""
        return _followed(self._paths)

    def follow_unloaded(self) -> Dirty[Instance]:
        """Instances, by id, that left the workers' host memory."""
        return _followed(self._unloaded)

    # ------------------------------------------------------------------------------ publishers

    def execs(self, gpu: Gpu) -> None:
        for dirty in self._execs:
            dirty[gpu.index] = gpu

    def loads(self, gpu: Gpu) -> None:
        for dirty in self._loads:
            dirty[gpu.index] = gpu

    def path(self, worker: Worker) -> None:
        for dirty in self._paths:
            dirty[worker.worker_id] = worker

    def unloaded(self, model: Instance) -> None:
        for dirty in self._unloaded:
            dirty[model.model_id] = model


def _followed(consumers: list[Dirty[_Thing]]) -> Dirty[_Thing]:
    dirty: Dirty[_Thing] = {}
    consumers.append(dirty)
    return dirty
