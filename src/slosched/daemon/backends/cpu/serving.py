"""One model in a process of its own: built once, with a block of weights for each instance on the device.

Runs on rows in memory that it shares with the worker. What is measured at preparation is the code that
serves (measuring.py). Torch, and code of others, run here alone; the worker's side is processes.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from slosched.daemon.backends.contract import ModelRefused
from slosched.daemon.backends.layout import Layouts
from slosched.daemon.backends.templates import Array, DeviceWeights, Template
from slosched.daemon.backends.zoo import ModelSpec
from slosched.signature import BYTES, Tensor


class Rows:
    """`memory` of one batch of the class (`batch`, `length`): inputs, and outputs from byte `outputs_at` on."""

    def __init__(
        self, memory: object, batch: int, length: int, outputs_at: int, layouts: Layouts
    ) -> None:
        whole: Array = np.frombuffer(memory, np.uint8)  # type: ignore[call-overload]
        self.batch, self.length = batch, length
        self.inputs, self._gives = layouts.at(length)
        self.input_rows = whole[: batch * self.inputs.row_bytes].reshape(batch, -1)
        self._outputs = whole[outputs_at:]
        #: The inputs as tensors (batch, *shape), in order; those of BYTES are None.
        views = self.inputs.views(whole, batch)
        self.tensors = [
            None if tensor.dtype == BYTES else torch.from_numpy(views[tensor.name])
            for tensor in self.inputs.tensors
        ]
        self._views = self._gives.views(self._outputs, batch)

    def given(self) -> list[Any]:
        """The inputs for a forward: tensors, which lie here, and lists of lists of bytes."""
        if None not in self.tensors:
            return list(self.tensors)
        arrays = self.inputs.unpack(self.input_rows.reshape(-1), self.batch)
        return as_inputs(self.inputs.tensors, arrays)

    def answer(self, outputs: Mapping[str, Array], count: int) -> None:
        """Write the first `count` rows of `outputs`. Raises ModelRefused if one is not as it was measured."""
        gives = self._gives.tensors
        found = {name: (array.shape[1:], array.dtype) for name, array in outputs.items()}
        for tensor in gives:
            shape, dtype = found[tensor.name]
            kind = BYTES if dtype.kind == "O" else str(dtype)
            expected = tensor.shape_at(self.length)
            if (shape, kind) != (expected, tensor.dtype):
                which = f"{tensor.name}: " if len(gives) > 1 else ""
                raise ModelRefused(
                    f"the model answers with {which}{list(shape)} of {kind} for each request; when it was "
                    f"prepared, it answered with {list(expected)} of {tensor.dtype}"
                )
        first = {tensor.name: outputs[tensor.name][:count] for tensor in gives}
        try:
            self._gives.pack(first, self._outputs)
        except ValueError as error:  # texts that need more room
            raise ModelRefused(str(error)) from None


def as_inputs(takes: Sequence[Tensor], arrays: Mapping[str, Array]) -> list[Any]:
    """`arrays` (batch, *shape) as a forward takes them: tensors, and of BYTES nested lists."""
    return [
        arrays[tensor.name].tolist()
        if tensor.dtype == BYTES
        else torch.from_numpy(arrays[tensor.name])
        for tensor in takes
    ]


def as_arrays(outputs: Mapping[str, Any], gives: Sequence[Tensor] = ()) -> dict[str, Array]:
    """A forward's outputs as arrays (batch, *shape) that are their own, or views: those of `gives`, if they
    are known.

    Raises ModelRefused if one of these is not there.
    """
    lacking = [tensor.name for tensor in gives if tensor.name not in outputs]
    if lacking:
        raise ModelRefused(
            f"the model answers without {lacking[0]!r}, with which it answered when it was prepared"
        )
    names = [tensor.name for tensor in gives] or list(outputs)
    return {
        name: outputs[name].contiguous().numpy()
        if isinstance(outputs[name], torch.Tensor)
        else outputs[name]
        for name in names
    }


class ServedModel:
    """The model of `spec`. Raises what its `build` raises."""

    def __init__(self, spec: ModelSpec) -> None:
        self.template = Template(spec)
        self.gives: tuple[Tensor, ...] = ()  # the outputs, once they are known
        self.layouts = Layouts((), (), {})
        self._weights: dict[int, DeviceWeights] = {}  # by model id
        self._samples: dict[int, Array] = {}  # made-up rows, by length class

    def answers_with(self, gives: Sequence[Tensor]) -> None:
        """Its outputs are known from now on."""
        spec = self.template.spec
        self.gives = tuple(gives)
        self.layouts = Layouts(spec.takes, gives, spec.pads)

    def load(self, model_id: int) -> None:
        """Copy the weights from the host's block to one of the instance's own."""
        self.evict(model_id)
        weights = DeviceWeights(self.template.host.clone())
        while not self.template.add_views(weights):
            pass
        self._weights[model_id] = weights

    def evict(self, model_id: int) -> None:
        weights = self._weights.pop(model_id, None)
        if weights is not None:
            self.template.forget(weights)

    def holds(self, model_id: int) -> bool:
        return model_id in self._weights

    def run(self, model_id: int, rows: Rows, given: Sequence[int], answers: int) -> None:
        """Run the batch of `rows`, whose rows `given` are there; the others are made up.

        The first `answers` rows of the outputs are written to `rows`. Raises ModelRefused for an output that
        is not as it was measured, and whatever the model raises.
        """
        if len(given) < rows.batch:
            sample = self.made_up(rows)
            for row in set(range(rows.batch)).difference(given):
                rows.input_rows[row] = sample[row]
        outputs = self.template.forward(self._weights[model_id], rows.given())
        if answers:
            rows.answer(as_arrays(outputs, self.gives), answers)
        if self.template.own_state:
            self.template.restore(self._weights[model_id])

    def made_up(self, rows: Rows) -> Array:
        """Rows for a batch of the class of `rows`."""
        known = self._samples.get(rows.length)
        if known is None or len(known) < rows.batch:
            arrays = self.template.sample_rows(rows.batch, 0, rows.length)
            known = self._samples[rows.length] = rows.inputs.pack(arrays)
        return known
