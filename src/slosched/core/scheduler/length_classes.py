"""Length classes: which programs a model has, and which of them a request may run in.

A model with a dimension that varies has a program, and so a queue, for each length class. The longest bears the
model's own name: what holds for a whole model (the unit of SLO factors, what placement expects) is said of it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence

import msgspec

from slosched.messages import LengthClass, LoadModelResult
from slosched.signature import ONLY_INPUT, ONLY_OUTPUT, Tensor, described, digest


def with_signature(result: LoadModelResult) -> LoadModelResult:
    """`result` with its signature: a worker may leave out that of a single fixed input and output.

    A function has none: its payloads are its own affair.
    """
    if (result.inputs and result.outputs) or result.function is not None:
        return result
    inputs = result.inputs or (Tensor(ONLY_INPUT, result.input_dtype, result.input_shape),)
    outputs = result.outputs or (Tensor(ONLY_OUTPUT, result.output_dtype, result.output_shape),)
    return msgspec.structs.replace(result, inputs=inputs, outputs=outputs)


def lengths_of(result: LoadModelResult) -> tuple[int, ...]:
    """The length classes of a prepared model, ascending; empty if no dimension varies."""
    return tuple([each.length for each in result.length_classes])


def programs(result: LoadModelResult, name: str) -> dict[str, dict[int, int]]:
    """The profiled exec times by batch size, of each program of the model or function `name`."""
    longest = dict(zip(result.batch_sizes, result.exec_ns, strict=True))
    if result.function is not None:
        sizes = range(1, result.function.size_classes)
        return {name: longest} | {sized_program(name, size): longest.copy() for size in sizes}
    shorter = result.length_classes[:-1]
    return {name: longest} | {program_of(name, each.length): _times(each) for each in shorter}


def program_of(name: str, length: int) -> str:
    """What the program of a class is called that is not the longest."""
    return f"{name}@{length}"


def sized_program(name: str, size_class: int) -> str:
    """What the program of a function's size class is called; that of class 0 has the function's name."""
    return f"{name}#{size_class}" if size_class else name


def _name_in(prepared: Mapping[str, LoadModelResult], program: str) -> str:
    """The name of the model or function whose program this is."""
    if program in prepared:
        return program
    mark = "@" if program.rpartition("@")[0] in prepared else "#"
    return program.rpartition(mark)[0]


def program_times(prepared: Mapping[str, LoadModelResult], program: str) -> dict[int, int]:
    """The profiled exec times of `program`, of one of the `prepared` models. Raises KeyError."""
    name = _name_in(prepared, program)
    return programs(prepared[name], name)[program]


def program_boundaries(prepared: Mapping[str, LoadModelResult], program: str) -> dict[int, int]:
    """The longest time until a run of `program` can be interrupted, by batch size; {}: none can be."""
    name = _name_in(prepared, program)
    result = prepared[name]
    for each in result.length_classes[:-1]:
        if program_of(name, each.length) == program:
            return dict(zip(each.batch_sizes, each.boundaries_ns, strict=False))
    return dict(zip(result.batch_sizes, result.boundaries_ns, strict=False))


def host_part_ns(prepared: Mapping[str, LoadModelResult], program: str) -> int:
    """What the host part of a call of `program` is said to take; 0: there is none."""
    function = prepared[_name_in(prepared, program)].function
    return 0 if function is None else function.prepare_ns


def class_for(lengths: Sequence[int], length: int) -> int:
    """The place in `lengths` (ascending) of the shortest class that takes `length`; the last for 0."""
    return bisect_left(lengths, length) if length else len(lengths) - 1


def input_error(
    result: LoadModelResult, name: str, length: int, signature: int, bytes_behind: int
) -> str:
    """What is wrong with the inputs of a request for a model that takes more than one fixed tensor.

    `bytes_behind` are those of its frame; 0: the worker makes the inputs up.
    """
    lengths = lengths_of(result)
    if not (0 <= length <= lengths[-1] if lengths else length == 0):
        wanted = f"1 to {lengths[-1]}" if lengths else "no length"
        return (
            f"model {name!r} takes {wanted}, not a length of {length} ({described(result.inputs)})"
        )
    if not bytes_behind:
        return ""
    if signature != digest(result.inputs):
        return (
            f"model {name!r} takes {described(result.inputs)}, and the request brings other inputs; list "
            "the models once more"
        )
    if lengths and not length:
        return f"a request for {name!r} needs its length ({described(result.inputs)})"
    return ""


def _times(each: LengthClass) -> dict[int, int]:
    return dict(zip(each.batch_sizes, each.exec_ns, strict=True))
