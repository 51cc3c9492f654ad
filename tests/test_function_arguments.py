"""Large arguments of calls that wait: they are written before their calls have a slot, and lost with them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from function_rig import FunctionRig
from slosched.clock import now_ns
from slosched.daemon.backends.functions.arguments import Arguments
from slosched.functions.payload import encode, joined
from slosched.units import NS_PER_S

pytestmark = pytest.mark.processes

LARGE = bytes(range(256)) * 2**14  # 4 MiB: four pieces
DATA = joined(encode((LARGE,)))


@pytest.fixture(scope="module")
def rig() -> Iterator[FunctionRig]:
    with FunctionRig() as opened:
        assert opened.call("echo", 1)[1] == 1
        yield opened


def _payloads() -> int:
    """Files of payloads that this process has open."""
    found = 0
    for each in Path("/proc/self/fd").iterdir():
        with suppress(OSError):
            found += str(each.readlink()).startswith("/memfd:slosched-payload")
    return found


def _write_all(rig: FunctionRig) -> None:
    give_up_ns = now_ns() + 30 * NS_PER_S
    while rig.backend.calls._arguments.writing:
        rig.poll(0)
        assert now_ns() < give_up_ns


def test_what_was_written_while_its_call_waited_is_not_written_when_it_begins(
    rig: FunctionRig,
) -> None:
    rig.backend.calls.keep(rig._next + 1, [DATA])
    _write_all(rig)
    op = rig.begin("echo", frame=b"")  # takes that number
    assert not rig.backend.calls._writing  # it is on its way at once
    assert rig.result(op, rig.done(op)) == LARGE


def test_a_call_that_begins_before_all_is_written_gets_all(rig: FunctionRig) -> None:
    rig.backend.calls.keep(rig._next + 1, [DATA])
    rig.poll(0)
    op = rig.begin("echo", frame=b"")
    assert rig.result(op, rig.done(op)) == LARGE


def test_what_never_begins_keeps_no_descriptor(rig: FunctionRig) -> None:
    for key in range(10_000, 10_100):
        rig.backend.calls.keep(key, [DATA])
    for _ in range(50):
        rig.poll(0)
    assert 0 < _payloads() < 100  # of more than 64 calls, the rest is written later
    for key in range(10_000, 10_100):
        rig.backend.drop_inputs(key)
    assert not _payloads()
    assert not rig.backend.calls._arguments.writing


def test_small_arguments_are_not_written() -> None:
    arguments = Arguments()
    arguments.keep(1, [b"small"])
    assert not arguments.writing
    assert arguments.take(1) == ([b"small"], None)
    assert arguments.take(1) == ((), None)
