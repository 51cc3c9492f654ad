"""Models with a judge: the score of each answer goes to the controller, and only the rest to the client."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from slosched.codes import Code
from slosched.config_file import dump_profile, load_profile, load_worker_config
from slosched.core.scheduler.after import Reply
from slosched.core.scheduler.stage_ends import StageEnd
from slosched.core.scheduler.state import Request
from slosched.core.worker.emulated import EmulatedGpu
from slosched.core.worker.interface import Op, OpDone, OpKind
from slosched.daemon.backends.checking import OneTensor, profile_of
from slosched.daemon.backends.layout import Layout, made_up
from slosched.errors import InvalidConfig
from slosched.gpu_profile import GpuProfile, ModelProfile
from slosched.messages import ErrorResult, Infer, InferResult, LoadModelResult, Span
from slosched.model_source import ModelSource
from slosched.signature import BYTES, Tensor, joined, split
from slosched.transport.codec import decode_from_worker, encode

torch = pytest.importorskip("torch")

from cpu_rig import CpuRig  # noqa: E402
from fake_cuda import MS, TEXT_GIVES, FakeProgram  # noqa: E402
from judged_models import WIDTH  # noqa: E402
from made_messages import an_infer_result  # noqa: E402
from served_signatures import worker  # noqa: E402
from slosched.daemon.backends.contract import ModelRefused  # noqa: E402
from slosched.daemon.backends.cpu.measuring import check_model  # noqa: E402
from slosched.daemon.backends.cuda.program import Class  # noqa: E402
from slosched.daemon.backends.sources import source_spec  # noqa: E402
from slosched.daemon.backends.templates import Template  # noqa: E402
from test_cuda_cutting import Prepared  # noqa: E402
from test_cuda_device import EXEC_NS, PAGE, Rig  # noqa: E402
from test_cuda_signatures import prepared, text_rig  # noqa: E402
from test_cuda_signatures import request as text_request  # noqa: E402
from test_stages import two_stages  # noqa: E402

pytestmark = pytest.mark.torch

ANSWER, SCORE = Tensor("answer", "float32", (WIDTH,)), Tensor("score", "float32", ())
IDS = (Tensor("ids", "int64", (-1,)), Tensor("mask", "int64", (-1,)))
LENGTHS = (4, 8, 16)


def source(kind: str, score: str = "score", **more: Any) -> ModelSource:
    shape = () if "inputs" in more else (WIDTH,)
    factory = f"judged_models:{kind}"
    return ModelSource(kind, factory=factory, input_shape=shape, score=score, **more)


LIGHT, WORDS = source("Light"), source("Words", "1")
TOKENS = source("Tokens", inputs=IDS, lengths=LENGTHS)


def same(found: tuple[float, ...], wanted: list[float]) -> bool:
    """Equal, NaN to NaN."""
    return np.array_equal(np.array(found), np.array(wanted), equal_nan=True)


# ----------------------------------------------------------------------------------------- layout


@pytest.mark.parametrize("shape", [(), (1,)])
def test_rows_have_a_place_for_the_score_and_frames_have_none(shape: tuple[int, ...]) -> None:
    texts = (Tensor("ids", "int64", (-1,)), Tensor("odd", "uint8", (3,)))
    score = Tensor("score", "float32", shape)
    plain, scored = Layout(texts, 8), Layout((*texts, score), 8, scored=True)
    rows = made_up((*texts, score), 3, 1, length=8, high=100)
    memory = scored.pack(rows).reshape(-1)
    for place in range(3):
        row = memory[place * scored.row_bytes : (place + 1) * scored.row_bytes]
        own = plain.pack({name: rows[name][place : place + 1] for name in ("ids", "odd")})[0]
        for length in (8, 5):
            frame, pieces = scored.answer(row, length)
            for to, given in pieces:
                to[...] = given
            assert bytes(scored.read(row, length)) == bytes(frame) == bytes(plain.read(own, length))
    first, _, last = rows["score"].reshape(-1).tolist()
    assert same(scored.scores(memory, (1, 0, 7)), [first, math.nan, last])
    assert scored.scores(memory, (1,)) == (first,)


def test_an_answer_of_one_tensor_is_a_part_of_its_row() -> None:
    layout = Layout((ANSWER, SCORE), scored=True)
    rows = made_up((ANSWER, SCORE), 2, 5)
    memory = layout.pack(rows)
    assert not layout.plain and Layout((ANSWER,)).plain
    assert [bytes(layout.read(row, 0)) for row in memory] == [r.tobytes() for r in rows["answer"]]
    texts = Layout((Tensor("said", BYTES, (2,), 40), SCORE), scored=True)
    said = np.empty((1, 2), object)
    said[0] = [b"hello", b""]
    block = texts.pack({"said": said, "score": np.array([0.25], np.float32)})
    assert bytes(texts.read(block[0], 0)) == b"\5\0\0\0hello\0\0\0\0"
    assert texts.scores(block.reshape(-1), (1,)) == (0.25,)


def test_nan_passes_through_messages() -> None:
    span = Span(1, 2, 1)
    message = InferResult(
        session=1,
        action_id=2,
        received_ns=3,
        sent_ns=4,
        gpu_id=0,
        copy_input=span,
        exec=span,
        copy_output=span,
        gpu_clock_before_mhz=0,
        gpu_clock_mhz=0,
        scores=(0.5, math.nan, -math.inf),
    )
    found = decode_from_worker(encode(message))
    assert isinstance(found, InferResult) and same(found.scores, [0.5, math.nan, -math.inf])


# ------------------------------------------------------------------------------------ what is said


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"output": "score"}, "output and score both name 'score'"),
        ({"cupy": "kernels:make", "factory": ""}, "leave score out"),
        ({"outputs": (SCORE,)}, "no output but its score 'score'"),
        ({"outputs": (Tensor("score", "float64", ()), ANSWER)}, r"score float64\[\] cannot be"),
        ({"outputs": (ANSWER, Tensor("score", "float32", (2,)))}, r"score float32\[2\] cannot be"),
        ({"outputs": (ANSWER, Tensor("score", "float32", (-1,)))}, r"float32\[-1\] cannot be"),
    ],
)
def test_a_score_that_the_file_alone_refuses(more: dict[str, Any], words: str) -> None:
    given = {"factory": "judged_models:Light", "input_shape": (WIDTH,), **more}
    with pytest.raises(InvalidConfig, match=f"model 'mine': .*{words}"):
        ModelSource("mine", score="score", **given)


def test_the_file_of_a_worker_names_the_score(tmp_path: Path) -> None:
    file = tmp_path / "worker.toml"
    text = "[models.mine]\nfactory = 'judged_models:Light'\ninput_shape = [6]\nscore = 'score'\n"
    file.write_text(text, encoding="utf-8")
    (model,) = load_worker_config(file).models
    assert model.score == "score"
    file.write_text(text + "output = 'score'\n", encoding="utf-8")
    with pytest.raises(InvalidConfig, match="both name 'score'"):
        load_worker_config(file)


def gives(kind: str, score: str, **more: Any) -> tuple[Tensor, ...]:
    return check_model(Template(source_spec(source(kind, score, **more))))


def test_the_score_is_the_last_output_whatever_else_is_named() -> None:
    assert gives("Light", "score") == (ANSWER, SCORE)
    assert gives("Light", "score", output="answer") == (ANSWER, SCORE)
    assert gives("Light", "score", outputs=(ANSWER,)) == (ANSWER, SCORE)
    assert gives("Light", "score", outputs=(SCORE, ANSWER)) == (ANSWER, SCORE)
    bools, sums = Tensor("output_0", "bool", (WIDTH,)), Tensor("output_2", "int64", ())
    middle = Tensor("output_1", "float32", (1,))
    assert gives("Words", "1") == gives("Words", "output_1") == (bools, sums, middle)
    assert gives("Words", "1", output="2") == (sums, middle)


@pytest.mark.parametrize(
    ("kind", "score", "more", "words"),
    [
        ("Light", "scores", {}, r"no output 'scores' to be its score; it has score \[\d\], answer"),
        ("Light", "answer", {}, r"answer float32\[6\] cannot be its score"),
        ("Heavy", "answer", {}, "no output but its score 'answer'"),
        ("Whole", "score", {}, r"score int64\[\] cannot be its score"),
        ("Tokens", "each", {"inputs": IDS, "lengths": LENGTHS}, r"each float32\[-1\] cannot be"),
    ],
)
def test_a_score_that_is_none_is_refused_when_the_model_is_prepared(
    kind: str, score: str, more: dict[str, Any], words: str
) -> None:
    with pytest.raises(ModelRefused, match=f"model '{kind}'.*{words}"):
        gives(kind, score, **more)


def test_a_profile_knows_its_score_and_its_file_does(tmp_path: Path) -> None:
    model = OneTensor("net", (WIDTH,), score="1")
    profile = profile_of(model, (ANSWER, SCORE), {0: {1: 1000}}, 1, 1)
    assert (profile.score, profile.answers, profile.gives) == (
        "score",
        (ANSWER,),
        (ANSWER, SCORE),
    )
    assert (profile.output_shape, profile.output_dtype) == ((WIDTH,), "float32")
    file = tmp_path / "gpu.toml"
    file.write_text(dump_profile(GpuProfile("g", {"net": profile}, 2**28)), encoding="utf-8")
    assert load_profile(file).models["net"] == profile
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(profile), type=ModelProfile) == profile
    for outputs, words in (
        ((SCORE, ANSWER), "must be the last"),
        ((), "must be the last"),
        ((SCORE,), "no output but"),
        ((ANSWER, Tensor("score", "int8", ())), "cannot be its score"),
    ):
        with pytest.raises(InvalidConfig, match=words):
            ModelProfile("net", {1: 1000}, 1, 1, outputs=outputs, score="score")


# ---------------------------------------------------------------------------------------- the CPU


@pytest.fixture(scope="module")
def rig() -> Iterator[CpuRig]:
    with CpuRig([LIGHT, WORDS, TOKENS]) as rig:
        for model_id, name in enumerate(("Light", "Words", "Tokens")):
            prepared = rig.prepare(name, max_batch=4)
            assert prepared.code == 0, prepared.reason
            assert rig.load(name, model_id).code == 0
        yield rig


def frames_of(firsts: list[float]) -> tuple[np.ndarray, list[bytes]]:
    rows = np.random.default_rng(3).random((len(firsts), WIDTH), dtype=np.float32)
    rows[:, 0] = firsts
    return rows, [row.tobytes() for row in rows]


@pytest.mark.processes
def test_scores_of_a_batch_on_the_cpu(rig: CpuRig) -> None:
    rows, frames = frames_of([0.25, -1, 0.75])
    done, answers = rig.ask("Light", frames, 0)
    assert done.code == 0 and same(done.scores, [0.25, math.nan, 0.75])
    assert answers == [(row * np.arange(1, 7, dtype=np.float32)).tobytes() for row in rows]
    done, answers = rig.ask("Light", [b"", frames[2], frames[0]], 0)
    assert same(done.scores, [math.nan, 0.75, 0.25]) and len(answers) == 2
    done, answers = rig.ask("Light", [b"", b""], 0)
    assert (done.code, done.scores, answers) == (0, (), [])
    failed, _ = rig.ask("Light", [frames_of([100])[1][0]], 0)
    assert failed.code == Code.RUNTIME_ERROR and "the judge gives up" in failed.reason
    assert failed.scores == () and rig.ask("Light", frames[:1], 0)[0].scores == (0.25,)


@pytest.mark.processes
def test_scores_of_shape_1_and_beside_outputs_that_vary(rig: CpuRig) -> None:
    rows, frames = frames_of([0.5, -2])
    done, answers = rig.ask("Words", frames, 1)
    assert done.scores == (0.25, -1.0)
    sums = [np.int64(torch.from_numpy(row).sum().item()).tobytes() for row in rows]
    wanted = [joined([(r > 0).tobytes(), each]) for r, each in zip(rows, sums, strict=True)]
    assert answers == [bytes(each) for each in wanted]
    ids = [np.arange(1, 6), np.arange(10, 13)]
    frames = [bytes(joined([each.tobytes(), np.ones_like(each).tobytes()])) for each in ids]
    done, answers = rig.ask("Tokens", frames, 2, length=8, lengths=(5, 3))
    assert np.allclose(done.scores, [0.015, 0.033])
    outputs = (Tensor("twice", "int64", (-1,)), Tensor("each", "float32", (-1,)))
    for each, answer in zip(ids, answers, strict=True):
        twice, quarters = split(outputs, len(each), answer)
        assert np.array_equal(np.frombuffer(twice, np.int64), each * 2)
        assert np.array_equal(np.frombuffer(quarters, np.float32), each.astype(np.float32) / 4)


@pytest.mark.processes
def test_a_worker_tells_the_score_in_its_results_and_not_among_the_outputs() -> None:
    _, frames = frames_of([0.25, -1])
    with worker("cpu", (LIGHT,)) as controller:
        loaded = controller.load("Light", 0)
        assert isinstance(loaded, LoadModelResult)
        assert loaded.outputs == (ANSWER,) and loaded.output_shape == (WIDTH,)
        controller.send(controller.infer_message(2, sizes=(24, 24), model_id=0), *frames)
        result, found = controller.receive()
        assert isinstance(result, InferResult), result
        assert result.output_sizes == (24, 24) and len(found) == 2
        assert same(result.scores, [0.25, math.nan])
        controller.send(controller.infer_message(2, model_id=0))
        result, found = controller.receive()
        assert isinstance(result, InferResult) and (result.scores, found) == ((), [])
        _, frames = frames_of([100])
        controller.send(controller.infer_message(1, sizes=(24,), model_id=0), *frames)
        result, _ = controller.receive()
        assert isinstance(result, ErrorResult) and result.code == Code.RUNTIME_ERROR


def test_an_emulated_gpu_answers_without_the_score() -> None:
    model = ModelProfile("net", {1: 1000}, 1, 1, outputs=(ANSWER, SCORE), score="score")
    gpu = EmulatedGpu(GpuProfile("small", {"net": model}, 2**28))
    shape: dict[str, Any] = {"request_count": 2, "input_sizes": (24, 0), "model_name": "net"}
    done = gpu.launch(Op(1, OpKind.COPY_OUTPUT, 0, 0, 1, 2, **shape), now_ns=0)
    assert isinstance(done, OpDone) and (done.output_sizes, done.scores) == ((24, 0), ())


@pytest.mark.parametrize("scores", [(), (0.25,), (0.25, math.nan), (0.25, 0.5, 0.75)])
def test_a_worker_that_sends_other_scores_than_requests(scores: tuple[float, ...]) -> None:
    seen: list[tuple[float, ...]] = []

    def after(request: Request, end: StageEnd) -> Reply:
        seen.append(end.scalars)
        return Reply.OUTPUT

    rig, light, _ = two_stages(after)
    for _ in range(3):  # the first one runs alone
        rig.infer(light.instance.info(), slo_ms=100)
        rig.step()
    first = rig.to_worker(Infer)[-1]
    rig.now_ns += 10 * MS
    rig.finish(first, begin_ms=1)
    rig.step()
    rest = rig.to_worker(Infer)[-1]
    assert rest.request_count == 2
    seen.clear()
    rig.now_ns += 10 * MS
    span = Span(rig.now_ns - MS, rig.now_ns, MS)
    ids = (rest.session, rest.action_id, span)
    result = an_infer_result(*ids, received_ns=rig.now_ns - MS, sent_ns=rig.now_ns)
    rig.from_worker(msgspec.structs.replace(result, scores=scores), 0)
    wanted = [*scores[:2], math.nan, math.nan][:2]
    assert same(tuple((each or (math.nan,))[0] for each in seen), wanted)


# --------------------------------------------------------------------------------------- the GPU

NUMBER = Tensor("number", "float32", ())


class Judged(FakeProgram):
    """Gives its first input again, and a score: the sum of that, NaN if it is above 500."""

    def _forward(self, inputs: Any) -> Any:
        results = super()._forward(inputs)
        number = self._in_pool((inputs[0].shape[0],), "float32")

        def action() -> None:
            sums = inputs[0].array().astype(np.float32).sum(1)
            number.array()[...] = np.where(sums > 500, np.nan, sums)

        self.driver.enqueue(self._stream, 1, action)
        return [results[-1], number]


def judged_rig() -> Rig:
    rig = text_rig()
    program = Judged("text", rig.driver, PAGE + 7, {}, lengths=LENGTHS)
    program.exec_ns = dict(EXEC_NS)
    program.answers_with((TEXT_GIVES[1], NUMBER), scored=True)
    for batch in EXEC_NS:
        for length in LENGTHS:
            program.add_class(Class(batch, length))
    rig.device._programs["text"] = program  # type: ignore[index]
    return rig


def test_scores_of_a_batch_on_the_gpu() -> None:
    rig = judged_rig()
    for action_id, lengths in enumerate(((3,), (2, 8, 5), (8, 1, 4, 6))):
        asked = [text_request(length, 10 * action_id + length) for length in lengths]
        frames = [b"" if place == 2 else frame for place, (frame, _) in enumerate(asked)]
        shape: dict[str, Any] = {
            "batch_size": len(lengths),
            "request_count": len(lengths),
            "input_sizes": tuple(map(len, frames)),
            "length": 8,
            "lengths": lengths,
            "model_name": "text",
        }
        rig.device.keep_inputs(action_id, [frame for frame in frames if frame])
        for kind in (OpKind.COPY_INPUT, OpKind.EXEC, OpKind.COPY_OUTPUT):
            done = rig.until(rig.launch(kind, action_id, 9, **shape))
            assert done.code == 0, done.reason
        ids = [own["ids"] for _, own in asked]
        sums = [float(each.sum()) for each in ids]
        wanted = [
            math.nan if total > 500 or place == 2 else total for place, total in enumerate(sums)
        ]
        assert same(done.scores, wanted), (done.scores, wanted)
        given = [each.tobytes() for place, each in enumerate(ids) if place != 2]
        assert [bytes(frame) for frame in rig.device.take_outputs(action_id)] == given
    done = rig.until(
        rig.launch(OpKind.EXEC, 50, 9, batch_size=1, length=8, model_name="text", request_count=1)
    )
    assert done.code == 0 and done.scores == ()


def test_a_model_without_a_judge_has_no_scores_on_the_gpu() -> None:
    rig = Rig()
    rig.load()
    rig.infer(1, [bytes(16)])
    assert all(done.scores == () for done in rig.done.values())


def test_a_model_with_a_judge_is_prepared_for_the_gpu() -> None:
    # Before the check the fake calls its two outputs as all fakes do.
    program, profile, _ = prepared(Judged, score="echo", max_exec_ns=1)  # batch 1 of each length
    assert profile.answers == (Tensor("output", "int32", (-1,)),)
    assert (profile.score, profile.outputs[-1]) == ("echo", Tensor("echo", "float32", ()))
    layouts = [program.sets(each)[0].gives for each in program.classes]
    assert len(layouts) == 3 and all(each.scored for each in layouts)
    with pytest.raises(ModelRefused, match=r"echo int32\[-1\] cannot be its score"):
        prepared(score="echo", max_exec_ns=1)


def test_the_twin_for_urgent_runs_has_the_score_as_well() -> None:
    class Scored(FakeProgram):
        def answers_with(self, gives: Any, *, scored: bool = False) -> None:
            super().answers_with(gives, scored=True)

    made = Prepared({1: MS // 2}, kind=Scored).program
    assert isinstance(made.urgent, FakeProgram) and not isinstance(made.urgent, Scored)
    assert made.urgent.scored and made.urgent.sets(Class(1))[0].gives.scored
