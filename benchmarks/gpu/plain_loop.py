"""An eager model in a plain loop beside a member's loop, in one process and by turns: median latencies as JSON.

python3 benchmarks/gpu/plain_loop.py bert 2 5    # the model, seconds of a turn, turns of each

Two processes would not do: where the card waits for the host, a plain loop differs by a fifth between two.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from statistics import median

import checkout_path  # noqa: F401  (before everything that lies in this checkout)
import msgspec
import torch

from slosched.clock import now_ns
from slosched.core.share.brain import Load, ShareBrain
from slosched.daemon.backends.eager.lane import EagerLane
from slosched.daemon.backends.eager.models import open_model
from slosched.daemon.member.loop import Control, Pair, Serving, undisturbed
from slosched.daemon.member.rows import RowFile
from slosched.share_spec import Begin, Job, Prepared, Row
from slosched.units import NS_PER_MS, NS_PER_S


def main(name: str, seconds: float, turns: int, device: str = "cuda:0") -> None:
    job = Job(name="job", model=name)
    lane = EagerLane(0, job, device=device, seed=0)
    prepared = lane.prepare()
    model = open_model(job, torch.device(device), 0)
    plain: list[float] = []
    member: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(turns + 1):
            plain_ms = _plain(model, seconds)
            member_ms = _member(lane, job, prepared, seconds, Path(folder) / f"{turn}.jsonl")
            if turn:  # the first one warms both up
                plain.append(plain_ms)
                member.append(member_ms)
    found = {"plain_ms": median(plain), "member_ms": median(member)}
    print(json.dumps(found | {"plain_turns_ms": plain, "member_turns_ms": member}))


def _plain(model: object, seconds: float) -> float:
    times: list[int] = []
    with undisturbed(), torch.inference_mode():
        until_ns = now_ns() + round(seconds * NS_PER_S)
        while (began_ns := now_ns()) < until_ns:
            [each.cpu() for each in model.run(lambda: None)]  # type: ignore[attr-defined]
            times.append(now_ns() - began_ns)
    return median(times) / NS_PER_MS


def _member(lane: EagerLane, job: Job, prepared: Prepared, seconds: float, path: Path) -> float:
    load = Load(job=0, clients=job.clients, expected_ns=prepared.exec_ns)
    rows = RowFile(path, now_ns)
    begin_ns = now_ns()
    serving = Serving(
        Begin(at_ns=begin_ns, until_ns=begin_ns + round(seconds * NS_PER_S), jobs=(0,)),
        rows=rows,
        control=Control(),
        now=now_ns,
        tell=lambda message: None,
        finish_within_ns=60 * NS_PER_S,
    )
    with undisturbed():
        serving.serve([Pair((0,), ShareBrain([load]), lane)])
    rows.close()
    read = [msgspec.json.decode(line, type=Row).request for line in path.read_bytes().splitlines()]
    return median(each.ended_ns - each.arrived_ns for each in read if each) / NS_PER_MS


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:])
