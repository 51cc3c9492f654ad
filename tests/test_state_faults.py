# ruff: noqa: F811  (fixtures of test_state)
"""State when something goes wrong: late commits, kills, dropped namespaces, full memory, forks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slosched.errors import InvalidConfig, OutOfResources
from slosched.functions.state import (
    KeyDeleted,
    LockLost,
    NamespaceInUse,
    State,
    StateLimit,
    StoreLost,
    folders,
    open_store,
)
from slosched.functions.state.ranges import Part
from test_state import (  # noqa: F401
    free_port,
    redis_address,
    redis_program,
    remote,
    run,
    shared_memory,
    store,
)


class TestBothTiers:
    def test_a_run_does_not_drop_its_successor(self, store: str) -> None:
        first = State("shared", store, own=True)
        array = first.array("w", 5)
        assert open_store(store).drop("shared")
        with State("shared", store, own=True) as second:
            theirs = second.array("w", 5)
            theirs.set(np.ones(5))
            theirs.push()
            with pytest.raises(KeyDeleted):
                array.pull()
            with pytest.raises(KeyDeleted, match="open a new State"):
                first.array("other", 5)
            first.close()
            theirs.pull(discard=True)
            assert theirs.copy().all() and len(second.list()) == 1
        assert not open_store(store).namespaces()

    @pytest.mark.parametrize("name", ["..", ".", "/" * 200, "ä b" * 60])
    def test_names_that_no_file_could_have(self, store: str, name: str) -> None:
        with State(name, store, own=True) as state:
            state.array(name, 5)
            assert open_store(store).namespaces() == {name: (1, 40)}
            with pytest.raises(NamespaceInUse):
                State(name, store, own=True)

    def test_a_pull_of_the_same_version_moves_nothing(self, run: State, store: str) -> None:
        array, other = run.array("w", 1000), remote(store)
        theirs = other.array("w", 1000)
        assert array.pull() == 8000 and array.pull() == 0 and array.pull(discard=True) == 0
        array.set(np.ones(1000))
        assert array.pull() == 0 and array.get().all(), "what was not pushed stays"
        array.get(writable=True)  # from here on there is a base
        assert array.pull(discard=True) == 8000 and not array.get().any()
        theirs.set_chunk(3, [7.0])
        theirs.push_partial()
        assert array.pull() == 8000 and array.get()[3] == 7
        theirs.clear()
        assert array.pull() == 8000 and not array.get().any()
        other.close()

    def test_a_failed_pull_discards_nothing(
        self, run: State, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        array = run.array("w", 5)
        array.set(np.ones(5))

        def lost(*_: Any) -> None:
            raise StoreLost("lost")

        with monkeypatch.context() as patch:
            patch.setattr(array._space, "read", lost)
            with pytest.raises(StoreLost):
                array.pull(discard=True)
        assert array.push() == 40

    def test_shapes_and_values(self, run: State) -> None:
        assert run.array("n", np.int64(3), "u1").shape == (3,)
        small = run.array("u", (3,), "u1")
        small.set([1, 2, 255])
        assert list(small.get()) == [1, 2, 255]
        small.append([])
        for act in (
            lambda: small.set([1, 2, 256]),
            lambda: small.set([1, 2, -1]),
            lambda: small.set([[1], [2, 3]]),
            lambda: run.array("x", (2.5,)),  # type: ignore[arg-type]
            lambda: run.array("x", (1,) * 65),
            lambda: run.array("x", (0, 2**70)),
            lambda: run.array("x", 3, ">f8"),
            lambda: run.array("x", 3, np.longdouble),
        ):
            with pytest.raises(InvalidConfig):
                act()

    def test_a_lock_does_not_stay_with_a_fork(self, run: State, store: str) -> None:
        array = run.array("w", 5)
        with array.lock():
            child = os.fork()
            if not child:
                signal.pause()
        try:
            with array.lock(timeout_ns=2 * 10**9):
                pass
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)

    def test_deleting_makes_no_copy(
        self, run: State, store: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        other = remote(store)
        run.array("w", 5)
        monkeypatch.delattr(os, "posix_fallocate")
        other.delete("w")
        assert not list(other._local.iterdir())
        other.close()

    def test_a_key_that_another_host_deletes_frees_this_hosts_copy(
        self, run: State, store: str
    ) -> None:
        other = remote(store)
        theirs = other.array("w", 5)
        run.array("w", 5).delete()
        with pytest.raises(KeyDeleted):
            theirs.pull()
        assert not list(other._local.iterdir())
        other.close()


class TestEmbedded:
    def test_zeros_after_a_killed_push_are_zeros(self) -> None:
        with State("shared", own=True) as state:
            array = state.array("w", 5)
            state.space._file(array.info, "new").write_bytes(b"\1" * 40)  # type: ignore[attr-defined]
            array.clear()
            array.pull()
            assert not array.copy().any()

    def test_memory_is_taken_when_a_key_is_declared(self) -> None:
        with State("shared", own=True) as state:
            array = state.array("w", 10_000)
            data = state.space._file(array.info, "data")  # type: ignore[attr-defined]
            assert data.stat().st_blocks * 512 >= 80_000
            array.clear()
            assert data.stat().st_blocks * 512 >= 80_000

    def test_writers_are_forgotten_in_order(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("slosched.functions.state.embedded._WRITERS", 2)
        with State("shared", own=True) as state:
            array = state.array("w", 5)
            for writer in "abac":
                array._local.header["writer"] = writer.encode()
                array.set(np.ones(5))
                array.push()
            assert state.space.committed(array.info, "a") == 3
            assert state.space.committed(array.info, "b") == 0


def test_an_array_has_a_largest_size() -> None:
    with State("shared", own=True) as state, pytest.raises(StateLimit, match="several keys"):
        state.array("w", 5 * 10**9, "i1")


class TestFolders:
    def test_the_root_is_this_users_alone(self, tmp_path: Path) -> None:
        folders.root().rmdir()
        folders._root_path().mkdir(mode=0o777)
        folders._root_path().chmod(0o777)
        with State("shared", own=True):
            assert folders.root().stat().st_mode & 0o777 == 0o700
        folders._root_path().symlink_to(tmp_path)
        with pytest.raises(InvalidConfig, match="not a folder of this user"):
            State("shared", own=True)
        folders._root_path().unlink()

    def test_a_draft_of_another_pid_namespace_stays(self) -> None:
        draft = folders.root() / ".new-4194999-x"  # no such process here
        draft.mkdir()
        folders.sweep()
        assert draft.exists()
        os.utime(draft, (0, 0))
        folders.sweep()
        assert not draft.exists()


class TestRedis:
    def test_a_late_commit_of_a_sum_is_refused(
        self, redis_address: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("slosched.functions.state.redis_store._MERGE_LEASE_MS", 300)
        with State("shared", redis_address, own=True) as state:
            array = state.array("w", 5, merge="sum")
            array.set(np.ones(5))
            real, late = state.store.call, []  # type: ignore[attr-defined]

            def slow(script: str, keys: list[str], args: list[Any]) -> Any:
                if script == "COMMIT" or (script == "MUTEX" and not args[1]):
                    late.append((script, keys, args))
                    raise StoreLost("on its way")
                return real(script, keys, args)

            with monkeypatch.context() as patch:
                patch.setattr(state.store, "call", slow)
                with pytest.raises(StoreLost):
                    array.push()
            array.pull()
            real(*late[0])
            array.push()
            array.pull(discard=True)
            assert list(array.copy()) == [1] * 5

    def test_many_ranges_of_a_chunk_go_as_a_mask(
        self, redis_address: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        client = open_store(redis_address).client  # type: ignore[attr-defined]

        def staged() -> set[bytes]:
            return {key for key in client.scan_iter() if b":s:" in key}

        before = staged()
        with State("shared", redis_address, own=True) as state:
            other, size = remote(redis_address), 150_000  # two chunks
            array, theirs = state.array("w", size), other.array("w", size)
            theirs.set(np.full(size, 2.0))
            theirs.push()
            array.set(np.ones(size))
            mask = np.zeros(size, bool)
            mask[: size // 4 : 2] = True
            mask[-3:] = True
            kinds: list[list[Any]] = []
            real = state.store.call  # type: ignore[attr-defined]

            def seen(script: str, keys: list[str], args: list[Any]) -> Any:
                if script == "COMMIT":
                    kinds.append(args[6:])
                return real(script, keys, args)

            monkeypatch.setattr(state.store, "call", seen)
            assert array.push_partial(mask) == 8 * mask.sum()
            assert kinds == [["M", 0, "P", 1]]
            theirs.pull()
            assert (theirs.get() == np.where(mask, 1, 2)).all()
            other.close()
            assert staged() <= before, "staged parts are left"

    def test_pushes_of_many_ranges_by_two_hosts_all_arrive(self, redis_address: str) -> None:
        size, rounds = 20_000, 12
        with State("shared", redis_address, own=True) as state:
            other = remote(redis_address)
            both = [each.array("w", size) for each in (state, other)]
            both[0].set(np.zeros(size))
            both[0].push()
            places = np.arange(size) % 7
            failed: list[BaseException] = []

            def work(number: int) -> None:
                try:
                    for step in range(1, rounds + 1):
                        values = both[number].get(writable=True)
                        mine = places == number * 3
                        values[mine] = step
                        both[number].push_partial(mine)
                        both[number].pull()
                except BaseException as error:
                    failed.append(error)

            threads = [threading.Thread(target=work, args=(n,)) for n in (0, 1)]
            for each in threads:
                each.start()
            for each in threads:
                each.join(60)
            assert not failed
            both[0].pull(discard=True)
            wanted = np.where((places == 0) | (places == 3), rounds, 0)
            assert (both[0].copy() == wanted).all()
            other.close()

    def test_values_that_were_never_written_are_zeros_beside_a_mask(
        self, redis_address: str
    ) -> None:
        with State("shared", redis_address, own=True) as state:
            array = state.array("w", 5_000)
            values = array.get(writable=True)
            values[100:2_000:2] = 3.0
            assert array.push_partial() == 8 * 950
            other = remote(redis_address)
            assert (other.array("w", 5_000).get() == values).all()
            other.close()

    def test_a_server_that_evicts_is_refused(self, redis_address: str) -> None:
        client = open_store(redis_address).client  # type: ignore[attr-defined]
        client.config_set("maxmemory", 10**9)
        client.config_set("maxmemory-policy", "allkeys-lru")
        try:
            with pytest.raises(InvalidConfig, match="noeviction"):
                State("shared", redis_address)
        finally:
            client.config_set("maxmemory", 0)
            client.config_set("maxmemory-policy", "noeviction")

    def test_a_clear_is_not_undone_by_a_sum(self, redis_address: str) -> None:
        with State("shared", redis_address, own=True) as state:
            array = state.array("w", 5, merge="sum")
            with state.space.merge_lock(array.info):
                state.space.clear(array.info, values=True)
                with pytest.raises(LockLost):
                    state.space._renew_mutex(array.info)  # type: ignore[attr-defined]

    def test_without_memory_keys_can_be_removed(self, redis_address: str) -> None:
        with State("shared", redis_address, own=True) as state:
            array = state.array("w", 5)
            client = state.store.client  # type: ignore[attr-defined]
            client.config_set("maxmemory", 1)
            try:
                array.set(np.ones(5))
                with pytest.raises(OutOfResources, match="out of memory"):
                    array.push()
                array.delete()
                assert not state.list()
            finally:
                client.config_set("maxmemory", 0)

    def test_a_log_that_is_emptied_during_a_read(
        self, redis_address: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with State("shared", redis_address, own=True) as state:
            array = state.array("w", 0, "i4")
            array.append([1, 2, 3])
            space: Any = state.space
            real = space._try_read

            def emptied(*args: Any) -> Any:
                monkeypatch.setattr(space, "_try_read", real)
                array.clear_appended()
                array.append([9])
                return real(*args)

            monkeypatch.setattr(space, "_try_read", emptied)
            assert list(array.read_appended()) == [9]

    def test_a_stopped_process_knows_that_its_lease_is_over(self, redis_address: str) -> None:
        with State("shared", redis_address, own=True) as state:
            array = state.array("w", 5)
            with pytest.raises(LockLost), array.lock():
                held: Any = array._held
                held._until_ns = 0
                array.set(np.ones(5))
                array.push()

    def test_the_server_refuses_what_comes_under_a_lost_lock(self, redis_address: str) -> None:
        with State("shared", redis_address, own=True) as state:
            array, other = state.array("w", 5), state.array("w", 5)
            with pytest.raises(LockLost), array.lock():
                state.store.client.delete(f"{state.space._at('w')}:w")  # type: ignore[attr-defined]
                with other.lock():
                    array.set(np.ones(5))
                    for act in (array.push, lambda: array.append([1.0])):
                        with pytest.raises(LockLost, match="nothing was written"):
                            act()
            assert not state.space.read(array.info, Part(slice(0, 5))).any()
            assert not array.read_appended().size

    def test_a_restart_without_data(self) -> None:
        program = redis_program()
        from slosched.functions.state.server import Server

        port = free_port()
        with Server(port, program=program) as server:
            state = State("shared", server.address, own=True)
            array = state.array("w", 5, merge="sum")
            array.set(np.ones(5))
        with Server(port, program=program):
            for act in (array.push, array.pull, lambda: state.array("w", 5)):
                for _ in range(2):  # the first call may find the old connection closed
                    with pytest.raises((KeyDeleted, StoreLost)):
                        act()
            with pytest.raises(KeyDeleted, match="declare it again"):
                array.push()
            state.close()

    def test_down_ends_only_what_up_started(self) -> None:
        program = redis_program()
        from slosched.functions.state.redis_store import RedisStore
        from slosched.functions.state.server import Server

        with Server(free_port(), program=program) as server:
            other = RedisStore(server.address)
            other.client.delete("slosched:started")
            with pytest.raises(InvalidConfig, match="did not start"):
                other.shut_down()
            assert server.process.poll() is None
            other.mark()
            other.shut_down()
            server.process.wait(10)
            other.close()

    @pytest.mark.processes
    def test_a_server_ends_with_its_killed_parent(self) -> None:
        program = redis_program()
        from slosched.functions.state.redis_store import RedisStore

        port = free_port()
        script = (
            "import signal; from slosched.functions.state.server import Server; "
            f"Server({port}, program={program!r}); print('ready', flush=True); signal.pause()"
        )
        parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
        assert parent.stdout is not None and parent.stdout.readline() == "ready\n"
        store = RedisStore(f"redis://127.0.0.1:{port}")
        assert store.process_id()
        parent.kill()
        parent.communicate(timeout=10)
        until = time.monotonic() + 10
        while store.process_id():
            assert time.monotonic() < until
            time.sleep(0.01)
        store.close()
