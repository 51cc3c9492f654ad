"""What a model must keep to be served in batches: dimension 0 of its input and of its output is the batch,
and each row of the output depends on its own row of the input alone.

Requests of several clients share a batch, so a model that does otherwise would answer one with another's
data. It is found when the model is prepared, and refused with what was seen and what to do.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from slosched.errors import InvalidConfig
from slosched.units import tensor_bytes

Array = npt.NDArray[Any]

#: By how much two right answers may differ, as a part of the largest value among them: batch sizes take
#: different kernels, which add in different orders, and deep networks carry such differences on.
_TOLERANCE = {"float32": 5e-3, "float16": 3e-2, "bfloat16": 1e-1}
#: More tensors than this are not listed in an error, and deeper ones are not looked for.
_LISTED_AT_MOST = 12
_DEPTH = 4
#: Number of samples that must all differ before integer outputs count as wrong: they are often the likeliest
#: class, and each kernel may decide a tie differently.
_REPEATS = 4
_TRIES_OF_INTEGERS = 3


class ModelRefused(InvalidConfig):
    """The model builds, but cannot be served: the message says what was seen and what to do."""


# ------------------------------------------------------------------------------------- one output


def single_output(output: Any, batch: int, *, name: str, take: str = "") -> torch.Tensor:
    """The tensor of `output` to answer with: (batch, *output_shape), float32 or integers, detached.

    A tensor is taken, and so is the only one of a dict, dataclass, tuple, list or object (transformers'
    ModelOutput). `take` names one of several: its key, attribute or index, "1.0" for one within another; with
    "?" behind it, only if it is there.
    It may be a view of an input or of the weights: copy it to keep it. Raises ModelRefused for no
    tensor or several, another dimension 0 than `batch`, and for what cannot travel.
    """
    tensor = (
        output
        if isinstance(output, torch.Tensor) and (not take or take[-1] == "?")
        else _named(output, name, take)
    )
    if tensor.layout is not torch.strided:
        raise ModelRefused(
            f"model {name!r} answers with a {_word(tensor.layout)} tensor; return a dense one (to_dense())"
        )
    if tensor.is_quantized or tensor.is_complex():
        kind = "quantized" if tensor.is_quantized else "complex"
        advice = "dequantize it" if tensor.is_quantized else "return torch.view_as_real of it"
        raise ModelRefused(f"model {name!r} answers with a {kind} tensor; {advice} in the model")
    if tensor.ndim == 0 or tensor.shape[0] != batch:
        raise ModelRefused(_wrong_batch(name, tuple(tensor.shape), batch))
    if tensor.is_floating_point():
        return tensor.detach().float()
    if not tensor_bytes((), _word(tensor.dtype)):
        raise ModelRefused(
            f"model {name!r} answers in {_word(tensor.dtype)}, which does not travel; convert it in the "
            "model, to int64 or float32"
        )
    return tensor.detach()


def _word(thing: object) -> str:
    return str(thing).removeprefix("torch.")


def _wrong_batch(name: str, shape: tuple[int, ...], batch: int) -> str:
    seen = f"model {name!r} answers a batch of {batch} with the shape {list(shape)}"
    if not shape:
        return f"{seen}: keep the batch as dimension 0 (a squeeze() or a mean over everything drops it)"
    if batch in shape[1:]:
        place = shape.index(batch)
        return (
            f"{seen}: dimension 0 must be the batch, and {batch} stands at dimension {place}; "
            f"transpose it back in the model (movedim({place}, 0))"
        )
    return (
        f"{seen}: dimension 0 must be the batch; use squeeze(dim) for squeeze(), flatten(1) for "
        "flatten(), and reduce over dimensions from 1 on"
    )


def _named(output: Any, name: str, take: str) -> torch.Tensor:
    found = dict(_tensors(output, "", _DEPTH))
    if take.endswith("?"):  # a wish: if it is there
        take = take[:-1] if take[:-1] in found else ""
    if take:
        if take in found:
            return found[take]
        if len(found) == 1 and "" in found:
            raise ModelRefused(
                f"model {name!r} has no output {take!r}: it answers with one tensor; leave `output` out"
            )
        raise ModelRefused(f"model {name!r} has no output {take!r}; it has {_listed(found)}")
    if len(found) == 1:
        return next(iter(found.values()))
    if not found:
        raise ModelRefused(
            f"model {name!r} answers with a {type(output).__name__} that holds no tensor; return one of "
            "(batch, ...)"
        )
    raise ModelRefused(
        f"model {name!r} answers with {len(found)} tensors: {_listed(found)}. One is served: name it "
        f'with output = "{next(iter(found))}", or return it alone'
    )


def _listed(found: Mapping[str, torch.Tensor]) -> str:
    shown = [f"{key} {list(value.shape)}" for key, value in list(found.items())[:_LISTED_AT_MOST]]
    more = len(found) - len(shown)
    return (", ".join(shown) or "none") + (f" and {more} more" if more else "")


def _tensors(value: Any, path: str, depth: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor in `value` by its path; objects of other kinds are looked into at the top alone."""
    if isinstance(value, torch.Tensor):
        yield path, value
        return
    items: Sequence[tuple[object, Any]] = ()
    if isinstance(value, Mapping):
        items = list(value.items())
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        items = list(zip(value._fields, value, strict=False))
    elif isinstance(value, tuple | list):
        items = list(enumerate(value))
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        items = [(f.name, getattr(value, f.name, None)) for f in dataclasses.fields(value)]
    elif depth == _DEPTH:
        items = list(getattr(value, "__dict__", {}).items())
    if depth:
        for key, each in items:
            yield from _tensors(each, f"{path}.{key}" if path else str(key), depth - 1)


# -------------------------------------------------------------------------- rows follow their inputs


def tolerance_of(precision: str) -> float:
    """How far two right answers of a model in `precision` ("float32", "float16", "bfloat16") may lie
    apart, as a part of the largest value. Raises InvalidConfig for another precision."""
    if precision not in _TOLERANCE:
        raise InvalidConfig(f"no precision {precision!r}; one of {', '.join(_TOLERANCE)}")
    return _TOLERANCE[precision]


def differ(a: Array, b: Array, precision: str) -> str:
    """How `a` and `b` differ by more than rounding, in words; empty if they do not.

    Numbers are compared on the scale of the largest finite one of both. NaN equals NaN and an infinity
    itself; integers and booleans must be the same.
    """
    if a.shape != b.shape:
        return f"shape {list(a.shape)} instead of {list(b.shape)}"
    if a.dtype != b.dtype:
        return f"dtype {a.dtype} instead of {b.dtype}"
    if a.dtype.kind != "f":
        wrong = int(np.count_nonzero(a != b))
        return f"{wrong} of {a.size} values are others" if wrong else ""
    left, right = a.astype(np.float64), b.astype(np.float64)
    finite = np.isfinite(left) & np.isfinite(right)
    same = (left == right) | (np.isnan(left) & np.isnan(right))
    odd = int(np.count_nonzero(~finite & ~same))
    if odd:
        return f"{odd} of {a.size} values are NaN or infinite in one of them alone"
    if not finite.any():
        return ""
    scale = max(float(np.abs(left[finite]).max()), float(np.abs(right[finite]).max()))
    worst = float(np.abs(left[finite] - right[finite]).max())
    if worst <= tolerance_of(precision) * scale:
        return ""
    return f"values up to {scale:.3g} are {worst:.3g} apart"


def check_rows(
    run: Callable[[Array], Array],
    sample: Callable[[int, int], Array],
    *,
    name: str,
    precision: str,
    sizes: Sequence[int] = (1, 2, 3, 4),
) -> tuple[int, ...]:
    """Run the model a dozen times and refuse it (ModelRefused) unless each row follows its own input.

    `run` is a plain forward of rows (batch, *input_shape) to (batch, *output_shape), that has checked
    dimension 0 (`single_output`); `sample(batch, seed)` makes rows at random. Checked are: the same input
    twice with another between, a row alone and in batches, permuted rows, one output shape for all
    `sizes`. Returns the sizes that ran: a size but the first that raises anything but ModelRefused ends
    them, since an exported program may know some sizes only. Raises what the first one raises.
    """
    tries = 1
    seed = 0
    while True:
        difference, ran, integers = _check_once(run, sample, name, precision, sorted(sizes), seed)
        if not difference:
            return ran
        if not integers or tries == _TRIES_OF_INTEGERS:
            raise ModelRefused(difference)
        tries, seed = tries + 1, seed + 100


def _check_once(
    run: Callable[[Array], Array],
    sample: Callable[[int, int], Array],
    name: str,
    precision: str,
    sizes: Sequence[int],
    seed: int,
) -> tuple[str, tuple[int, ...], bool]:
    """What is wrong (empty: nothing), the sizes that ran, and whether the answers are integers."""
    rows = sample(sizes[-1], seed)
    first = run(rows[: sizes[0]])
    run(sample(sizes[0], seed + 1))
    again = run(rows[: sizes[0]])
    integers = first.dtype.kind != "f"
    if difference := differ(again, first, precision):
        return _unsteady(name, difference), (), integers
    whole, ran = first, [sizes[0]]
    for size in sizes[1:]:
        try:
            whole = run(rows[:size])
            permuted = run(rows[_permutation(size)])
        except ModelRefused:
            raise
        except Exception:  # whatever this model raises for a size that it does not know
            break
        if whole.shape[1:] != first.shape[1:]:
            raise ModelRefused(
                f"model {name!r} answers a batch of {sizes[0]} with rows of {list(first.shape[1:])} and one "
                f"of {size} with rows of {list(whole.shape[1:])}; each request needs the same shape: use "
                "flatten(1) for flatten(), squeeze(dim) for squeeze(), and no sizes made of the batch"
            )
        when = f"for {size} rows in another order"
        difference = differ(permuted, whole[_permutation(size)], precision)
        if not difference:
            when = f"for a row beside {size - sizes[0]} other(s)"
            difference = differ(whole[: sizes[0]], first, precision)
        if difference:
            # A model that draws may have drawn the same twice for the one row above; more rows tell.
            unsteady = _repeats(run, rows[:size], whole, precision)
            return (
                (_unsteady(name, unsteady) if unsteady else _mixed(name, when, difference)),
                (),
                integers,
            )
        ran.append(size)
    return "", tuple(ran), integers


def _repeats(run: Callable[[Array], Array], rows: Array, answer: Array, precision: str) -> str:
    """How an answer to the same rows differs from `answer`, in words; empty if it did not, several times."""
    return next(
        (
            difference
            for _ in range(_REPEATS)
            if (difference := differ(run(rows), answer, precision))
        ),
        "",
    )


def _permutation(size: int) -> list[int]:
    """An order in which, from two rows on, each row moves; no mirror image from three rows on."""
    return [*range(1, size), 0]


def _unsteady(name: str, difference: str) -> str:
    return (
        f"model {name!r} answers the same input differently the second time ({difference}). Something in it "
        "is drawn anew or kept from the run before: put it into eval mode (dropout), seed nothing in "
        "forward, and keep no state of a request in the module"
    )


def _mixed(name: str, when: str, difference: str) -> str:
    return (
        f"model {name!r} answers otherwise {when} ({difference}), so requests in one batch would change each "
        "other's answers. Put it into eval mode (batch normalisation), reduce and normalise over "
        "dimensions from 1 on, and flatten with flatten(1)"
    )
