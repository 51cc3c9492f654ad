"""The loaded functions of one worker: LOAD_WEIGHTS and its end, evictions, and functions that were lost.

Nothing here waits: `step` says what has ended since the last one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from slosched.clock import Clock
from slosched.codes import Code
from slosched.core.worker.interface import DeviceEvent, Op, OpDone, WeightsLost
from slosched.daemon.backends.functions.loaded import LoadedFunction
from slosched.messages import Span


class LoadedFunctions:
    """By device and name; `trial` adds those that are loaded to be measured alone."""

    def __init__(self, *, clock: Clock, announce: Callable[[str], None]) -> None:
        self._clock, self._announce = clock, announce
        self._loaded: dict[tuple[int, str], LoadedFunction] = {}
        self._loads: dict[int, tuple[Op, LoadedFunction, int]] = {}  # ops, with their begin
        #: What is loaded to be measured, and what to call when it is ready or has failed.
        self._trials: list[tuple[LoadedFunction, Callable[[], None]]] = []
        #: Something was begun since the last `step`.
        self.begun = False

    @property
    def unfinished(self) -> bool:
        """True if a load or a trial has not ended: each step may end one."""
        return self.begun or bool(self._loads or self._trials)

    def __iter__(self) -> Iterator[LoadedFunction]:
        yield from self._loaded.values()
        for function, _ in self._trials:
            yield function

    def get(self, gpu_id: int, name: str) -> LoadedFunction | None:
        return self._loaded.get((gpu_id, name))

    def named(self, name: str) -> list[LoadedFunction]:
        """The function `name` on each device that it is loaded on."""
        return [each for each in self._loaded.values() if each.name == name]

    def load(self, op: Op, make: Callable[[], LoadedFunction]) -> None:
        """Begin a LOAD_WEIGHTS; a later step reports its end."""
        key = op.gpu_id, op.model_name
        function = self._loaded.get(key)
        if function is None or function.failed:
            function = self._loaded[key] = make()
        function.model_ids.add(op.model_id)
        self._loads[op.op_id] = op, function, self._clock()
        self.begun = True

    def trial(self, function: LoadedFunction, when_over: Callable[[], None]) -> None:
        """Look after a function that is loaded to be measured, until it is ready or has failed."""
        self._trials.append((function, when_over))
        self.begun = True

    def evict(self, gpu_id: int, model_id: int) -> None:
        for key, function in list(self._loaded.items()):
            if key[0] == gpu_id and model_id in function.model_ids:
                function.model_ids.discard(model_id)
                if not function.model_ids:
                    del self._loaded[key]
                    function.close()

    def step(self, now_ns: int) -> list[DeviceEvent]:
        """Let each function do what is due. Returns the ends of loads, and what was lost."""
        self.begun = False
        for function in list(self):
            function.step(now_ns)
        self._end_trials()
        events: list[DeviceEvent] = []
        self._end_loads(now_ns, events)
        self._lose_weights(events)
        return events

    def close(self) -> None:
        """End every process of a function."""
        for function in self:
            function.close()
        self._loaded.clear()

    def _end_trials(self) -> None:
        over = [trial for trial in self._trials if trial[0].ready or trial[0].failed]
        if over:
            self._trials = [trial for trial in self._trials if trial not in over]
            for _, when_over in over:
                when_over()

    def _end_loads(self, now_ns: int, events: list[DeviceEvent]) -> None:
        for op_id, (op, function, begin_ns) in list(self._loads.items()):
            if not function.ready and not function.failed:
                continue
            del self._loads[op_id]
            span = Span(begin_ns, now_ns, now_ns - begin_ns)
            if function.failed:
                function.model_ids.discard(op.model_id)
                events.append(OpDone(op_id, span, Code.MODEL_PROCESS_ENDED, function.failed))
            else:
                events.append(OpDone(op_id, span))

    def _lose_weights(self, events: list[DeviceEvent]) -> None:
        for key, function in list(self._loaded.items()):
            if not function.failed:
                continue
            loading = {op.model_id for op, each, _ in self._loads.values() if each is function}
            lost = tuple(sorted(function.model_ids - loading))
            del self._loaded[key]
            if lost:
                self._announce(f"{function.name}: {function.failed}")
                events.append(WeightsLost(key[0], lost))
