"""How good a run could have been at most: a clairvoyant fluid bound on the share of heavy answers.

The bound knows every arrival and every score beforehand. It relaxes the problem in these points, each of
which only helps: GPUs are a fluid of `gpus` GPU-seconds per second that any request may use as a whole; a
program costs the GPU time per request of its best batch size whose exec takes at most the SLO (sizes
between those that are measured are interpolated); a request that gets a heavy answer costs the heavy
program alone, because its score is known without the light program; changing roles, loading and messages
take no time. All requests have the same SLO, so the fluid serves them in order of arrival, and request i
ends at F(i) = max(F(i-1), a(i)) + w(i) / gpus, which must not be after a(i) + SLO.

The most heavy answers follow by one pass: each request is made heavy, and where its end would be too late,
the last heavy request up to there becomes light. That one is in every interval of overload that ends here,
and in every later one that the others are in, so no other choice leaves more. Where light answers alone are
too late, requests are lost, and the count says how many.

No policy without a violation has a greater heavy share. The bound's FID is that of the table at this share,
or at the table's best share if that is smaller; a policy that lets requests go can be better, and one that
asks no judge cannot reach it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from slosched.analysis.drawn import plain
from slosched.cascade_spec import CascadeSpec


@dataclass(frozen=True)
class FluidBound:
    """`heavy_share` is the greatest share of heavy answers, of the requests that are not `lost`; `fid` is the
    table's at the share used, which is at most the table's best one (NaN without a table)."""

    requests: int
    lost: int
    heavy_share: float
    used_heavy_share: float
    fid: float

    def as_dict(self) -> dict[str, Any]:
        document = plain(asdict(self))
        assert isinstance(document, dict)
        return document


def best_cost_ns(exec_ns: Mapping[int, int], slo_ns: int) -> float:
    """GPU time per request (ns) of the best batch size within the SLO; that of size 1 if none is within it."""
    costs = [ns / batch for batch, ns in exec_ns.items() if ns <= slo_ns]
    return min(costs, default=float(exec_ns[1]))


def fluid_bound(arrivals_ns: Sequence[int], cascade: CascadeSpec, gpus: int) -> FluidBound:
    """The bound for requests that arrive at `arrivals_ns`, ascending."""
    profile = cascade.profile(memory_bytes=2**40, page_bytes=2**24)
    light_ns, heavy_ns = (
        best_cost_ns(profile.models[stage.model].exec_ns, cascade.slo_ns) / gpus
        for stage in (cascade.light, cascade.heavy)
    )
    heavy, lost = most_heavy(arrivals_ns, light_ns, heavy_ns, cascade.slo_ns)
    served = len(arrivals_ns) - lost
    share = heavy / served if served else 0.0
    quality = cascade.quality
    used = share if quality is None else min(share, 1 - quality.best_light_share)
    fid = float("nan") if quality is None else quality.fid(1 - used)
    return FluidBound(len(arrivals_ns), lost, share, used, fid)


def most_heavy(
    arrivals_ns: Sequence[int], light_ns: float, heavy_ns: float, slo_ns: int
) -> tuple[int, int]:
    """The most requests that can be heavy, and how many are lost though all others are light.

    `light_ns` and `heavy_ns` are how long the whole fluid works on one request.
    """
    if heavy_ns <= light_ns:
        light_ns = heavy_ns
    fluid = _Fluid(arrivals_ns, heavy_ns)
    heavy: list[int] = []  # places, ascending
    lost = 0
    for place, at_ns in enumerate(arrivals_ns):
        heavy.append(place)
        fluid.serve(place, place)
        # What ended before the fluid was last idle has no part in the delay.
        while (
            fluid.end_ns[place] > at_ns + slo_ns and heavy and heavy[-1] >= fluid.busy_from[place]
        ):
            lighter = heavy.pop()
            fluid.work_ns[lighter] = light_ns
            fluid.serve(lighter, place)
        if fluid.end_ns[place] > at_ns + slo_ns:
            fluid.work_ns[place] = 0.0
            lost += 1
            fluid.serve(place, place)
    return len(heavy), lost


class _Fluid:
    """When each request ends, and with which request the fluid was last idle before it."""

    def __init__(self, arrivals_ns: Sequence[int], work_ns: float) -> None:
        count = len(arrivals_ns)
        self._arrivals_ns = arrivals_ns
        self.work_ns = [work_ns] * count
        self.end_ns = [0.0] * count
        self.busy_from = [0] * count

    def serve(self, first: int, last: int) -> None:
        """Serve the requests from `first` to `last`, anew where they were served before."""
        for place in range(first, last + 1):
            at_ns = float(self._arrivals_ns[place])
            before_ns = self.end_ns[place - 1] if place else at_ns
            waits = place > 0 and before_ns > at_ns
            self.busy_from[place] = self.busy_from[place - 1] if waits else place
            self.end_ns[place] = max(before_ns, at_ns) + self.work_ns[place]
