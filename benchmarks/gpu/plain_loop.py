"""An eager model of the sharing experiments in a plain loop: its median latency in ms.

python3 benchmarks/gpu/plain_loop.py bert 5    # the model, and for how many seconds
"""

from __future__ import annotations

import sys
from statistics import median

import checkout_path  # noqa: F401  (before everything that lies in this checkout)
import torch

from slosched.clock import now_ns
from slosched.daemon.backends.eager.models import open_model
from slosched.share_spec import Job
from slosched.units import NS_PER_MS, NS_PER_S


def main(name: str, seconds: float) -> None:
    model = open_model(Job(name=name, model=name), torch.device("cuda:0"), 0)
    times: list[int] = []
    with torch.inference_mode():
        until_ns = now_ns() + round((seconds + 2) * NS_PER_S)
        while (began_ns := now_ns()) < until_ns:
            [each.cpu() for each in model.run(lambda: None)]
            times.append(now_ns() - began_ns)
    print(median(times[len(times) // 4 :]) / NS_PER_MS)


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]))
