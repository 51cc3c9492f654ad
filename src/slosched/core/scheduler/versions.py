"""Versions of models in workers' repositories: what a plain name means, and why a name is not offered.

A worker offers a version as "NAME:VERSION". A plain name that a worker offers itself means that model, and
otherwise the newest version that any of them offers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from slosched.config import MOST_PUT_ASIDE, canonical_model
from slosched.core.scheduler.state import Worker
from slosched.model_source import is_version_of, newest_version, split_version


def meant(name: str, workers: Sequence[Worker]) -> str:
    """The canonical name of what a load of `name` loads from these workers; unknown names pass unchanged."""
    canonical = canonical_model(name)
    if any(canonical in worker.loadable for worker in workers):
        return canonical
    return newest_version(name, (each for w in workers for each in w.loadable)) or canonical


def loaded_under(name: str, by_name: Mapping[str, object]) -> list[str]:
    """Which of `by_name`, models that are loaded, `name` stands for: itself, or each version, oldest first."""
    canonical = canonical_model(name)
    if by_name.get(canonical):
        return [canonical]
    found = [each for each, models in by_name.items() if models and is_version_of(each, name)]
    return sorted(found, key=lambda each: split_version(each)[1])


def why_left_out(name: str, workers: Iterable[Worker]) -> str:
    """Why a worker leaves `name`, or a version of it, out of what it offers; empty if none does."""
    for worker in workers:
        for each, reason in worker.left_out.items():
            if each == name or is_version_of(each, name):
                return f"worker {worker.worker_id} leaves {each!r} of its repository out: {reason}"
    return ""


def left_out_by_all(workers: Sequence[Worker]) -> tuple[tuple[str, str], ...]:
    """(name, reason) of what workers find in their repositories and none offers, as far as a reply has room."""
    found: dict[str, str] = {}
    for worker in workers:
        for name, reason in worker.left_out.items():
            if len(found) >= MOST_PUT_ASIDE:
                break
            if name not in found and not any(name in each.loadable for each in workers):
                found[name] = reason
    return tuple(found.items())
