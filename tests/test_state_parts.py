"""Pushes of scattered elements: all of them arrive, nothing else moves, and a kill leaves no half of one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from slosched.functions.state import KeyDeleted, State, folders
from slosched.functions.state.embedded import EmbeddedSpace
from slosched.functions.state.local import LocalCopy

SIZE = 9_000


@pytest.fixture(autouse=True)
def shared_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A root of its own in shared memory, which is empty in the end."""
    name = f"slosched-state-parts-{folders.digest(str(tmp_path))}"
    monkeypatch.setenv(folders.PREFIX_VARIABLE, name)
    yield
    folders.sweep()
    folders.root().rmdir()


@pytest.fixture
def run() -> Iterator[State]:
    with State("parts", own=True) as state:
        yield state


@pytest.fixture
def other(run: State) -> Iterator[State]:
    with State("parts", private=True) as state:
        yield state


class Killed(BaseException):
    """Stands for the end of a process: nothing in the package catches it."""


@pytest.mark.parametrize("dtype", ["f8", "f4", "i8", "u1", "bool", "c16"])
@pytest.mark.parametrize("merge", ["overwrite", "sum", "max"])
@pytest.mark.parametrize("share", [0.0005, 0.3])
def test_scattered_elements_arrive_and_no_others(
    run: State, other: State, dtype: str, merge: Any, share: float
) -> None:
    if (dtype, merge) in {("bool", "sum"), ("c16", "max"), ("bool", "max")}:
        merge = "overwrite"
    array, theirs = (
        run.array("w", SIZE, dtype, merge=merge),
        other.array("w", SIZE, dtype, merge=merge),
    )
    random = np.random.default_rng(1)
    start = random.integers(0, 2, SIZE).astype(dtype)
    theirs.set(start)
    theirs.push()
    array.pull()
    view = array.get(writable=True)
    expected = start.copy()
    for _ in range(3):
        places = np.flatnonzero(random.random(SIZE) < share)
        view[places] = ~view[places] if dtype == "bool" else view[places] + 3
        expected[places] = view[places]
        before = run.moved.pushed_bytes
        assert array.push_partial() == len(places) * array.dtype.itemsize
        assert run.moved.pushed_bytes - before == len(places) * array.dtype.itemsize
        theirs.pull()
        assert np.array_equal(theirs.get(), expected)
    assert array.push_partial() == 0
    # What was not asked for is not pushed, though it was changed.
    view[:] = ~view if dtype == "bool" else view + 1
    mask = random.random(SIZE) < share
    expected[mask] = view[mask]
    array.push_partial(mask)
    theirs.pull()
    assert np.array_equal(theirs.get(), expected)


@settings(
    max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None
)
@given(st.lists(st.booleans(), min_size=1, max_size=200))
def test_a_mask_and_its_ranges_push_the_same(run: State, other: State, bits: list[bool]) -> None:
    mask = np.array(bits)
    edges = np.flatnonzero(np.diff(mask.astype(int), prepend=0, append=0)).reshape(-1, 2)
    found = []
    for how in (mask, [(int(a), int(b)) for a, b in edges]):
        array = run.array("w", len(mask), "i4")
        array.set(np.arange(1, len(mask) + 1))
        pushed = array.push_partial(how)
        theirs = other.array("w", len(mask), "i4")
        found.append((pushed, list(theirs.copy())))
        array.delete()
    assert found[0] == found[1]
    assert found[0] == (4 * mask.sum(), list(np.where(mask, np.arange(1, len(mask) + 1), 0)))


class TestKills:
    def scattered(self) -> np.ndarray[Any, np.dtype[np.bool_]]:
        return np.equal(np.arange(SIZE) % 3, 0)

    @pytest.mark.parametrize("ask", ["pull", "version"])
    def test_a_commit_of_scattered_elements_is_completed(
        self, run: State, other: State, monkeypatch: pytest.MonkeyPatch, ask: str
    ) -> None:
        array, theirs = run.array("w", SIZE), other.array("w", SIZE)
        theirs.pull()
        before = other.space.version(theirs.info)
        array.set(np.ones(SIZE))
        complete = EmbeddedSpace._complete

        def half(self: EmbeddedSpace, info: Any, journal: Any, part: Any = None) -> None:
            raise Killed

        monkeypatch.setattr(EmbeddedSpace, "_complete", half)
        with pytest.raises(Killed):
            array.push_partial(self.scattered())
        monkeypatch.setattr(EmbeddedSpace, "_complete", complete)
        if ask == "version":
            assert other.space.version(theirs.info) != before
        theirs.pull()
        assert np.array_equal(theirs.get(), self.scattered())

    @pytest.mark.parametrize("arrived", [False, True])
    def test_a_sum_of_scattered_elements_counts_once(
        self, run: State, other: State, monkeypatch: pytest.MonkeyPatch, arrived: bool
    ) -> None:
        array, theirs = (each.array("w", SIZE, merge="sum") for each in (run, other))
        view = array.get(writable=True)
        view[self.scattered()] += 5
        owner: type = LocalCopy if arrived else EmbeddedSpace
        name = "complete" if arrived else "commit"
        real = getattr(owner, name)

        def killed(*args: Any) -> None:
            raise Killed

        monkeypatch.setattr(owner, name, killed)
        with pytest.raises(Killed):
            array.push_partial()
        monkeypatch.setattr(owner, name, real)
        array.push_partial()
        array.pull()
        theirs.pull()
        for each in (array, theirs):
            assert np.array_equal(each.get(), 5 * self.scattered())

    def test_a_pull_of_scattered_changes_is_completed(
        self, run: State, other: State, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        array, theirs = run.array("w", SIZE), other.array("w", SIZE)
        array.get(writable=True)[1] = 7
        theirs.set(np.full(SIZE, 2.0))
        theirs.push_partial(self.scattered())
        complete = LocalCopy.complete

        def half(self: LocalCopy, journal: Any, part: Any = None) -> None:
            if part is not None:
                self.value[part.where[:1]] = 2
                raise Killed
            complete(self, journal, part)

        monkeypatch.setattr(LocalCopy, "complete", half)
        with pytest.raises(Killed):
            array.pull()
        assert array._local.value[0] == 2 and array._local.value[3] == 0
        monkeypatch.setattr(LocalCopy, "complete", complete)
        array.pull()
        wanted = 2.0 * self.scattered()
        wanted[1] = 7
        assert np.array_equal(array.get(), wanted)


def test_a_pull_behind_its_own_push_waits_for_nobody(run: State) -> None:
    array = run.array("w", SIZE)
    array.pull()
    array.get(writable=True)[::2] = 1
    array.push_partial()
    held = run.space._key_lock(array.info, shared=False)  # type: ignore[attr-defined]
    with array._local.locked(), held:  # neither may be taken twice
        assert array.pull() == 0
    array.delete()
    with pytest.raises(KeyDeleted):
        array.pull()
