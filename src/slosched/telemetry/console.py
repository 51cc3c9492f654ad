"""The lines that a controller and a client print every ten seconds (Clockwork, docs/telemetry.md).

`lines` gives the text of an interval and starts the next one: the controller's from what its tally counted
in between, the client's from the records that it was given. The published lines call every answered
request a success; what was asked for is that the deadline was met, so each first line also says that,
and who judged it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from slosched.codes import ActionType, Code
from slosched.telemetry.client_log import NO_ANSWER, ClientRecord
from slosched.telemetry.tally import Lane, Tally
from slosched.units import NS_PER_MS, NS_PER_S, format_share

#: Printed this often.
INTERVAL_NS = 10 * NS_PER_S

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

    def __str__(self) -> str:
        if not self.count:
            return "min=- max=- mean=-"
        mean_ns = self.total / self.count
        return f"min={_ms(self.least)} max={_ms(self.greatest)} mean={_ms(mean_ns)}"


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


class ControllerConsole:
    """The controller's ten-second lines, from its `tally`. The first interval begins at `now_ns`."""

    def __init__(self, tally: Tally, *, now_ns: int) -> None:
        self._tally = tally
        self._since_ns = now_ns
        self._workers = _Traffic()
        self._look()

    def _look(self) -> None:
        """Remember the totals of now: the next interval counts from here."""
        tally = self._tally
        self._served, self._latency_ns = tally.served.count, tally.served.total
        self._answered, self._in_time = tally.answered, tally.in_time
        self._lanes = {key: _totals(lane) for key, lane in tally.lanes.items()}
        tally.forget_extremes()

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
        tally = self._tally
        seconds = max(now_ns - self._since_ns, 1) / NS_PER_S
        lanes = [
            line
            for key, lane in sorted(tally.lanes.items(), key=lambda item: item[0])
            if (line := _lane_line(key, lane, self._lanes.get(key, _NOTHING), seconds))
        ]
        count = tally.answered - self._answered
        lines = []
        if count or lanes:
            served = tally.served.count - self._served
            mean_ns = (tally.served.total - self._latency_ns) / served if served else 0.0
            spread = _Spread(served, mean_ns * served, tally.least_ns, tally.greatest_ns)
            lines = [
                f"Client throughput={count / seconds:.1f} "
                f"success={_percent(served, count)} ({count - served}/{count} violations) {spread} "
                f"satisfaction={_percent(tally.in_time - self._in_time, count)} "
                "(controller, from arrival)",
                *lanes,
            ]
            if self._workers.sent or self._workers.received:
                lines.append(self._workers.line("Network->Workers", seconds))
        self._since_ns, self._workers = now_ns, _Traffic()
        self._look()
        return lines


def _totals(lane: Lane) -> tuple[int, int, int, int, float]:
    norm_ns = lane.norm_ns if lane.clocked else lane.exec_ns
    return lane.count, lane.requests, lane.exec_ns, lane.e2e_ns, norm_ns


_NOTHING: tuple[int, int, int, int, float] = (0, 0, 0, 0, 0)


def _lane_line(
    key: tuple[int, int, int], lane: Lane, before: tuple[int, int, int, int, float], seconds: float
) -> str:
    """What one GPU did since `before`; empty if nothing, or nothing that has a line."""
    worker, gpu, kind = key
    count, requests, exec_ns, e2e_ns, norm_ns = (
        now - then for now, then in zip(_totals(lane), before, strict=True)
    )
    if not count or kind not in _KIND_NAMES:
        return ""
    clock = f"[{lane.clock_least}-{lane.clock_greatest}]" if lane.clock_greatest else "[-]"
    norm_greatest = lane.norm_greatest if lane.clocked else lane.greatest
    return (
        f"W{worker}-GPU{gpu} {_KIND_NAMES[ActionType(kind)]} "
        f"min={_ms(lane.least)} max={_ms(lane.greatest)} mean={_ms(exec_ns / count)} "
        f"e2emean={_ms(e2e_ns / count)} e2emax={_ms(lane.e2e_greatest)} "
        f"throughput={requests / seconds:.1f} "
        f"utilization={exec_ns / NS_PER_S / seconds:.2f} clock={clock} "
        f"norm_max={_ms(norm_greatest)} norm_mean={_ms(norm_ns / count)}"
    )


class ClientConsole:
    """The load generator's ten-second lines. The first interval begins at `now_ns`."""

    def __init__(self, *, now_ns: int) -> None:
        self._since_ns = now_ns
        self._submitted = 0
        self._reset()

    def _reset(self) -> None:
        self._count = self._in_time = 0
        self._latency = _Spread()  # of successes
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
        self._count += 1
        self._in_time += record.in_time
        if record.code == Code.OK:
            self._latency.add(record.latency_ns)

    def lines(self, now_ns: int) -> list[str]:
        """Return the lines of the interval that ends at `now_ns`, and begin the next one.

        `total` counts what was ever submitted; durations are in ms from the scheduled send.
        """
        seconds = max(now_ns - self._since_ns, 1) / NS_PER_S
        lines = [
            f"total={self._submitted} throughput={self._count / seconds:.1f} {self._latency} "
            f"satisfaction={_percent(self._in_time, self._count)} (client, from the scheduled send)",
            self._controller.line("Client->Controller", seconds),
        ]
        self._since_ns = now_ns
        self._reset()
        return lines


def _ms(duration_ns: float) -> str:
    return f"{duration_ns / NS_PER_MS:.2f}"


def _percent(part: int, whole: int) -> str:
    return format_share(part / whole).replace(" ", "") if whole else "-"
