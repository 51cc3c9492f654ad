"""What a model instance and a queued request cost the controller in resident memory."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from cluster import Load, serving
from process_parts import rss_bytes

from slosched.clients.aio import connect
from slosched.clock import now_ns
from slosched.experiment.children import ChildFailed
from slosched.units import NS_PER_S

INSTANCES = 10_000
#: Some are served while the others are sent: at least 100,000 wait in the end.
QUEUED = 107_000
#: Long enough that nothing is given up, and that no request is refused: capacity is 1,019 requests/s.
_SLO_NS = 1_000 * NS_PER_S
OVERLOAD_RATE = 10_190
OVERLOAD_S = 20.0
_BURST = 500
_BURST_EVERY_S = 0.02
_WITHIN_S = 60.0
_SETTLE_S = 2.0


async def measure(directory: Path) -> dict[str, Any]:
    """One emulated GPU. First 10,000 instances are loaded, then 107,000 requests are sent at once.

    `before`, `instances`, `queued` and `after` are the controller's resident bytes: at the start, with the
    instances, with the requests, and when their client has left. Raises ChildFailed if the requests do
    not get there.
    """
    with serving(directory / "memory", gpus=1) as cluster:
        pid = cluster.controller.process.pid
        async with connect(cluster.address) as client:
            await client.load("resnet50_v2", 1)
            await asyncio.sleep(_SETTLE_S)
            before = rss_bytes(pid)
            models = await client.load("resnet50_v2", INSTANCES)
            await asyncio.sleep(_SETTLE_S)
            instances = rss_bytes(pid)
            print(
                f"  {INSTANCES} instances: {(instances - before) / INSTANCES:.0f} B each",
                flush=True,
            )
            async with connect(cluster.address) as sender:
                [model] = await sender.load("resnet50_v2", 1)
                for first in range(0, QUEUED, _BURST):
                    for _ in range(first, min(QUEUED, first + _BURST)):
                        sender.submit(model, slo_ns=_SLO_NS, on_reply=_ignored, later=True)
                    if sender.flush():
                        raise ChildFailed("the controller took no more requests")
                    await asyncio.sleep(_BURST_EVERY_S)
                ends_ns = now_ns() + int(_WITHIN_S * NS_PER_S)
                while (await _queued(client)) == 0 and now_ns() < ends_ns:
                    await asyncio.sleep(0.1)
                waiting = await _queued(client)
                queued = rss_bytes(pid)
                print(
                    f"  {waiting} queued: {(queued - instances) / waiting:.0f} B each", flush=True
                )
            await asyncio.sleep(2 * _SETTLE_S)
            after = rss_bytes(pid)
    return {
        **_overloaded(directory),
        "instances": len(models),
        "queued": waiting,
        "before_bytes": before,
        "instances_bytes": instances,
        "queued_bytes": queued,
        "after_bytes": after,
    }


def _overloaded(directory: Path) -> dict[str, Any]:
    """The controller's resident memory under ten times the capacity of its GPU, every second."""
    sizes: list[int] = []
    load = Load(OVERLOAD_RATE, 1, "100ms", "100ms", OVERLOAD_S)
    with serving(directory / "overloaded", gpus=1) as cluster:
        client, _ = cluster.start_client(load)
        while cluster.children.wait(client, 1.0) is None and len(sizes) < 3 * OVERLOAD_S:
            sizes.append(rss_bytes(cluster.controller.process.pid))
        cluster.children.check()
    settled = sizes[len(sizes) // 4 :]
    return {
        "overload_rate": OVERLOAD_RATE,
        "overload_s": OVERLOAD_S,
        "overload_first_bytes": settled[0],
        "overload_last_bytes": settled[-1],
        "overload_most_bytes": max(settled),
    }


async def _queued(client: Any) -> int:
    report = await client.status(brief=True, timeout_s=20.0)
    return int(report["requests"]["queued"])


def _ignored(reply: object, output: object) -> None:
    pass
