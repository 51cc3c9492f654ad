"""The systems that are one process: A @ B, the blocked algorithm, and the graph of calls inline.

    python -m slosched.faasm.matrices.baselines '{"kernel": "numpy", "size": 1000, ...}'

Each is a process of its own, so that the number of its cores and its memory are what was asked for. It prints a
line of JSON, and writes the product to the file that it is told.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from slosched import child_processes
from slosched.clock import monotonic_ns
from slosched.engines.local import LocalEngine
from slosched.errors import SloschedError
from slosched.faasm.matrices import blocks, functions, kernels
from slosched.faasm.matrices.blocks import NAMES, Matrix, Plan
from slosched.faasm.matrices.systems import How
from slosched.functions.state.state import State
from slosched.functions.state.store import Limits

_END_S = 5.0
#: The longest that a baseline may take.
_MOST_S = 3600.0
#: Short products are repeated until they have taken that long, or so often.
_SHORT_NS, _MOST_REPEATS = 300_000_000, 20

Record = dict[str, Any]


class Order(msgspec.Struct, frozen=True, kw_only=True):
    """What is measured. `how`: one multiplication, the algorithm of the graph, or the graph's calls inline.

    There are `repeats`, and more of short ones. `product` is the file of the last product, in NumPy's format.
    `namespace` is that of the graph's state.
    """

    kernel: str
    size: int
    splits: int
    seed: int
    how: How
    repeats: int
    product: str
    namespace: str


class BaselineFailed(SloschedError):
    """The process of a baseline ended without a result."""


def measure(order: Order) -> list[Record]:
    """Multiply in this process, and write the last product. Returns a record for each repeat.

    A short product is made once more before, as the first takes memory that the others find.
    """
    found: list[Record] = []
    with _multiplier(order) as multiply:
        first = multiply("first", order.repeats == 1)
        if first["took_ns"] > _SHORT_NS:
            found.append(first)
        while len(found) < order.repeats or (
            len(found) < _MOST_REPEATS and sum(each["took_ns"] for each in found) < _SHORT_NS
        ):
            last = len(found) + 1 >= order.repeats
            found.append(multiply(str(len(found)), last))
    return found


@contextmanager
def _multiplier(order: Order) -> Iterator[Callable[[str, bool], Record]]:
    """What multiplies once, under a name that was not used, and writes the product if it is told to."""
    if order.how == "graph":
        room = blocks.stored_bytes(order.size, order.splits) + blocks.stored_bytes(8, 1)
        state = State(order.namespace, own=True, limits=Limits(bytes=room))
        with state, LocalEngine(functions.offered(order.kernel), state=state) as engine:
            warm = Plan(size=8, splits=1, prefix="warm", kernel=order.kernel)
            functions.product(engine, warm)  # with what `init` imports
            functions.forget([state], warm)
            yield partial(_by_calls, order, engine, state)
        return
    by = kernels.kernel(order.kernel)
    a, b = (blocks.block_values(order.seed, name, order.size, 0, 0, 0) for name in NAMES)
    yield partial(_by_itself, order, by, a, b)


def _by_calls(order: Order, engine: LocalEngine, state: State, name: str, last: bool) -> Record:
    plan = Plan(
        size=order.size, splits=order.splits, seed=order.seed, prefix=name, kernel=order.kernel
    )
    found = functions.product(engine, plan)
    if last:
        _write(order, functions.product_of(state, plan))
    functions.forget([state], plan)
    return found


def _by_itself(
    order: Order, by: kernels.Kernel, a: Matrix, b: Matrix, name: str, last: bool
) -> Record:
    begun_ns = monotonic_ns()
    if order.how == "whole":
        product, copies_ns, _ = kernels.product(by, a, b)
    else:
        left, right = by.load(a), by.load(b)
        by.wait()
        loaded_ns = monotonic_ns()
        found = kernels.blocked(by, left, right, order.splits)
        by.wait()
        made_ns = monotonic_ns()
        product = by.save(found)
        copies_ns = loaded_ns - begun_ns + monotonic_ns() - made_ns
    took_ns = monotonic_ns() - begun_ns
    if last:
        _write(order, product)
    return {"took_ns": took_ns, "device_copy_ns": copies_ns, "device": by.device}


def _write(order: Order, product: Matrix) -> None:
    with Path(order.product).open("wb") as file:
        np.save(file, product)


def measured_apart(order: Order, log: Path, *, one_core: bool = False) -> list[Record]:
    """The same in a process of its own. Raises BaselineFailed; what it wrote is in `log`."""
    argv = [sys.executable, "-m", __name__, msgspec.json.encode(order).decode()]
    answer = log.with_suffix(".json")
    with answer.open("wb") as out, log.open("wb") as errors:
        variables = os.environ | child_processes.computing_threads(1) if one_core else None
        process = child_processes.start(
            argv, stdout=out.fileno(), stderr=errors.fileno(), env=variables
        )
        try:
            code = process.wait(_MOST_S)
        except subprocess.TimeoutExpired:
            raise BaselineFailed(f"a baseline took more than {_MOST_S:.0f} s") from None
        finally:
            child_processes.end(process, within_s=_END_S)
    if code:
        text = log.read_text(errors="replace").strip().rpartition("\n")[2]
        raise BaselineFailed(f"a baseline ended with {code}: {text} (all of it: {log})")
    return msgspec.json.decode(answer.read_bytes(), type=list[Record])


def main() -> int:
    child_processes.end_with_parent(9)
    order = msgspec.json.decode(sys.argv[1], type=Order)
    sys.stdout.write(msgspec.json.encode(measure(order)).decode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
