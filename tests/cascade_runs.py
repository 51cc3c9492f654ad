"""Simulated runs of a cascade, and the one command that makes the golden numbers anew:

    .venv/bin/python tests/cascade_runs.py

They are in tests/golden/cascade_runs.json: for each policy the verdicts, the codes, and the digest of
stages.tsv.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slosched.cascade_spec import CascadeOptions
from slosched.codes import Code, Verdict
from slosched.config import PAGE_BYTES, SchedulerConfig
from slosched.loadgen.results import RunResult
from slosched.sim.faults import FaultPlan
from slosched.sim.run import simulate
from slosched.sim.spec import SimSpec
from slosched.telemetry.plan_log import read_plan_log
from slosched.telemetry.request_log import read_request_log
from slosched.telemetry.stage_log import read_stage_log
from slosched.telemetry.table import LogTable
from slosched.units import NS_PER_S
from slosched.workloads import parse_workload
from slosched.workloads.cascades import load_cascade

GOLDEN = Path(__file__).parent / "golden" / "cascade_runs.json"
POLICIES = (
    "CASCADE",
    "DIFFSERVE",
    "DIFFSERVE-STATIC",
    "CLIPPER-LIGHT",
    "CLIPPER-HEAVY",
    "PROTEUS",
)
#: Room for one of sdturbo's programs (2.7 and 2.1 GB), and for both.
ONE, BOTH = 2_800_000_000, 80_000_000_000


@dataclass(frozen=True)
class CascadeRun:
    """What came of a run."""

    result: RunResult
    verdicts: dict[str, int]
    codes: dict[str, int]
    digest: str
    plans: LogTable
    requests: LogTable
    stages: LogTable

    def numbers(self) -> dict[str, Any]:
        return {"verdicts": self.verdicts, "codes": self.codes, "stages_sha256": self.digest}


def spec_of(
    policy: str,
    trace: str = "fixed_8",
    *,
    gpus: int = 4,
    seconds: float = 20,
    memory_bytes: int = BOTH,
    seed: int = 1,
    faults: FaultPlan | None = None,
    **options: Any,
) -> SimSpec:
    """sdturbo under `policy`, with every invariant checked."""
    cascade = load_cascade("sdturbo")
    return SimSpec(
        workload=parse_workload("cascade", ["sdturbo", trace]),
        scheduler=SchedulerConfig(
            policy=policy, cascades=(cascade,), cascade=CascadeOptions(**options)
        ),
        profiles=(cascade.profile(memory_bytes=memory_bytes, page_bytes=PAGE_BYTES),),
        gpus=gpus,
        seed=seed,
        duration_ns=round(seconds * NS_PER_S),
        faults=faults,
        check=True,
    )


def run(spec: SimSpec, folder: Path) -> CascadeRun:
    result = simulate(spec, out=folder / "run")
    assert result.run_dir is not None
    stages = read_stage_log(result.run_dir / "stages.tsv")
    requests = read_request_log(result.run_dir / "clockwork_request_log.tsv")
    return CascadeRun(
        result=result,
        verdicts=counted(Verdict(each).name for each in stages["verdict"].tolist()),
        codes=counted(Code(each).name for each in requests["result"].tolist()),
        digest=hashlib.sha256((result.run_dir / "stages.tsv").read_bytes()).hexdigest(),
        plans=read_plan_log(result.run_dir / "cascade_plans.tsv"),
        requests=requests,
        stages=stages,
    )


def counted(names: Any) -> dict[str, int]:
    return dict(sorted(Counter(names).items()))


def golden_numbers() -> dict[str, Any]:
    numbers = {}
    for policy in POLICIES:
        with tempfile.TemporaryDirectory() as folder:
            numbers[policy] = run(spec_of(policy), Path(folder)).numbers()
    return numbers


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(golden_numbers(), indent=2) + "\n")
    sys.stdout.write(f"{GOLDEN} is made anew\n")
