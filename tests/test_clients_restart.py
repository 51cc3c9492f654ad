"""A controller that is killed and started again, under a client that goes on: real processes, real sockets."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest

from slosched import AsyncClient, connect
from slosched.clients.inference import Inference, Model
from slosched.errors import ConnectionLost, RequestFailed
from slosched.experiment.children import Child, Children

pytestmark = pytest.mark.processes

LOOPBACK = ("--bind", "127.0.0.1")


def _controller(children: Children, worker_port: int, port: int, log: Path) -> Child:
    return children.start(
        "controller",
        [
            "controller",
            "INFER5",
            "--workers",
            f"127.0.0.1:{worker_port}",
            *LOOPBACK,
            "--port",
            str(port),
            "--log-dir",
            str(log.with_suffix("")),
        ],
        log,
    )


def test_a_killed_controller_costs_its_clients_what_was_in_flight_and_no_more(
    tmp_path: Path,
) -> None:
    with Children() as children:
        device = ["worker", "--device", "emulated", "--port", "0", *LOOPBACK]
        worker = children.start("worker", device, tmp_path / "worker.log")
        worker_port = children.wait_ready(worker, within_s=30)
        controller = _controller(children, worker_port, 0, tmp_path / "first.log")
        port = children.wait_ready(controller, within_s=30)

        async def work() -> None:
            told: list[str] = []
            async with connect(f"127.0.0.1:{port}", on_restart=told.append) as client:
                two, models = (
                    await client.load("resnet50_v2", 2),
                    await client.load("resnet50_v2", 3),
                )
                assert two == models[:2]
                assert all([(await client.infer(model, slo=1)).ok for model in models])
                asked = [asyncio.ensure_future(client.infer(models[0], slo=20)) for _ in range(50)]
                await asyncio.sleep(0)  # all have begun,
                await asyncio.sleep(0)  # and left together
                os.kill(controller.process.pid, signal.SIGKILL)
                controller.process.wait(10)
                children.forget(controller)
                second = _controller(children, worker_port, port, tmp_path / "second.log")
                await asyncio.to_thread(children.wait_ready, second, within_s=30)
                ends = await asyncio.wait_for(asyncio.gather(*asked, return_exceptions=True), 60)
                lost = [each for each in ends if isinstance(each, ConnectionLost)]
                served = [each for each in ends if isinstance(each, Inference) and each.ok]
                assert len(served) + len(lost) == len(ends)
                # The same handles; while models are loaded again, requests wait.
                for model in models:
                    answer = await _served(client, model)
                    assert answer.ok and answer.model is model
                assert client.restarts == len(told) == 1
                assert client.lost_requests == len(lost)
                assert len((await client.models())[0]) == 3

        asyncio.run(asyncio.wait_for(work(), 120))


async def _served(client: AsyncClient, model: Model) -> Inference:
    """The first answer: a worker that has just joined a controller may load weights for longer than the SLO."""
    for _ in range(20):
        try:
            return await client.infer(model, slo=2, timeout_s=60)
        except RequestFailed:
            await asyncio.sleep(0.2)
    return await client.infer(model, slo=2)
