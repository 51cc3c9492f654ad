"""`slosched exp matrices`: A @ B as a graph of calls, by several systems, against one process.

After Faasm (USENIX ATC'20, section 6.4, figure 8), whose two systems took as long, and moved different amounts.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

import numpy as np

from slosched.errors import MissingPackage, SloschedError
from slosched.faasm import layout
from slosched.faasm.frame import Frame
from slosched.faasm.installed import check_installed
from slosched.faasm.matrices import blocks, functions, summary
from slosched.faasm.matrices.baselines import Order, measured_apart
from slosched.faasm.matrices.blocks import Truth
from slosched.faasm.matrices.options import MatricesOptions
from slosched.faasm.matrices.systems import Stores, System, chosen, lack_of_memory, lacks, opened

#: The first calls of a system, of which no time is kept, are on matrices of that size.
_WARM_SIZE = 64
#: For the estimate of a run's time: a core's float32 operations, bytes that calls read and write through the
#: local tier and through Redis, a call beside them, an element that is made or compared, and what is beside
#: the products.
_OPERATIONS_PER_S, _SHARED_BYTES_PER_S, _SENT_BYTES_PER_S = 1.2e11, 2e9, 4e8
_CALL_S, _ELEMENT_S, _BESIDE_S = 1e-3, 1e-8, 0.7


class WrongProduct(SloschedError):
    """A system's product differs from A @ B by more than rounding can: its times mean nothing."""


def check(options: MatricesOptions) -> None:
    """Raise UnknownName, InvalidConfig or MissingPackage for systems that cannot run, where they are named."""
    systems = chosen(options.systems, options.kernel, options.workers)
    if options.kernel != "numpy":
        check_installed(f"the kernel {options.kernel}", options.kernel)
    for system in systems if options.systems else ():
        if lack := lacks(system):
            raise MissingPackage(f"the system {system.name} cannot run: {lack}")


def run(options: MatricesOptions, frame: Frame) -> None:
    """Measure every system at every size, and report. Raises WrongProduct once all of it is recorded."""
    options = options.at_scale(frame.scale)
    systems = []
    for system in chosen(options.systems, options.kernel, options.workers):
        if lack := lacks(system):
            frame.say(f"{system.name} is left out: {lack}")
        else:
            systems.append(system)
    cells = [
        (system, size, splits)
        for system in systems
        for size in options.sizes
        for splits in splits_of(system, options)
    ]
    frame.expect(
        {
            cell_key(system, size, splits): expected_s(system, size, splits, options.repeats)
            for system, size, splits in cells
        }
    )
    truths = {size: Truth(options.seed, size) for size in options.sizes}
    if frame.measures:
        if options.kernel != "numpy":
            frame.bill_gpus()
        with closing(Stores()) as stores:
            for system in systems:
                todo = [
                    (size, splits)
                    for size in options.sizes
                    for splits in splits_of(system, options)
                    if not frame.has(cell_key(system, size, splits))
                ]
                fitting = _without_too_large(frame, system, todo)
                if system.engine and fitting:
                    _by_engine(options, frame, stores, system, truths, fitting)
                else:
                    for size, splits in fitting:
                        with _billed_cell(frame, system, size, splits) as made:
                            made += _alone(options, frame, system, truths[size], splits)
            stores.check()
    wrong = [each for each in frame.records() if each.get("right") is False]
    if wrong:
        report(options, frame)
        cells_of_wrong = ", ".join(dict.fromkeys(each["key"] for each in wrong))
        raise WrongProduct(
            f"products that are wrong: {cells_of_wrong}; the worst is off by {worst(wrong):.2g}"
        )


def report(options: MatricesOptions, frame: Frame) -> None:
    """Tables and figures, from the records alone."""
    options = options.at_scale(frame.scale)
    summary.show(frame, chosen(options.systems, options.kernel, options.workers))


def worst(records: list[dict[str, Any]]) -> float:
    return max(float(each["error"]) for each in records)


def splits_of(system: System, options: MatricesOptions) -> tuple[int, ...]:
    """A single multiplication has no splits, and the blocked one at least 1."""
    if system.name.startswith("whole"):
        return (0,)
    if system.name == "blocked":
        return tuple(each for each in options.splits if each)
    return options.splits


def expected_s(system: System, size: int, splits: int, repeats: int) -> float:
    """About how long a cell takes in s: its products, making its matrices, and the comparison.

    The speeds are those of a usual core, and of the state as it is on one.
    """
    cores = 1 if system.one_core else min(len(os.sched_getaffinity(0)), system.slots * system.hosts)
    if system.name == "whole":
        cores = len(os.sched_getaffinity(0))
    product_s = blocks.operations(size) / _OPERATIONS_PER_S
    made_s = 3 * size * size * _ELEMENT_S
    if not system.calls:
        return repeats * product_s / cores + made_s + _BESIDE_S
    bytes_per_s = _SENT_BYTES_PER_S if system.pushes else _SHARED_BYTES_PER_S
    product_s += blocks.travelling_bytes(size, splits) / bytes_per_s
    product_s += blocks.calls(splits) * _CALL_S
    return repeats * (product_s / cores + 2 * made_s) + _BESIDE_S


def cell_key(system: System, size: int, splits: int) -> str:
    return f"{system.name} size={size} splits={splits}"


def _without_too_large(
    frame: Frame, system: System, todo: list[tuple[int, int]]
) -> list[tuple[int, int]]:
    """What fits into this machine now. What does not is recorded as left out."""
    found = []
    for size, splits in todo:
        lack = lack_of_memory(system, size, splits)
        if not lack:
            found.append((size, splits))
            continue
        with frame.cell(cell_key(system, size, splits)) as cell:
            if cell:
                cell.row({"kind": "left out", **named(system, size, splits), "why": lack})
                frame.say(f"{cell.key}: left out: it {lack}")
    return found


def _by_engine(
    options: MatricesOptions,
    frame: Frame,
    stores: Stores,
    system: System,
    truths: dict[int, Truth],
    todo: list[tuple[int, int]],
) -> None:
    """The cells of a system of calls, in processes that are started for them."""
    store = stores.address(system)
    # The leak check of a run asks no server that ends with it; `stores` looks there itself.
    namespace = frame.new_namespace()
    most_splits = max(splits for _, splits in todo)
    room = max(blocks.stored_bytes(size, splits) for size, splits in todo)
    room += blocks.stored_bytes(_WARM_SIZE, most_splits)
    logs = frame.raw(f"{system.name}-logs")
    with opened(system, options.kernel, namespace, store, room, logs) as (engine, states):
        warm = system.plan(_WARM_SIZE, most_splits, 0, options.kernel, "warm")
        functions.product(engine, warm)
        functions.forget(states, warm)
        for size, splits in todo:
            with _billed_cell(frame, system, size, splits) as made:
                for repeat in range(options.repeats):
                    prefix = f"{size}.{splits}.{repeat}"
                    plan = system.plan(size, splits, options.seed, options.kernel, prefix)
                    found = functions.product(engine, plan)
                    found |= compared(truths[size], functions.product_of(states[0], plan))
                    functions.forget(states, plan)
                    made.append(record(system, size, splits, repeat, found))


@contextmanager
def _billed_cell(
    frame: Frame, system: System, size: int, splits: int
) -> Iterator[list[dict[str, Any]]]:
    """A cell whose records get what its processes used. It is given as the list of these records."""
    with frame.cell(cell_key(system, size, splits)) as cell:
        found: list[dict[str, Any]] = []
        with frame.bill() as bill:
            yield found
        for each in found:
            cell.row(each | bill.record())


def named(system: System, size: int, splits: int) -> dict[str, Any]:
    """The fields of every record."""
    return {"system": system.name, "size": size, "splits": splits}


def compared(truth: Truth, product: blocks.Matrix) -> dict[str, Any]:
    """How far a product is from the one in float64, and whether that is rounding."""
    error = truth.error(product)
    tolerance = blocks.tolerance(truth.size)
    return {"error": error, "tolerance": tolerance, "right": error <= tolerance}


def _alone(
    options: MatricesOptions, frame: Frame, system: System, truth: Truth, splits: int
) -> list[dict[str, Any]]:
    """The records of a system that is one process. The last of its products is compared."""
    stem = f"{system.name}-{truth.size}-{splits}"
    product = frame.raw(f"{stem}.npy")
    order = Order(
        kernel=options.kernel,
        size=truth.size,
        splits=splits,
        seed=options.seed,
        how=system.how,
        repeats=options.repeats,
        product=str(product),
        namespace=frame.new_namespace(),
    )
    try:
        found = measured_apart(order, frame.raw(f"{stem}.log"), one_core=system.one_core)
        checked = compared(truth, np.load(product, mmap_mode="r"))
    finally:
        product.unlink(missing_ok=True)
    return [
        record(system, truth.size, splits, repeat, each | checked)
        for repeat, each in enumerate(found)
    ]


def record(
    system: System, size: int, splits: int, repeat: int, found: dict[str, Any]
) -> dict[str, Any]:
    """What is kept of one product."""
    published = layout.matrices(
        system.published,
        size=size,
        splits=splits,
        workers=system.slots * system.hosts,
        run_ns=found["took_ns"],
    )
    return {
        "kind": "product",
        **named(system, size, splits),
        "repeat": repeat,
        **found,
        layout.PUBLISHED: published,
    }
