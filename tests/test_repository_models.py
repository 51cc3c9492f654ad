"""Versions of a repository on the CPU's backend: each kind answers, and each from its own files."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from cpu_rig import CpuRig  # noqa: E402
from repository_rig import FACTORY, FACTORY_TOML, Repository  # noqa: E402
from slosched.codes import Code  # noqa: E402
from slosched.config import WorkerConfig  # noqa: E402
from slosched.core.worker.interface import ModelPrepared, OpKind  # noqa: E402
from slosched.daemon.backends.sources import source_spec  # noqa: E402
from slosched.daemon.profiler import Profiler  # noqa: E402
from slosched.daemon.repository.beneath import read_below, root_of  # noqa: E402
from slosched.daemon.repository.describing import described, name_of  # noqa: E402
from slosched.daemon.repository.listing import Version, packed  # noqa: E402
from slosched.daemon.repository.modules import Packages  # noqa: E402
from slosched.daemon.repository.opened import opened  # noqa: E402
from slosched.daemon.repository.scanning import look_at_version  # noqa: E402
from slosched.errors import InvalidConfig  # noqa: E402

pytestmark = pytest.mark.torch
ROW = np.arange(4, dtype=np.float32)


def version_of(repository: Repository, folder: str) -> Version:
    """The version at `folder`, as a look describes it."""

    def read(file: str, most_bytes: int) -> bytes:
        with root_of(str(repository.path)) as root:
            return read_below(root, f"{folder}/{file}", most_bytes=most_bytes)

    with root_of(str(repository.path)) as root:
        found = look_at_version(root, folder)
    source = described(found, repository.path / folder, read)
    return Version(name_of(folder), folder, packed(source), found.fingerprint)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[CpuRig, Repository]]:
    """One backend for all tests of this file: torch is imported once. The zoo is not in it."""
    repository = Repository(tmp_path_factory.mktemp("repository"))
    with CpuRig((), repository=str(repository.path)) as rig:
        yield rig, repository


def offer(rig: CpuRig, repository: Repository, *folders: str) -> None:
    rig.backend.offer([version_of(repository, folder) for folder in folders])


def prepared(rig: CpuRig, name: str, model_id: int = 0) -> ModelPrepared:
    found = rig.prepare(name, max_batch=1)
    assert found.profile is not None, found.reason
    assert rig.load(name, model_id).code == 0
    return found


def answer(rig: CpuRig, name: str, model_id: int = 0) -> Any:
    done, answers = rig.infer(name, [ROW], model_id)
    assert not done.code, done.reason
    return answers[0]


def test_two_models_with_the_same_modules_do_not_meet(served: tuple[CpuRig, Repository]) -> None:
    rig, repository = served
    repository.scaled("double/1", 2.0)
    repository.scaled("triple/1", 3.0)
    repository.scaled("copy/1", 3.0)
    offer(rig, repository, "double/1", "triple/1", "copy/1")
    digests: list[str] = []
    for model_id, (name, factor) in enumerate((("double:1", 2), ("triple:1", 3), ("copy:1", 3))):
        digests.append(prepared(rig, name, model_id).digest)
        assert np.array_equal(answer(rig, name, model_id), ROW * factor)

    assert digests[0] != digests[1] == digests[2] and len(digests[0]) == 64


def test_a_changed_version_is_as_it_was_until_it_is_unloaded(
    served: tuple[CpuRig, Repository],
) -> None:
    rig, repository = served
    place = repository.scaled("changing/1", 2.0)
    offer(rig, repository, "changing/1")
    prepared(rig, "changing:1", 5)
    (place / "scale.py").write_text("FACTOR = 7.0\n")
    assert np.array_equal(answer(rig, "changing:1", 5), ROW * 2)
    offer(rig, repository, "changing/1")
    prepared(rig, "changing:1", 6)  # another copy shares the process
    assert np.array_equal(answer(rig, "changing:1", 6), ROW * 2)
    rig.release("changing:1")
    prepared(rig, "changing:1", 7)
    assert np.array_equal(answer(rig, "changing:1", 7), ROW * 7)


def test_a_process_that_ends_is_not_built_of_other_files(
    served: tuple[CpuRig, Repository],
) -> None:
    rig, repository = served
    place = repository.scaled("ending/1", 2.0)
    offer(rig, repository, "ending/1")
    prepared(rig, "ending:1", 8)
    (place / "scale.py").write_text("FACTOR = 7.0\n")
    process = rig.backend._processes.by_name["ending:1"]
    process.child.kill("the test ends it")
    words = "cannot be started again"
    for _ in range(200):
        rig.poll()
        if any(words in line for line in rig.said):
            break
    [line] = [line for line in rig.said if words in line][:1]
    assert "not those that it was offered or loaded with" in line
    assert rig.run(OpKind.LOAD_WEIGHTS, "ending:1", 8).code
    rig.release("ending:1")
    offer(rig, repository, "ending/1")
    prepared(rig, "ending:1", 9)
    assert np.array_equal(answer(rig, "ending:1", 9), ROW * 7)


def rewrite_unnoticed(file: Path, text: str) -> None:
    """Other content of the same length, with the times of before, in the same file."""
    status = file.stat()
    assert status.st_size == len(text)
    file.write_text(text)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_other_contents_are_noticed_when_a_process_is_built_again(
    served: tuple[CpuRig, Repository],
) -> None:
    rig, repository = served
    place = repository.scaled("sly/1", 2.0)
    offer(rig, repository, "sly/1")
    first = prepared(rig, "sly:1", 30)
    rewrite_unnoticed(place / "scale.py", "FACTOR = 7.0\n")
    rig.backend._processes.by_name["sly:1"].child.kill("the test ends it")
    words = "sly:1: it cannot be started again"
    for _ in range(200):
        rig.poll()
        if any(words in line for line in rig.said):
            break
    [line] = [line for line in rig.said if words in line][:1]
    assert "not those that it was offered or loaded with" in line
    assert rig.run(OpKind.LOAD_WEIGHTS, "sly:1", 30).code
    rig.release("sly:1")
    second = prepared(rig, "sly:1", 31)
    assert second.digest != first.digest
    assert np.array_equal(answer(rig, "sly:1", 31), ROW * 7)


def test_what_is_offered_no_more_serves_until_it_is_unloaded(
    served: tuple[CpuRig, Repository],
) -> None:
    rig, repository = served
    repository.scaled("going/1", 2.0)
    offer(rig, repository, "going/1")
    prepared(rig, "going:1", 10)
    repository.remove("going/1")
    rig.backend.offer(())
    assert np.array_equal(answer(rig, "going:1", 10), ROW * 2)


def test_a_pt2_file_answers_as_its_module_does(
    served: tuple[CpuRig, Repository], tmp_path: Path
) -> None:
    rig, repository = served
    linear = torch.nn.Linear(4, 2).eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(linear, (torch.zeros(2, 4),), dynamic_shapes=({0: batch},))
    torch.export.save(program, tmp_path / "model.pt2")
    repository.add("linear/3", {"model.pt2": (tmp_path / "model.pt2").read_bytes()})
    offer(rig, repository, "linear/3")
    prepared(rig, "linear:3", 11)
    with torch.no_grad():
        expected = linear(torch.from_numpy(ROW)[None])[0].numpy()
    assert np.allclose(answer(rig, "linear:3", 11), expected, atol=1e-6)


def test_a_copy_that_is_complete_later_is_built_then(
    served: tuple[CpuRig, Repository],
) -> None:
    rig, repository = served
    place = repository.scaled("slow/1", 2.0)
    (place / "scale.py").unlink()
    code, reason = failure(rig, repository, "slow/1")
    assert code == Code.INVALID_MODEL_PATH and "scale" in reason
    (place / "scale.py").write_text("FACTOR = 4.0\n")
    offer(rig, repository, "slow/1")
    prepared(rig, "slow:1", 20)
    assert np.array_equal(answer(rig, "slow:1", 20), ROW * 4)


@pytest.mark.parametrize("shards", [0, 8])
def test_a_checkpoint_answers_as_it_was_saved(
    served: tuple[CpuRig, Repository], tmp_path: Path, shards: int
) -> None:
    transformers = pytest.importorskip("transformers")
    rig, repository = served
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=8,
        patch_size=4,
        num_channels=1,
        num_labels=3,
    )
    torch.manual_seed(0)
    model = transformers.ViTForImageClassification(config).eval()
    model.save_pretrained(tmp_path, **({"max_shard_size": "1KB"} if shards else {}))
    files = {each.name: each.read_bytes() for each in tmp_path.iterdir()}
    assert sum(name.startswith("model-") for name in files) >= shards
    folder = f"vit/{shards + 1}"
    name, model_id = name_of(folder), 12 + shards
    repository.add(folder, dict(files))
    offer(rig, repository, folder)
    prepared(rig, name, model_id)
    image = np.linspace(0, 1, 64, dtype=np.float32).reshape(1, 8, 8)
    done, answers = rig.infer(name, [image], model_id)
    assert not done.code, done.reason
    with torch.no_grad():
        expected = model(torch.from_numpy(image)[None]).logits[0].numpy()
    assert np.allclose(answers[0], expected, atol=1e-5)


def failure(rig: CpuRig, repository: Repository, folder: str) -> tuple[int, str]:
    offer(rig, repository, folder)
    found = rig.prepare(name_of(folder))
    assert found.profile is None
    return found.code, found.reason


def test_errors_name_the_versions_own_files(served: tuple[CpuRig, Repository]) -> None:
    rig, repository = served
    repository.add("broken/1", {"model.pt2": b"nonsense"})
    code, reason = failure(rig, repository, "broken/1")
    assert code == Code.INVALID_MODEL_PATH and "broken/1/model.pt2 is not an exported" in reason
    assert "/proc" not in reason
    config = json.dumps({"model_type": "bert"})
    repository.add("broken/2", {"model.safetensors": b"x", "config.json": config})
    code, reason = failure(rig, repository, "broken/2")
    assert code == Code.INVALID_MODEL_PATH and "broken/2/" in reason and "/proc" not in reason
    index = json.dumps({"weight_map": {"a": "a.safetensors", "b": "b.safetensors"}})
    shards: dict[str, str | bytes] = {
        "a.safetensors": b"x",
        "b.safetensors": b"x",
        "model.safetensors.index.json": index,
    }
    repository.add("broken/4", {**shards, "config.json": config})
    code, reason = failure(rig, repository, "broken/4")
    assert code == Code.INVALID_MODEL_PATH and "broken/4/a.safetensors is not a whole" in reason
    assert "/proc" not in reason
    absolute = FACTORY.replace("from . import scale", "import scale")
    files = {"model.toml": FACTORY_TOML, "model.py": absolute, "scale.py": "FACTOR = 1.0"}
    repository.add("broken/3", dict(files))
    code, reason = failure(rig, repository, "broken/3")
    assert "write from . import scale" in reason and "_slosched_" not in reason


def test_a_file_that_is_replaced_after_the_look_is_not_built(
    served: tuple[CpuRig, Repository],
) -> None:
    rig, repository = served
    place = repository.scaled("late/1", 2.0)
    offer(rig, repository, "late/1")
    (place / "scale.py").unlink()
    (place / "scale.py").symlink_to("/etc/passwd")
    found = rig.prepare("late:1")
    assert found.profile is None and found.code == Code.INVALID_MODEL_PATH
    assert "absolute path" in found.reason


def test_versions_are_measured_for_a_profile(tmp_path: Path) -> None:
    repository = Repository(tmp_path)
    repository.scaled("net/1", 2.0)
    repository.scaled("net/2", 3.0)
    repository.add("net/3", {"model.toml": "nonsense"})
    repository.add("out/1", {"model.toml": "nonsense"})
    config = WorkerConfig(device="cpu", repository=str(repository.path))
    with Profiler(config) as profiler:
        assert "net:1" not in profiler.names
        assert [profiler.canonical(name) for name in ("net", "net:1")] == ["net:2", "net:1"]
        for name in ("out", "net:3"):
            with pytest.raises(InvalidConfig, match=r"is left out: model\.toml is not a TOML"):
                profiler.canonical(name)
        measured = profiler.measure("net:1", [1])
    assert measured.name == "net:1" and measured.exec_ns[1] > 0
    assert measured.takes[0].shape == (4,)


# ---------------------------------------------------------- the same in one process, as on a GPU


def build(repository: Repository, version: Version, packages: Packages) -> Any:
    with opened(str(repository.path), version, packages) as found:
        return source_spec(found.source).build()


def test_modules_of_one_process_are_apart_and_go_with_their_version(tmp_path: Path) -> None:
    repository, packages = Repository(tmp_path), Packages()
    before = set(sys.modules)
    repository.scaled("one/1", 2.0)
    place = repository.scaled("two/1", 3.0)
    one, two = (build(repository, version_of(repository, f), packages) for f in ("one/1", "two/1"))
    row = torch.ones(1, 4)
    assert (one(row)[0, 0].item(), two(row)[0, 0].item()) == (2.0, 3.0)
    module = sys.modules[type(two).__module__]
    assert module.__file__ == str(place / "model.py") and "model" not in sys.modules
    assert module.__spec__ is not None and module.scale.FACTOR == 3.0
    (place / "scale.py").write_text("FACTOR = 5.0")
    again = build(repository, version_of(repository, "two/1"), packages)
    assert again(row)[0, 0].item() == 5.0 and two(row)[0, 0].item() == 3.0
    assert module.__name__ not in sys.modules
    packages.drop("one:1")
    packages.drop("two:1")
    left = set(sys.modules) - before
    assert not [name for name in left if name.startswith("_slosched_repository_")]


def test_a_package_of_modules_and_a_traceback_with_its_lines(tmp_path: Path) -> None:
    repository, packages = Repository(tmp_path), Packages()
    files = {
        "model.toml": FACTORY_TOML.replace("model:make", "nets.small:make"),
        "nets/__init__.py": "",
        "nets/small.py": "from .parts.base import Base\n\ndef make():\n    return Base()\n",
        "nets/parts/base.py": "raise ValueError('its words')\n",
    }
    repository.add("deep/1", dict(files))
    with pytest.raises(InvalidConfig) as caught:
        build(repository, version_of(repository, "deep/1"), packages)
    assert "'nets.small:make' cannot be imported (ValueError: its words)" in str(caught.value)


def test_packages_of_two_objects_in_one_process_are_apart(tmp_path: Path) -> None:
    repository = Repository(tmp_path)
    repository.scaled("one/1", 2.0)
    repository.scaled("two/1", 3.0)
    one, two = (
        build(repository, version_of(repository, folder), Packages())
        for folder in ("one/1", "two/1")
    )
    assert one(torch.ones(1, 4)).tolist() != two(torch.ones(1, 4)).tolist()


def test_nothing_stays_open_and_nothing_is_written(tmp_path: Path) -> None:
    repository, packages = Repository(tmp_path), Packages()
    repository.scaled("one/1", 2.0)
    repository.add("two/1", {"model.pt2": b"nonsense"})
    before = len([*Path("/proc/self/fd").iterdir()])
    build(repository, version_of(repository, "one/1"), packages)
    with pytest.raises(InvalidConfig):
        build(repository, version_of(repository, "two/1"), packages)
    assert len([*Path("/proc/self/fd").iterdir()]) == before
    assert not [*repository.path.rglob("__pycache__")]
