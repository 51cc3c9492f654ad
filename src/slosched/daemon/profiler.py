"""Measure a model on a worker's device: what `slosched profile` writes into a TOML profile."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from slosched.config import ModelProfile, WorkerConfig, canonical_model
from slosched.config_file import load_profile
from slosched.errors import InvalidConfig

#: No batch class is left out for being slow: the profile should say how slow it is.
_ANY_EXEC_NS = 2**62


def profile_model(
    name: str,
    config: WorkerConfig,
    batches: Sequence[int],
    *,
    progress: Callable[[str], None] | None = None,
) -> ModelProfile:
    """The times of `name` on `config.device`: exec per batch size of `batches`, weights transfer, ns.

    Medians of about ten runs each, bounded to seconds per batch size. An emulated device answers from
    its profile. A batch size that fails ends the list (a profile says so by leaving it out). Raises
    UnknownName, MissingPackage, or InvalidConfig for a model or device that cannot be used.
    """
    wanted = sorted({1, *batches})
    if wanted[0] < 1:
        raise InvalidConfig(f"batch sizes must be at least 1, not {wanted[0]}")
    if config.device == "emulated":
        known = load_profile(config.profile).model(name)
        times = {batch: ns for batch, ns in known.exec_ns.items() if batch in wanted}
        return replace(known, exec_ns=times)
    from slosched.daemon.backends.torch_backend import measure_named

    return measure_named(
        canonical_model(name), config, wanted, max_exec_ns=_ANY_EXEC_NS, progress=progress
    )
