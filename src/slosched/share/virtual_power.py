"""The power of a GPU in virtual time: a model, with samples as NVML would give them."""

from __future__ import annotations

from collections.abc import Mapping

from slosched.share.solos import Profile, Solo
from slosched.share_spec import PowerSample
from slosched.units import NS_PER_S

_SAMPLE_NS = NS_PER_S // 10
#: Samples of one run at most: about 28 hours.
_MOST_SAMPLES = 1_000_000
#: Above idle, of a model whose power is unknown and that keeps the GPU busy all the time.
_UNKNOWN_WATTS = 300.0


class PowerModel:
    """Integrates the power of the card without work, plus each running job's own above that times its rate.

    Without work that is the profile's idle power, or while `awake` (models are loaded) its awake power.
    """

    def __init__(self, profile: Profile, solos: Mapping[int, Solo], start_ns: int) -> None:
        self._idle = profile.idle_watts
        self._awake = max(profile.awake_watts, profile.idle_watts)
        self._most = max(profile.most_watts, self._awake)
        self.awake = False
        self._above = {
            i: max(0.0, solo.watts - self._awake)
            if solo.watts >= 0
            else _UNKNOWN_WATTS * solo.gpu_share
            for i, solo in solos.items()
        }
        self._share = {i: solo.gpu_share for i, solo in solos.items()}
        self._memory = sum(solo.memory_mib for solo in solos.values()) << 20
        self._now_ns = start_ns
        self._next_ns = start_ns + _SAMPLE_NS
        self._joules = 0.0
        self._joules_before = self._busy_s = 0.0
        self._samples: list[PowerSample] = []

    def spend(self, rates: Mapping[int, float], until_ns: int) -> None:
        """Jobs ran at `rates` from the last call until `until_ns`."""
        without = self._awake if self.awake else self._idle
        watts = min(self._most, without + sum(self._above[i] * rates[i] for i in sorted(rates)))
        busy = min(1.0, sum(self._share[i] * rates[i] for i in sorted(rates)))
        while self._now_ns < until_ns:
            then_ns = min(until_ns, self._next_ns)
            passed_s = (then_ns - self._now_ns) / NS_PER_S
            self._joules += watts * passed_s
            self._busy_s += busy * passed_s
            self._now_ns = then_ns
            if then_ns == self._next_ns:
                self._sample(watts)

    def _sample(self, watts: float) -> None:
        window_s = _SAMPLE_NS / NS_PER_S
        self._next_ns += _SAMPLE_NS
        if len(self._samples) < _MOST_SAMPLES:
            self._samples.append(
                PowerSample(
                    at_ns=self._now_ns,
                    watts=watts,
                    watts_average=(self._joules - self._joules_before) / window_s,
                    energy_mj=round(self._joules * 1000),
                    utilization=round(100 * self._busy_s / window_s),
                    memory_used=self._memory,
                )
            )
        self._joules_before, self._busy_s = self._joules, 0.0

    def samples(self) -> tuple[PowerSample, ...]:
        return tuple(self._samples)
