"""Where a run of load stands, from what its driver has counted. The same live and simulated."""

from __future__ import annotations

import math
from collections import deque

from slosched.loadgen.driver import LoadDriver
from slosched.loadgen.results import RunProgress
from slosched.units import NS_PER_S
from slosched.workloads.engine import Engine

#: The end of a run that has none: a hundred years. Its caller stops it.
FOREVER_NS = 100 * 365 * 86_400 * NS_PER_S
_RATE_OVER_NS = 11 * NS_PER_S // 10


class ProgressMeter:
    """Says where the run of `driver` stands. Asked a few times a second, on the driver's clock."""

    def __init__(self, driver: LoadDriver, engine: Engine) -> None:
        self._driver, self._engine = driver, engine
        self._total_s = math.inf if engine.end_ns >= FOREVER_NS else engine.end_ns / NS_PER_S
        self._sent_before: deque[tuple[int, int]] = deque()  # (time, sent), of the last second

    def at(self, now_ns: int) -> RunProgress:
        """Where the run stands at `now_ns`, which never decreases from call to call."""
        driver, before = self._driver, self._sent_before
        before.append((now_ns, driver.sent))
        # One sample stays that is older, so that there is a rate however seldom we are asked.
        while len(before) > 2 and now_ns - before[1][0] > _RATE_OVER_NS:
            before.popleft()
        then_ns, sent = before[0]
        answered = sum(tally.answered for tally in driver.tallies)
        in_time = sum(tally.in_time for tally in driver.tallies)
        elapsed_s = max(0, now_ns - driver.start_ns) / NS_PER_S
        passed_ns = now_ns - then_ns
        return RunProgress(
            step=driver.step + 1,
            steps=len(self._engine.steps),
            elapsed_s=min(elapsed_s, self._total_s),
            total_s=self._total_s,
            label=self._label(),
            rate_per_s=(driver.sent - sent) * NS_PER_S / passed_ns if passed_ns else 0.0,
            satisfaction=in_time / answered if answered else 0.0,
            sent=driver.sent,
        )

    def _label(self) -> str:
        step = self._engine.steps[self._driver.step]
        is_slo = not step.label and (step.slo_factor or step.slo_ns)
        return f"SLO {step.text}" if is_slo else step.text
