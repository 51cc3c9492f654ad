"""Checks of a model before it is served, the same on every device: in each of its length classes rows follow
their inputs, its outputs are found, and what a request is padded with does not change its answer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Protocol

import numpy as np

from slosched.config import ModelProfile
from slosched.daemon.backends.contract import (
    Array,
    Arrays,
    ModelRefused,
    check_rows,
    differing,
)
from slosched.daemon.backends.layout import Layout, made_up
from slosched.errors import InvalidConfig, SloschedError
from slosched.signature import BYTES, ONLY_INPUT, ONLY_OUTPUT, VARIES, Tensor, score_error, single

#: The batches that are compared in length classes after the first.
_FEWER_SIZES = (1, 3)
#: How often other rows are tried where integers differ: a tie may be decided anew.
_TRIES_OF_INTEGERS = 3

Run = Callable[[Arrays], Arrays]


class Checked(Protocol):
    """What is said of a model: a ModelSpec."""

    @property
    def name(self) -> str: ...

    @property
    def takes(self) -> tuple[Tensor, ...]: ...

    @property
    def inputs(self) -> tuple[Tensor, ...]: ...

    @property
    def outputs(self) -> tuple[Tensor, ...]: ...

    @property
    def lengths(self) -> tuple[int, ...]: ...

    @property
    def pads(self) -> Mapping[str, float]: ...

    @property
    def padding_changes_answers(self) -> bool: ...

    @property
    def input_high(self) -> int: ...

    @property
    def score(self) -> str: ...


@dataclass(frozen=True)
class OneTensor:
    """A model of which no more need be said than the shape and dtype of its only input."""

    name: str
    input_shape: tuple[int, ...]
    input_dtype: str = "float32"
    inputs: tuple[Tensor, ...] = ()
    outputs: tuple[Tensor, ...] = ()
    lengths: tuple[int, ...] = ()
    pads: Mapping[str, float] = field(default_factory=dict)
    padding_changes_answers: bool = False
    input_high: int = 0
    score: str = ""

    @property
    def takes(self) -> tuple[Tensor, ...]:
        return self.inputs or (Tensor(ONLY_INPUT, self.input_dtype, self.input_shape),)


def check_model(run: Run, model: Checked, *, precision: str) -> tuple[Tensor, ...]:
    """The outputs of `model`, in `precision`, its score behind the others. Raises ModelRefused, and what it
    raises in a batch of 1.

    `run` is a plain forward of inputs (batch, *shape), by name and at any length, that starts from the weights
    as they were loaded.
    """

    def sample(length: int) -> Callable[[int, int], Arrays]:
        return lambda batch, seed: made_up(
            model.takes, batch, seed, length=length, high=model.input_high
        )

    answers: dict[int, Arrays] = {}
    for place, length in enumerate(model.lengths or (0,)):
        sizes = _FEWER_SIZES if place else (1, 2, 3, 4)
        check_rows(run, sample(length), name=model.name, precision=precision, sizes=sizes)
        answers[length] = run(sample(length)(1, 0))
    shorter = _shorter(run, sample, model.lengths)
    if shorter is not None:
        answers[shorter] = run(sample(shorter)(1, 0))
    gives = _outputs(model, answers)
    wrong = score_error(gives, gives[-1].name) if model.score else ""
    if wrong:
        raise ModelRefused(f"model {model.name!r}: {wrong}")
    if model.lengths and not model.padding_changes_answers:
        for short, long in pairwise(sorted(answers)):
            if difference := _padding_changes(run, model, gives, short, long, precision):
                raise ModelRefused(_padding_matters(model.name, short, long, difference))
    return gives


def refuse_texts(model: Checked) -> None:
    """Raises InvalidConfig for a model of texts, on a GPU."""
    texts = [str(each) for each in (*model.takes, *model.outputs) if each.dtype == BYTES]
    if texts:
        raise InvalidConfig(
            f"model {model.name!r} takes or gives texts ({', '.join(texts)}), which are not for a GPU: serve "
            "it by a worker on the CPU (--device cpu), or make numbers of them in the client (a tokenizer)"
        )


def profile_of(
    model: Checked,
    gives: Sequence[Tensor],
    exec_ns: Mapping[int, dict[int, int]],
    weights_ns: int,
    weights_bytes: int,
    *,
    steps: int = 0,
    step_ns: Mapping[int, int] | None = None,
) -> ModelProfile:
    """The profile of `model` with these outputs; `exec_ns` by length class (0: it has none) and batch size.

    `step_ns` is the time of each of its `steps` by batch size, if it runs in steps and has no length classes.

    An only tensor of a fixed shape without a name of its own is not named.
    """
    only = single(gives)
    unnamed = only is not None and only.name == ONLY_OUTPUT
    (first, *_), (answer, *_) = model.takes, gives
    longest = max(exec_ns)
    return ModelProfile(
        name=model.name,
        exec_ns=exec_ns[longest],
        weights_ns=weights_ns,
        weights_bytes=weights_bytes,
        input_shape=first.shape_at(longest),
        input_dtype=first.dtype,
        output_shape=answer.shape_at(longest),
        output_dtype=answer.dtype,
        inputs=model.inputs,
        outputs=() if unnamed else tuple(gives),
        exec_ns_at=dict(exec_ns) if longest else {},
        score=gives[-1].name if model.score else "",
        steps=steps if step_ns else 0,
        step_ns=dict(step_ns or {}),
    )


def _shorter(
    run: Run, sample: Callable[[int], Callable[[int, int], Arrays]], lengths: Sequence[int]
) -> int | None:
    """A length below the shortest class that runs, for comparisons; None if there is none."""
    length = lengths[0] * 3 // 4 if lengths else 0
    if not length:
        return None
    try:
        run(sample(length)(1, 0))
    except SloschedError:
        raise
    except Exception:  # a program that knows its classes alone, whatever it raises for another
        return None
    return length


def _outputs(model: Checked, answers: Mapping[int, Arrays]) -> tuple[Tensor, ...]:
    """The signature of answers to a batch of 1, by length."""
    first = next(iter(answers.values()))
    for length, arrays in answers.items():
        if arrays.keys() != first.keys():
            raise ModelRefused(
                f"model {model.name!r} answers with {', '.join(first)} at one length, and at length {length} "
                f"with {', '.join(arrays)}; each request needs the same outputs"
            )
    declared = {tensor.name: tensor for tensor in model.outputs}
    return tuple(
        _output(
            model.name,
            declared.get(name),
            name,
            {length: arrays[name] for length, arrays in answers.items()},
        )
        for name in first
    )


def _output(model: str, declared: Tensor | None, name: str, answers: Mapping[int, Array]) -> Tensor:
    """One output. Raises ModelRefused if it cannot be served, or is not as the operator declared it."""
    length, array = next(iter(answers.items()))
    if 0 in array.shape[1:]:
        raise ModelRefused(
            f"model {model!r}: output {name!r} has no values: its shape is {list(array.shape[1:])}"
        )
    dtype = BYTES if array.dtype.kind == "O" else str(array.dtype)
    shapes = {length: each.shape[1:] for length, each in answers.items()}
    if declared is None:
        declared = Tensor(name, dtype, _shape(model, name, shapes))
    for length, shape in shapes.items():
        if declared.shape_at(length) != shape or declared.dtype != dtype:
            at = f" at length {length}" if length else ""
            raise ModelRefused(
                f"model {model!r}: output {name!r} was declared as {declared}, and{at} it is "
                f"{Tensor(name, dtype, shape)}"
            )
    return declared


def _shape(model: str, name: str, shapes: Mapping[int, tuple[int, ...]]) -> tuple[int, ...]:
    """The shape of an output, with -1 where it is the length."""
    first = next(iter(shapes.values()))
    if len({len(shape) for shape in shapes.values()}) > 1:
        raise ModelRefused(f"{_varies(model, name, shapes)}; its dimensions must be as many")
    found = []
    for axis, extent in enumerate(first):
        if all(shape[axis] == length for length, shape in shapes.items()):
            if len(shapes) == 1:
                raise ModelRefused(
                    f"{_varies(model, name, shapes)}, and the model runs at no other length, so that nothing "
                    f"tells whether it varies: declare it in a table [models.{model}.outputs.{name}] with its "
                    "shape"
                )
            found.append(VARIES)
        elif all(shape[axis] == extent for shape in shapes.values()):
            found.append(extent)
        else:
            raise ModelRefused(
                f"{_varies(model, name, shapes)}; a dimension that varies must be the length itself: pad or "
                "cut it in the model"
            )
    return tuple(found)


def _varies(model: str, name: str, shapes: Mapping[int, tuple[int, ...]]) -> str:
    seen = [f"{list(shape)} at length {length}" for length, shape in list(shapes.items())[:3]]
    return f"model {model!r} answers with {name!r} of shape {' and '.join(seen)}"


def _padding_changes(
    run: Run, model: Checked, gives: Sequence[Tensor], short: int, long: int, precision: str
) -> str:
    """How an answer changes when a request of `short` runs in the class `long`, in words; or nothing."""
    layout, answered = Layout(model.takes, long, model.pads), Layout(gives, long)
    difference = ""
    for seed in range(_TRIES_OF_INTEGERS):
        high = model.input_high
        rows = made_up(model.takes, 1, 100 + seed, length=short, high=high)
        exact = run(rows)
        beside = made_up(model.takes, 1, 200 + seed, length=long, high=high)
        padded = layout.padded(rows, short)
        try:
            batch = {name: np.concatenate([padded[name], beside[name]]) for name in padded}
            found = run(batch)
        except SloschedError:
            raise
        except Exception:  # it may know a batch of 1 alone
            found = run(padded)
        own = answered.cut({name: array[:1] for name, array in found.items()}, short)
        difference = differing(own, exact, precision)
        if not difference or all(array.dtype.kind == "f" for array in exact.values()):
            break
    return difference


def _padding_matters(name: str, short: int, long: int, difference: str) -> str:
    return (
        f"model {name!r} answers a request of length {short} otherwise when it is padded to {long} "
        f"({difference}), so an answer would depend on the class that its request runs in. Let the model take "
        "a mask as a further input, which is padded with 0, and leave out what lies behind; or choose what an "
        "input is padded with (pad, in its table). If the answers are right all the same, say "
        "padding_changes_answers = true"
    )
