"""The profile zoo61: what the rule makes, and its spread."""

from __future__ import annotations

import importlib.util
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import pytest
from typer.testing import CliRunner

from slosched.cli.app import app
from slosched.config_file import builtin_profiles, load_profile
from slosched.workloads.zoo import profile_hint, zoo_models

ROOT = Path(__file__).parent.parent


def recipe() -> ModuleType:
    spec = importlib.util.spec_from_file_location("zoo61_recipe", ROOT / "analysis" / "zoo61.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_committed_profile_is_what_the_rule_gives() -> None:
    committed = ROOT / "src" / "slosched" / "profiles" / "zoo61.toml"
    assert committed.read_text(encoding="utf-8") == recipe().zoo61()


def test_it_is_a_profile_by_name_with_61_models() -> None:
    assert "zoo61" in builtin_profiles()
    zoo = load_profile("zoo61")
    assert len(zoo.models) == 61 and tuple(sorted(zoo.models)) == zoo_models()
    v100 = load_profile("v100")
    assert zoo.model("resnet50_v2") == v100.model("resnet50_v2")
    assert (zoo.weights_cache_bytes, zoo.page_bytes) == (v100.weights_cache_bytes, v100.page_bytes)


def test_its_spread_is_that_of_the_published_zoo() -> None:
    models = load_profile("zoo61").models.values()
    first = [model.exec_ns[1] for model in models]
    assert min(first) < 1_000_000 and 12_000_000 < max(first) < 20_000_000
    weights = [model.weights_bytes for model in models]
    assert min(weights) < 6_000_000 and 540_000_000 < max(weights) < 560_000_000
    for model in models:
        assert list(model.exec_ns) == [1, 2, 4, 8, 16]
        assert all(a < b for a, b in pairwise(model.exec_ns.values()))
        # Batching always pays, and never for nothing.
        assert 4 < model.exec_ns[16] / model.exec_ns[1] < 11
        assert model.weights_bytes / model.weights_ns == pytest.approx(12.264, rel=1e-3)


def test_an_unknown_model_of_zoo61_names_the_profile_that_has_it(tmp_path: Path) -> None:
    result = CliRunner().invoke(
        app, ["simulate", "INFER5", "example", "--duration", "1s", "--out", str(tmp_path / "run")]
    )
    assert result.exit_code == 2
    assert "no worker offers " in result.stderr and "--profile zoo61" in result.stderr
    assert profile_hint("resnet_of_mine") == ""
