"""A direct forward pass of a model of the zoo or of a library, in float32: it shares nothing with the
serving path but the builder.
"""

from __future__ import annotations

from collections.abc import Mapping
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
from slosched.signature import described


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


def forward_named(name: str, inputs: Mapping[str, npt.NDArray[Any]]) -> npt.NDArray[Any]:
    """See slosched.daemon.backends.reference_forward: the same for one request of several inputs, by name."""
    spec = _spec(name)
    takes = {tensor.name: tensor for tensor in spec.takes}
    if inputs.keys() != takes.keys():
        raise InvalidConfig(f"{name!r} takes {described(spec.takes)}, not {', '.join(inputs)}")
    given = {
        key: torch.from_numpy(np.array(inputs[key], dtype=tensor.dtype)[None])
        for key, tensor in takes.items()
    }
    with torch.inference_mode():
        found = _model(spec.name)(**given)
        answer = single_output(found, 1, name=spec.name, take=spec.output)[0].numpy()
    result: npt.NDArray[Any] = answer
    return result
