"""`slosched functions` and `slosched call`: what functions there are, and one call of one."""

from __future__ import annotations

import json as json_module
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slosched.cli.ask import Json
from slosched.cli.guard import SloschedGroup
from slosched.cli.help import SloschedTyper
from slosched.cli.output import beside, print_json, say, table_text
from slosched.cli.values import LOCAL_CONTROLLER, duration_ns, looks_like_address, one_address
from slosched.codes import code_name
from slosched.errors import InvalidConfig, SloschedError
from slosched.units import format_duration

if TYPE_CHECKING:
    from slosched.clients.calls import CallAnswer
    from slosched.functions.function import Function
    from slosched.message_types import FunctionInfo, ModelInfo

app = SloschedTyper(cls=SloschedGroup, no_args_is_help=True, rich_markup_mode=None)

_NAMED = re.compile(r"([A-Za-z_]\w*)=(.*)", re.DOTALL)
_MOST_SHOWN = 2_000
_MODULES_HELP = (
    "package.module, package.module:function, entry-points or entry-points:NAME; modules are also looked for "
    "in the current folder."
)


@app.callback()
def functions() -> None:
    """The functions that workers run: list those of a controller or of modules, and check modules.

    docs/functions.md says how to write one.

    \b
    Example:
      slosched functions check my_module
      slosched worker --functions my_module
      slosched call my_function 3 --slo 50ms
    """


# -------------------------------------------------------------------------------------- list


@app.command("list")
def list_functions(
    where: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[host:port|MODULE]...",
            help=f"A controller, default {LOCAL_CONTROLLER}, or modules: {_MODULES_HELP}",
            show_default=False,
        ),
    ] = None,
    json: Json = False,
) -> None:
    """List the functions that a controller's workers run, or those of modules.

    A controller tells the time of one call as it was when the function was loaded; a module, what its
    decorators say.

    \b
    Examples:
      slosched functions list
      slosched functions list cluster02:12346 --json
      slosched functions list my_module
    """
    places = where or [LOCAL_CONTROLLER]
    if all(looks_like_address(each) for each in places):
        if len(places) > 1:
            raise InvalidConfig(f"one controller at a time, and not {', '.join(places)}")
        _list_served(one_address(places[0]), json)
        return
    from slosched.functions.registry import find

    found = [*find(places).values()]
    if json:
        print_json({"functions": [_document(each) for each in found]})
        return
    say(_table(found))


def _list_served(address: str, json: bool) -> None:
    import uvloop

    from slosched.clients.aio import connect

    async def ask() -> tuple[ModelInfo, ...]:
        async with connect(address, name="slosched functions list") as client:
            loaded, _ = await client.models()
            return loaded

    served = [each for each in uvloop.run(ask()) if each.function is not None]
    if json:
        print_json({"functions": [_served_document(each) for each in served]})
    elif served:
        headings = ("id", "name", "one call", "cold start", "memory", *_INFO, "warm on", "clients")
        say(table_text(headings, [_served_row(each) for each in served]))
    else:
        say(f"the workers of {address} run no functions; start one with --functions MODULE")


#: The headings of `_info_cells`.
_INFO = ("runs on", "SLO", "limit", "payload", "sizes", "idempotent")


def _info_cells(info: FunctionInfo) -> tuple[str, ...]:
    return (
        "GPU" if info.gpu else "host",
        format_duration(info.slo_ns) if info.slo_ns else "controller's",
        format_duration(info.limit_ns),
        f"{info.max_payload_bytes / 1e6:.3g} MB",
        str(info.size_classes),
        "yes" if info.idempotent else "no",
    )


def _served_row(each: ModelInfo) -> tuple[object, ...]:
    assert each.function is not None
    return (
        each.model_id,
        each.name,
        format_duration(each.b1_ns),
        format_duration(each.weights_ns),
        f"{each.weights_bytes / 1e6:.1f} MB",
        *_info_cells(each.function),
        each.gpus_resident,
        each.clients,
    )


def _served_document(each: ModelInfo) -> dict[str, object]:
    assert each.function is not None
    return {
        "model_id": each.model_id,
        "name": each.name,
        "expected_ns": each.b1_ns,
        "cold_start_ns": each.weights_ns,
        "memory_bytes": each.weights_bytes,
        "resident": each.gpus_resident,
        "clients": each.clients,
        **_info_document(each.function),
    }


def _info_document(info: FunctionInfo) -> dict[str, object]:
    return {name: getattr(info, name) for name in info.__struct_fields__}


def _table(found: Iterable[Function[Any]]) -> str:
    rows = [
        (
            each.name,
            each.target,
            "async def" if each.is_async else "def",
            format_duration(each.expected_ns),
            *_info_cells(each.info),
            each.reset,
            "-" if each.init is None else getattr(each.init, "__qualname__", "yes"),
            each.doc,
        )
        for each in found
    ]
    headings = ("name", "where", "kind", "expected", *_INFO, "reset", "init", "does")
    return table_text(headings, rows)


def _document(each: Function[Any]) -> dict[str, object]:
    return {
        "name": each.name,
        "target": each.target,
        "async": each.is_async,
        "expected_ns": each.expected_ns,
        "memory_bytes": each.memory_bytes,
        "reset": each.reset,
        "init": each.init is not None,
        "does": each.doc,
        **_info_document(each.info),
    }


# -------------------------------------------------------------------------------------- check


@app.command("check")
def check(
    modules: Annotated[list[str], typer.Argument(metavar="MODULE...", help=_MODULES_HELP)],
    init: Annotated[
        bool, typer.Option("--init", help="Run each function's init, and say how long it takes.")
    ] = False,
    json: Json = False,
) -> None:
    """Import modules as a worker would, and say what is wrong with their functions; exit code 2 then.

    \b
    Examples:
      slosched functions check my_module
      slosched functions check my_package.steps:resize --init
    """
    from slosched.functions.registry import find

    found = [*find(modules).values()]
    times = {each.name: _init_ns(each) for each in found if init and each.init is not None}
    if json:
        documents = [{**_document(each), "init_ns": times.get(each.name)} for each in found]
        print_json({"functions": documents})
        return
    say(_table(found))
    for name, init_ns in times.items():
        say(f"{name}: init takes {format_duration(init_ns)} here")
    sized = ", ".join(each.name for each in found if each.size is not None)
    if sized:
        module = modules[0].partition(":")[0]
        say(
            f"{sized}: only calls that are given the function itself, or {module}:NAME, have a size class; a "
            "client that gives the name alone is forecast with class 0"
        )
    say(f"{len(found)} function(s); a worker runs them with --functions {','.join(modules)}")


def _init_ns(function: Function[Any]) -> int:
    from slosched.clock import now_ns

    begin_ns = now_ns()
    try:
        assert function.init is not None
        function.init()
    except (Exception, SystemExit) as error:
        from slosched.functions.body import traceback_text
        from slosched.functions.errors import FunctionError

        beside(traceback_text(error))
        raise FunctionError(
            f"function {function.name!r}: its init raised {type(error).__name__}: {error}"
        ) from None
    return now_ns() - begin_ns


# --------------------------------------------------------------------------------------- call


def call(
    function: Annotated[
        str,
        typer.Argument(
            metavar="FUNCTION",
            help="A function's name; `slosched functions list` shows them. Or package.module:function, whose "
            "arguments are then checked here and have their size class.",
        ),
    ],
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[VALUE|NAME=VALUE]...",
            help='Each is JSON ("[1, 2]", true, 3) or else a text; @FILE.npy is an array.',
            show_default=False,
        ),
    ] = None,
    controller: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="Where the controller listens for clients.")
    ] = LOCAL_CONTROLLER,
    slo: Annotated[
        str | None,
        typer.Option(
            metavar="DURATION",
            help="From the call's send to the receipt of its result, for example 25ms; a bare number is in "
            "seconds. Default: the function's, else the controller's.",
            show_default=False,
        ),
    ] = None,
    near: Annotated[
        str, typer.Option(metavar="KEY", help="Run it where the last call near the same key ran.")
    ] = "",
    json: Json = False,
) -> None:
    """Call a function of the workers; print its result, and everything that the answer says.

    Exit code 1: the call was refused, was given up, failed or raised (its traceback is printed on stderr);
    exit code 2: the call was wrong (unknown function, wrong arguments, impossible SLO).

    \b
    Examples:
      slosched call fibonacci 12 --slo 50ms
      slosched call resize @image.npy width=224 --json
      slosched call my_module:fibonacci 12 --controller cluster02:12346
    """
    if slo is not None:
        duration_ns("--slo", slo)
    called: Function[Any] | str = function
    if ":" in function:
        from slosched.functions.registry import find

        [called, *others] = find([function]).values()
        if others:
            raise InvalidConfig(f"{function} names {1 + len(others)} functions; name one")
    args, kwargs = _arguments(arguments or [])
    answer = _answer(one_address(controller), called, args, kwargs, slo, near)
    if json:
        print_json({"function": answer.function, **answer.facts(), "value": _plain(answer.value)})
    else:
        if answer.ok:
            say(_shown(answer.value))
        say(f"{answer.function}: {_explained(answer)}")
        say(f"round trip at the client: {format_duration(answer.round_trip_ns)}")
    if not answer.ok:
        if "\n" in answer.reason and not json:
            beside(answer.reason)
        code = answer.code
        raise _NotServed(f"call of {answer.function!r}: {code_name(code)} (code {code})")


class _NotServed(SloschedError):
    """The call did not return; what is known has been printed."""


def _answer(
    address: str,
    function: Function[Any] | str,
    args: Sequence[Any],
    kwargs: dict[str, Any],
    slo: str | None,
    near: str,
) -> CallAnswer:
    import uvloop

    from slosched.clients.aio import connect
    from slosched.functions.function import RESERVED

    reserved = sorted(set(kwargs) & set(RESERVED))
    if reserved:
        raise InvalidConfig(
            f"{reserved[0]}= is an option of calls; give that argument by its place"
        )

    async def ask() -> CallAnswer:
        async with connect(address, name="slosched call") as client:
            return await client.call_answer(function, *args, slo=slo, near=near, **kwargs)

    try:
        return uvloop.run(ask())
    except SloschedError:
        raise
    except (TypeError, ValueError) as error:  # of the arguments; it says which
        raise InvalidConfig(str(error)) from None


def _arguments(words: Sequence[str]) -> tuple[list[Any], dict[str, Any]]:
    """The values of the command line. Raises InvalidConfig for a file that is not an array."""
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    for word in words:
        match = _NAMED.fullmatch(word)
        if match is None:
            if kwargs:
                raise InvalidConfig(f"{word!r} stands behind NAME=VALUE; values come first")
            args.append(_value(word))
        elif match[1] in kwargs:
            raise InvalidConfig(f"{match[1]}= is given twice")
        else:
            kwargs[match[1]] = _value(match[2])
    return args, kwargs


def _value(word: str) -> Any:
    if word.startswith("@"):
        return _array(word[1:])
    try:
        return json_module.loads(word)
    except (ValueError, RecursionError):
        return word


def _array(path: str) -> Any:
    import numpy as np

    try:
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InvalidConfig(f"@{path} is not an array in numpy's .npy form: {error}") from None


def _explained(answer: CallAnswer) -> str:
    """The answer in one line; a traceback is printed apart."""
    text = answer.explain()
    return (
        text.replace(answer.reason, "its traceback is on stderr") if "\n" in answer.reason else text
    )


def _shown(value: Any) -> str:
    """A result for a person: JSON, with arrays by dtype and shape."""
    text = json_module.dumps(_plain(value), ensure_ascii=False, default=str)
    return (
        text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}... ({len(text):,} characters)"
    )


def _plain(value: Any) -> Any:
    """`value` as JSON has it: an array becomes a text of its dtype and shape, bytes one of their number."""
    import numpy as np

    if isinstance(value, np.ndarray):
        return f"array of {value.dtype} {value.shape}"
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, bytes):
        return f"{len(value):,} bytes"
    if isinstance(value, dict):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value
