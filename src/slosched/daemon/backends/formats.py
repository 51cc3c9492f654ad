"""Precision and memory format of a model's weights.

Inputs travel as float32 and outputs return so, whatever a model computes in (templates.py converts).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from slosched.config import DTYPES
from slosched.daemon.backends.zoo import ModelSpec
from slosched.errors import InvalidConfig

TORCH_DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in DTYPES}


#: Other names that precisions are called by.
_ALSO = {"fp32": "float32", "fp16": "float16", "half": "float16", "bf16": "bfloat16"}


def dtype_named(text: str) -> str:
    """The precision that `text` names, one of DTYPES. Raises InvalidConfig."""
    name = _ALSO.get(text, text)
    if name not in TORCH_DTYPES:
        raise InvalidConfig(
            f"dtype {text!r} is not known; choose from {', '.join((*TORCH_DTYPES, *_ALSO))}"
        )
    return name


def takes_images(spec: ModelSpec) -> bool:
    """True if one request is (channels, height, width), so that a batch can be in channels_last."""
    return len(spec.input_shape) == 3


def in_format(spec: ModelSpec, dtype: str, *, channels_last: bool) -> ModelSpec:
    """`spec` with its floating weights in `dtype`, a name in DTYPES, and in that memory format.

    float32 leaves a module as it was built, so that an operator's own mix of precisions stays. A
    channels_last that a model cannot have, because it takes no images, is left out.
    """
    channels_last = channels_last and takes_images(spec)
    labels = (dtype,) * (dtype != "float32") + ("channels_last",) * channels_last
    if not labels:
        return spec

    def build() -> nn.Module:
        module = spec.build()
        if dtype != "float32":
            module = module.to(TORCH_DTYPES[dtype])
        if channels_last:
            # The stubs know no call with a memory format alone.
            module = module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return module

    return replace(spec, build=build, labels=spec.labels + labels, channels_last=channels_last)
