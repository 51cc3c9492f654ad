"""The lines that a controller prints every ten seconds (Clockwork, docs/telemetry.md).

`lines` gives the text of an interval, from what the controller's tally counted in it, and starts the next one.
The published lines call every answered request a success; what a client wants is that its deadline is met, so
the first line also says that, and who judged it.
"""

from __future__ import annotations

from slosched.codes import ActionType
from slosched.telemetry.tally import Lane, Tally
from slosched.units import NS_PER_MS, NS_PER_S, format_share

_KIND_NAMES = {
    ActionType.LOAD_WEIGHTS: "LoadW",
    ActionType.INFER: "Infer",
    ActionType.CALL: "Call",
}


class ControllerConsole:
    """The controller's ten-second lines, from its `tally`. The first interval begins at `now_ns`."""

    def __init__(self, tally: Tally, *, now_ns: int) -> None:
        self._tally = tally
        self._since_ns = now_ns
        self._look()

    def _look(self) -> None:
        """Remember the totals of now: the next interval counts from here."""
        tally = self._tally
        self._served, self._latency_ns = tally.served.count, tally.served.total
        self._answered, self._in_time = tally.answered, tally.in_time
        self._lanes = {key: _totals(lane) for key, lane in tally.lanes.items()}
        tally.forget_extremes()

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
            spread = _spread(served, mean_ns, tally.least_ns, tally.greatest_ns)
            lines = [
                f"Client throughput={count / seconds:.1f} "
                f"success={_percent(served, count)} ({count - served}/{count} violations) {spread} "
                f"satisfaction={_percent(tally.in_time - self._in_time, count)} "
                "(controller, from arrival)",
                *lanes,
            ]
        self._since_ns = now_ns
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


def _spread(count: int, mean_ns: float, least_ns: float, greatest_ns: float) -> str:
    if not count:
        return "min=- max=- mean=-"
    return f"min={_ms(least_ns)} max={_ms(greatest_ns)} mean={_ms(mean_ns)}"


def _ms(duration_ns: float) -> str:
    return f"{duration_ns / NS_PER_MS:.2f}"


def _percent(part: int, whole: int) -> str:
    return format_share(part / whole).replace(" ", "") if whole else "-"
