"""A model as a worker keeps it on the host: one skeleton of code and one flat block of weights.

Copies of a name share the template; each copy that is loaded onto a device has a block of its own there,
made by one copy (55 GB/s for pinned memory on an H200; 161 small ones would take far longer). The
skeleton is bound to a block just before it runs; unbound it has no weights at all, so an evicted model
cannot run by mistake.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt
import torch
from torch import nn

from slosched.daemon.backends.contract import ModelRefused, named_outputs
from slosched.daemon.backends.layout import made_up
from slosched.daemon.backends.stepped import Stepped
from slosched.daemon.backends.zoo import KnowsInputs, ModelSpec, taking
from slosched.errors import InvalidConfig
from slosched.signature import Tensor, described

#: Tensors within a block begin at multiples of this (CUDA's own allocations do, kernels like it).
_ALIGN = 256
_VIEWS_PER_STEP = 16
#: Dimensions of a batch of images: a memory format is for these alone.
_IMAGES_DIMENSIONS = 4

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
    `build` raises, and InvalidConfig for a program that takes other inputs than the spec says.
    """

    def __init__(self, spec: ModelSpec) -> None:
        self.own_state: tuple[str, ...] = ()  # what a forward was seen to change
        self._module: nn.Module = spec.build()
        if isinstance(self._module, KnowsInputs):
            spec = _settled(spec, self._module.inputs)
        self.spec = spec
        self._names_of_inputs = [tensor.name for tensor in spec.takes]
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

    def forward(
        self, weights: DeviceWeights, inputs: Sequence[Any], *, steps: int = 0
    ) -> dict[str, Any]:
        """Run the model with `weights` on copies of `inputs`, in the order of the signature; its outputs by
        name. With `steps` a model in steps runs no more than these.

        An input is a tensor (batch, *shape), or of BYTES a list of lists of bytes. The copies, in the model's
        precision and memory format, are the model's: it may work on them in place. Outputs are (batch,
        *output_shape), float32 or integers; they may be views of these copies or of the weights. Raises
        ModelRefused (contract.py).
        """
        if steps:
            state = self.begin(weights, inputs)
            for _ in range(steps):
                state = self.step(weights, state)
            return self.finish(weights, state)
        self._bind(weights)
        with torch.inference_mode():
            own = [self._own(each) for each in inputs]
            if len(own) == 1:
                output = self._module(own[0])
            else:
                output = self._module(**dict(zip(self._names_of_inputs, own, strict=True)))
        return self._named(output, len(inputs[0]))

    def _named(self, output: Any, rows: int) -> dict[str, Any]:
        spec = self.spec
        return named_outputs(
            output,
            rows,
            name=spec.name,
            take=spec.output,
            declared=spec.outputs,
            score=spec.score,
        )

    def _bind(self, weights: DeviceWeights) -> None:
        """Make the model run with `weights`."""
        if self._bound is not weights:
            for tensor, view in zip(self._tensors, weights.views, strict=True):
                tensor.data = view
            self._bound = weights

    @property
    def steps(self) -> int:
        """The number of equal steps of a run; 0 for a model that has none (stepped.py)."""
        return self._module.steps if isinstance(self._module, Stepped) else 0

    def begin(self, weights: DeviceWeights, inputs: Sequence[Any]) -> Sequence[Any]:
        """The state of a run in steps before the first one, for `inputs` as `forward` takes them."""
        module = self._stepped(weights)
        with torch.inference_mode():
            own = [self._own(each) for each in inputs]
            if len(own) == 1:
                return module.begin(own[0])
            return module.begin(**dict(zip(self._names_of_inputs, own, strict=True)))

    def step(self, weights: DeviceWeights, state: Sequence[Any]) -> Sequence[Any]:
        """The state after one step."""
        module = self._stepped(weights)
        with torch.inference_mode():
            return module.step(*state)

    def finish(self, weights: DeviceWeights, state: Sequence[Any]) -> dict[str, Any]:
        """The outputs of a run with this state, as `forward` gives them."""
        module = self._stepped(weights)
        with torch.inference_mode():
            return self._named(module.finish(*state), len(state[0]))

    def _stepped(self, weights: DeviceWeights) -> Stepped:
        self._bind(weights)
        assert isinstance(self._module, Stepped)
        return self._module

    def _own(self, given: Any) -> Any:
        if not isinstance(given, torch.Tensor):
            return given
        if given.is_floating_point():
            images = given.ndim == _IMAGES_DIMENSIONS
            memory_format = self._memory_format if images else torch.preserve_format
            return given.to(self._dtype, memory_format=memory_format, copy=True)
        return given.clone()

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

    def sample_rows(self, batch: int, seed: int, length: int = 0) -> dict[str, Array]:
        """Made-up inputs (batch, *shape) by name, the same for the same seed (layout.made_up)."""
        spec = self.spec
        return made_up(spec.takes, batch, seed, length=length, high=spec.input_high)


def _settled(spec: ModelSpec, found: Sequence[Tensor]) -> ModelSpec:
    """`spec` with the inputs that its program was found to take. Raises InvalidConfig if it says others."""
    if spec.inputs:
        if set(spec.inputs) != set(found):
            raise InvalidConfig(
                f"model {spec.name!r} takes {described(found)}, and the worker's file says "
                f"{described(spec.inputs)}; leave the tables of inputs out"
            )
        return spec
    if spec.input_shape:  # the short form
        if len(found) > 1:
            raise InvalidConfig(
                f"model {spec.name!r} takes {described(found)}: leave input_shape out"
            )
        return spec
    return taking(spec, found)


def _strides(tensor: torch.Tensor) -> tuple[int, ...]:
    """Those of a dense tensor of the same order: its own, unless it has gaps or overlaps itself.

    So weights in channels_last lie in the block as the kernels want them.
    """
    return torch.empty_like(tensor, device="meta").stride()
