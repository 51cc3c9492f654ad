"""The devices a worker drives: emulated, or torch's. Nothing heavy is imported before it is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy.typing as npt

__all__ = ["reference_forward"]


def reference_forward(
    name: str, array: npt.NDArray[Any] | Mapping[str, npt.NDArray[Any]]
) -> npt.NDArray[Any]:
    """What the model `name`, of the zoo or LIBRARY/NAME, answers to `array`, by a direct forward pass on
    the CPU in float32.

    `array` is one request's input (input_shape) or a batch of them (batch, *input_shape); the result
    has the same leading axis, dtype float32. Inputs by name are one request's, of any length.
    Independent of worker and controller, for checking them.
    Raises UnknownName, MissingPackage, or InvalidConfig for another shape.
    """
    from slosched.daemon.backends.reference import forward, forward_named

    return forward_named(name, array) if isinstance(array, Mapping) else forward(name, array)
