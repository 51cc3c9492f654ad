"""Which models can be served in batches: one output whose rows follow their inputs, or words why not."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from slosched.errors import InvalidConfig

torch = pytest.importorskip("torch")

from slosched.daemon.backends.contract import (  # noqa: E402
    Arrays,
    ModelRefused,
    check_rows,
    differ,
    named_outputs,
    single_output,
    tolerance_of,
)
from slosched.signature import BYTES, Tensor  # noqa: E402

pytestmark = pytest.mark.torch

Pair = namedtuple("Pair", "logits states")


@dataclass
class Answer:
    logits: Any
    loss: Any = None


def rows(batch: int, seed: int = 0) -> Arrays:
    return {"x": np.random.default_rng(seed).random((batch, 4), dtype=np.float32)}


def check(forward: Callable[[Any], Any], *, precision: str = "float32") -> tuple[int, ...]:
    def run(given: Arrays) -> Arrays:
        output = forward(torch.from_numpy(given["x"].copy()))
        found = named_outputs(output, len(given["x"]), name="mine")
        return {name: tensor.numpy().copy() for name, tensor in found.items()}

    return check_rows(run, rows, name="mine", precision=precision, sizes=(1, 2, 3, 4))


# ------------------------------------------------------------------------------------- one output

ONE = torch.arange(6.0).reshape(2, 3)


@pytest.mark.parametrize(
    "output",
    [ONE, {"a": ONE}, (ONE,), [ONE, None], Answer(ONE), SimpleNamespace(logits=ONE), {"a": [ONE]}],
)
def test_the_only_tensor_is_taken_wherever_it_lies(output: Any) -> None:
    assert torch.equal(single_output(output, 2, name="mine"), ONE)


@pytest.mark.parametrize(
    "output, take, listed",
    [
        ((ONE, ONE * 2), "1", r"0 \[2, 3\], 1 \[2, 3\]"),
        (Pair(ONE, ONE * 2), "states", r"logits \[2, 3\], states \[2, 3\]"),
        ({"x": ONE, "y": ONE * 2}, "y", r"x \[2, 3\], y \[2, 3\]"),
        ((ONE, (ONE * 2, ONE)), "1.0", r"1.0 \[2, 3\]"),
        (Answer(ONE, ONE * 2), "loss", r"logits \[2, 3\], loss"),
    ],
)
def test_several_tensors_are_refused_with_their_names_unless_one_is_named(
    output: Any, take: str, listed: str
) -> None:
    with pytest.raises(ModelRefused, match=rf'(?s)tensors: .*{listed}.*output = "\w+"'):
        single_output(output, 2, name="mine")
    assert torch.equal(single_output(output, 2, name="mine", take=take), ONE * 2)
    with pytest.raises(ModelRefused, match=f"no output 'absent'; it has .*{listed}"):
        single_output(output, 2, name="mine", take="absent")


@pytest.mark.parametrize(
    "output, names",
    [
        (ONE, ["output"]),
        ((ONE,), ["output_0"]),
        ((ONE, ONE), ["output_0", "output_1"]),
        ((ONE, {"a": ONE, "b": [ONE]}), ["output_0", "output_1.a", "output_1.b.0"]),
        (Pair(ONE, None), ["logits"]),
        (Answer(ONE, ONE), ["logits", "loss"]),
        ({"x": ONE, "y": (ONE, ONE)}, ["x", "y.0", "y.1"]),
    ],
)
def test_several_outputs_are_all_served_by_name(output: Any, names: list[str]) -> None:
    assert list(named_outputs(output, 2, name="mine")) == names
    first = Tensor(names[-1], "float32", (3,))
    assert list(named_outputs(output, 2, name="mine", declared=(first,))) == names[-1:]
    if len(names) > 1:
        assert list(named_outputs(output, 2, name="mine", take=names[0])) == names[:1]


@pytest.mark.parametrize(
    "output, words",
    [
        ([ONE] * 65, r"65 tensors: .*at most 64 are served: name one with output = "),
        ({"output_0": ONE, 0: ONE}, "names cannot be served"),
        ({"a\x07": ONE}, "names cannot be served"),
        ({"a": ONE, "loss": torch.tensor(1.0)}, r"output 'loss', answers .*without this one"),
        ({"a": ONE, "b": torch.zeros(3, 2)}, r"output 'b', answers .*shape \[3, 2\].*movedim"),
    ],
)
def test_several_outputs_of_which_one_cannot_be_served(output: Any, words: str) -> None:
    with pytest.raises(ModelRefused, match=words):
        named_outputs(output, 2, name="mine")


def test_texts_are_found_where_they_are_declared() -> None:
    texts = Tensor("texts", BYTES, (2,), 64)
    answers: tuple[Any, ...] = (
        [["a", b"b"], ["c", ""]],
        {"texts": [("a", "b"), ("c", "")], "other": ONE},
    )
    for output in answers:
        (found,) = named_outputs(output, 2, name="mine", declared=(texts,)).values()
        assert found.tolist() == [[b"a", b"b"], [b"c", b""]]
    for output, words in (
        ([["a"], ["b", "c"]], "all of one length"),
        ([["a", "b"]], r"batch of 2 with texts of the shape \[1, 2\]"),
        ([["a", 3], ["b", "c"]], "other things than bytes and str"),
    ):
        with pytest.raises(ModelRefused, match=words):
            named_outputs(output, 2, name="mine", declared=(texts,))
    with pytest.raises(ModelRefused, match=r"holds no tensor.*declare texts in a table"):
        named_outputs([["a"], ["b"]], 2, name="mine")


def test_a_name_for_a_model_with_one_output_only() -> None:
    with pytest.raises(ModelRefused, match="answers with one tensor; leave `output` out"):
        single_output(ONE, 2, name="mine", take="logits")
    assert torch.equal(single_output({"a": ONE}, 2, name="mine", take="a"), ONE)


@pytest.mark.parametrize("output", ["text", None, {}, (), {"a": 3}])
def test_no_tensor(output: Any) -> None:
    with pytest.raises(ModelRefused, match="holds no tensor"):
        single_output(output, 2, name="mine")


def test_a_list_of_a_thousand_tensors_makes_a_short_message() -> None:
    with pytest.raises(ModelRefused, match="and 988 more") as caught:
        single_output([ONE] * 1000, 2, name="mine")
    assert len(str(caught.value)) < 500
    endless: list[Any] = []
    endless.append(endless)
    with pytest.raises(ModelRefused, match="no tensor"):
        single_output(endless, 2, name="mine")


@pytest.mark.parametrize(
    "output, words",
    [
        (torch.tensor(1.0), r"shape \[\]: keep the batch"),
        (torch.zeros(3, 2), r"shape \[3, 2\].*movedim\(1, 0\)"),
        (torch.zeros(5, 7), r"shape \[5, 7\]: dimension 0 must be the batch; use squeeze\(dim\)"),
        (torch.zeros(4, 7), r"shape \[4, 7\]"),  # never cut to the batch, silently
        (torch.zeros(2, 3).to_sparse(), "sparse_coo tensor; return a dense one"),
        (torch.zeros(2, 3, dtype=torch.complex64), "complex tensor; .*view_as_real"),
        (torch.zeros(2, 3, dtype=torch.uint16), "uint16, which does not travel"),
    ],
)
def test_outputs_that_are_refused(output: Any, words: str) -> None:
    with pytest.raises(ModelRefused, match=words):
        single_output(output, 2, name="mine")


def test_quantized_outputs_are_refused() -> None:
    quantized = torch.quantize_per_tensor(torch.zeros(2, 3), 1.0, 0, torch.quint8)
    with pytest.raises(ModelRefused, match="quantized tensor; dequantize it"):
        single_output(quantized, 2, name="mine")


def test_floats_become_float32_and_integers_and_booleans_stay() -> None:
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        assert single_output(ONE.to(dtype), 2, name="mine").dtype == torch.float32
    for dtype in (torch.int64, torch.int32, torch.uint8, torch.bool):
        assert single_output(ONE.to(dtype), 2, name="mine").dtype == dtype
    parameter = torch.nn.Parameter(ONE.clone())
    assert not single_output(parameter, 2, name="mine").requires_grad
    assert issubclass(ModelRefused, InvalidConfig)


# -------------------------------------------------------------------------- rows follow their inputs


@pytest.mark.parametrize(
    "forward",
    [
        lambda x: x,
        lambda x: x.flatten(1),
        lambda x: x[:, :2],
        lambda x: x.add_(1),
        lambda x: x.sum(1),
        lambda x: x.argmax(1),
        lambda x: x > 0.5,
        lambda x: torch.full_like(x, float("nan")),
        lambda x: torch.where(x > 0.5, x, float("inf")),
        lambda x: torch.zeros(len(x), 3),
        lambda x: (x.double() @ torch.ones(4, 7).double()) * 1e30,
        lambda x: torch.zeros(len(x), 0),
    ],
)
def test_sound_models_pass(forward: Callable[[Any], Any]) -> None:
    assert check(forward) == (1, 2, 3, 4)


@pytest.mark.parametrize(
    "forward, words",
    [
        (lambda x: x.transpose(0, 1), r"batch of 1 with the shape \[4, 1\].*movedim"),
        (lambda x: (x * 2).squeeze(), r"batch of 1 with the shape \[4\]"),
        (lambda x: x.mean(), r"shape \[\]"),
        (lambda x: x[:1], r"batch of 2 with the shape \[1, 4\]"),
        (lambda x: x.flatten(), r"batch of 1 with the shape \[4\]"),
        (lambda x: x.flip(0), "other"),
        (lambda x: x.roll(1, 0), "other"),
        (lambda x: x - x.mean(0), r"a row beside 1 other.*dimensions from 1 on"),
        (lambda x: x + torch.arange(len(x))[:, None], "rows in another order"),
        (lambda x: x @ x.T, r"rows of \[1\] and one of 2 with rows of \[2\]"),
        (lambda x: torch.dropout(x, 0.5, True), "differently the second time.*eval mode"),
        (lambda x: torch.rand(len(x), 2), "differently the second time"),
        (lambda x: torch.rand(len(x), 50).argmax(1), "differently the second time"),
        (lambda x: torch.where(x < x.mean(0), float("nan"), x), "NaN"),
        (
            lambda x: (
                torch.nn.functional.batch_norm(x, None, None, training=True)
                if len(x) > 1
                else x * 0
            ),
            "a row beside|another order",
        ),
    ],
)
def test_models_whose_rows_do_not_follow_their_inputs_are_refused(
    forward: Callable[[Any], Any], words: str
) -> None:
    with pytest.raises(ModelRefused, match=f"model 'mine' .*{words}"):
        check(forward)


def test_a_model_that_draws_the_same_twice_for_one_row_is_told_to_use_eval_mode() -> None:
    # One row of four values meets the same dropout mask twice once in sixteen checks.
    masks = [1.0, 1.0, 1.0, *(i % 2 for i in range(40))]

    def forward(x: Any) -> Any:
        return x * masks.pop(0)

    with pytest.raises(ModelRefused, match=r"differently the second time.*eval mode"):
        check(forward)


def test_state_outside_the_module_is_seen_by_the_repeat() -> None:
    seen: list[Any] = []

    def forward(x: Any) -> Any:
        seen.append(x)
        return x + len(seen)

    with pytest.raises(ModelRefused, match="keep no state of a request in the module"):
        check(forward)


def test_a_size_that_does_not_run_ends_the_list_and_the_first_must_run() -> None:
    def up_to_two(x: Any) -> Any:
        if len(x) > 2:
            raise RuntimeError("a size of 2 was exported")
        return x

    assert check(up_to_two) == (1, 2)
    with pytest.raises(ZeroDivisionError):
        check(lambda x: 1 / 0)


def test_a_choice_that_a_tie_decides_anew_is_no_fault() -> None:
    calls: list[int] = []

    def forward(x: Any) -> Any:  # the first comparison meets a tie, later ones none
        calls.append(len(x))
        return torch.full((len(x),), int(len(calls) == 1))

    assert check(forward) == (1, 2, 3, 4)


def test_lower_precisions_are_given_more_room() -> None:
    a = np.array([1.0, -100.0], np.float32)
    assert [tolerance_of(p) for p in ("float32", "float16", "bfloat16")] == sorted(
        tolerance_of(p) for p in ("float32", "float16", "bfloat16")
    )
    b = a + np.float32(2.0)
    assert differ(a, b, "float16") == "" and "2 apart" in differ(a, b, "float32")
    with pytest.raises(InvalidConfig, match="no precision 'int8'"):
        tolerance_of("int8")


def test_differ_says_how() -> None:
    a = np.array([1.0, np.nan, np.inf], np.float32)
    assert differ(a, a.copy(), "float32") == ""
    assert "shape [2] instead of [3]" in differ(a[:2], a, "float32")
    assert "dtype" in differ(a, a.astype(np.float64), "float32")
    assert "NaN or infinite" in differ(a, np.array([1.0, 2.0, np.inf], np.float32), "float32")
    assert "NaN or infinite" in differ(a, np.array([1.0, np.nan, -np.inf], np.float32), "float32")
    assert differ(np.array([1, 2]), np.array([1, 3]), "float32") == "1 of 2 values are others"
