"""A cascade of two real models through real processes: the judge's scores decide which of them answers."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from slosched import connect
from slosched.clients.inference import Inference
from slosched.codes import Code, Verdict
from slosched.errors import RequestFailed
from slosched.experiment.children import Children
from slosched.units import NS_PER_S

torch = pytest.importorskip("torch")

import judged_models  # noqa: E402
from judged_models import WIDTH  # noqa: E402

pytestmark = [pytest.mark.torch, pytest.mark.processes]

LOOPBACK = ("--bind", "127.0.0.1", "--port", "0")
WORKER = """
[models.light]
factory = "cascade_parts:Light"
score = "score"
[models.light.inputs.x]
shape = [6]

[models.heavy]
factory = "cascade_parts:Heavy"
[models.heavy.inputs.x]
shape = [6]

[models.refiner]
factory = "cascade_parts:Heavy"
[models.refiner.inputs.answer]
shape = [6]
"""
CASCADE = """
slo = "2s"
live_scores = true
threshold = 0.5
light = { model = "light", exec = { 1 = "1ms" } }
heavy = { model = "heavy", exec = { 1 = "1ms" } }
scores = { thresholds = [0, 1], deferred = [0, 1] }
"""
#: The heavy program of this one starts from the light answer.
CHAIN = "passes_output = true" + CASCADE.replace('"heavy"', '"refiner"')
#: The first values of the inputs, which are their scores; of a negative one the judge cannot tell.
SCORES = (0.9, 0.1, 0.5, 0.49, -1.0, 1.0, 0.0, -3.0, 0.7, 0.3) * 4
DIRECT = {"light": judged_models.Light().eval(), "heavy": judged_models.Heavy().eval()}


@pytest.fixture
def children() -> Iterator[Children]:
    with Children() as children:
        yield children


def start(children: Children, folder: Path, policy: str, workers: int) -> str:
    """The address of a controller of the cascade "mine" over workers on the CPU."""
    shutil.copy(Path(judged_models.__file__), folder / "cascade_parts.py")
    (folder / "worker.toml").write_text(WORKER, encoding="utf-8")
    (folder / "mine.toml").write_text(CASCADE, encoding="utf-8")
    (folder / "chain.toml").write_text(CHAIN, encoding="utf-8")
    # Without this CASCADE would defer as many as the worker has time for: all of these few.
    (folder / "c.toml").write_text("[cascade]\nfixed_threshold = 0.5\n", encoding="utf-8")
    config = str(folder / "worker.toml")
    words = ["worker", "--device", "cpu", "--config", config, *LOOPBACK]
    started = [
        children.start(f"worker {place}", words, folder / f"worker{place}.log")
        for place in range(workers)
    ]
    ports = [children.wait_ready(each, within_s=60) for each in started]
    addresses = ",".join(f"127.0.0.1:{port}" for port in ports)
    names = ("mine", "chain") if policy == "INFER5" else ("mine",)
    cascades = ",".join(str(folder / f"{name}.toml") for name in names)
    words = ["controller", policy, "--cascade", cascades]
    words += ["--workers", addresses, "--config", str(folder / "c.toml"), *LOOPBACK]
    words += ["--http-port", "-1", "--log-dir", str(folder / "run")]
    controller = children.start("controller", words, folder / "controller.log")
    return f"127.0.0.1:{children.wait_ready(controller, within_s=30)}"


def direct(name: str, x: np.ndarray) -> bytes:
    with torch.inference_mode():
        found: bytes = DIRECT[name](torch.from_numpy(x.copy())[None])["answer"][0].numpy().tobytes()
    return found


def check(answer: Inference, x: np.ndarray, score: float) -> None:
    """The answer is that of the right program, byte by byte, and its message says why."""
    assert answer.ok and list(answer.outputs) == ["answer"], answer
    light, *rest = answer.message.stages
    accepted = score >= 0.5
    assert answer.outputs["answer"].tobytes() == direct("light" if accepted else "heavy", x)
    known = float(np.float32(score)) if score >= 0 else -1.0
    assert (light.model, light.score, light.threshold) == ("light", known, 0.5)
    assert light.verdict == (Verdict.ACCEPTED if accepted else Verdict.DEFERRED)
    assert [(each.model, each.verdict, each.score) for each in rest] == (
        [] if accepted else [("heavy", Verdict.HEAVY, known)]
    )
    assert all(0 <= each.queued_ns <= each.start_ns <= each.end_ns for each in (light, *rest))


# CASCADE keeps one GPU free of heavy batches.
@pytest.mark.parametrize(("policy", "workers"), [("CASCADE", 2), ("INFER5", 1)])
def test_the_judge_of_a_real_model_decides(
    children: Children, tmp_path: Path, policy: str, workers: int
) -> None:
    address = start(children, tmp_path, policy, workers)
    draw = np.random.default_rng(7)
    rows = draw.random((len(SCORES), WIDTH), dtype=np.float32)
    rows[:, 0] = SCORES

    async def ask() -> None:
        async with connect(address) as client:
            (model,) = await client.load("mine")
            assert [str(each) for each in model.outputs] == ["answer float32[6]"]
            together = [client.infer(model, {"x": row}, slo="2s") for row in rows]
            for answer, row, score in zip(
                await asyncio.gather(*together), rows, SCORES, strict=True
            ):
                check(answer, row, score)
                assert answer.message.latency_ns < 2 * NS_PER_S
            # A request without an input has no score, so the heavy program answers it.
            empty = await client.infer(model, slo="2s")
            assert empty.ok and [each.verdict for each in empty.message.stages] == [
                Verdict.DEFERRED,
                Verdict.HEAVY,
            ]
            assert empty.message.stages[0].score == -1.0
            if policy == "INFER5":  # the programs serve alone as well, without the judge
                (alone,) = await client.load("light")
                answer = await client.infer(alone, {"x": rows[1]}, slo="2s")
                assert answer.outputs["answer"].tobytes() == direct("light", rows[1])
                assert answer.message.stages == ()

    asyncio.run(ask())


def test_a_judge_that_fails_and_a_heavy_program_that_goes_on_from_the_light_answer(
    children: Children, tmp_path: Path
) -> None:
    address = start(children, tmp_path, "INFER5", 1)
    bad, good, poor = (np.full(WIDTH, score, np.float32) for score in (100, 0.75, 0.25))

    async def ask() -> None:
        async with connect(address) as client:
            (model,) = await client.load("mine")
            with pytest.raises(RequestFailed, match="the judge gives up") as failed:
                await client.infer(model, {"x": bad}, slo="2s")
            assert failed.value.code == Code.RUNTIME_ERROR
            check(await client.infer(model, {"x": good}, slo="2s"), good, 0.75)
            (chain,) = await client.load("chain")
            assert [str(each) for each in chain.inputs] == ["x float32[6]"]
            accepted = await client.infer(chain, {"x": good}, slo="2s")
            assert accepted.outputs["answer"].tobytes() == direct("light", good)
            refined = await client.infer(chain, {"x": poor}, slo="2s")
            light = np.frombuffer(direct("light", poor), np.float32)
            assert refined.outputs["answer"].tobytes() == direct("heavy", light)
            assert [each.model for each in refined.message.stages] == ["light", "refiner"]

    asyncio.run(ask())
