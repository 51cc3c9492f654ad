"""A version whose model.toml names a factory for CuPy, as a GPU's worker builds it, with stand-ins for CuPy."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from repository_rig import FACTORY_TOML, Repository  # noqa: E402
from slosched.config import WorkerConfig  # noqa: E402
from slosched.errors import InvalidConfig  # noqa: E402
from test_repository_models import version_of  # noqa: E402

pytestmark = pytest.mark.torch

CUDA = "slosched.daemon.backends.cuda"
MODEL = """
import numpy as np
from slosched.daemon.backends.cuda.cupy_program import CupyModel
from . import scale

def run(weights, batch):
    return batch * weights["factor"]

def make():
    return CupyModel({"factor": np.float32([scale.FACTOR])}, run, (4,))

def other():
    return 7
"""


@dataclass(frozen=True)
class FakeModel:
    weights: dict[str, Any]
    run: Callable[..., Any]
    input_shape: tuple[int, ...]
    input_dtype: str = "float32"
    random_weights: bool = True


class FakeProgram:
    def __init__(self, name: str, model: FakeModel, *rest: Any) -> None:
        self.name, self.model = name, model

    def image(self) -> Any:
        return np.concatenate([each.view(np.uint8) for each in self.model.weights.values()])


@pytest.fixture
def models(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """cuda/models.py on stand-ins for NVIDIA's bindings and CuPy; nothing of it is left behind."""
    package: Any = importlib.import_module(CUDA)
    modules, attributes = dict(sys.modules), dict(vars(package))
    contents: dict[str, dict[str, Any]] = {
        "bindings": {"CudaDriver": object},
        "cupy_program": {"CupyModel": FakeModel, "CupyProgram": FakeProgram},
        "cupy_zoo": {"CUPY_ZOO": {}},
        "torch_program": {"TorchProgram": object, "TorchStreams": object},
    }
    for name, content in contents.items():
        module = ModuleType(f"{CUDA}.{name}")
        vars(module).update(content)
        sys.modules[module.__name__] = module
    sys.modules.pop(f"{CUDA}.models", None)
    found = importlib.import_module(f"{CUDA}.models")
    monkeypatch.setattr(found, "find_spec", lambda name: object())
    monkeypatch.setattr(found, "open_specs", lambda config: {})
    yield found
    for name in [name for name in sys.modules if name.startswith(f"{CUDA}.")]:
        del sys.modules[name]
    sys.modules.update({n: m for n, m in modules.items() if n.startswith(f"{CUDA}.")})
    for name in [name for name in vars(package) if name not in attributes]:
        delattr(package, name)
    vars(package).update(attributes)


@pytest.fixture
def gpu(models: Any, tmp_path: Path) -> tuple[Any, Repository]:
    """What a GPU's worker builds of, with a repository."""
    repository = Repository(tmp_path)
    config = WorkerConfig(device="cuda", repository=str(repository.path))
    return models.Models(config, None, SimpleNamespace(capture_stream=None)), repository


def built(made: Any, repository: Repository, folder: str) -> Any:
    version = version_of(repository, folder)
    made.versions[version.name] = version
    return made.build(version.name, None)


def add(repository: Repository, folder: str, factor: float, named: str = "model:make") -> None:
    toml = FACTORY_TOML.replace("factory", "cupy").replace("model:make", named)
    files = {"model.toml": toml, "model.py": MODEL, "scale.py": f"FACTOR = {factor}"}
    repository.add(folder, dict(files))


def test_each_version_is_built_of_its_own_files(gpu: tuple[Any, Repository]) -> None:
    made, repository = gpu
    assert not made.no_cupy
    add(repository, "double/1", 2.0)
    add(repository, "double/2", 3.0)
    for folder, factor in (("double/1", 2), ("double/2", 3)):
        source = built(made, repository, folder)
        assert source.weights.view(np.float32).tolist() == [factor]
        assert source.labels == ("cupy",) and source.model.takes[0].shape == (4,)
        assert source.program.model.run(source.program.model.weights, 5.0) == 5 * factor
    assert made.digests["double:1"] != made.digests["double:2"]


def test_a_factory_that_returns_something_else_is_named(gpu: tuple[Any, Repository]) -> None:
    made, repository = gpu
    add(repository, "net/1", 2.0, "model:other")
    with pytest.raises(InvalidConfig, match="'net:1': model:other returned a int, not a CupyModel"):
        built(made, repository, "net/1")


def test_a_worker_without_cupy_says_so(models: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "find_spec", lambda name: None)
    made = models.Models(WorkerConfig(device="cuda"), None, None)
    assert "needs cupy, which is not installed" in made.no_cupy
