"""Regions of shared memory: reading and writing them, and what a client cannot do with them."""

from __future__ import annotations

import gc
import os
import resource
import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from slosched.fronts.asked import RegionPart
from slosched.fronts.errors import FrontError, Status
from slosched.fronts.regions import FOLDER, Regions, Room

KEY = "memory"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / KEY).write_bytes(bytes(range(100)))
    return tmp_path


@pytest.fixture
def regions(folder: Path) -> Iterator[Regions]:
    made = Regions(folder=folder, max_part_bytes=64)
    yield made
    made.close()


def open_files() -> int:
    """Descriptors of files in folders of tests. Sockets of the tests before may close at any time."""
    gc.collect()
    found = 0
    for each in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # that of the folder that is read here
            found += "/pytest-" in str(each.readlink())
    return found


def refused(status: Status, words: str, call: object, *arguments: object) -> None:
    assert callable(call)
    with pytest.raises(FrontError) as caught:
        call(*arguments)
    assert caught.value.status is status, caught.value.text
    assert words in caught.value.text


def test_a_region_is_read_and_written_from_its_offset(regions: Regions, folder: Path) -> None:
    regions.register("r", f"/{KEY}", 10, 20)
    assert regions.read(RegionPart("r", 0, 20)) == bytes(range(10, 30))
    assert regions.read(RegionPart("r", 18, 2)) == b"\x1c\x1d"
    assert regions.read(RegionPart("r", 20, 0)) == b""
    regions.write(RegionPart("r", 4, 16), memoryview(b"abc"))
    assert (folder / KEY).read_bytes()[13:18] == b"\x0dabc\x11"


def test_the_status_shows_one_or_all(regions: Regions) -> None:
    assert regions.status("") == []
    regions.register("b", f"/{KEY}", 0, 100)
    regions.register("a", KEY, 1, 2)
    assert regions.status("b") == [{"name": "b", "key": f"/{KEY}", "offset": 0, "byte_size": 100}]
    assert [each["name"] for each in regions.status("")] == ["a", "b"]
    words = "Unable to find system shared memory region: 'nope'"
    refused(Status.NOT_FOUND, words, regions.status, "nope")


def test_a_region_is_forgotten_with_its_file(regions: Regions) -> None:
    before = open_files()
    regions.register("a", KEY, 0, 1)
    regions.register("b", KEY, 0, 1)
    assert open_files() == before + 2
    regions.unregister("unknown")
    regions.unregister("a")
    words = "Unable to find shared memory region: 'a'"
    refused(Status.NOT_FOUND, words, regions.read, RegionPart("a", 0, 1))
    assert regions.read(RegionPart("b", 0, 1)) == b"\x00"
    regions.unregister("")
    assert open_files() == before and regions.status("") == []


def test_an_object_that_was_unlinked_still_serves(regions: Regions, folder: Path) -> None:
    regions.register("r", KEY, 0, 100)
    (folder / KEY).unlink()
    regions.write(RegionPart("r", 0, 1), b"x")
    assert regions.read(RegionPart("r", 0, 2)) == b"x\x01"


@pytest.mark.parametrize(
    ("name", "key", "offset", "size", "words"),
    [
        ("", KEY, 0, 1, "needs a name"),
        ("n" * 1025, KEY, 0, 1, "needs a name"),
        ("r", KEY, 0, 0, "byte_size of at least 1"),
        ("r", KEY, 0, -1, "byte_size of at least 1"),
        ("r", KEY, -1, 1, "offset of at least 0"),
        ("r", KEY, 0, 101, "has 100 bytes"),
        ("r", KEY, 2**64 - 1, 2**64 - 1, "has 100 bytes"),
        ("r", "missing", 0, 1, "Unable to open shared memory region: 'missing'"),
        ("r", "", 0, 1, "not the name of a shared memory object"),
        ("r", "/", 0, 1, "not the name of a shared memory object"),
        ("r", ".", 0, 1, "not the name of a shared memory object"),
        ("r", "..", 0, 1, "not the name of a shared memory object"),
        ("r", "/..", 0, 1, "not the name of a shared memory object"),
        ("r", "//" + KEY, 0, 1, "not the name of a shared memory object"),
        ("r", "../" + KEY, 0, 1, "not the name of a shared memory object"),
        ("r", "sub/" + KEY, 0, 1, "not the name of a shared memory object"),
        ("r", "a\0b", 0, 1, "not the name of a shared memory object"),
        ("r", "k" * 256, 0, 1, "not the name of a shared memory object"),
    ],
)
def test_wrong_registrations(
    regions: Regions, name: str, key: str, offset: int, size: int, words: str
) -> None:
    before = open_files()
    refused(Status.INVALID_ARGUMENT, words, regions.register, name, key, offset, size)
    assert open_files() == before and regions.status("") == []


def test_only_files_are_opened(regions: Regions, folder: Path) -> None:
    (folder / "secret").write_text("secret")
    (folder / "link").symlink_to(folder / "secret")
    (folder / "inner").mkdir()
    os.mkfifo(folder / "pipe")
    (folder / "dangling").symlink_to(folder / "made")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "socket"))
        before = open_files()
        for each in ("link", "inner", "pipe", "socket", "dangling"):
            refused(Status.INVALID_ARGUMENT, f"'{each}'", regions.register, "r", each, 0, 1)
        assert open_files() == before
    assert not (folder / "made").exists()


def test_a_name_is_taken_until_it_is_unregistered(regions: Regions) -> None:
    regions.register("r", KEY, 0, 1)
    before = open_files()
    words = "shared memory region 'r' already in manager"
    refused(Status.ALREADY_EXISTS, words, regions.register, "r", KEY, 0, 2)
    assert open_files() == before and regions.status("r")[0]["byte_size"] == 1


@pytest.mark.parametrize(
    ("part", "words"),
    [
        (RegionPart("r", 21, 0), "Invalid offset for shared memory region: 'r'"),
        (RegionPart("r", -1, 1), "Invalid offset for shared memory region: 'r'"),
        (RegionPart("r", 2**63, 1), "Invalid offset for shared memory region: 'r'"),
        (RegionPart("r", 0, 21), "Invalid offset + byte size for shared memory region: 'r'"),
        (RegionPart("r", 20, 1), "Invalid offset + byte size for shared memory region: 'r'"),
        (RegionPart("r", 0, -1), "Invalid offset + byte size for shared memory region: 'r'"),
        (RegionPart("r", 0, 2**63), "Invalid offset + byte size for shared memory region: 'r'"),
    ],
)
def test_parts_that_are_not_in_the_region(
    regions: Regions, folder: Path, part: RegionPart, words: str
) -> None:
    regions.register("r", KEY, 10, 20)
    refused(Status.INVALID_ARGUMENT, words, regions.read, part)
    refused(Status.INVALID_ARGUMENT, words, regions.write, part, b"")
    assert (folder / KEY).read_bytes() == bytes(range(100))


def test_an_output_needs_room(regions: Regions, folder: Path) -> None:
    regions.register("r", KEY, 0, 100)
    words = "is too small: 2 bytes in region 'r', and 3 are needed"
    refused(Status.INVALID_ARGUMENT, words, regions.write, RegionPart("r", 0, 2), b"abc")
    assert (folder / KEY).read_bytes() == bytes(range(100))


def test_a_part_that_is_read_has_a_bound(regions: Regions, folder: Path) -> None:
    os.truncate(folder / KEY, 2**40)  # sparse: it takes no memory
    regions.register("r", KEY, 0, 2**40)
    part = RegionPart("r", 0, 65)
    refused(Status.TOO_LARGE, "65 bytes in shared memory region 'r'", regions.read, part)
    assert len(regions.read(RegionPart("r", 2**39, 64))) == 64


def test_a_file_that_was_shortened_does_not_end_the_process(regions: Regions, folder: Path) -> None:
    regions.register("r", KEY, 0, 100)
    os.truncate(folder / KEY, 10)
    words = "'r' was shortened after it was registered"
    refused(Status.INVALID_ARGUMENT, words, regions.read, RegionPart("r", 0, 11))
    refused(Status.INVALID_ARGUMENT, words, regions.write, RegionPart("r", 8, 3), b"abc")
    assert (folder / KEY).stat().st_size == 10
    assert regions.read(RegionPart("r", 0, 10)) == bytes(range(10))


def test_regions_leave_files_for_connections(
    regions: Regions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (12, 4096))
    for number in range(3):
        regions.register(str(number), KEY, 0, 1)
    words = "3 shared memory regions are registered"
    refused(Status.RESOURCE_EXHAUSTED, words, regions.register, "more", KEY, 0, 1)
    regions.unregister("0")
    regions.register("more", KEY, 0, 1)
    assert Room.MOST == 1024


def test_it_can_be_off(folder: Path) -> None:
    regions = Regions(enabled=False, folder=folder)
    words = "--no-shared-memory"
    refused(Status.UNIMPLEMENTED, words, regions.register, "r", KEY, 0, 1)
    refused(Status.UNIMPLEMENTED, words, regions.read, RegionPart("r", 0, 1))
    refused(Status.UNIMPLEMENTED, words, regions.write, RegionPart("r", 0, 1), b"a")
    regions.unregister("")
    assert regions.status("") == []


def test_an_object_of_this_host_by_its_name() -> None:
    key = f"slosched_test_{os.getpid()}"
    (FOLDER / key).write_bytes(b"hello")
    regions = Regions()
    try:
        regions.register("r", f"/{key}", 0, 5)
        assert regions.read(RegionPart("r", 0, 5)) == b"hello"
    finally:
        regions.close()
        (FOLDER / key).unlink()
