"""What HotCarbon-24 published (share/published/hotcarbon.toml), and our own runs beside it."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import msgspec

from slosched.errors import UnknownName
from slosched.share.imported import Imported
from slosched.text_files import read_toml

_FILE = Path(__file__).with_name("published") / "hotcarbon.toml"
#: Names as the other sets have them.
_ALSO = {"a100-tm": "five-min-a100-pwr"}


class PublishedRun(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A mix on one device in one mode. Lists are in the order of `models`; batch sizes are 1."""

    models: tuple[str, ...]
    throughput_per_s: tuple[float, ...]
    p50_ms: tuple[float, ...]
    p99_ms: tuple[float, ...]
    normalized: tuple[float, ...]
    watts: float
    stp: float
    energy_ratio: float | None = None


class PublishedSet(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    name: str  # the folder of HotCarbon's results: a6000-mps
    device: str
    mode: str
    duration_s: float
    runs: tuple[PublishedRun, ...]


class Compared(msgspec.Struct, frozen=True, kw_only=True):
    """A mix then and now. None: one of both does not have it. Lists are in the order of `models`."""

    models: tuple[str, ...]
    then_device: str
    then_mode: str
    now_device: str
    now_mode: str
    stp_then: float
    stp_now: float | None
    energy_ratio_then: float | None
    energy_ratio_now: float | None
    normalized_then: tuple[float, ...]
    normalized_now: tuple[float | None, ...]
    p99_ms_then: tuple[float, ...]
    p99_ms_now: tuple[float | None, ...]
    watts_then: float
    watts_now: float | None


@cache
def hotcarbon_sets() -> tuple[PublishedSet, ...]:
    """HotCarbon's five sets: A6000 and 4090 in both modes, and A100 under time slicing."""
    _, table = read_toml(_FILE, "")
    return msgspec.convert(table["sets"], tuple[PublishedSet, ...])


def hotcarbon_set(name: str) -> PublishedSet:
    """The set of that name, such as a6000-mps; a100-tm is five-min-a100-pwr. Raises UnknownName."""
    found = {each.name: each for each in hotcarbon_sets()}
    name = _ALSO.get(name, name)
    if name not in found:
        raise UnknownName("published set", name, list(found))
    return found[name]


def compare(run: Imported, published: PublishedSet) -> Compared | None:
    """`run` beside the same mix of `published`, whatever the order of its models; None if it has none.

    Batches other than 1 were not published. Compare STP, energy ratio and throughput / throughput alone: they
    are relative to the same device alone, while latencies and power are not.
    """
    if any(job.batch != 1 for job in run.jobs):
        return None
    then = next((each for each in published.runs if tuple(sorted(each.models)) == run.mix), None)
    if then is None:
        return None
    left = list(run.jobs)
    jobs = []
    for model in then.models:
        job = next(each for each in left if each.model == model)
        left.remove(job)
        jobs.append(job)
    return Compared(
        models=then.models,
        then_device=published.device,
        then_mode=published.mode,
        now_device=run.label,
        now_mode=run.mode,
        stp_then=then.stp,
        stp_now=run.stp,
        energy_ratio_then=then.energy_ratio,
        energy_ratio_now=run.energy_ratio,
        normalized_then=then.normalized,
        normalized_now=tuple(job.normalized for job in jobs),
        p99_ms_then=then.p99_ms,
        p99_ms_now=tuple(job.p99_ms for job in jobs),
        watts_then=then.watts,
        watts_now=run.watts,
    )
