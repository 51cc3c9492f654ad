"""A direct forward pass of a model of the zoo or of a library, in float32: it shares nothing with the
serving path but the builder.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from slosched.config import LIBRARY_PREFIXES, canonical_model
from slosched.daemon.backends.contract import single_output
from slosched.daemon.backends.libraries import library_spec
from slosched.daemon.backends.zoo import ZOO, ModelSpec
from slosched.errors import InvalidConfig, UnknownName


@lru_cache(maxsize=2)
def _model(name: str) -> nn.Module:
    return _spec(name).build()


def _spec(name: str) -> ModelSpec:
    if name.startswith(LIBRARY_PREFIXES):
        return library_spec(name)
    spec = ZOO.get(canonical_model(name))
    if spec is None:
        raise UnknownName("model", name, list(ZOO))
    return spec


def forward(name: str, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """See slosched.daemon.backends.reference_forward."""
    spec = _spec(name)
    single = array.shape == spec.input_shape
    if not single and array.shape[1:] != spec.input_shape:
        raise InvalidConfig(
            f"{name!r} takes {spec.input_shape} or (batch, *{spec.input_shape}), not {array.shape}"
        )
    batch = torch.from_numpy(
        np.array(array, dtype=spec.input_dtype, ndmin=len(spec.input_shape) + 1)
    )
    with torch.inference_mode():
        output = single_output(
            _model(spec.name)(batch), len(batch), name=spec.name, take=spec.output
        ).numpy()
    result: npt.NDArray[Any] = output[0] if single else output
    return result
