"""Models of torchvision and timm by name; the libraries themselves are stood in for."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from slosched.cli.ask import _loadable_text
from slosched.config import ModelSource, WorkerConfig
from slosched.errors import InvalidConfig, MissingPackage, UnknownName, known_names

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from slosched.daemon.backends import reference_forward, sources  # noqa: E402
from slosched.daemon.backends.sources import open_specs, source_spec, worker_specs  # noqa: E402
from slosched.daemon.backends.templates import DeviceWeights, Template  # noqa: E402
from slosched.daemon.backends.zoo import ZOO  # noqa: E402
from template_answers import answer, sample  # noqa: E402

pytestmark = pytest.mark.torch


def network(pixels: int) -> Any:
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(1),
        torch.nn.Linear(4, pixels),
    )


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Puts a torchvision and a timm into sys.modules; the names of what they built."""
    built: list[str] = []

    def build(name: str) -> Any:
        built.append(name)
        return network(7)

    torchvision, models, timm = (
        ModuleType(name) for name in ("torchvision", "torchvision.models", "timm")
    )
    vars(torchvision).update(models=models)
    vars(models).update(
        list_models=lambda module: ["resnet50", "vit_b_16"] if module is models else ["fcn"],
        get_model=build,
    )
    sizes = {"eva_giant": (3, 336, 336), "resnet10t": (3, 176, 176)}
    vars(timm).update(
        list_models=lambda: [*sizes, "test_vit"],
        get_pretrained_cfg=lambda name: (
            SimpleNamespace(input_size=sizes[name]) if name in sizes else None
        ),
        create_model=build,
    )
    for module in (torchvision, models, timm):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return built


def test_a_named_library_offers_its_classifiers_and_builds_none(made: list[str]) -> None:
    specs = worker_specs(WorkerConfig(libraries=("torchvision", "timm")))
    assert {name: spec.input_shape for name, spec in specs.items() if name not in ZOO} == {
        "torchvision/resnet50": (3, 224, 224),
        "torchvision/vit_b_16": (3, 224, 224),
        "timm/eva_giant": (3, 336, 336),
        "timm/resnet10t": (3, 176, 176),
        "timm/test_vit": (3, 224, 224),
    }
    assert made == [] and specs["timm/test_vit"].random_weights
    assert set(worker_specs(WorkerConfig())) == set(ZOO)


def test_a_librarys_model_has_the_same_weights_each_time_and_the_workers_format(
    made: list[str],
) -> None:
    config = WorkerConfig(libraries=("timm",), dtype="bfloat16", channels_last=True)
    spec = worker_specs(config)["timm/resnet10t"]
    assert spec.labels == ("image", "bfloat16", "channels_last")
    first, second = Template(spec), Template(spec)
    assert torch.equal(first.host, second.host) and made == ["resnet10t"] * 2
    assert not first.host.eq(0).all()
    weights = DeviceWeights(first.host)
    while not first.add_views(weights):
        pass
    output = answer(first, weights, torch.from_numpy(sample(first, 2)))
    assert (output.shape, output.dtype) == ((2, 7), torch.float32)
    reference = reference_forward("timm/resnet10t", sample(first, 2))
    assert 0 < np.abs(output.numpy() - reference).max() < 1e-2


def test_one_model_may_be_named_without_the_rest_and_with_a_shape_of_its_own(
    made: list[str],
) -> None:
    spec = source_spec(ModelSource("timm/eva_giant", dtype="float16"))
    assert (spec.input_shape, spec.labels) == ((3, 336, 336), ("image", "float16"))
    small = ModelSource("timm/eva_giant", input_shape=(3, 64, 64))
    assert source_spec(small).input_shape == (3, 64, 64)
    assert set(worker_specs(WorkerConfig(models=(small,)))) == {*ZOO, "timm/eva_giant"}
    for name in ("timm/resnet10", "timm/hf-hub:someone/something"):
        with pytest.raises(UnknownName, match=r"unknown model of timm .*timm/resnet10t"):
            source_spec(ModelSource(name))
    assert made == []


def test_a_library_that_is_not_there_ends_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(MissingPackage, match=r"models of timm need it.*not installed.*pip install"):
        open_specs(WorkerConfig(libraries=("timm",)))


def test_a_library_for_another_torch_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('operator nms does not exist')")
    for name in ("torchvision", "torchvision.models"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(MissingPackage, match=r"does not fit this torch .operator nms"):
        open_specs(WorkerConfig(libraries=("torchvision",)))


def test_without_transformers_a_worker_offers_what_is_left(
    made: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> None:
        raise MissingPackage("no transformers")

    monkeypatch.setattr(sources, "import_zoo", missing)
    own = ModelSource("resnet50", factory="test_zoo:tiny_net", input_shape=(4,))
    assert set(open_specs(WorkerConfig(models=(own,)))) == {"resnet50"}
    assert "timm/resnet10t" in open_specs(WorkerConfig(libraries=("timm",)))
    for config in (WorkerConfig(), WorkerConfig(models=(own, ModelSource("resnet18")))):
        with pytest.raises(MissingPackage, match="no transformers"):
            open_specs(config)


def test_a_long_list_of_names_is_never_said_whole() -> None:
    known = [f"timm/model_{number}" for number in range(1300)] + list(ZOO)
    for name, nearest in (
        ("timm/model_77", "timm/model_77"),
        ("model_9", "timm/model_9"),
        ("resnt50", "resnet50"),
        ("RESNET", "and 1,3"),
        ("", "and 1,3"),
    ):
        text = known_names(name, known)
        assert nearest in text and len(text) < 250, text
        assert text.count(",") <= 8
    assert known_names("a", ["c", "b"]) == "b, c" and known_names("a", []) == "none"
    with pytest.raises(InvalidConfig, match=r"unknown model .resnt50.; known: resnet50.* more"):
        raise UnknownName("model", "resnt50", known)
    listed = _loadable_text([*known, "torchvision/vit_b_16"])
    assert listed.startswith("resnet18, ") and listed.count(",") < 20
    assert listed.endswith("torchvision/vit_b_16, timm/... (1,300; --json lists them)")
    assert _loadable_text(["resnet50"]) == "resnet50" and _loadable_text([]) == ""


@pytest.mark.parametrize("count", [3, 1300])
def test_a_long_name_is_compared_with_nothing_and_not_repeated(
    count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[tuple[str, list[str]]] = []

    def matches(word: str, words: list[str], n: int) -> list[str]:
        compared.append((word, words))
        return []

    monkeypatch.setattr("slosched.errors.get_close_matches", matches)
    known = [f"model{number}" for number in range(count)] + ["x" * 100_000]
    text = str(UnknownName("model", "m" * 10_000_000, known))
    assert len(text) < 2_000 and "(10,000,000 characters)" in text and not compared
    assert len(known_names("modl7", known)) < 2_000
    assert all(len(word) <= 200 for _, words in compared for word in words)
