"""A model as a worker keeps it on the host: one skeleton of code and one flat block of weights.

Copies of a name share the template; each copy that is loaded onto a device has a block of its own there,
made by one copy (55 GB/s for pinned memory on an H200; 161 small ones would take far longer). The
skeleton is bound to a block just before it runs; unbound it has no weights at all, so an evicted model
cannot run by mistake.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from slosched.daemon.backends.contract import ModelRefused, single_output
from slosched.daemon.backends.zoo import ModelSpec

#: Tensors within a block begin at multiples of this (CUDA's own allocations do, kernels like it).
_ALIGN = 256
_VIEWS_PER_STEP = 16

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class _Place:
    """Where one parameter or buffer lies in the block: offset in elements of its dtype."""

    offset: int
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype


class DeviceWeights:
    """One copy's weights on a device: the block and, made bit by bit, a view per tensor."""

    def __init__(self, block: torch.Tensor) -> None:
        self.block = block
        self.views: list[torch.Tensor] = []


class Template:
    """Build `spec` and flatten its weights.

    Takes seconds for large models, so it is done by the preparation thread. Raises what the spec's
    `build` raises.
    """

    def __init__(self, spec: ModelSpec) -> None:
        self.spec = spec
        self.batch_sizes: tuple[int, ...] = ()  # classes that were measured, ascending
        self.own_state: tuple[str, ...] = ()  # what a forward was seen to change
        self._module: nn.Module = spec.build()
        for parameter in self._module.parameters():
            parameter.requires_grad_(False)
        named = [*self._module.named_parameters(), *self._module.named_buffers()]
        self._names = [name for name, _ in named]
        self._tensors = [tensor for _, tensor in named]
        self._bound: DeviceWeights | None = None
        self._places: list[_Place] = []
        end = 0
        for tensor in self._tensors:
            begin = -(-end // _ALIGN) * _ALIGN
            self._places.append(
                _Place(
                    begin // tensor.element_size(),
                    tensor.shape,
                    _strides(tensor),
                    tensor.dtype,
                )
            )
            end = begin + tensor.numel() * tensor.element_size()
        self.weights_bytes = max(end, 1)
        self.host = torch.zeros(self.weights_bytes, dtype=torch.uint8)
        flat = DeviceWeights(self.host)
        while not self.add_views(flat):
            pass
        for tensor, view in zip(self._tensors, flat.views, strict=True):
            view.copy_(tensor)
        floating = [t.dtype for t in self._tensors if t.is_floating_point()]
        self._dtype = floating[0] if floating else torch.float32
        self._memory_format = torch.channels_last if spec.channels_last else torch.preserve_format
        self._unbind()

    def add_views(self, weights: DeviceWeights) -> bool:
        """Make the next few views. True when all are there. A step takes some 20 us."""
        storage = weights.block.untyped_storage()
        device = weights.block.device
        begin = len(weights.views)
        for place in self._places[begin : begin + _VIEWS_PER_STEP]:
            view = torch.empty(0, dtype=place.dtype, device=device)
            weights.views.append(view.set_(storage, place.offset, place.shape, place.stride))
        return len(weights.views) == len(self._places)

    @property
    def precision(self) -> str:
        """float32, float16 or bfloat16: what its first floating weights are in."""
        word = str(self._dtype).removeprefix("torch.")
        return word if word in ("float16", "bfloat16") else "float32"

    def spans(self) -> list[tuple[str, int, int]]:
        """(name, first byte, number of bytes) of each parameter and buffer in the block."""
        sizes = [place.dtype.itemsize for place in self._places]
        return [
            (name, place.offset * size, place.shape.numel() * size)
            for name, place, size in zip(self._names, self._places, sizes, strict=True)
        ]

    def forward(self, weights: DeviceWeights, batch: torch.Tensor) -> torch.Tensor:
        """Run the model with `weights` on a copy of `batch` (batch, *input_shape); float32 or integers.

        The copy, in the model's precision and memory format, is the model's: it may work on it in place.
        The answer may be a view of that copy or of the weights. Raises ModelRefused (contract.py).
        """
        if self._bound is not weights:
            for tensor, view in zip(self._tensors, weights.views, strict=True):
                tensor.data = view
            self._bound = weights
        rows = batch.shape[0]
        with torch.inference_mode():
            if batch.is_floating_point():
                batch = batch.to(self._dtype, memory_format=self._memory_format, copy=True)
            else:
                batch = batch.clone()
            output = self._module(batch)
        return single_output(output, rows, name=self.spec.name, take=self.spec.output)

    def check_bound(self) -> None:
        """Raises ModelRefused if a forward put another tensor in the place of a parameter or buffer.

        The next run would read that one, and no longer the weights of the instance that it serves.
        """
        named = [*self._module.named_parameters(), *self._module.named_buffers()]
        now = dict(named)
        for name, tensor in zip(self._names, self._tensors, strict=True):
            if now.get(name) is not tensor:
                raise ModelRefused(
                    f"model {self.spec.name!r} replaces {name!r} in its forward, so it would keep something "
                    "of each request; change it in place (then each run starts from what was loaded), or "
                    "keep no state"
                )

    def changed(self, weights: DeviceWeights) -> tuple[str, ...]:
        """Names of parameters and buffers that differ, byte by byte, from what was loaded."""
        return tuple(
            name
            for name, begin, nbytes in self.spans()
            if not torch.equal(
                weights.block[begin : begin + nbytes], self.host[begin : begin + nbytes]
            )
        )

    def restore(self, weights: DeviceWeights) -> None:
        """Give the tensors in `own_state` the values that were loaded."""
        for name, begin, nbytes in self.spans():
            if name in self.own_state:
                weights.block[begin : begin + nbytes].copy_(self.host[begin : begin + nbytes])

    def forget(self, weights: DeviceWeights) -> None:
        """The weights leave the device: let go of them."""
        if self._bound is weights:
            self._unbind()

    def _unbind(self) -> None:
        self._bound = None
        for tensor in self._tensors:
            tensor.data = torch.empty(0, dtype=tensor.dtype)

    def sample_input(self, batch: int) -> Array:
        """A made-up input of (batch, *input_shape), the same each time."""
        return self.sample_rows(batch, 0)

    def sample_rows(self, batch: int, seed: int) -> Array:
        """Random rows (batch, *input_shape): floats in 0..1, integers below the spec's `input_high`."""
        random = np.random.default_rng(seed)
        shape = (batch, *self.spec.input_shape)
        dtype = np.dtype(self.spec.input_dtype)
        if dtype.kind == "f":
            return random.random(shape, dtype=np.float32).astype(dtype)
        return random.integers(0, max(2, self.spec.input_high), shape).astype(dtype)


def _strides(tensor: torch.Tensor) -> tuple[int, ...]:
    """Those of a dense tensor of the same order: its own, unless it has gaps or overlaps itself.

    So weights in channels_last lie in the block as the kernels want them.
    """
    return torch.empty_like(tensor, device="meta").stride()
