"""A template with one input and one output, as tests ask it."""

from __future__ import annotations

from typing import Any

from slosched.daemon.backends.templates import DeviceWeights, Template


def answer(template: Template, weights: DeviceWeights, batch: Any) -> Any:
    """The only output for `batch`, a tensor (batch, *input_shape)."""
    (only,) = template.forward(weights, [batch]).values()
    return only


def sample(template: Template, batch: int) -> Any:
    """Made-up rows, an array (batch, *input_shape)."""
    (only,) = template.sample_rows(batch, 0).values()
    return only
