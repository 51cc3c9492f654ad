"""Whose answer was it? Two live clients, thousands of requests in batches, each with a mark of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from slosched import AsyncClient, connect
from slosched.clients.inference import Model
from slosched.experiment.children import Children

pytestmark = [pytest.mark.processes, pytest.mark.quiet]

LOOPBACK = ("--bind", "127.0.0.1", "--port", "0")
#: Each client's requests; how many of them are in flight at once; every third brings no input.
REQUESTS, AT_ONCE, WITHOUT = 2000, 64, 3
#: Small inputs, so that the marks are what travels. An output is as long as its mark and a zero.
PROFILE = """
name = "small"
weights_cache_bytes = 1073741824
page_bytes = 16777216

[models.tiny]
exec_ns = { 1 = 1_000_000, 2 = 1_200_000, 4 = 1_500_000, 8 = 2_000_000, 16 = 3_000_000 }
weights_ns = 1_000_000
weights_bytes = 16_000_000
input_shape = [5]
input_dtype = "int64"
output_shape = [3]
output_dtype = "int64"
"""


async def ask(client: AsyncClient, model: Model, who: int) -> tuple[list[str], set[int]]:
    """Send REQUESTS; returns what was wrong with answers, and the batch sizes that they came in."""
    wrong: list[str] = []
    batches: set[int] = set()
    numbers = iter(range(1, REQUESTS + 1))

    async def one_after_another() -> None:
        for number in numbers:
            if number % WITHOUT == 0:
                answer = await client.infer(model, slo="60s")
                if answer.output is not None:
                    wrong.append(f"client {who}, {number} without input: {answer.output.tolist()}")
            else:
                array = np.array([who, number, 7, 7, 7], np.int64)
                answer = await client.infer(model, array, slo="60s")
                got = None if answer.output is None else answer.output.tolist()
                if got != [who, number, 0]:
                    wrong.append(f"client {who}, {number}: {got}")
            batches.add(answer.batch_size)

    await asyncio.gather(*(one_after_another() for _ in range(AT_ONCE)))
    return wrong, batches


@pytest.mark.parametrize("options", [(), ("--generate-inputs",)], ids=["plain", "generate inputs"])
def test_every_answer_is_that_of_its_own_request(options: tuple[str, ...], tmp_path: Path) -> None:
    profile = tmp_path / "small.toml"
    profile.write_text(PROFILE)
    with Children() as children:
        emulated = ("worker", "--device", "emulated", "--profile", str(profile), *LOOPBACK)
        workers = [
            children.start(f"worker {i}", [*emulated, "--gpus", gpus], tmp_path / f"w{i}.log")
            for i, gpus in enumerate("21")
        ]
        addresses = ",".join(f"127.0.0.1:{children.wait_ready(w, within_s=30)}" for w in workers)
        arguments = ["controller", "INFER5", "--workers", addresses, *LOOPBACK, *options]
        arguments += ["--log-dir", str(tmp_path / "run")]
        controller = children.start("controller", arguments, tmp_path / "c.log")
        address = f"127.0.0.1:{children.wait_ready(controller, within_s=30)}"

        async def work() -> Sequence[tuple[list[str], set[int]]]:
            async with connect(address) as one, connect(address) as other:
                (ours,), (theirs,) = await one.load("tiny"), await other.load("tiny")
                return await asyncio.gather(ask(one, ours, 1), ask(other, theirs, 2))

        found = asyncio.run(asyncio.wait_for(work(), 240))
    for wrong, batches in found:
        assert not wrong, f"{len(wrong)} wrong answers, such as {wrong[:5]}"
        assert max(batches) > 1, "requests must have shared batches"
