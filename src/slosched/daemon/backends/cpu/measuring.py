"""Check a model and measure it, in the process that will serve it: exec per batch class, weights' transfer.

The code that serves is what runs, so that what was measured is what will be predicted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from statistics import median

import torch

from slosched.clock import now_ns
from slosched.config import ModelProfile
from slosched.daemon.backends.contract import check_rows
from slosched.daemon.backends.cpu.serving import Rows, ServedModel
from slosched.daemon.backends.sources import explain_forward_error
from slosched.daemon.backends.templates import Array, DeviceWeights, Template
from slosched.errors import InvalidConfig, SloschedError
from slosched.units import tensor_bytes

_WARM_UPS = 3
_RUNS = 10
_LOADS = 3
#: No batch class is measured longer than this, once it ran twice.
_CLASS_AT_MOST_NS = 1_500_000_000
#: The instance whose weights are measured: no controller's.
_OWN = -1


def measure_model(
    model: ServedModel,
    batches: Sequence[int],
    *,
    max_exec_ns: int,
    progress: Callable[[str], None],
) -> ModelProfile:
    """Check `model` and measure it on the CPU; `template.batch_sizes` are the classes that were measured.

    Ascending classes of 1 and `batches`; it ends at the first, other than 1, that is slower than
    `max_exec_ns` or fails (an exported program may have a fixed batch). `progress` gets a line for each, and an
    empty one for each other step that has ended.
    Raises ModelRefused, or InvalidConfig for a model that does not run.
    """
    template = model.template
    spec = template.spec
    step = partial(progress, "")  # one forward may take long: it goes on
    step()
    answer = check_model(template, step)
    model.output = (answer.shape[1:], str(answer.dtype))
    weights_ns = _load_ns(model)
    exec_ns: dict[int, int] = {}
    for batch in sorted({1, *batches}):
        try:
            spent_ns = _exec_ns(model, batch, step)
        except (
            Exception
        ) as error:  # a size that the model does not know; or a model that runs at times
            if batch == 1:
                raise InvalidConfig(
                    f"model {spec.name!r} does not run: {explain_forward_error(error, spec)}"
                ) from None
            break
        if batch > 1 and spent_ns > max_exec_ns:
            break
        exec_ns[batch] = spent_ns
        progress(f"{spec.name} batch {batch}: {spent_ns / 1e6:.3f} ms")
    template.batch_sizes = tuple(exec_ns)
    model.evict(_OWN)
    return ModelProfile(
        name=spec.name,
        exec_ns=exec_ns,
        weights_ns=weights_ns,
        weights_bytes=template.weights_bytes,
        input_shape=spec.input_shape,
        input_dtype=spec.input_dtype,
        output_shape=model.output[0],
        output_dtype=model.output[1],
    )


def check_model(template: Template, step: Callable[[], object] = lambda: None) -> Array:
    """Refuse a model whose rows do not follow their inputs; note which of its weights a forward changes.

    Each run starts from the weights as they were loaded, as each served one does; after it `step` is called.
    Returns the answer to a batch of 1. Raises ModelRefused, or InvalidConfig for one that does not run at all.
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
        step()
        return answer

    try:
        check_rows(run, template.sample_rows, name=name, precision=template.precision)
        answer = run(template.sample_rows(1, 0))
        for seed in range(_WARM_UPS):
            template.forward(weights, torch.from_numpy(template.sample_rows(1, seed)))
            step()
    except SloschedError:
        raise
    except Exception as error:  # a model may raise anything
        why = explain_forward_error(error, template.spec)
        raise InvalidConfig(f"model {name!r} does not run: {why}") from None
    finally:
        template.forget(weights)
    template.own_state = template.changed(weights)
    return answer


def _load_ns(model: ServedModel) -> int:
    """Median time of a few loads, ns. The weights are loaded afterwards."""
    times = []
    for _ in range(_LOADS):
        model.evict(_OWN)
        begin_ns = now_ns()
        model.load(_OWN)
        times.append(now_ns() - begin_ns)
    return max(1, round(median(times)))


def _exec_ns(model: ServedModel, batch: int, step: Callable[[], object]) -> int:
    """Median exec time of `batch`, ns."""
    spec = model.template.spec
    outputs_at = batch * tensor_bytes(spec.input_shape, spec.input_dtype)
    size = outputs_at + batch * tensor_bytes(*model.output)
    rows = Rows(bytearray(size), batch, outputs_at, spec)
    rows.inputs[:] = torch.from_numpy(model.template.sample_input(batch))
    everything = range(batch)
    times: list[int] = []
    first_ns = now_ns()
    for run in range(_WARM_UPS + _RUNS):
        begin_ns = now_ns()
        model.run(_OWN, rows, batch, everything, batch)
        end_ns = now_ns()
        step()
        enough = end_ns - first_ns > _CLASS_AT_MOST_NS
        if run >= _WARM_UPS or enough:
            times.append(end_ns - begin_ns)
        if enough and run:
            break
    return max(1, round(median(times)))
