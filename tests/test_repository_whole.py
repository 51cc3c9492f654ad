"""Files of weights that are not all there are left out, whatever their times say; whole ones are offered."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path

import pytest

from repository_rig import Repository
from slosched.daemon.repository.watcher import list_once

CONFIG = "{}"
SHARD = "model-00001-of-00001.safetensors"
INDEX = "model.safetensors.index.json"


def zipped(comment: bytes = b"") -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("model/models/model.json", "x" * 100_000)
        archive.comment = comment
    return file.getvalue()


def tensors(*values: object, data: int = 0) -> bytes:
    """A file of safetensors with these heads, and `data` bytes behind them."""
    head = json.dumps(dict(enumerate(values))).encode()
    return len(head).to_bytes(8, "little") + head + bytes(data)


def weight(begin: int, end: int) -> dict[str, object]:
    return {"dtype": "F32", "shape": [(end - begin) // 4], "data_offsets": [begin, end]}


WHOLE = tensors(weight(0, 8), weight(8, 400), data=400)


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    return Repository(tmp_path)


def reason(repository: Repository, files: dict[str, str | bytes]) -> str:
    """Why a version of these files is left out; empty if it is offered."""
    repository.add("net/1", files)
    listing = list_once(str(repository.path))
    assert bool(listing.versions) != bool(listing.left_out)
    return dict(listing.left_out).get("net:1", "")


@pytest.mark.parametrize("comment", [b"", b"c" * 1_000])
def test_a_whole_program_is_offered(repository: Repository, comment: bytes) -> None:
    assert reason(repository, {"model.pt2": zipped(comment)}) == ""


@pytest.mark.parametrize("kept", [0, 1, 50_000, -1, -30])
def test_a_program_that_is_cut_short_is_left_out(repository: Repository, kept: int) -> None:
    said = reason(repository, {"model.pt2": zipped()[:kept]})
    assert "not a whole ZIP file" in said and "may not be copied yet" in said


def test_a_program_that_lacks_its_middle_is_left_out(repository: Repository) -> None:
    data = zipped()
    assert "lacks what its end lists" in reason(repository, {"model.pt2": data[50_000:]})


def test_whole_weights_are_offered_in_one_file_and_in_several(repository: Repository) -> None:
    assert reason(repository, {"model.safetensors": WHOLE, "config.json": CONFIG}) == ""
    index = json.dumps({"weight_map": {"0": SHARD}})
    repository.add("net/2", {SHARD: WHOLE, INDEX: index, "config.json": CONFIG})
    repository.add("net/3", {SHARD: WHOLE[:-1], INDEX: index, "config.json": CONFIG})
    listing = list_once(str(repository.path))
    assert [each.name for each in listing.versions] == ["net:2", "net:1"]
    [(name, said)] = listing.left_out
    assert name == "net:3" and f"{SHARD} has {len(WHOLE) - 1:,} of {len(WHOLE):,} bytes" in said


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "not a whole file of safetensors"),
        (b"1234567", "not a whole file of safetensors"),
        (WHOLE[:20], "not a whole file of safetensors"),
        (WHOLE[:-4], "bytes; it may not be copied yet"),
        (WHOLE + b"x", "bytes; it may not be copied yet"),
        (b"\xff" * 100, "not a whole file of safetensors"),
        (tensors(7), "does not begin as a file of safetensors does"),
        (tensors({"data_offsets": [0]}), "does not begin as"),
        (tensors({"data_offsets": [0, "x"]}), "does not begin as"),
        (bytes([4, 0, 0, 0, 0, 0, 0, 0]) + b"nope", "does not begin as"),
    ],
)
def test_weights_that_are_not_all_there_are_left_out(
    repository: Repository, data: bytes, words: str
) -> None:
    said = reason(repository, {"model.safetensors": data, "config.json": CONFIG})
    assert said.startswith("model.safetensors ") and words in said


def test_files_that_no_load_reads_are_left_alone(repository: Repository) -> None:
    place = repository.scaled("net/1", 2.0)
    (place / "weights.safetensors").write_bytes(b"x")
    assert [each.name for each in list_once(str(repository.path)).versions] == ["net:1"]
