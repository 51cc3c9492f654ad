"""Row "cold": 3,000 instances over the caches of all GPUs, asked for by Zipf popularity."""

from __future__ import annotations

from typing import Any

from exact_cold import EXPONENT, INSTANCES, SLO, cold_figures
from exact_rig import Rig, check, scaled
from live_and_simulated import describe, simulate_beside
from several_rig import Compared
from several_sweeps import compared_checks, pcie_bytes_per_s, several

from slosched.units import NS_PER_MS, NS_PER_S

#: Requests/s of each GPU: between the light and the heavy load of one GPU alone.
_RATE_PER_GPU = 300
_SECONDS = 15
_SETTLE_S = 3.0
#: Instances that the compared answers come from, the first ones.
_COMPARED_COPIES = 48


def cold(rig: Rig) -> dict[str, Any]:
    """Latency of cold requests less exec and load, and how busy PCIe and GPUs are."""
    rig = several(rig)
    gpus, seconds = rig.settings.gpus, rig.settings.seconds(_SECONDS)
    instances = rig.settings.number(INSTANCES, least=250)
    rate = rig.rate(_RATE_PER_GPU) * gpus
    words = [
        "zipf",
        rig.settings.model,
        str(instances),
        f"{rate:g}",
        EXPONENT,
        f"{seconds:g}s",
        SLO,
    ]
    compared = Compared(rig, rate, seconds, _COMPARED_COPIES)
    with rig.serving("cold") as served, compared.beside(served):
        result = rig.client(served, words, seconds)
    settle_ns = round(min(_SETTLE_S, seconds / 4) * NS_PER_S)
    figures = describe(rig, served.run_dir, words, result)
    found = cold_figures(served.run_dir, served.run_dir, settle_ns)
    found |= {"pcie_busy": found["pcie_busy"] / gpus, "gpu_busy": found["gpu_busy"] / gpus}
    figures |= {
        "cold": found,
        "instances": instances,
        "sent_rate": rate,
        "compared": compared.found,
    }
    figures["pcie_bytes_per_s"] = pcie_bytes_per_s(rig)
    simulate_beside(rig, "cold", figures)
    beyond = found["beyond_exec_and_load_ns"]
    where = f"{instances} instances, {rate:g}/s"
    return {
        "figures": figures,
        "checks": [
            check(
                f"{where}: cold latency less exec and load, p99",
                scaled(beyond["p99"], NS_PER_MS),
                "ms",
            ),
            check(f"{where}: the same, p50", scaled(beyond["p50"], NS_PER_MS), "ms"),
            check(f"{where}: load, p50", scaled(found["load_ns"]["p50"], NS_PER_MS), "ms"),
            check(
                f"{where}: PCIe busy with loads, of each GPU", 100 * found["pcie_busy"], "%", "< 30"
            ),
            check(f"{where}: GPUs busy", 100 * found["gpu_busy"], "%"),
            check(f"{where}: cold requests served", float(found["cold_served"]), ""),
            check(f"{where}: in time at {SLO}, of all", 100 * result.satisfaction, "%"),
            *compared_checks("cold", compared.found),
        ],
    }
