"""What an SLO that counts from the client's send is worth: three SLOs that ask for the same, side by side.

    .venv/bin/python benchmarks/client_deadlines.py [--rounds 5] [--seconds 8]

One emulated GPU with the linear profile serves Poisson arrivals. Each round runs the same load three times,
in turn: with an SLO from arrival at the controller (Clockwork's meaning), with one that is 0.5 ms shorter
by hand, and with one from the client's send, which the controller shortens by what it forecasts of the
client's latencies. All are judged alike: an answer is in time if it is here within the SLO, from its
scheduled send.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
from pathlib import Path
from statistics import mean

from cluster import serving

from slosched.clients.run import run_workload
from slosched.telemetry.client_log import FILE_NAME, read_client_log
from slosched.units import NS_PER_MS
from slosched.workloads import parse_workload

_PROFILE = "v100-linear"
_BY_HAND_MS = 0.5
#: Name, milliseconds taken off the SLO, and whether the SLO counts from the client's send.
_SLOS = (
    ("from arrival", 0.0, False),
    ("0.5 ms shorter", _BY_HAND_MS, False),
    ("from the send", 0.0, True),
)


def share_in_time(directory: Path, slo_ns: int) -> float:
    """Per cent of all requests whose answer came within `slo_ns`, by the client's log."""
    log = read_client_log(directory / FILE_NAME)
    good = [
        code == 0 and latency_ns <= slo_ns
        for code, latency_ns in zip(log["code"], log["latency_ns"], strict=True)
    ]
    return 100.0 * float(sum(good)) / max(1, len(good))


def measure(
    address: str, out: Path, *, rate: float, slo_ms: float, seconds: float, seed: int
) -> list[float]:
    """One round: the shares in time under the three SLOs, in their order."""
    shares = []
    for name, shorter_ms, from_send in _SLOS:
        slo = f"{slo_ms - shorter_ms:g}ms"
        words = ["resnet50_v2", "1", "poisson", f"{rate:g}", slo, slo, "2", "mul", f"{seconds:g}"]
        directory = out / name.replace(" ", "-")
        asyncio.run(
            run_workload(
                address,
                parse_workload("slo-exp-1", words),
                inputs=False,
                seed=seed,
                out=directory,
                slo_from_send=from_send,
            )
        )
        shares.append(share_in_time(directory, round(slo_ms * NS_PER_MS)))
    return shares


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rate", type=float, default=600, help="requests per second")
    parser.add_argument("--slo-ms", type=float, default=10)
    parser.add_argument("--seconds", type=float, default=8, help="of each run")
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    names = [name for name, _, _ in _SLOS]
    print(f"{_PROFILE}, {given.rate:g}/s, SLO {given.slo_ms:g} ms: per cent in time at the client")
    print("".join(f"{name:>18}" for name in ("round", *names)))
    with tempfile.TemporaryDirectory() as directory:
        rounds = []
        with serving(Path(directory) / "cluster", gpus=1, profile=_PROFILE) as cluster:
            for seed in range(given.rounds):
                shares = measure(
                    cluster.address,
                    Path(directory) / f"round-{seed}",
                    rate=given.rate,
                    slo_ms=given.slo_ms,
                    seconds=given.seconds,
                    seed=seed,
                )
                rounds.append(shares)
                print(f"{seed:>18}" + "".join(f"{share:>18.1f}" for share in shares), flush=True)
    means = [mean(shares[place] for shares in rounds) for place in range(len(names))]
    print(f"{'mean':>18}" + "".join(f"{share:>18.1f}" for share in means))


if __name__ == "__main__":
    main()
