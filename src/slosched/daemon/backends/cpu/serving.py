"""One model in a process of its own: built once, with a block of weights for each instance on the device.

Runs on rows in memory that it shares with the worker. What is measured at preparation is the code that
serves (measuring.py). Torch, and code of others, run here alone; the worker's side is processes.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from slosched.daemon.backends.contract import ModelRefused
from slosched.daemon.backends.templates import Array, DeviceWeights, Template
from slosched.daemon.backends.zoo import ModelSpec
from slosched.units import tensor_bytes


class Rows:
    """`memory` of one batch: inputs (batch, *input_shape) of `spec`, and outputs from byte `outputs_at` on."""

    def __init__(self, memory: object, batch: int, outputs_at: int, spec: ModelSpec) -> None:
        whole: Array = np.frombuffer(memory, np.uint8)  # type: ignore[call-overload]
        used = batch * tensor_bytes(spec.input_shape, spec.input_dtype)
        inputs = whole[:used].view(spec.input_dtype).reshape(batch, *spec.input_shape)
        self.inputs = torch.from_numpy(inputs)
        self.outputs = whole[outputs_at:]


class ServedModel:
    """The model of `spec`. Raises what its `build` raises."""

    def __init__(self, spec: ModelSpec) -> None:
        self.template = Template(spec)
        #: One row of the answers, as it was measured: shape and numpy dtype.
        self.output: tuple[tuple[int, ...], str] = ((), "float32")
        self._weights: dict[int, DeviceWeights] = {}  # by model id
        self._sample = torch.empty(0)

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

    def run(
        self, model_id: int, rows: Rows, batch: int, given: Sequence[int], answers: int
    ) -> None:
        """Run a batch of which the rows `given` are in `rows`; the others are made up.

        The first `answers` rows of the output are written to `rows`. Raises ModelRefused for an output that
        is not as it was measured, and whatever the model raises.
        """
        sample = self._made_up(batch)
        inputs = rows.inputs[:batch] if given else sample
        if given:
            for row in set(range(batch)).difference(given):
                inputs[row] = sample[row]
        weights = self._weights[model_id]
        output = self.template.forward(weights, inputs)
        if answers:
            self._write(output[:answers], rows)
        if self.template.own_state:
            self.template.restore(weights)

    def _write(self, output: torch.Tensor, rows: Rows) -> None:
        answers: Array = output.contiguous().numpy()
        found = (answers.shape[1:], str(answers.dtype))
        if found != self.output:
            (shape, dtype), (expected, kind) = found, self.output
            raise ModelRefused(
                f"the model answers with {list(shape)} of {dtype} for each request; when it was prepared, it "
                f"answered with {list(expected)} of {kind}"
            )
        rows.outputs[: answers.nbytes] = answers.reshape(-1).view(np.uint8)

    def _made_up(self, batch: int) -> torch.Tensor:
        if len(self._sample) < batch:
            self._sample = torch.from_numpy(self.template.sample_input(batch))
        return self._sample[:batch]
