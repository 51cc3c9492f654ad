"""What `@slosched.function` makes of a Python function, and how workers find it."""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

import sample_functions
import slosched
from slosched.errors import ExtensionError
from slosched.functions import registry
from slosched.functions.errors import FunctionError
from slosched.functions.function import MAX_PAYLOAD_BYTES, Function, function
from slosched.functions.registry import collected, find
from slosched.message_types import FunctionInfo


def plain(ctx: Any, a: int, b: int = 2) -> int:
    """The first line.

    The rest.
    """
    return a + b


async def coroutine(ctx: Any) -> int:
    return 1


def test_a_plain_function_has_the_defaults() -> None:
    made = function(plain)
    assert isinstance(made, Function) and made.name == "plain" and made.doc == "The first line."
    assert made.target == f"{__name__}:plain" and not made.is_async and function(coroutine).is_async
    assert made.info == FunctionInfo(limit_ns=60 * 10**9, max_payload_bytes=MAX_PAYLOAD_BYTES)
    assert made.expected_ns == 10**6 and made.reset == "none" and made.memory_bytes == 0
    assert made(None, 1) == 3  # still a function, for tests of its own


def test_options_become_what_a_scheduler_needs() -> None:
    made = function(
        init=dict,
        gpu=True,
        slo="50ms",
        reset="restore",
        idempotent=True,
        limit=2,
        expected=0.25,
        memory="64MiB",
        name="my-function.v2",
        size=lambda a, b=0: a,
        max_payload="1MiB",
    )(plain)
    assert made.name == "my-function.v2" and made.memory_bytes == 2**26
    assert made.limit_ns == 2 * 10**9 and made.expected_ns == 250_000_000
    assert made.info == FunctionInfo(
        gpu=True,
        slo_ns=50_000_000,
        limit_ns=2 * 10**9,
        max_payload_bytes=2**20,
        size_classes=16,
        idempotent=True,
    )
    assert made.size_class((7,), {}) == 7


def plain_id(value: object) -> str:
    """`value` without addresses, which differ from process to process."""
    return re.sub(r" at 0x[0-9a-f]+", "", str(value))


@pytest.mark.parametrize("found", [16, -1, 1.0, True, None, "1"])
def test_a_size_that_is_no_class_is_an_error_with_the_name(found: Any) -> None:
    made = function(size=lambda a: found)(plain)
    with pytest.raises(ValueError, match=r"plain: size returned .*within 0\.\.15"):
        made.size_class((1,), {})


def test_arguments_are_checked_against_the_body() -> None:
    made = function(plain)
    made.check_arguments((1,), {"b": 3})
    for args, kwargs in (((), {}), ((1, 2, 3), {}), ((1,), {"c": 1}), ((1,), {"ctx": 1})):
        with pytest.raises(TypeError, match=r"^plain\(\): "):
            made.check_arguments(args, kwargs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"slo": "fast"}, "slo: 'fast' is not a duration"),
        ({"slo": 0}, "slo is above 0"),
        ({"slo": True}, "slo: True is not a duration"),
        ({"limit": "800h"}, "limit is above 0 and at most 30 days"),
        ({"limit": float("inf")}, "limit: 'inf' is not a duration"),
        ({"expected": None}, "expected: None is not a duration"),
        ({"memory": "big"}, "memory: 'big' is not a size"),
        ({"memory": -1}, "memory is within 0"),
        ({"memory": 1.5}, "memory is a text, '64MiB', or a number of bytes"),
        ({"max_payload": 0}, "max_payload is within 1"),
        ({"max_payload": "1GiB"}, "max_payload is within 1"),
        ({"reset": "always"}, "reset is one of none, restore, reload, not 'always'"),
        ({"gpu": 1}, "gpu is True or False"),
        ({"idempotent": "yes"}, "idempotent is True or False"),
        ({"init": 3}, "init must be a plain function"),
        ({"init": coroutine}, "init must be a plain function"),
        ({"size": coroutine}, "size must be a plain function"),
        ({"name": "a b"}, "cannot be called 'a b'"),
        ({"name": "a#1"}, "cannot be called 'a#1'"),
        ({"name": "x" * 65}, "cannot be called"),
        ({"name": 3}, "cannot be called 3"),
    ],
    ids=plain_id,
)
def test_an_impossible_option_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(FunctionError, match=message):
        function(**options)(plain)
    with pytest.raises(TypeError, match="unexpected keyword"):
        function(timeout=3)(plain)  # type: ignore[call-overload]


def _generator(ctx: Any) -> Iterator[int]:
    yield 1


async def _async_generator(ctx: Any) -> Any:
    yield 1


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (lambda ctx: 1, "cannot be called '<lambda>'"),
        (_generator, "it has a yield"),
        (_async_generator, "it has a yield"),
        (dict, "is not a function"),
        (3, "cannot be called ''"),
        (functools.partial(plain, b=1), "cannot be called ''"),
    ],
    ids=plain_id,
)
def test_only_functions_can_be_functions(body: Any, message: str) -> None:
    with pytest.raises(FunctionError, match=message):
        function(body)


def test_the_context_comes_first_and_names_of_options_are_taken() -> None:
    def without() -> None: ...
    def by_name(*, ctx: Any) -> None: ...
    def takes_slo(ctx: Any, *, slo: int) -> None: ...
    def may_have_slo(ctx: Any, slo: int) -> None: ...

    bodies: list[Callable[..., None]] = [without, by_name]
    for body in bodies:
        with pytest.raises(FunctionError, match="its first parameter must be the context"):
            function(body)
    with pytest.raises(FunctionError, match="'slo' can be given by name only"):
        function(takes_slo)
    assert function(may_have_slo).name == "may_have_slo"


def test_slosched_exports_what_functions_need() -> None:
    assert slosched.function is function and slosched.Function is Function
    for name in ("CallFailed", "ChildRef", "Context", "gather"):
        assert name in slosched.__all__ and getattr(slosched, name)


# ---------------------------------------------------------------------------- where they are found


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder for modules; what is imported from it is forgotten afterwards."""
    before = set(sys.modules)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def _write(folder: Path, name: str, text: str) -> None:
    (folder / f"{name}.py").write_text(f"import slosched\n{text}", encoding="utf-8")


_ONE = "@slosched.function\ndef one(ctx): return 1\n"


def test_a_module_offers_all_its_functions_and_a_target_one() -> None:
    everything = find(["sample_functions"])
    assert everything["noop"] is sample_functions.noop and len(everything) > 5
    assert find(["sample_functions:noop"]) == {"noop": sample_functions.noop}
    assert find(["sample_functions:noop", "sample_functions"]) == {
        "noop": sample_functions.noop,
        **{name: each for name, each in everything.items() if name != "noop"},
    }
    assert find([]) == {}


def test_a_module_is_looked_for_in_the_folder_and_offers_what_it_imports(folder: Path) -> None:
    _write(folder, "made_one", _ONE)
    _write(folder, "made_two", "from made_one import one\nagain = one\n")
    found = find(["made_two"], folder=str(folder))
    assert [*found] == ["one"] and found["one"].module == "made_one"


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("", FunctionError, "'' is not a module"),
        ("a/b.py", FunctionError, "'a/b.py' is not a module with functions; write package.module"),
        ("os:", FunctionError, "'os:' is not a module"),
        ("../x", FunctionError, "is not a module"),
        ("no_such_module_at_all", ExtensionError, "ModuleNotFoundError"),
        ("no_such_module_at_all:x", ExtensionError, "ModuleNotFoundError"),
        ("sample_functions:no", ExtensionError, "AttributeError"),
        ("sample_functions:load", FunctionError, "a function and not a function|decorate it"),
        ("bisect", FunctionError, "module 'bisect' has no functions"),
        ("made_plain", FunctionError, "it has first, which are not decorated"),
        ("made_exits", ExtensionError, "SystemExit"),
        ("made_raises", ExtensionError, "ZeroDivisionError"),
        (
            "entry-points:missing",
            FunctionError,
            "no installed package has an entry point 'missing'",
        ),
    ],
)
def test_a_spec_without_functions_says_why(
    folder: Path, spec: str, error: type[Exception], message: str
) -> None:
    _write(folder, "made_plain", "def first(ctx): pass\n")
    _write(folder, "made_exits", "raise SystemExit(3)\n")
    _write(folder, "made_raises", "1 / 0\n")
    with pytest.raises(error, match=message):
        find([spec], folder=str(folder))


def test_two_functions_of_one_name_are_refused(folder: Path) -> None:
    _write(folder, "made_a", _ONE)
    _write(folder, "made_b", _ONE)
    with pytest.raises(
        FunctionError, match="two functions are called 'one': made_a:one and made_b"
    ):
        find(["made_a", "made_b"], folder=str(folder))
    with pytest.raises(FunctionError, match="is not a function"):
        collected([plain])  # type: ignore[list-item]


def test_more_functions_than_a_worker_may_offer_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(registry, "MOST_FUNCTIONS", 3)
    made = [function(name=f"f{n}")(plain) for n in range(4)]
    assert len(collected(made[:3])) == 3
    with pytest.raises(FunctionError, match="more than 3"):
        collected(made)


def test_entry_points_are_imported_only_when_they_are_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _write(folder, "made_offered", _ONE)
    _write(folder, "made_broken", "1 / 0\n")
    offered = [
        EntryPoint("good", "made_offered:one [extra]", registry.GROUP),
        EntryPoint("whole", "made_offered", registry.GROUP),
        EntryPoint("broken", "made_broken", registry.GROUP),
    ]
    monkeypatch.setattr(registry, "entry_points", lambda group: offered)
    monkeypatch.syspath_prepend(str(folder))
    assert [*find(["sample_functions:noop"])] == ["noop"] and "made_offered" not in sys.modules
    assert [*find(["entry-points:good"])] == ["one"] and "made_broken" not in sys.modules
    with pytest.raises(ExtensionError, match=r"the entry point 'broken': .*ZeroDivisionError"):
        find(["entry-points"])
    del offered[2]
    assert [*find(["entry-points"])] == ["one"]
