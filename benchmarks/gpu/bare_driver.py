"""One worker's controller that decides nothing, in a process of its own, so that several can act at once.

    bare_driver.py PORT MODEL COPIES

It loads the copies, says {"ready": ...}, and then answers each line of JSON with one: {"do": "starts", "count"}
measures start lateness, {"do": "loads", "seconds"} loads the copies over and over, {"do": "wait"} only waits.
Each begins at "at_ns".
"""

from __future__ import annotations

import json
import select
import sys
import time
from typing import Any

import checkout_path  # noqa: F401  (before everything that lies in this checkout)
from exact_bare import BareController, planned_starts

from slosched.clock import now_ns
from slosched.messages import LoadModelResult
from slosched.units import NS_PER_S

_TICK_S = 0.005


def loads(bare: BareController, copies: int, seconds: float) -> dict[str, Any]:
    """Load and evict all copies for `seconds`: when each load began and ended, on the worker's clock (ns)."""
    end_ns = now_ns() + round(seconds * NS_PER_S)
    spans = []
    while now_ns() < end_ns:
        spans += [result.span for result in bare.reload_all(copies)]
    return {"spans": [[span.begin_ns, span.end_ns, span.duration_ns] for span in spans]}


def perform(
    bare: BareController, prepared: LoadModelResult, copies: int, order: dict[str, Any]
) -> dict[str, Any]:
    """Do what the line says, at its time."""
    while now_ns() < order["at_ns"]:
        bare.drain()
        time.sleep(_TICK_S / 10)
    match order["do"]:
        case "starts":
            return planned_starts(bare, prepared, order["count"])
        case "loads":
            return loads(bare, copies, order["seconds"])
        case _:
            return {}


def main() -> int:
    port, model, copies = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    with BareController(port) as bare:
        bare.hello()
        prepared, _ = bare.load(model, copies)
        exec_ns = dict(zip(prepared.batch_sizes, prepared.exec_ns, strict=True))
        ready = {"exec_ns": exec_ns, "weights_ns": prepared.weights_ns}
        print(json.dumps({"ready": ready}), flush=True)
        while True:
            bare.drain()  # its heartbeats want an answer
            if not select.select([sys.stdin], [], [], _TICK_S)[0]:
                continue
            line = sys.stdin.readline()
            if not line:
                return 0
            print(json.dumps(perform(bare, prepared, copies, json.loads(line))), flush=True)


if __name__ == "__main__":
    sys.exit(main())
