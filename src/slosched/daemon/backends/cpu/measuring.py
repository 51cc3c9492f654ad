"""Check a model and measure it, in the process that will serve it: exec per batch class, weights' transfer.

The code that serves is what runs, so that what was measured is what will be predicted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from statistics import median

from slosched.clock import now_ns
from slosched.config import ModelProfile
from slosched.daemon.backends import checking
from slosched.daemon.backends.checking import profile_of
from slosched.daemon.backends.contract import Arrays
from slosched.daemon.backends.cpu.serving import Rows, ServedModel, as_arrays, as_inputs
from slosched.daemon.backends.cpu.slots import outputs_begin
from slosched.daemon.backends.sources import explain_forward_error
from slosched.daemon.backends.templates import DeviceWeights, Template
from slosched.errors import InvalidConfig, SloschedError
from slosched.signature import Tensor

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
    """Check `model` and measure it on the CPU, in each of its length classes.

    Ascending batch sizes of 1 and `batches`; they end at the first, other than 1, that is slower than
    `max_exec_ns` or fails (an exported program may have a fixed batch). `progress` gets a line for each, and an
    empty one for each other step that has ended.
    Raises ModelRefused, or InvalidConfig for a model that does not run.
    """
    template = model.template
    spec = template.spec
    step = partial(progress, "")  # one forward may take long: it goes on
    step()
    model.answers_with(check_model(template, step))
    weights_ns = _load_ns(model)
    exec_ns = {
        length: _class_ns(model, length, batches, max_exec_ns, progress)
        for length in spec.lengths or (0,)
    }
    model.evict(_OWN)
    return profile_of(spec, model.gives, exec_ns, weights_ns, template.weights_bytes)


def _class_ns(
    model: ServedModel,
    length: int,
    batches: Sequence[int],
    max_exec_ns: int,
    progress: Callable[[str], None],
) -> dict[int, int]:
    """Exec time of each batch size of one length class, ns; see `measure_model`."""
    spec = model.template.spec
    exec_ns: dict[int, int] = {}
    for batch in sorted({1, *batches}):
        try:
            spent_ns = _exec_ns(model, batch, length, partial(progress, ""))
        except (
            Exception
        ) as error:  # a size that the model does not know; or a model that runs at times
            if batch == 1:
                raise InvalidConfig(explain_forward_error(error, spec)) from None
            break
        if batch > 1 and spent_ns > max_exec_ns:
            break
        exec_ns[batch] = spent_ns
        at = f" length {length}" if length else ""
        progress(f"{spec.name}{at} batch {batch}: {spent_ns / 1e6:.3f} ms")
    return exec_ns


def check_model(
    template: Template, step: Callable[[], object] = lambda: None
) -> tuple[Tensor, ...]:
    """Refuse a model whose rows do not follow their inputs; note which of its weights a forward changes.

    Each run starts from the weights as they were loaded, as each served one does; after it `step` is called.
    Returns its outputs. Raises ModelRefused, or InvalidConfig for one that does not run at all.
    """
    spec = template.spec
    weights = DeviceWeights(template.host.clone())
    while not template.add_views(weights):
        pass

    def run(rows: Arrays) -> Arrays:
        weights.block.copy_(template.host)
        outputs = as_arrays(template.forward(weights, as_inputs(spec.takes, rows)))
        answer = {name: array.copy() for name, array in outputs.items()}
        template.check_bound()
        step()
        return answer

    longest = max(spec.lengths, default=0)
    try:
        gives = checking.check_model(run, spec, precision=template.precision)
        run(template.sample_rows(1, 0, longest))
        for seed in range(_WARM_UPS):
            template.forward(weights, as_inputs(spec.takes, template.sample_rows(1, seed, longest)))
            step()
    except SloschedError:
        raise
    except Exception as error:  # a model may raise anything
        raise InvalidConfig(explain_forward_error(error, spec)) from None
    finally:
        template.forget(weights)
    template.own_state = template.changed(weights)
    return gives


def _load_ns(model: ServedModel) -> int:
    """Median time of a few loads, ns. The weights are loaded afterwards."""
    times = []
    for _ in range(_LOADS):
        model.evict(_OWN)
        begin_ns = now_ns()
        model.load(_OWN)
        times.append(now_ns() - begin_ns)
    return max(1, round(median(times)))


def _exec_ns(model: ServedModel, batch: int, length: int, step: Callable[[], object]) -> int:
    """Median exec time of the class (`batch`, `length`), ns."""
    takes, gives = model.layouts.at(length)
    outputs_at = outputs_begin(batch * takes.row_bytes)
    memory = bytearray(outputs_at + batch * gives.row_bytes)
    rows = Rows(memory, batch, length, outputs_at, model.layouts)
    rows.input_rows[:] = model.made_up(rows)[:batch]
    everything = range(batch)
    times: list[int] = []
    first_ns = now_ns()
    for run in range(_WARM_UPS + _RUNS):
        begin_ns = now_ns()
        model.run(_OWN, rows, everything, batch)
        end_ns = now_ns()
        step()
        enough = end_ns - first_ns > _CLASS_AT_MOST_NS
        if run >= _WARM_UPS or enough:
            times.append(end_ns - begin_ns)
        if enough and run:
            break
    return max(1, round(median(times)))
