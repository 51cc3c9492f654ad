"""Which GPU holds which weights: both sides of the pair change together."""

from __future__ import annotations

from slosched.core.scheduler.state import Gpu, Instance


def add_residency(gpu: Gpu, model: Instance) -> None:
    """`gpu` holds `model`'s weights from now on; the pages were taken when the load was sent."""
    gpu.resident[model.model_id] = model
    model.resident_on[gpu.index] = gpu


def adopt_residency(gpu: Gpu, model: Instance) -> bool:
    """If the worker of `gpu` brought weights of `model` along, they are used from now on. False: it did not."""
    if gpu.brought.pop(model.model_id, None) is not None:
        add_residency(gpu, model)
        return True
    return False


def drop_residency(gpu: Gpu, model: Instance) -> None:
    """`gpu` does not hold `model`'s weights any more; the pages are the caller's to count."""
    gpu.resident.pop(model.model_id, None)
    model.resident_on.pop(gpu.index, None)
