"""What a model must keep to be served in batches: dimension 0 of its inputs and of its outputs is the batch,
and each row of the outputs depends on its own row of the inputs alone, not on how far that was padded.

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
from slosched.signature import BYTES, MOST_DIMENSIONS, MOST_TENSORS, ONLY_OUTPUT, Tensor
from slosched.units import tensor_bytes

Array = npt.NDArray[Any]
#: Inputs or outputs of a batch by name, (batch, *shape) each.
Arrays = Mapping[str, Array]

#: By how much two right answers may differ, as a part of the largest value among them: batch sizes take
#: different kernels, which add in different orders, and deep networks carry such differences on.
_TOLERANCE = {"float32": 5e-3, "float16": 3e-2, "bfloat16": 1e-1}
#: More tensors than this are not listed in an error, and deeper ones are not looked for.
_LISTED_AT_MOST = 12
_DEPTH = 4
_NAME_AT_MOST = 256
#: Number of samples that must all differ before integer outputs count as wrong: they are often the likeliest
#: class, and each kernel may decide a tie differently.
_REPEATS = 4
_TRIES_OF_INTEGERS = 3


class ModelRefused(InvalidConfig):
    """The model builds, but cannot be served: the message says what was seen and what to do."""


# --------------------------------------------------------------------------------------- outputs


def named_outputs(
    output: Any,
    batch: int,
    *,
    name: str,
    take: str = "",
    declared: Sequence[Tensor] = (),
    score: str = "",
) -> dict[str, Any]:
    """What a model answers with, by name: tensors (batch, *output_shape), float32 or integers, detached.

    Every tensor of a dict, dataclass, tuple, list or object (transformers' ModelOutput) is an output. Its name
    is its key or attribute, "pairs.left" within another, and "output_0" for the first of a tuple; a tensor
    alone is "output". `take` names the only one to answer with, as that or by its index, "1.0" for one within
    another; with "?" behind it, only if it is there. `declared` are those to answer with, in their order. BYTES
    are nested lists of bytes or str: they are found only if they are declared, and come as an array of bytes
    objects. `score` names the output that is a judge's score: it comes behind the others, whatever they name.

    A tensor may be a view of an input or of the weights: copy it to keep it. Raises ModelRefused for no output,
    for one that is not there, another dimension 0 than `batch`, and for what cannot travel.
    """
    texts = any(each.dtype == BYTES for each in declared)
    found = _chosen(output, name, take, texts)
    judged = _score(output, name, score) if score else {}
    if declared:
        if len(declared) == len(found) == 1 and "" in found:
            found = {declared[0].name: found[""]}
        else:
            found = _by_name(found, name)
        lacking = [each.name for each in declared if each.name not in found]
        if lacking:
            raise ModelRefused(
                f"model {name!r} has no output {lacking[0]!r}; it has {_listed(found)}"
            )
        found = {each.name: found[each.name] for each in declared}
    else:
        found = _by_name(found, name)
    if judged:
        found = {key: value for key, value in found.items() if key not in judged} | judged
        if len(found) == 1:
            raise ModelRefused(
                f"model {name!r} has no output but its score {score!r}; return the answer beside it"
            )
    several = len(found) > 1
    return {
        key: _travelling(value, batch, name, key if several else "") for key, value in found.items()
    }


def single_output(output: Any, batch: int, *, name: str, take: str = "") -> torch.Tensor:
    """The only one of `named_outputs`. Raises ModelRefused if there are several."""
    found = _chosen(output, name, take, False)
    if len(found) == 1:
        only: torch.Tensor = _travelling(next(iter(found.values())), batch, name, "")
        return only
    raise ModelRefused(
        f"model {name!r} answers with {len(found)} tensors: {_listed(found)}. One is wanted: name it "
        f'with output = "{next(iter(found))}"'
    )


def _score(output: Any, name: str, score: str) -> dict[str, Any]:
    """The output that `score` names, by its name. Raises ModelRefused if it is not there."""
    found = {_output_name(path): (path, each) for path, each in _tensors(output, "", _DEPTH, False)}
    for key, (path, value) in found.items():
        if score in (key, path):
            return {key: value}
    listed = _listed({key: value for key, (_, value) in found.items()})
    raise ModelRefused(f"model {name!r} has no output {score!r} to be its score; it has {listed}")


def _by_name(found: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Outputs by the name that they are served under, where they have come by path. Raises ModelRefused."""
    if len(found) > MOST_TENSORS:
        raise ModelRefused(
            f"model {name!r} answers with {len(found)} tensors: {_listed(found)}; at most {MOST_TENSORS} are "
            "served: "
            f'name one with output = "{next(iter(found))}", or several in tables [models.{name}.outputs.OUTPUT]'
        )
    named = {_output_name(path): value for path, value in found.items()}
    odd = [key for key in named if not key.isprintable() or len(key) > _NAME_AT_MOST]
    if len(named) < len(found) or odd:
        raise ModelRefused(
            f"model {name!r} answers with tensors whose names cannot be served: {_listed(found)}; give each "
            f"one of its own, printable and of at most {_NAME_AT_MOST} characters"
        )
    return named


def _output_name(path: str) -> str:
    if not path:
        return ONLY_OUTPUT
    return f"{ONLY_OUTPUT}_{path}" if path[0].isdigit() else path


def _travelling(value: Any, batch: int, name: str, key: str) -> Any:
    """`value` as it is answered; see `named_outputs`. `key` says which of several outputs it is."""
    whose = f"model {name!r}" + (f", output {key!r}," if key else "")
    if not isinstance(value, torch.Tensor):
        return _texts(value, batch, whose)
    tensor = value
    if tensor.layout is not torch.strided:
        raise ModelRefused(
            f"{whose} answers with a {_word(tensor.layout)} tensor; return a dense one (to_dense())"
        )
    if tensor.is_quantized or tensor.is_complex():
        kind = "quantized" if tensor.is_quantized else "complex"
        advice = "dequantize it" if tensor.is_quantized else "return torch.view_as_real of it"
        raise ModelRefused(f"{whose} answers with a {kind} tensor; {advice} in the model")
    if tensor.ndim == 0 or tensor.shape[0] != batch:
        raise ModelRefused(_wrong_batch(whose, tuple(tensor.shape), batch, several=bool(key)))
    if tensor.is_floating_point():
        return tensor.detach().float()
    if not tensor_bytes((), _word(tensor.dtype)):
        raise ModelRefused(
            f"{whose} answers in {_word(tensor.dtype)}, which does not travel; convert it in the "
            "model, to int64 or float32"
        )
    return tensor.detach()


def _texts(value: Any, batch: int, whose: str) -> Array:
    """Nested lists of bytes or str as an array of bytes objects. Raises ModelRefused if they are uneven."""
    shape, inner = [], value
    while isinstance(inner, list | tuple):
        shape.append(len(inner))
        inner = inner[0] if inner else b""
    leaves = list(_leaves(value, len(shape)))
    if not shape or shape[0] != batch or len(leaves) != int(np.prod(shape)):
        raise ModelRefused(
            f"{whose} answers a batch of {batch} with texts of the shape {shape}: return a list of as many "
            "lists as the batch has rows, all of one length"
        )
    if not all(isinstance(leaf, bytes | str) for leaf in leaves):
        raise ModelRefused(f"{whose} answers with lists that hold other things than bytes and str")
    found = np.empty(len(leaves), object)
    found[:] = [leaf.encode() if isinstance(leaf, str) else leaf for leaf in leaves]
    return found.reshape(shape)


def _leaves(value: Any, depth: int) -> Iterator[Any]:
    if depth == 0 or not isinstance(value, list | tuple):
        yield value
        return
    for each in value:
        yield from _leaves(each, depth - 1)


def _word(thing: object) -> str:
    return str(thing).removeprefix("torch.")


def _wrong_batch(whose: str, shape: tuple[int, ...], batch: int, *, several: bool) -> str:
    seen = f"{whose} answers a batch of {batch} with the shape {list(shape)}"
    if several and not shape:
        return f"{seen}: dimension 0 must be the batch; name the outputs to serve, without this one"
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


def _chosen(output: Any, name: str, take: str, texts: bool) -> dict[str, Any]:
    """The tensors of `output` by path, one or more: all of them, or the one that `take` names."""
    found = dict(_tensors(output, "", _DEPTH, texts))
    if take.endswith("?"):  # a wish: if it is there
        take = take[:-1] if take[:-1] in found else ""
    if take:
        paths = [path for path in found if take in (path, _output_name(path))]
        if len(paths) == 1 and paths != [""]:
            return {paths[0]: found[paths[0]]}
        if len(found) == 1 and "" in found:
            raise ModelRefused(
                f"model {name!r} has no output {take!r}: it answers with one tensor; leave `output` out"
            )
        raise ModelRefused(f"model {name!r} has no output {take!r}; it has {_listed(found)}")
    if not found:
        raise ModelRefused(
            f"model {name!r} answers with a {type(output).__name__} that holds no tensor; return one of "
            f"(batch, ...), or declare texts in a table [models.{name}.outputs.OUTPUT]"
        )
    return found


def _listed(found: Mapping[str, Any]) -> str:
    shown = [
        f"{key} {list(value.shape) if isinstance(value, torch.Tensor) else 'of texts'}"
        for key, value in list(found.items())[:_LISTED_AT_MOST]
    ]
    more = len(found) - len(shown)
    return (", ".join(shown) or "none") + (f" and {more} more" if more else "")


def _tensors(value: Any, path: str, depth: int, texts: bool) -> Iterator[tuple[str, Any]]:
    """Every tensor in `value` by its path; objects of other kinds are looked into at the top alone.

    `texts`: and every list of texts.
    """
    if isinstance(value, torch.Tensor) or (texts and _is_text(value)):
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
            yield from _tensors(each, f"{path}.{key}" if path else str(key), depth - 1, texts)


def _is_text(value: Any) -> bool:
    depth = 0
    while isinstance(value, list | tuple) and value and depth < MOST_DIMENSIONS:
        value, depth = value[0], depth + 1
    return depth > 0 and isinstance(value, bytes | str)


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


def differing(a: Arrays, b: Arrays, precision: str) -> str:
    """How answers differ by more than rounding, in words; empty if they do not."""
    if a.keys() != b.keys():
        return f"outputs {', '.join(a)} instead of {', '.join(b)}"
    for name, array in a.items():
        if difference := differ(array, b[name], precision):
            return f"{name}: {difference}" if len(a) > 1 else difference
    return ""


def check_rows(
    run: Callable[[Arrays], Arrays],
    sample: Callable[[int, int], Arrays],
    *,
    name: str,
    precision: str,
    sizes: Sequence[int] = (1, 2, 3, 4),
) -> tuple[int, ...]:
    """Run the model a dozen times and refuse it (ModelRefused) unless each row follows its own inputs.

    `run` is a plain forward of inputs (batch, *input_shape) to outputs (batch, *output_shape), by name, that
    has checked dimension 0 (`named_outputs`); `sample(batch, seed)` makes inputs at random. Checked are: the
    same input twice with another between, a row alone and in batches, permuted rows, the same outputs of one
    shape for all `sizes`. Returns the sizes that ran: a size but the first that raises anything but
    ModelRefused ends them, since an exported program may know some sizes only. Raises what the first one
    raises.
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


def _rows(arrays: Arrays, which: Any) -> Arrays:
    return {name: array[which] for name, array in arrays.items()}


def _check_once(
    run: Callable[[Arrays], Arrays],
    sample: Callable[[int, int], Arrays],
    name: str,
    precision: str,
    sizes: Sequence[int],
    seed: int,
) -> tuple[str, tuple[int, ...], bool]:
    """What is wrong (empty: nothing), the sizes that ran, and whether an answer is of integers."""
    rows, one = sample(sizes[-1], seed), slice(sizes[0])
    first = run(_rows(rows, one))
    run(sample(sizes[0], seed + 1))
    again = run(_rows(rows, one))
    integers = any(array.dtype.kind != "f" for array in first.values())
    if difference := differing(again, first, precision):
        return _unsteady(name, difference), (), integers
    whole, ran = first, [sizes[0]]
    for size in sizes[1:]:
        try:
            whole = run(_rows(rows, slice(size)))
            permuted = run(_rows(rows, _permutation(size)))
        except ModelRefused:
            raise
        except Exception:  # whatever this model raises for a size that it does not know
            break
        _check_shapes(name, first, whole, sizes[0], size)
        when = f"for {size} rows in another order"
        difference = differing(permuted, _rows(whole, _permutation(size)), precision)
        if not difference:
            when = f"for a row beside {size - sizes[0]} other(s)"
            difference = differing(_rows(whole, one), first, precision)
        if difference:
            # A model that draws may have drawn the same twice for the one row above; more rows tell.
            unsteady = _repeats(run, _rows(rows, slice(size)), whole, precision)
            return (
                (_unsteady(name, unsteady) if unsteady else _mixed(name, when, difference)),
                (),
                integers,
            )
        ran.append(size)
    return "", tuple(ran), integers


def _check_shapes(name: str, first: Arrays, whole: Arrays, least: int, size: int) -> None:
    """Raises ModelRefused unless a batch of `size` has the outputs, and the rows, of one of `least`."""
    if first.keys() != whole.keys():
        raise ModelRefused(
            f"model {name!r} answers a batch of {least} with {', '.join(first)} and one of {size} with "
            f"{', '.join(whole)}; each request needs the same outputs"
        )
    for key, array in whole.items():
        one, other = list(first[key].shape[1:]), list(array.shape[1:])
        if one != other:
            which = f"{key}: " if len(whole) > 1 else ""
            raise ModelRefused(
                f"model {name!r} answers a batch of {least} with rows of {which}{one} and one of {size} with "
                f"rows of {other}; each request needs the same shape: use flatten(1) for flatten(), "
                "squeeze(dim) for squeeze(), and no sizes made of the batch"
            )


def _repeats(run: Callable[[Arrays], Arrays], rows: Arrays, answer: Arrays, precision: str) -> str:
    """How an answer to the same rows differs from `answer`, in words; empty if it did not, several times."""
    return next(
        (
            difference
            for _ in range(_REPEATS)
            if (difference := differing(run(rows), answer, precision))
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
