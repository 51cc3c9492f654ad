"""The cascade of digits: its models, their shipped weights and their training, and what is measured of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("safetensors")

from slosched.cascade.digits import models, noise  # noqa: E402
from slosched.cascade.digits.files import HEAVY, LIGHT, WORKER_TEXT  # noqa: E402
from slosched.cascade.digits.served import one_thread  # noqa: E402
from slosched.config_file import load_worker_config  # noqa: E402
from slosched.daemon.backends.cpu.measuring import check_model  # noqa: E402
from slosched.daemon.backends.sources import source_spec  # noqa: E402
from slosched.daemon.backends.templates import Template  # noqa: E402
from slosched.errors import InvalidConfig  # noqa: E402
from slosched.signature import Tensor  # noqa: E402

pytestmark = pytest.mark.torch


@pytest.fixture(autouse=True, scope="module")
def threads() -> Iterator[None]:
    """Tests run beside others: more threads would wait for one another."""
    with one_thread():
        yield


WEIGHTS = Path(models.__file__).parent / "weights"


def inputs(count: int, first: int = 0) -> tuple[Any, Any]:
    place = torch.arange(count, dtype=torch.int64)[:, None]
    return place % 10, place + first


# ----------------------------------------------------------------------------------------- noise


def test_noise_is_normal_and_each_row_is_of_its_seed_alone() -> None:
    seeds = torch.arange(4000) * 7919 - 2000
    drawn = noise.normal(seeds, 64)
    assert drawn.shape == (4000, 64) and drawn.dtype == torch.float32
    assert abs(float(drawn.mean())) < 0.01 and abs(float(drawn.std()) - 1) < 0.01
    assert abs(float((drawn**4).mean()) - 3) < 0.06
    by_row = torch.corrcoef(drawn[:200]).fill_diagonal_(0)
    assert float(by_row.abs().max()) < 0.6
    order = torch.randperm(4000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(noise.normal(seeds[order], 64), drawn[order])


def test_noise_of_any_seed_is_finite_and_does_not_repeat() -> None:
    seeds = torch.tensor([0, -1, 1, 2**32, 2**32 + 1, 2**63 - 1, -(2**63)])
    drawn = noise.normal(seeds, 63)
    assert bool(torch.isfinite(drawn).all()) and drawn.shape == (7, 63)
    assert len({tuple(row) for row in drawn.tolist()}) == 7


def test_noise_stays_the_same_from_version_to_version() -> None:
    """Weights were learnt with this noise: another hash would make them useless."""
    first = noise.normal(torch.tensor([5]), 4)[0]
    assert first.tolist() == pytest.approx(FIRST_NOISE, abs=1e-5)


FIRST_NOISE = [0.29549313, -0.35052506, 0.78999841, 0.09735395]


# ---------------------------------------------------------------------------------------- models


def test_shipped_weights_are_those_that_the_manifest_lists() -> None:
    manifest = json.loads((WEIGHTS / "weights.json").read_text())
    assert manifest["recipe"]["seed"] == 0 and manifest["torch"] and manifest["script_version"] == 1
    files = {path.name for path in WEIGHTS.glob("*.safetensors")}
    assert files == set(manifest["files"]) and len(files) == 4
    for name, entry in manifest["files"].items():
        data = (WEIGHTS / name).read_bytes()
        assert hashlib.sha256(data).hexdigest() == entry["sha256"], name
        assert len(data) == entry["bytes"]
    assert sum(entry["bytes"] for entry in manifest["files"].values()) < 600_000


def test_the_manifest_is_of_the_recipe_that_is_the_default() -> None:
    pytest.importorskip("sklearn")
    from dataclasses import asdict

    from slosched.cascade.digits.training import SCRIPT_VERSION, Recipe

    manifest = json.loads((WEIGHTS / "weights.json").read_text())
    assert manifest["recipe"] == asdict(Recipe()) and manifest["script_version"] == SCRIPT_VERSION


def served_outputs(folder: Path) -> dict[str, tuple[Tensor, ...]]:
    """What a worker with the package's file finds that both programs answer with, after its checks."""
    path = folder / "worker.toml"
    path.write_text(WORKER_TEXT)
    sources = load_worker_config(path).models
    return {each.name: check_model(Template(source_spec(each))) for each in sources}


def test_both_programs_pass_the_checks_of_a_worker(tmp_path: Path) -> None:
    """Rows depend on their own inputs alone, and the score comes behind the answer."""
    answer, score = Tensor("answer", "float32", (1, 8, 8)), Tensor("score", "float32", ())
    assert served_outputs(tmp_path) == {LIGHT: (answer, score), HEAVY: (answer,)}


def test_parts_of_the_heavy_program_make_its_answer() -> None:
    heavy = models.heavy()
    label, seed = inputs(3)
    with torch.inference_mode():
        state = heavy.begin(label, seed)
        shapes = [(each.shape, each.dtype) for each in state]
        for _ in range(heavy.steps):
            before = [each.clone() for each in state]
            after = heavy.step(*state)
            assert all(torch.equal(a, b) for a, b in zip(before, state, strict=True))
            assert [(each.shape, each.dtype) for each in after] == shapes
            state = after
        in_parts = heavy.finish(*state)["answer"]
        whole = heavy(label, seed)["answer"]
        by_name = heavy(seed=seed, label=label)["answer"]
    assert torch.equal(in_parts, whole) and torch.equal(by_name, whole)
    assert state[2].tolist() == [heavy.steps] * 3 and whole.shape == (3, 1, 8, 8)
    assert float(whole.min()) >= 0 and float(whole.max()) <= 1


def test_light_and_heavy_draw_the_digit_that_was_asked_for_from_the_same_noise() -> None:
    from slosched.cascade.digits.served import Yardstick

    label, seed = inputs(60, first=10_000)
    with torch.inference_mode():
        light, heavy = models.light()(label, seed), models.heavy()(label, seed)
    yardstick = Yardstick()
    for answer in (light["answer"], heavy["answer"]):
        assert (yardstick.see(answer.numpy()).classes == label[:, 0].numpy()).mean() > 0.9
    assert light["score"].shape == (60,) and light["score"].dtype == torch.float32
    assert 0 <= float(light["score"].min()) < float(light["score"].max()) <= 1
    own = (light["answer"] - heavy["answer"]).abs().mean()
    other = (
        (light["answer"] - heavy["answer"].roll(10, 0)).abs().mean()
    )  # the same label, other noise
    assert float(own) < 0.7 * float(other)


def test_any_label_counts_by_its_last_digit() -> None:
    light = models.light()
    seed = torch.tensor([[3]])
    with torch.inference_mode():
        for label, same in ((13, 3), (-7, 3), (10**12, 0)):
            found, wanted = (light(torch.tensor([[x]]), seed)["answer"] for x in (label, same))
            assert torch.equal(found, wanted)


def test_weights_that_are_missing_or_of_another_network_are_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match=r"no weights of the teacher .* digits train"):
        models.heavy(tmp_path)
    (tmp_path / "teacher.safetensors").write_bytes((WEIGHTS / "judge.safetensors").read_bytes())
    with pytest.raises(InvalidConfig, match="no weights of the teacher"):
        models.heavy(tmp_path)
    (tmp_path / "teacher.safetensors").write_bytes(b"junk")
    with pytest.raises(InvalidConfig, match="no weights of the teacher"):
        models.heavy(tmp_path)


# -------------------------------------------------------------------------------------- training


def test_training_again_gives_the_same_weights(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    from slosched.cascade.digits.training import quick_recipe, train

    torch.manual_seed(5)
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    lines: list[str] = []
    one = train(tmp_path / "one", quick_recipe(), show=lines.append)
    torch.manual_seed(77)  # what ran before has no influence
    two = train(tmp_path / "two", quick_recipe())
    other = train(tmp_path / "other", quick_recipe(seed=1))
    assert one["files"] == two["files"] and len(one["files"]) == 4
    for name in one["files"]:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
        assert one["files"][name]["sha256"] != other["files"][name]["sha256"]
    assert any(line.startswith("student: step 6 of 6, loss ") for line in lines)
    assert torch.get_num_threads() == threads
    torch.manual_seed(5)
    assert torch.equal(torch.get_rng_state(), state)
    with torch.inference_mode():
        label, seed = inputs(2)
        for folder in ("one", "other"):
            answer = models.light(tmp_path / folder)(label, seed)["answer"]
            assert bool(torch.isfinite(answer).all())


def test_the_three_parts_share_no_image_and_have_every_class() -> None:
    pytest.importorskip("sklearn")
    from slosched.cascade.digits.data import load_digits

    digits = load_digits()
    parts = (digits.learn, digits.judge, digits.measure)
    assert sum(map(len, parts)) == 1797
    sets = [{ink.tobytes() for ink in part.ink} for part in parts]
    assert not (sets[0] & sets[1] or sets[0] & sets[2] or sets[1] & sets[2])
    for part in parts:
        counts = torch.bincount(torch.from_numpy(part.labels), minlength=10)
        assert int(counts.min()) > 0.09 * len(part)
