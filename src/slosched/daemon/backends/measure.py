"""Measure a model on the CPU: exec per batch class and the transfer of its weights.

The same device code runs that will serve, so that what was measured is what will be predicted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median

import torch

from slosched.clock import now_ns
from slosched.config import ModelProfile
from slosched.core.worker.interface import Op, OpDone, OpKind
from slosched.daemon.backends.contract import check_rows
from slosched.daemon.backends.sources import explain_forward_error
from slosched.daemon.backends.templates import Array, DeviceWeights, Template
from slosched.daemon.backends.torch_device import TorchDevice
from slosched.daemon.backends.zoo import ModelSpec
from slosched.errors import InvalidConfig, SloschedError
from slosched.units import NS_PER_S

_WARM_UPS = 3
_RUNS = 10
#: No batch class is measured longer than this, once it ran twice.
_CLASS_AT_MOST_NS = 1_500_000_000
_OP_AT_MOST_NS = 60 * NS_PER_S


def measure_model(
    template: Template,
    batches: Sequence[int],
    *,
    max_exec_ns: int,
    progress: Callable[[str], None] | None = None,
) -> ModelProfile:
    """The profile of `template` on the CPU, and `template.batch_sizes` set to the classes in it.

    Ascending classes of `batches`; it ends at the first, other than 1, that is slower than
    `max_exec_ns` or fails (an exported program may have a fixed batch). Raises InvalidConfig if
    batch 1 fails.
    """
    spec = template.spec
    check_model(template)
    bench = _Bench(template)
    weights_ns = bench.load()
    exec_ns: dict[int, int] = {}
    output_shape: tuple[int, ...] = ()
    output_dtype = "float32"
    for batch in sorted({1, *batches}):
        template.batch_sizes = (*exec_ns, batch)
        try:
            spent_ns, output = bench.exec(batch)
        except RuntimeError as error:  # also what an op failed with
            if batch == 1:
                raise InvalidConfig(f"model {spec.name!r} does not run: {error}") from None
            break
        if batch > 1 and spent_ns > max_exec_ns:
            break
        exec_ns[batch] = spent_ns
        if batch == 1:
            output_shape = tuple(output.shape[1:])
            output_dtype = str(output.dtype).removeprefix("torch.")
        if progress is not None:
            progress(f"{spec.name} batch {batch}: {spent_ns / 1e6:.3f} ms")
    template.batch_sizes = tuple(exec_ns)
    bench.close()
    return ModelProfile(
        name=spec.name,
        exec_ns=exec_ns,
        weights_ns=weights_ns,
        weights_bytes=template.weights_bytes,
        input_shape=spec.input_shape,
        input_dtype=spec.input_dtype,
        output_shape=output_shape,
        output_dtype=output_dtype,
    )


def check_model(template: Template) -> None:
    """Refuse a model whose rows do not follow their inputs; note which of its weights a forward changes.

    Each run starts from the weights as they were loaded, as each served one does. Raises ModelRefused, or
    InvalidConfig for one that does not run at all.
    """
    name = template.spec.name
    weights = DeviceWeights(template.host.clone())
    while not template.add_views(weights):
        pass

    def run(rows: Array) -> Array:
        weights.block.copy_(template.host)
        answer: Array = (
            template.forward(weights, torch.from_numpy(rows)).contiguous().numpy().copy()
        )
        template.check_bound()
        return answer

    try:
        check_rows(run, template.sample_rows, name=name, precision=template.precision)
        for seed in range(_WARM_UPS):
            template.forward(weights, torch.from_numpy(template.sample_rows(1, seed)))
    except SloschedError:
        raise
    except Exception as error:  # a model may raise anything
        why = explain_forward_error(error, template.spec)
        raise InvalidConfig(f"model {name!r} does not run: {why}") from None
    finally:
        template.forget(weights)
    template.own_state = template.changed(weights)


def measure_spec(
    spec: ModelSpec,
    batches: Sequence[int],
    *,
    threads: int,
    max_exec_ns: int,
    progress: Callable[[str], None] | None = None,
) -> ModelProfile:
    """Build `spec` and measure it; see measure_model. `threads` are those of an inference."""
    torch.set_num_threads(threads)
    template = Template(spec)
    return measure_model(template, batches, max_exec_ns=max_exec_ns, progress=progress)


class _Bench:
    """A device of its own with one copy of the model on it, driven op by op."""

    def __init__(self, template: Template) -> None:
        self._name = template.spec.name
        self._device = TorchDevice({self._name: template})
        self._next_op = 0

    def load(self) -> int:
        """Median time of a few loads, ns. The model is loaded afterwards."""
        times = []
        for _ in range(3):
            self._device.evict(0)
            times.append(self._run(OpKind.LOAD_WEIGHTS, 0, 0).span.duration_ns)
        return round(median(times))

    def exec(self, batch: int) -> tuple[int, torch.Tensor]:
        """Median exec time of `batch`, ns, and one output. Raises RuntimeError if it fails."""
        times: list[int] = []
        begin_ns = now_ns()
        for run in range(_WARM_UPS + _RUNS):
            self._run(OpKind.COPY_INPUT, run, batch)
            done = self._run(OpKind.EXEC, run, batch)
            output = self._device.output_of(run)
            self._run(OpKind.COPY_OUTPUT, run, batch)
            enough = now_ns() - begin_ns > _CLASS_AT_MOST_NS
            if run >= _WARM_UPS or enough:
                times.append(done.span.duration_ns)
            if enough and run:
                break
        return round(median(times)), output

    def close(self) -> None:
        self._device.evict(0)

    def _run(self, kind: OpKind, action_id: int, batch: int) -> OpDone:
        self._next_op += 1
        op = Op(
            self._next_op, kind, 0, 0, action_id, batch_size=batch, request_count=batch,
            model_name=self._name,
        )  # fmt: skip
        give_up_ns = now_ns() + _OP_AT_MOST_NS
        self._device.launch(op, now_ns=now_ns())
        while now_ns() < give_up_ns:
            for done in self._device.poll(now_ns=now_ns()):
                if done.code:
                    raise RuntimeError(done.reason)
                return done
        raise RuntimeError(f"{kind.name} of {self._name} did not end within a minute")
