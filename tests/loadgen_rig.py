"""MLPerf's LoadGen as an oracle: what it sends to, its verdict, and the latencies that it recorded.

LoadGen is a development dependency. A process runs one test of it at a time; the thread that starts it waits,
without the GIL.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import queue
import re
import threading
import time
from array import array
from collections import Counter
from collections.abc import Collection, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import mlperf_loadgen

from slosched.clients.aio import AsyncClient, connect
from slosched.clients.inference import Model
from slosched.codes import Code
from slosched.errors import ConnectionLost
from slosched.messages import InferReply
from slosched.units import NS_PER_MS, NS_PER_S

#: Samples that LoadGen draws from; which one it drew matters to no test here.
_SAMPLES = 16
#: A request that has to be late is held for this time beyond the target.
_BEYOND_NS = 5 * NS_PER_MS
_WITHIN_S = 30.0
#: LoadGen reads an answer's bytes until `QuerySamplesComplete` returns: one that lives as long as the module.
_ANSWER = array("B", [0])
_LATENCY = re.compile(r'"complete_ns":(\d+)')


class System(Protocol):
    """What LoadGen sends to (its "system under test")."""

    def issue(self, queries: Sequence[int]) -> None:
        """Take these queries, by their ids; each is completed once, at any time, in any thread."""


def complete(query: int) -> None:
    """Tell LoadGen that a query has been answered."""
    address, _ = _ANSWER.buffer_info()
    mlperf_loadgen.QuerySamplesComplete([mlperf_loadgen.QuerySampleResponse(query, address, 1)])


@dataclass(frozen=True)
class Asked:
    """A run of LoadGen. `rate_per_s` 0 is its SingleStream scenario, anything else its Server scenario."""

    queries: int
    target_ns: int = NS_PER_S
    rate_per_s: float = 0.0
    percentile: float = 0.99
    seed: int = 0


@dataclass(frozen=True)
class Judged:
    """What LoadGen said of a run. Latencies are from its schedule, in ns.

    `needs` is how many more queries it wants, `estimate_ns` its early-stopping estimate of the percentile
    (SingleStream; 0: none).
    """

    valid: bool
    queries: int
    late: int
    needs: int
    estimate_ns: int
    latencies_ns: tuple[int, ...]


def run(system: System, asked: Asked, folder: Path) -> Judged:
    """Have LoadGen send to `system`, and read what it says of it. Its files go to `folder`."""
    folder.mkdir(parents=True)
    logs = mlperf_loadgen.LogSettings()
    logs.log_output.outdir = str(folder)
    logs.log_output.copy_summary_to_stdout = False
    logs.enable_trace = True  # it alone has each latency
    sut = mlperf_loadgen.ConstructSUT(
        lambda queries: system.issue([query.id for query in queries]), lambda: None
    )
    samples = mlperf_loadgen.ConstructQSL(_SAMPLES, _SAMPLES, lambda _: None, lambda _: None)
    try:
        mlperf_loadgen.StartTestWithLogSettings(sut, samples, _settings(asked), logs)
    finally:
        mlperf_loadgen.DestroyQSL(samples)
        mlperf_loadgen.DestroySUT(sut)
    return _judged(folder)


def _settings(asked: Asked) -> Any:
    settings = mlperf_loadgen.TestSettings()
    settings.mode = mlperf_loadgen.TestMode.PerformanceOnly
    if asked.rate_per_s:
        settings.scenario = mlperf_loadgen.TestScenario.Server
        settings.server_target_qps = asked.rate_per_s
        settings.server_target_latency_ns = asked.target_ns
        settings.server_target_latency_percentile = asked.percentile
    else:
        settings.scenario = mlperf_loadgen.TestScenario.SingleStream
        settings.single_stream_target_latency_percentile = asked.percentile
    settings.min_duration_ms = 0
    settings.min_query_count = settings.max_query_count = asked.queries
    settings.schedule_rng_seed = asked.seed
    settings.sample_index_rng_seed = settings.qsl_rng_seed = asked.seed
    return settings


def _judged(folder: Path) -> Judged:
    entries: dict[str, Any] = {}
    for line in (folder / "mlperf_log_detail.txt").read_text(encoding="utf-8").splitlines():
        entry = json.loads(line.removeprefix(":::MLLOG "))
        entries[entry["key"]] = entry["value"]
    latencies = _LATENCY.findall((folder / "mlperf_log_trace.json").read_text(encoding="utf-8"))
    more = re.search(r"at least (\d+) more quer", entries["early_stopping_result"])
    valid = entries["result_validity"] == "VALID"
    assert valid == entries["early_stopping_met"], folder
    return Judged(
        valid=valid,
        queries=entries["result_query_count"],
        late=entries.get("result_overlatency_query_count", 0),
        needs=int(more[1]) if more else 0,
        estimate_ns=entries.get("early_stopping_latency_ss", 0),
        latencies_ns=tuple(map(int, latencies)),
    )


class Chosen:
    """Completes each query at once, except those whose number is in `late`: these after the target has passed.

    A context manager: it ends its thread.
    """

    def __init__(self, late: Collection[int], *, target_ns: int) -> None:
        self._late, self._hold_s = frozenset(late), (target_ns + _BEYOND_NS) / NS_PER_S
        self._numbers = itertools.count()
        self._held: queue.SimpleQueue[tuple[float, int] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._complete_held, name="held queries")

    def __enter__(self) -> Chosen:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._held.put(None)
        self._thread.join(_WITHIN_S)
        assert not self._thread.is_alive()

    def issue(self, queries: Sequence[int]) -> None:
        for query in queries:
            if next(self._numbers) in self._late:
                self._held.put((time.monotonic() + self._hold_s, query))
            else:
                complete(query)

    def _complete_held(self) -> None:
        """Each is held for the same time, so they are due in the order in which they came."""
        while (held := self._held.get()) is not None:
            due_s, query = held
            time.sleep(max(0.0, due_s - time.monotonic()))
            complete(query)


class Served:
    """A model behind a controller: sends each query as a request of the client's own.

    LoadGen knows no refusal and would count one as a fast answer. So whatever is not an answer is completed
    after the target has passed. A context manager: it ends its session and its thread.
    """

    def __init__(self, address: str, model: str, *, slo_ns: int) -> None:
        self._slo_ns = slo_ns
        self.codes: Counter[int] = Counter()
        self.late = 0  # not in time, by this client's clock from the call of `issue`
        self._waiting: list[tuple[int, float]] = []
        self._lock = threading.Lock()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="client's loop")
        self._thread.start()
        self._client, self._model = self._do(self._connected(address, model))

    def __enter__(self) -> Served:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._do(self._client.close())
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(_WITHIN_S)
            self._loop.close()

    def _do(self, work: Any) -> Any:
        future: Future[Any] = asyncio.run_coroutine_threadsafe(work, self._loop)
        return future.result(_WITHIN_S)

    async def _connected(self, address: str, name: str) -> tuple[AsyncClient, Model]:
        client = await connect(address, name="loadgen").open()
        (model,) = await client.load(name)
        return client, model

    def forget(self, slo_ns: int) -> None:
        """Begin another run, with this SLO."""
        self._slo_ns, self.late = slo_ns, 0
        self.codes.clear()

    def issue(self, queries: Sequence[int]) -> None:
        issued_s = time.monotonic()
        with self._lock:
            first = not self._waiting
            self._waiting.extend((query, issued_s) for query in queries)
        if first:
            self._loop.call_soon_threadsafe(self._send)

    def _send(self) -> None:
        with self._lock:
            waiting, self._waiting = self._waiting, []
        for query, issued_s in waiting:
            self._submit(query, issued_s)
        self._client.flush()

    def _submit(self, query: int, issued_s: float) -> None:
        def on_reply(reply: InferReply, _: object) -> None:
            self._ended(query, issued_s, reply.code)

        try:
            self._client.submit(self._model, slo_ns=self._slo_ns, on_reply=on_reply, later=True)
        except ConnectionLost:
            self._ended(query, issued_s, Code.CANCELLED)

    def _ended(self, query: int, issued_s: float, code: int) -> None:
        latency_ns = (time.monotonic() - issued_s) * NS_PER_S
        self.codes[code] += 1
        self.late += code != Code.OK or latency_ns > self._slo_ns
        if code == Code.OK:
            complete(query)
        else:
            self._loop.call_later((self._slo_ns + _BEYOND_NS) / NS_PER_S, complete, query)
