"""The lines that a controller and a client print every ten seconds (Clockwork, docs/telemetry.md).

Pure accumulators of constant size: records go in, `lines` gives the text and starts the next
interval. The published lines call every answered request a success; what was asked for is that the
deadline was met, so each first line also says that, and who judged it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from slosched.codes import ActionType, Code
from slosched.core.scheduler.interface import ActionRecord, RequestRecord
from slosched.telemetry.client_log import NO_ANSWER, ClientRecord
from slosched.units import NS_PER_MS, NS_PER_S

#: Printed this often.
INTERVAL_NS = 10 * NS_PER_S

#: Durations are also printed as if the GPU had run at this clock throughout (MHz; INFER5's default).
NORM_CLOCK_MHZ = 1380

_KIND_NAMES = {ActionType.LOAD_WEIGHTS: "LoadW", ActionType.INFER: "Infer"}


@dataclass
class _Spread:
    """Least, greatest and mean of a stream of durations, in ns."""

    count: int = 0
    total: float = 0.0
    least: float = math.inf
    greatest: float = -math.inf

    def add(self, value: float) -> None:
        self.count += 1
        self.total += value
        self.least = min(self.least, value)
        self.greatest = max(self.greatest, value)

    def min_ms(self) -> str:
        return _ms(self.least) if self.count else "-"

    def max_ms(self) -> str:
        return _ms(self.greatest) if self.count else "-"

    def mean_ms(self) -> str:
        return _ms(self.total / self.count) if self.count else "-"


@dataclass
class _Traffic:
    """Bytes and messages to and from one kind of peer."""

    sent_bytes: int = 0
    sent: int = 0
    received_bytes: int = 0
    received: int = 0

    def line(self, peer: str, seconds: float) -> str:
        return (
            f"{peer}: {self.sent_bytes / 1e6 / seconds:.1f} MB/s ({self.sent} msgs) snd, "
            f"{self.received_bytes / 1e6 / seconds:.1f} MB/s ({self.received} msgs) rcv"
        )


@dataclass
class _Answers:
    """Answered requests of an interval, as one side sees them."""

    count: int = 0
    failed: int = 0
    in_time: int = 0
    latency: _Spread = field(default_factory=_Spread)  # of successes

    def add(self, code: int, latency_ns: int, in_time: bool) -> None:
        self.count += 1
        self.in_time += in_time
        if code == Code.OK:
            self.latency.add(latency_ns)
        else:
            self.failed += 1

    def spread(self) -> str:
        s = self.latency
        return f"min={s.min_ms()} max={s.max_ms()} mean={s.mean_ms()}"


@dataclass
class _Kind:
    """Actions of one kind on one GPU that ended with code 0."""

    requests: int = 0
    exec: _Spread = field(default_factory=_Spread)
    norm: _Spread = field(default_factory=_Spread)
    e2e: _Spread = field(default_factory=_Spread)
    clocks: list[int] = field(default_factory=list)  # least and greatest, once known

    def add(self, record: ActionRecord) -> None:
        self.requests += record.batch_size
        duration_ns = record.exec.duration_ns
        self.exec.add(duration_ns)
        self.e2e.add(record.result_received_ns - record.sent_ns)
        seen = [mhz for mhz in (record.gpu_clock_before_mhz, record.gpu_clock_mhz) if mhz > 0]
        scale = sum(seen) / len(seen) / NORM_CLOCK_MHZ if seen else 1.0
        self.norm.add(duration_ns * scale)
        known = self.clocks + seen
        self.clocks = [min(known), max(known)] if known else []

    def line(self, seconds: float) -> str:
        clock = f"[{self.clocks[0]}-{self.clocks[1]}]" if self.clocks else "[-]"
        return (
            f"min={self.exec.min_ms()} max={self.exec.max_ms()} mean={self.exec.mean_ms()} "
            f"e2emean={self.e2e.mean_ms()} e2emax={self.e2e.max_ms()} "
            f"throughput={self.requests / seconds:.1f} "
            f"utilization={self.exec.total / NS_PER_S / seconds:.2f} clock={clock} "
            f"norm_max={self.norm.max_ms()} norm_mean={self.norm.mean_ms()}"
        )


class ControllerConsole:
    """The controller's ten-second lines.

    The first interval begins at `now_ns`, or with the first record where that is not given.
    """

    def __init__(self, *, now_ns: int | None = None) -> None:
        self._since_ns = now_ns
        self._reset()

    def _reset(self) -> None:
        self._answers = _Answers()
        self._kinds: dict[tuple[int, int, int], _Kind] = {}
        self._workers = _Traffic()

    def add_request(self, record: RequestRecord) -> None:
        if self._since_ns is None:
            self._since_ns = record.arrival_ns
        latency_ns = record.departure_ns - record.arrival_ns
        self._answers.add(record.code, latency_ns, record.deadline_met)

    def add_action(self, record: ActionRecord) -> None:
        """Count a load or an inference that ended with code 0; others show in the action log."""
        if self._since_ns is None:
            self._since_ns = record.sent_ns
        if record.code != Code.OK or record.action_type not in _KIND_NAMES:
            return
        key = (record.worker_id, record.gpu_id, int(record.action_type))
        kind = self._kinds.get(key)
        if kind is None:
            kind = self._kinds[key] = _Kind()
        kind.add(record)

    def add_sent(self, size_bytes: int) -> None:
        """Count one message to a worker."""
        self._workers.sent += 1
        self._workers.sent_bytes += size_bytes

    def add_received(self, size_bytes: int) -> None:
        """Count one message from a worker."""
        self._workers.received += 1
        self._workers.received_bytes += size_bytes

    def lines(self, now_ns: int) -> list[str]:
        """Return the lines of the interval that ends at `now_ns`, and begin the next one.

        Durations are in ms, rates per second, utilization in busy seconds per second. `success`
        counts code 0, `satisfaction` deadlines met. GPUs without finished work have no line, and an
        interval in which no request ended and no action did has none at all.
        """
        since_ns, self._since_ns = self._since_ns, now_ns
        a = self._answers
        if since_ns is None or (a.count == 0 and not self._kinds):
            self._reset()
            return []
        seconds = max(now_ns - since_ns, 1) / NS_PER_S
        lines = [
            f"Client throughput={a.count / seconds:.1f} "
            f"success={_percent(a.count - a.failed, a.count)} "
            f"({a.failed}/{a.count} violations) {a.spread()} "
            f"satisfaction={_percent(a.in_time, a.count)} (controller, from arrival)"
        ]
        for (worker, gpu, kind), seen in sorted(self._kinds.items(), key=lambda item: item[0]):
            lines.append(f"W{worker}-GPU{gpu} {_KIND_NAMES[ActionType(kind)]} {seen.line(seconds)}")
        if self._workers.sent or self._workers.received:
            lines.append(self._workers.line("Network->Workers", seconds))
        self._reset()
        return lines


class ClientConsole:
    """The load generator's ten-second lines. The first interval begins at `now_ns`."""

    def __init__(self, *, now_ns: int) -> None:
        self._since_ns = now_ns
        self._submitted = 0
        self._reset()

    def _reset(self) -> None:
        self._answers = _Answers()
        self._controller = _Traffic()

    def add_sent(self, size_bytes: int = 0) -> None:
        """Count one request sent."""
        self._submitted += 1
        self._controller.sent += 1
        self._controller.sent_bytes += size_bytes

    def add_reply(self, record: ClientRecord, size_bytes: int = 0) -> None:
        """Count one request's end; its latency runs from the scheduled send."""
        if record.code != NO_ANSWER:
            self._controller.received += 1
            self._controller.received_bytes += size_bytes
        self._answers.add(record.code, record.latency_ns, record.in_time)

    def lines(self, now_ns: int) -> list[str]:
        """Return the lines of the interval that ends at `now_ns`, and begin the next one.

        `total` counts what was ever submitted; durations are in ms from the scheduled send.
        """
        seconds = max(now_ns - self._since_ns, 1) / NS_PER_S
        a = self._answers
        lines = [
            f"total={self._submitted} throughput={a.count / seconds:.1f} {a.spread()} "
            f"satisfaction={_percent(a.in_time, a.count)} (client, from the scheduled send)",
            self._controller.line("Client->Controller", seconds),
        ]
        self._since_ns = now_ns
        self._reset()
        return lines


def _ms(duration_ns: float) -> str:
    return f"{duration_ns / NS_PER_MS:.2f}"


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.2f}%" if whole else "-"
