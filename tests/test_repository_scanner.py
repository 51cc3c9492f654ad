"""A repository's folder: what is a version, what is left out and why, and that nothing outside is opened."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from repository_rig import FACTORY_TOML, Repository
from slosched.config import MOST_PUT_ASIDE, PUT_ASIDE_CHARS, ModelSource
from slosched.daemon.repository.beneath import NotBelow, open_below, read_below, root_of
from slosched.daemon.repository.describing import MOST_TOML_BYTES, described
from slosched.daemon.repository.listing import (
    MOST_NAME_BYTES,
    MOST_VERSIONS,
    Listing,
    Version,
    newest_first,
    offered,
    packed,
)
from slosched.daemon.repository.looks import SETTLED_NS, Looks
from slosched.daemon.repository.scanning import Found, Look, look_at
from slosched.errors import InvalidConfig
from slosched.model_source import is_version_of, newest_version, split_version
from slosched.signature import VARIES

T0 = 10**18


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    return Repository(tmp_path)


def look(repository: Repository) -> Look:
    with root_of(str(repository.path)) as root:
        return look_at(root)


def describe(repository: Repository, found: Found) -> ModelSource:
    def read(file: str, most_bytes: int) -> bytes:
        with root_of(str(repository.path)) as root:
            return read_below(root, f"{found.folder}/{file}", most_bytes=most_bytes)

    return described(found, repository.path / found.folder, read)


def source(repository: Repository, folder: str) -> ModelSource:
    [found] = [each for each in look(repository).found if each.folder == folder]
    return describe(repository, found)


def fault(repository: Repository, folder: str) -> str:
    with pytest.raises(InvalidConfig) as caught:
        source(repository, folder)
    return str(caught.value)


# -------------------------------------------------------------------------------------- names


def test_a_version_is_a_whole_number_behind_the_last_colon() -> None:
    assert split_version("digits:12") == ("digits", 12)
    assert split_version("a:b:2") == ("a:b", 2)
    for name in ("digits", "digits:", ":1", "digits:01", "digits:0", "digits:-1", "digits:1a"):
        assert split_version(name) == (name, 0)
    assert split_version("digits:1234567890") == ("digits:1234567890", 0)
    assert split_version("digits:\u0661") == ("digits:\u0661", 0)  # a digit, and not an ASCII one
    assert is_version_of("digits:2", "digits") and not is_version_of("digits", "digits")
    assert not is_version_of("digits2:2", "digits")
    names = ("digits:2", "digits:10", "digits", "digit:99", "digits:x")
    assert newest_version("digits", names) == "digits:10"
    assert newest_version("other", names) == ""


# --------------------------------------------------------------------------------------- looks


def test_versions_are_found_and_what_cannot_be_one_is_said(
    repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository.scaled("digits/1", 2.0)
    repository.scaled("digits/12", 2.0)
    (repository.path / "README.md").write_text("not a model")
    (repository.path / ".incoming").mkdir()
    (repository.path / "digits" / "config.pbtxt").write_text("not a version")
    (repository.path / "digits" / ".3").mkdir()
    for name in (
        "empty",
        "a model",
        "-x",
        "x" * 201,
        "digits/01",
        "digits/latest",
        "digits/0",
        f"digits/{2**64}",
    ):
        (repository.path / name).mkdir()
    os.mkfifo(repository.path / "pipe")
    with socket.socket(socket.AF_UNIX) as end:
        monkeypatch.chdir(repository.path)  # a socket's path is short
        end.bind("socket")
    found = look(repository)
    assert [each.folder for each in found.found] == ["digits/1", "digits/12"]
    assert found.found[0].files == {"model.toml", "model.py", "scale.py"}
    assert found.found[0].modules == {"model", "scale"}
    assert set(found.faults) == {
        "empty",
        "a model",
        "-x",
        "x" * 201,
        "digits/01",
        "digits/latest",
        "digits/0",
        f"digits/{2**64}",
        "pipe",
        "socket",
    }
    assert "such as empty/1" in found.faults["empty"]
    assert "1 to 9 digits, without zeros" in found.faults["digits/01"]
    assert "neither" in found.faults["pipe"]


def test_a_name_that_is_not_text_is_shown_without_what_moves_a_cursor(
    repository: Repository,
) -> None:
    (repository.path / os.fsdecode(b"\x1b[2J\xff")).mkdir()
    [name] = look(repository).faults
    assert name.isprintable() and name.isascii() and "1b" in name
    assert Looks(lambda found: ModelSource("x")).take(look(repository), now_ns=T0) is not None


def test_a_fingerprint_changes_with_each_file_and_with_nothing_else(repository: Repository) -> None:
    place = repository.scaled("digits/1", 2.0)
    (place / "data").mkdir()
    (place / "data" / "labels.txt").write_text("one")
    before = look(repository).found[0].fingerprint
    assert look(repository).found[0].fingerprint == before
    (place / "__pycache__").mkdir()
    (place / "__pycache__" / "model.pyc").write_bytes(b"x")
    (place / ".lock").write_text("x")
    (repository.path / "digits").rename(repository.path / "numbers")
    assert look(repository).found[0].fingerprint == before
    inner = repository.path / "numbers" / "1" / "data" / "labels.txt"
    inner.write_text("two")
    os.utime(inner, (1, 1))
    changed = look(repository).found[0].fingerprint
    assert changed != before
    inner.unlink()
    assert look(repository).found[0].fingerprint not in (before, changed)


@pytest.mark.parametrize("most", [1_000])
def test_a_version_with_very_many_files_is_left_out(repository: Repository, most: int) -> None:
    repository.add("many/1", {f"{number}": "" for number in range(most + 1)})
    found = look(repository)
    assert not found.found and "more than 1000 files" in found.faults["many/1"]


# --------------------------------------------------------------------- nothing outside is opened


def test_links_that_lead_out_are_refused_and_others_are_followed(
    repository: Repository, tmp_path: Path
) -> None:
    (tmp_path / "secret").write_text(FACTORY_TOML)
    place = repository.scaled("digits/1", 2.0)
    links: dict[str, str] = {
        "absolute/1": str(place),
        "out/1": "../../../secret",
        "over/1": "../../../models/digits/1",
        "inside/1": "../digits/1",
        "circle/1": "../circle/1",
        "nowhere/1": "../digits/7",
    }
    for name, target in links.items():
        link = repository.path / name
        link.parent.mkdir()
        link.symlink_to(target)
    (repository.path / "alias").symlink_to("digits")
    (repository.path / "file").symlink_to("digits/1/model.py")
    repository.add("shards/1", {**SHARDED, INDEX: index(SHARD, "more.safetensors")})
    (repository.path / "shards" / "1" / "more.safetensors").symlink_to("../../../secret")
    repository.add("weights/1", {"model.py": "", "model.toml": FACTORY_TOML})
    (repository.path / "weights" / "1" / "scale.py").symlink_to("../../../secret")
    found = look(repository)
    assert [each.folder for each in found.found] == ["alias/1", "digits/1", "inside/1"]
    assert set(found.faults) == {
        "absolute/1",
        "out/1",
        "over/1",
        "circle/1",
        "nowhere/1",
        "shards/1",
        "weights/1",
    }
    assert "'more.safetensors'" in found.faults["shards/1"]
    assert "leads out" in found.faults["out/1"] and "'scale.py'" in found.faults["weights/1"]
    same = {each.folder: each.fingerprint for each in found.found}
    assert same["alias/1"] == same["digits/1"] == same["inside/1"]


def test_a_path_is_walked_below_the_folder_whatever_it_says(
    repository: Repository, tmp_path: Path
) -> None:
    (tmp_path / "secret").write_text("secret")
    repository.scaled("digits/1", 2.0)
    with root_of(str(repository.path)) as root:
        for path in ("../secret", "digits/../../secret", "digits/1/../../../secret"):
            with pytest.raises(NotBelow):
                open_below(root, path)
        os.close(open_below(root, "digits/1/../1/./model.py"))
        with pytest.raises(NotBelow):
            open_below(root, "digits/1/model.py/x")
        os.mkfifo(repository.path / "pipe")
        with pytest.raises(NotBelow):  # and does not wait for a writer
            open_below(root, "pipe")
        (repository.path / "zero").symlink_to("/dev/zero")
        with pytest.raises(NotBelow):
            open_below(root, "zero")
        with pytest.raises(InvalidConfig):
            read_below(root, "digits/1/model.py", most_bytes=10)


def test_no_descriptor_is_left_open(repository: Repository) -> None:
    repository.scaled("digits/1", 2.0)
    (repository.path / "digits" / "2").symlink_to("../../x")
    before = len([*Path("/proc/self/fd").iterdir()])
    for _ in range(3):
        look(repository)
    assert len([*Path("/proc/self/fd").iterdir()]) == before


# --------------------------------------------------------------------------------------- kinds


def test_each_kind_is_known_by_its_files(repository: Repository) -> None:
    repository.add("net/1", {"model.pt2": b"", "labels.txt": "one"})
    assert source(repository, "net/1").pt2.endswith("/net/1/model.pt2")
    repository.add("net/2", {"model.pt2": b"", "model.toml": '[model]\ndtype = "float16"\n'})
    assert source(repository, "net/2").dtype == "float16"
    repository.scaled("net/3", 1.0)
    scaled = source(repository, "net/3")
    assert (scaled.name, scaled.factory, scaled.input_shape) == ("net:3", "model:make", (4,))
    texts = {"max_position_embeddings": 256}
    repository.add("net/4", {"model.safetensors": b"", "config.json": json.dumps(texts)})
    text = source(repository, "net/4")
    assert [each.name for each in text.inputs] == ["input_ids", "attention_mask"]
    assert text.inputs[0].shape == (VARIES,) and text.lengths == (32, 128)
    gpt2 = json.dumps({"n_positions": 64})
    repository.add("net/9", {"model.safetensors": b"", "config.json": gpt2})
    assert source(repository, "net/9").lengths == (32,)
    images = {"image_size": 32, "num_channels": 1}
    repository.add("net/5", {"model.safetensors": b"", "config.json": json.dumps(images)})
    assert source(repository, "net/5").input_shape == (1, 32, 32)
    repository.add("net/8", SHARDED)
    sharded = source(repository, "net/8")
    assert sharded.safetensors.endswith("/net/8/model.safetensors.index.json")
    assert sharded.config.endswith("/net/8/config.json")
    own = "[model]\nlengths = [16]\n[model.inputs.input_ids]\nshape = [-1]\ndtype = 'int64'\n"
    repository.add("net/6", {**WEIGHTS, "model.toml": own})
    assert source(repository, "net/6").lengths == (16,)
    repository.add("net/7", {"model.safetensors": b"", "config.json": '{"image_size": [3, 3]}'})
    assert source(repository, "net/7").lengths == (32, 128, 512)


WEIGHTS: dict[str, str | bytes] = {"model.safetensors": b"", "config.json": "{}"}
SHARD = "model-00001-of-00001.safetensors"
INDEX = "model.safetensors.index.json"


def index(*files: str) -> str:
    return json.dumps({"weight_map": {f"w{number}": file for number, file in enumerate(files)}})


SHARDED: dict[str, str | bytes] = {SHARD: b"", INDEX: index(SHARD, SHARD), "config.json": "{}"}
FAULTS: dict[str, tuple[dict[str, str | bytes], str]] = {
    "nothing": ({}, "none of model.pt2"),
    "two kinds": ({"model.pt2": b"", **WEIGHTS}, "both model.pt2 and model.safetensors"),
    "no config": ({"model.safetensors": b""}, "needs config.json"),
    "index without config": ({SHARD: b"", INDEX: index(SHARD)}, "needs config.json"),
    "index and whole": ({**SHARDED, **WEIGHTS}, f"both model.safetensors and {INDEX}"),
    "index and pt2": ({**SHARDED, "model.pt2": b""}, f"both model.pt2 and {INDEX}"),
    "index of a file that is missing": (
        {**SHARDED, INDEX: index(SHARD, "x.safetensors")},
        "no such",
    ),
    "index that leads out": (
        {**SHARDED, INDEX: index("../../x.safetensors")},
        "beside it are read",
    ),
    "index with a path": ({**SHARDED, INDEX: index("/etc/x.safetensors")}, "beside it are read"),
    "index of another kind": ({**SHARDED, INDEX: index("config.json")}, "only .safetensors files"),
    "index of nothing": ({**SHARDED, INDEX: "{}"}, 'no "weight_map"'),
    "index of numbers": ({**SHARDED, INDEX: '{"weight_map": {"a": 1}}'}, "lists 1; only"),
    "index that is a list": ({**SHARDED, INDEX: "[]"}, 'no "weight_map"'),
    "index that is cut short": ({**SHARDED, INDEX: '{"weight_map": {'}, "not a JSON file"),
    "deep index": ({**SHARDED, INDEX: "[" * 100_000}, "not a JSON file"),
    "index that is not text": ({**SHARDED, INDEX: b"\xff"}, "not UTF-8"),
    "weight twice": (
        {**SHARDED, INDEX: f'{{"weight_map": {{"a": "{SHARD}", "a": "{SHARD}"}}}}'},
        "it has 'a' twice",
    ),
    "config is not JSON": ({**WEIGHTS, "config.json": "{"}, "not a JSON file"),
    "config is a list": ({**WEIGHTS, "config.json": "[]"}, "not a JSON object"),
    "deep JSON": ({**WEIGHTS, "config.json": "[" * 100_000}, "not a JSON file"),
    "no TOML": ({"model.toml": "x"}, "not a TOML file"),
    "not text": ({"model.toml": b"\x80"}, "not UTF-8"),
    "deep TOML": ({"model.toml": "x = " + "[" * 20_000}, "not a TOML file"),
    "huge": ({"model.toml": "#" * (MOST_TOML_BYTES + 1)}, "more than"),
    "no table": ({"model.toml": "x = 1"}, "one table, [model]"),
    "more tables": ({"model.toml": "[model]\n[other]"}, "one table, [model]"),
    "no factory": ({"model.toml": "[model]\ninput_shape = [4]"}, "alone needs factory"),
    "factory elsewhere": ({"model.toml": FACTORY_TOML.replace("model:", "os:")}, "no os.py"),
    "factory and pt2": (
        {"model.pt2": b"", "model.toml": FACTORY_TOML},
        "both model.pt2 and factory in model.toml",
    ),
    "cupy and weights": (
        {**WEIGHTS, "model.toml": FACTORY_TOML.replace("factory", "cupy")},
        "both model.safetensors and cupy in model.toml",
    ),
    "cupy and a factory": (
        {"model.py": "", "model.toml": f'{FACTORY_TOML}cupy = "model:make"'},
        "both factory in model.toml and cupy in model.toml",
    ),
    "cupy elsewhere": (
        {"model.toml": FACTORY_TOML.replace("factory", "cupy").replace("model:", "os:")},
        "cupy 'os:make': there is no os.py",
    ),
    "cupy with lengths": (
        {"model.py": "", "model.toml": '[model]\ncupy = "model:make"\nlengths = [4]'},
        "a cupy model takes one array",
    ),
    "path": ({"model.toml": '[model]\npt2 = "/etc/passwd"'}, "fixed names"),
    "folder": ({"model.toml": '[model]\ntransformers = ".."'}, "fixed names"),
    "bad key": ({"model.pt2": b"", "model.toml": "[model]\ndytpe = 1"}, "dtype"),
    "bad shape": (
        {"model.py": "", "model.toml": FACTORY_TOML.replace("[4]", "[0]")},
        "input_shape must be",
    ),
}


@pytest.mark.parametrize("what", FAULTS)
def test_each_fault_is_said(repository: Repository, what: str) -> None:
    files, words = FAULTS[what]
    repository.add("net/1", files)
    reason = fault(repository, "net/1")
    assert words in reason and str(repository.path) not in reason and "models.NAME" not in reason


# ------------------------------------------------------------------------------------ settling


def named(folder: str, fingerprint: str = "a", changed_ns: int = 0) -> Found:
    return Found(folder, fingerprint, changed_ns, frozenset())


def names(listing: Listing | None) -> list[str]:
    assert listing is not None
    return [version.name for version in listing.versions]


def looks(describe: Callable[[Found], ModelSource] | None = None) -> Looks:
    return Looks(describe or (lambda found: ModelSource(found.folder)))


def test_a_version_counts_once_its_files_rest() -> None:
    taken = looks()
    first = taken.take(Look([named("old/1"), named("new/1", changed_ns=T0 - 1)]), now_ns=T0)
    assert names(first) == ["old:1"]
    both = Look([named("old/1"), named("new/1", "a")])
    assert taken.take(both, now_ns=T0 + 1) is None
    written = Look([named("old/1"), named("new/1", "b")])
    assert taken.take(written, now_ns=T0 + SETTLED_NS - 1) is None
    assert taken.take(written, now_ns=T0 + 2 * SETTLED_NS - 2) is None
    assert names(taken.take(written, now_ns=T0 + 2 * SETTLED_NS)) == ["new:1", "old:1"]
    assert taken.take(written, now_ns=T0 + 9 * SETTLED_NS) is None
    assert names(taken.take(Look([named("new/1", "b")]), now_ns=T0 + 10 * SETTLED_NS)) == ["new:1"]


def test_a_changed_version_is_offered_as_it_was_until_it_rests() -> None:
    taken = looks()
    taken.take(Look([named("net/1", "a")]), now_ns=T0)
    changed = Look([named("net/1", "b")])
    assert taken.take(changed, now_ns=T0 + 1) is None
    later = taken.take(changed, now_ns=T0 + 1 + SETTLED_NS)
    assert later is not None and later.versions[0].fingerprint == "b"


def test_what_could_not_be_read_is_tried_again() -> None:
    tries: list[str] = []

    def describe(found: Found) -> ModelSource:
        tries.append(found.folder)
        if len(tries) == 1:
            raise PermissionError(13, "Permission denied")
        return ModelSource("net")

    taken = looks(describe)
    there = Look([named("net/1")])
    first = taken.take(there, now_ns=T0)
    assert first is not None and first.left_out == (("net:1", "permission denied"),)
    assert taken.take(there, now_ns=T0 + SETTLED_NS) is None and len(tries) == 1
    assert names(taken.take(there, now_ns=T0 + 10 * SETTLED_NS)) == ["net:1"]


def test_a_fault_is_said_once_it_stays_and_taken_back() -> None:
    taken = looks()
    bad = Look([], {"net": "it has no version"})
    assert taken.take(Look(), now_ns=T0) == Listing()
    assert taken.take(bad, now_ns=T0 + 1) is None
    said = taken.take(bad, now_ns=T0 + 1 + SETTLED_NS)
    assert said is not None and said.left_out == (("net", "it has no version"),)
    assert taken.take(Look(), now_ns=T0 + 2 + SETTLED_NS) == Listing()


def test_a_repository_that_cannot_be_read_still_offers_what_it_did() -> None:
    taken = looks()
    taken.take(Look([named("net/1")]), now_ns=T0)
    gone = taken.unreadable("it is not there")
    assert gone is not None and names(gone) == ["net:1"]
    assert gone.left_out == ((".", "it is not there"),)
    assert taken.unreadable("it is not there") is None
    back = taken.take(Look([named("net/1")]), now_ns=T0 + 1)
    assert back is not None and not back.left_out


# -------------------------------------------------------------------------------------- bounds


def version(name: str) -> Version:
    return Version(name, name.replace(":", "/"), packed(ModelSource(name)), "a")


def test_a_workers_own_models_keep_their_names() -> None:
    listing = Listing((version("net:1"), version("resnet50:1"), version("resnet50_v2:1")))
    found = offered(listing, ("resnet50", "other:1"))
    assert names(found) == ["net:1"]
    assert [name for name, _ in found.left_out] == ["resnet50", "resnet50_v2"]
    assert "of its own" in found.left_out[0][1]


def test_models_of_cupy_are_left_out_where_they_cannot_run(repository: Repository) -> None:
    repository.scaled("net/1", 2.0)
    toml = FACTORY_TOML.replace("factory", "cupy")
    repository.add("net/2", {"model.py": "", "model.toml": toml})
    taken = Looks(lambda found: describe(repository, found)).take(
        look(repository), now_ns=2 * 10**18
    )
    assert taken is not None and names(taken) == ["net:2", "net:1"]
    assert taken.versions[0].model_source().cupy == "model:make"
    assert names(offered(taken, ())) == ["net:2", "net:1"]
    found = offered(taken, (), "it needs a GPU")
    assert names(found) == ["net:1"] and found.left_out == (("net:2", "it needs a GPU"),)


def test_the_newest_versions_are_offered_where_there_are_too_many() -> None:
    every: list[Version] = [version("net:1"), version("net:2"), version("net:10")]
    every += [version(f"m{number}:1") for number in range(MOST_VERSIONS - 2)]
    found = offered(Listing(tuple(newest_first(every))), ())
    assert len(found.versions) == MOST_VERSIONS
    assert {"net:10", "net:2"} <= set(names(found)) and "net:1" not in names(found)
    assert found.left_out[0][0] == "*" and found.left_out[0][1].startswith("1 of the older")
    long = tuple(version(f"{number:0200}:1") for number in range(1_000))
    kept = offered(Listing(long), ()).versions
    assert 0 < sum(len(each.name) for each in kept) <= MOST_NAME_BYTES


def test_reasons_are_bounded_in_number_and_length() -> None:
    many: Any = tuple((f"m{number}:1", "x" * 5_000) for number in range(500))
    left_out = offered(Listing((), many), ()).left_out
    assert len(left_out) == MOST_PUT_ASIDE and left_out[-1] == ("...", "and 437 more")
    assert all(len(reason) <= PUT_ASIDE_CHARS for _, reason in left_out)
