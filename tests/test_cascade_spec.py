"""Cascades: built-in ones and a person's own load, curves invert, and a wrong file is named with its line."""

from __future__ import annotations

import pickle
import random
import re
from dataclasses import replace
from importlib import resources
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arrival_statistics import distance_from_uniform
from slosched.cascade_spec import CascadeSpec, QualityCurve, ScoreCurve, StageSpec
from slosched.config_file import load_controller_config, load_profile
from slosched.errors import InvalidConfig, UnknownName
from slosched.units import NS_PER_MS, NS_PER_S
from slosched.workloads.cascades import (
    builtin_cascades,
    is_cascade_path,
    load_cascade,
    read_scores,
)

OWN = Path(__file__).parent.parent / "workloads" / "cascades" / "my-cascade.toml"
GOOD = """\
slo = "1s"
threshold = 0.25

[light]
model = "small"
exec = { 1 = "5ms", 4 = "12ms" }

[heavy]
model = "large"
load = "40ms"
weights = "1GiB"

[heavy.exec]
2 = "90ms"
1 = "50ms"

[scores]
thresholds = [0, 0.5, 1]
deferred = [0, 0.2, 1]

[quality]
light_share = [0, 1]
fid = [18, 22.5]

[static]
gpus = 4
threshold = 0.5
light_gpus = 1
heavy_gpus = 3
light_batch = 4
heavy_batch = 2
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "mine.toml"
    path.write_text(text)
    return path


# ------------------------------------------------------------------------------------- specs


def test_the_cascades_of_the_artifact_are_built_in() -> None:
    assert builtin_cascades() == ["sdturbo", "sdxlltn", "sdxs"]
    slos = {name: load_cascade(name).slo_ns // NS_PER_S for name in builtin_cascades()}
    assert slos == {"sdturbo": 5, "sdxs": 5, "sdxlltn": 15}
    models = {(spec.light.model, spec.heavy.model) for spec in map(load_cascade, slos)}
    assert models == {
        ("sd-turbo+judge", "sd-v1.5"),
        ("sdxs+judge", "sd-v1.5"),
        ("sdxl-lightning+judge", "sdxl"),
    }


@pytest.mark.parametrize("name", builtin_cascades())
def test_a_built_in_cascade_is_whole(name: str) -> None:
    spec = load_cascade(name)
    assert spec.name == name and load_cascade(name) == spec
    assert pickle.loads(pickle.dumps(spec)) == spec
    assert len(spec.scores.thresholds) == 201 and spec.quality is not None
    assert all(t == pytest.approx(i / 200) for i, t in enumerate(spec.scores.thresholds))
    assert len(spec.quality.fids) == 11 and spec.judge_ns == 20 * NS_PER_MS
    assert spec.light_ns[1] == spec.light.exec_ns[1] + spec.judge_ns
    threshold, light, heavy, light_batch, heavy_batch = spec.static_plan
    assert light + heavy == spec.static_gpus == 16 and threshold == spec.threshold
    assert light_batch in spec.light.exec_ns and heavy_batch in spec.heavy.exec_ns
    # With the judge and the batches of its plan, a request that is deferred at once is within its SLO.
    assert spec.light_ns[int(light_batch)] + spec.heavy.exec_ns[int(heavy_batch)] <= spec.slo_ns
    profile = spec.profile(memory_bytes=80 * 10**9, page_bytes=2**24)
    assert set(profile.models) == {spec.light.model, spec.heavy.model}
    assert set(profile.models[spec.heavy.model].exec_ns) == set(
        range(1, max(spec.heavy.exec_ns) + 1)
    )


def test_batches_that_do_not_fit_are_left_out() -> None:
    sizes = [1, 2, 4, 8, 16, 32]
    for name in ("sdturbo", "sdxs"):
        spec = load_cascade(name)
        assert list(spec.light.exec_ns) == list(spec.heavy.exec_ns) == sizes
    large = load_cascade("sdxlltn")
    assert list(large.light.exec_ns) == list(large.heavy.exec_ns) == sizes[:-1]


def test_published_numbers_are_what_they_were() -> None:
    turbo, sdxs, lightning = (load_cascade(name) for name in ("sdturbo", "sdxs", "sdxlltn"))
    assert [ns // NS_PER_MS for ns in turbo.light.exec_ns.values()] == [
        *(100, 150, 220, 410, 770, 1560)
    ]
    assert [ns // NS_PER_MS for ns in lightning.heavy.exec_ns.values()] == [
        *(6100, 10650, 20920, 40230, 79110)
    ]
    shares = [turbo.scores.share_below(t) for t in (0, 0.005, 0.05, 0.2, 0.25, 0.5, 1)]
    assert shares == [0, 0.143, 0.36, 0.582, 0.69, 0.993, 1]
    assert lightning.scores == sdxs.scores != turbo.scores
    assert sdxs.scores.share_below(0.3) == 0.715
    best = [spec.quality.best_light_share for spec in (turbo, sdxs, lightning) if spec.quality]
    assert best == [0.4, 0.3, 0.1]


def test_the_example_of_ones_own_cascade_loads() -> None:
    spec = load_cascade(OWN)
    assert spec.name == "my-cascade" and spec.passes_output and not spec.live_scores
    assert spec == load_cascade(str(OWN)) and spec.quality is not None and spec.static_gpus == 4


def test_a_name_is_built_in_and_a_path_is_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(OWN.parent)
    assert load_cascade("my-cascade.toml") == load_cascade("./my-cascade.toml")
    assert [is_cascade_path(text) for text in ("sdxs", "a.toml", "a/b")] == [False, True, True]
    with pytest.raises(UnknownName, match=r"unknown cascade 'sdturb' \(did you mean sdturbo\?\)"):
        load_cascade("sdturb")
    with pytest.raises(InvalidConfig, match=r"cannot read the cascade gone\.toml"):
        load_cascade("gone.toml")


def test_a_file_says_all_fields(tmp_path: Path) -> None:
    spec = load_cascade(written(tmp_path, GOOD))
    assert spec == CascadeSpec(
        name="mine",
        light=StageSpec("small", {1: 5 * NS_PER_MS, 4: 12 * NS_PER_MS}),
        heavy=StageSpec("large", {1: 50 * NS_PER_MS, 2: 90 * NS_PER_MS}, 40 * NS_PER_MS, 2**30),
        slo_ns=NS_PER_S,
        scores=ScoreCurve((0, 0.5, 1), (0, 0.2, 1)),
        quality=QualityCurve((0, 1), (18, 22.5)),
        threshold=0.25,
        static_gpus=4,
        static_plan=(0.5, 1, 3, 4, 2),
    )
    more = 'name = "other"\njudge = "1.5ms"\nlive_scores = true\nseed = 7\n'
    other = load_cascade(written(tmp_path, more + GOOD))
    assert other == replace(spec, name="other", judge_ns=1_500_000, live_scores=True, seed=7)


def test_recorded_scores_lie_beside_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "dist.txt").write_text("0.5\n" * 8)
    text = GOOD.replace("[scores]", '[scores]\nrecorded = "dist.txt"')
    monkeypatch.chdir("/")
    assert load_cascade(written(tmp_path, text)).recorded == (0.5, 0.5)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("slo =", "slow =", r", line 1: unknown key 'slow' \(did you mean slo\?\); known: heavy, "),
        ('slo = "1s"', "", ": slo must be given"),
        ('"1s"', "1", r', line 1: slo must be a duration with a unit, such as "20ms", not 1'),
        ('"1s"', '"1"', ", line 1: slo must be a duration with a unit"),
        ('"1s"', '"0ms"', ", line 1: slo must be above 0, not '0ms'"),
        ("0.25", "1.5", ", line 2: threshold must be within 0..1, not 1.5"),
        ("0.25", "nan", ", line 2: threshold must be a number, not nan"),
        ("0.25", "true", ", line 2: threshold must be a number, not True"),
        ("threshold = 0.25", "seed = -1", ", line 2: seed must be a whole number of at least 0"),
        ("threshold = 0.25", "live_scores = 1", ", line 2: live_scores must be true or false"),
        ("threshold = 0.25", "name = ''", ", line 2: name must be a text in quotes, not ''"),
        ('{ 1 = "5ms", 4 = "12ms" }', '"5ms"', ", line 6: light.exec must be a table, not '5ms'"),
        ('"small"', "3", ", line 5: light.model must be a text in quotes, not 3"),
        ('model = "small"', "", ", line 4: light.model must be given"),
        ("model = ", "modle = ", r", line 5: unknown key of \[light\] 'modle' \(did you mean"),
        ('1 = "5ms"', '2 = "5ms"', ", line 6: light.exec must have the time of batch size 1"),
        ('"5ms"', "5", ", line 6: light.exec of batch size 1 must be a duration with a unit"),
        ('"90ms"', '"0s"', ", line 13: heavy.exec of batch size 2 must be above 0"),
        ('2 = "90ms"', '0 = "90ms"', ", line 13: heavy.exec has the batch size '0', which is not"),
        ('2 = "90ms"', '01 = "90ms"', ", line 13: heavy.exec has the batch size 1 twice"),
        ('"40ms"', '"-40ms"', ", line 10: heavy.load '-40ms' is negative"),
        ('"1GiB"', "5", r', line 11: heavy.weights must be a size with a unit, such as "2.1GB"'),
        ('"1GiB"', '"5 apples"', ", line 11: heavy.weights '5 apples' is not a size"),
        ('"large"', '"small"', ": cascade 'mine': both stages are 'small'"),
        ('"large"', '"mine"', ": cascade 'mine': a stage has the cascade's own name"),
        ("[0, 0.2, 1]", "[0, 0.2]", ", line 17: scores: thresholds and deferred must be two"),
        ("[0, 0.2, 1]", "[0, 0.2, 0.1]", ", line 17: scores: deferred must never fall"),
        ("[0, 0.2, 1]", "[0.1, 0.2, 1]", ", line 17: scores: deferred must begin with 0"),
        ("[0, 0.2, 1]", "[0, 0.2, 1.1]", ", line 17: scores: deferred must begin with 0 and end"),
        ("[0, 0.5, 1]", "[0, 0.5, 0.5]", ", line 17: scores: thresholds must rise"),
        ("[0, 0.5, 1]", "[0, 0.5, 2]", ", line 17: scores: thresholds must be within 0..1"),
        ("[0, 0.5, 1]", '[0, "a", 1]', ", line 18: scores.thresholds number 2 of 3: it must be"),
        ("[0, 0.5, 1]", "0.5", ", line 18: scores.thresholds must be a list of numbers, not 0.5"),
        ("deferred = [0, 0.2, 1]", "", ", line 17: scores.deferred must be given"),
        ("[0, 1]", "[0, 0.9]", ", line 21: quality: light_share and fid must be pairs"),
        ("[18, 22.5]", "[18, -1]", ", line 21: quality: fid must be finite and at least 0"),
        ("gpus = 4", "gpus = 3", ", line 26: static.gpus is 3, fewer than light_gpus and heavy"),
        ("light_batch = 4", "", ", line 25: static.light_batch must be given"),
        ("light_batch = 4", "light_batch = 0", ", line 30: static.light_batch must be a whole"),
        ("[scores]", "[scores", " is not a TOML file: "),
    ],
)
def test_what_is_wrong_in_a_file_is_named_with_its_line(
    tmp_path: Path, old: str, new: str, words: str
) -> None:
    assert old in GOOD
    path = written(tmp_path, GOOD.replace(old, new, 1))
    with pytest.raises(InvalidConfig, match=re.escape(str(path)) + words):
        load_cascade(path)


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("slo = '5s'\n[light\nmodel = 'a'\n", "at line 2, column 7"),
        ("slo = '5s'\nname = 'x", "at line 2, column 10, the end of the file"),
        ("slo = '5s'\nname = [\n", "at line 3, column 1, the end of the file"),
    ],
)
def test_a_file_that_is_not_toml_is_named_with_line_and_column_as_other_files_are(
    tmp_path: Path, text: str, place: str
) -> None:
    path = written(tmp_path, text)
    texts = []
    for load in (load_cascade, load_controller_config, load_profile):
        with pytest.raises(InvalidConfig) as caught:
            load(path)
        texts.append(str(caught.value))
    assert texts[0].startswith(f"{path} is not a TOML file: ") and f"({place})" in texts[0]
    assert texts[1:] == texts[:1] * 2


def test_specs_made_in_a_program_are_checked_too() -> None:
    spec = load_cascade(OWN)
    for wrong in (
        {"static_plan": (0.5, 1)},
        {"static_gpus": 0},
        {"recorded": (0.5, 1.5)},
        {"recorded": (0.5, float("nan"))},
        {"threshold": -0.1},
        {"slo_ns": 0},
        {"name": "a\n"},
    ):
        with pytest.raises(InvalidConfig):
            replace(spec, **wrong)
    with pytest.raises(InvalidConfig, match="the name of its model"):
        StageSpec("", {1: 5})
    with pytest.raises(InvalidConfig, match="needs batch size 1"):
        StageSpec("m", {2: 5})


def test_the_files_are_in_the_package() -> None:
    folder = resources.files("slosched.workloads.cascades")
    assert all(folder.joinpath(f"{name}.toml").is_file() for name in builtin_cascades())


# ------------------------------------------------------------------------------------- curves

CURVES = st.lists(
    st.tuples(st.integers(1, 50), st.integers(0, 50)), min_size=2, max_size=20
).filter(lambda steps: sum(rise for _, rise in steps[1:]) > 0)
SHARES = st.floats(0, 1, exclude_max=True)


def curve_of(steps: list[tuple[int, int]], top: float) -> ScoreCurve:
    """A curve whose thresholds and shares rise by these steps; its last share is `top`."""
    wide = sum(step for step, _ in steps[1:])
    high = sum(rise for _, rise in steps[1:])
    thresholds, deferred = [0.0], [0.0]
    for step, rise in steps[1:]:
        thresholds.append(thresholds[-1] + step)
        deferred.append(deferred[-1] + rise)
    return ScoreCurve(tuple(t / wide for t in thresholds), tuple(top * d / high for d in deferred))


@given(CURVES, SHARES, st.sampled_from((1.0, 0.8)))
def test_a_score_has_its_share_of_scores_below_it(
    steps: list[tuple[int, int]], share: float, top: float
) -> None:
    curve = curve_of(steps, top)
    score = curve.score_at(share)
    assert 0 <= score <= 1
    assert curve.share_below(score) == pytest.approx(min(share, top), abs=1e-9)
    assert curve.score_at(share / 2) <= score


@given(CURVES, SHARES)
def test_a_threshold_defers_at_most_the_share_and_no_greater_one_does(
    steps: list[tuple[int, int]], share: float
) -> None:
    curve = curve_of(steps, 1.0)
    threshold = curve.threshold_for(share)
    assert curve.share_below(threshold) <= share + 1e-9
    assert curve.score_at(share) <= threshold + 1e-9
    if threshold < 1 - 1e-6:
        assert curve.share_below(min(1.0, threshold + 1e-6)) > share - 1e-9
    assert curve.threshold_for(1.0) == curve.threshold_for(2.0) == 1.0
    assert curve.threshold_for(-1.0) == curve.threshold_for(0.0)


@given(CURVES, SHARES, SHARES)
def test_a_curve_never_falls(steps: list[tuple[int, int]], one: float, other: float) -> None:
    curve = curve_of(steps, 1.0)
    low, high = min(one, other), max(one, other)
    assert curve.share_below(low) <= curve.share_below(high) + 1e-12
    assert curve.threshold_for(low) <= curve.threshold_for(high) + 1e-12


@pytest.mark.parametrize("name", builtin_cascades())
def test_scores_drawn_by_the_inverse_are_distributed_as_the_table(name: str) -> None:
    curve = load_cascade(name).scores
    draws = random.Random(3)
    scores = [curve.score_at(draws.random()) for _ in range(20_000)]
    # Kolmogorov-Smirnov at the 0.1 % level: f of its own scores is uniform.
    assert distance_from_uniform(map(curve.share_below, scores)) < 1.95 / 20_000**0.5
    for threshold, share in zip(curve.thresholds[::20], curve.deferred[::20], strict=True):
        below = sum(score < threshold for score in scores) / len(scores)
        assert abs(below - share) < 0.015


def test_quality_is_linear_between_the_points_and_blind_from_end_to_end() -> None:
    quality = QualityCurve((0, 0.5, 1), (20, 16, 24))
    assert [quality.fid(share) for share in (0, 0.25, 0.5, 0.75, 1)] == [20, 18, 16, 20, 24]
    assert quality.blind_fid(0.5) == 22 and quality.best_light_share == 0.5
    assert quality.pessimistic_fid(50, 0, 50) == 16
    assert quality.pessimistic_fid(0, 100, 0) == 24
    assert quality.pessimistic_fid(50, 100, 50) == 20  # half at 16, half at 24


# ------------------------------------------------------------------------------------- scores


def test_scores_are_means_of_four_lines_and_what_fake_leaves(tmp_path: Path) -> None:
    path = tmp_path / "dist_mine.txt"
    fakes = [0.25, 0.5, 0.75, 1.0, 0.0, 0.0, 0.0, 0.5]
    path.write_text("".join(f"{fake:.18e}\n" for fake in fakes))
    assert read_scores(path) == pytest.approx((0.375, 0.875))
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert read_scores(str(path)) == pytest.approx((0.375, 0.875))


def test_scores_of_a_csv_are_of_the_first_column_after_the_id(tmp_path: Path) -> None:
    path = tmp_path / "confidence_scores.csv"
    text = "content_id,sdturbo,sdv15\r\n1,7.5E-01,1\r\n2,1.00E+00,0\r\n3,2.50E-01,0.5"
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert read_scores(path)[1:] == (0.25, 0.0, 0.75), "the place of a score is its prompt's id"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ": the file holds no scores"),
        ("\n\n", ": the file holds no scores"),
        ("0.5\n0.5\n\nnan\n0.5\n", ", line 4: P.fake. must be within 0..1, not nan"),
        ("0.5\n1.5\n", ", line 2: P.fake. must be within 0..1, not 1.5"),
        ("0.5\n-0.5\n", ", line 2: P.fake. must be within 0..1"),
        ("0.5\nhalf\n", ", line 2: 'half' is not a number"),
        ("0.5\n0,5\n", ", line 2: '0,5' is a number with a decimal comma"),
        ("0.5\n" * 6, ": 6 numbers, which are not 4 for each prompt"),
        ("content_id,a\n", ": the file has a header and no scores"),
        ("id,a\n1,0.5\n", ", line 1: the header must be content_id and then the models"),
        ("content_id\n1\n", ", line 1: the header must be content_id and then the models"),
        ("content_id,a\n1,0.5\n2\n", ", line 3: 1 columns, but the header has 2"),
        ("content_id,a\n1,0.5\n3,0.5\n", ", line 3: content_id is 3 where 2 should follow"),
        ("content_id,a\n1.0,0.5\n", ", line 2: content_id '1.0' is a number that a spreadsheet"),
        ("content_id,a\n5,0.5\n", ", line 2: content_id must begin with 0 or 1, not 5"),
        ("content_id,a\n1,\n", ", line 2: '' is not a number"),
        ("content_id,a\n1,2\n", ", line 2: P.fake. must be within 0..1, not 2"),
    ],
)
def test_a_wrong_file_of_scores_is_named_with_its_line(
    tmp_path: Path, text: str, words: str
) -> None:
    path = tmp_path / "scores.txt"
    path.write_text(text)
    with pytest.raises(InvalidConfig, match=re.escape(str(path)) + words):
        read_scores(path)


def test_scores_of_a_made_file_have_the_distribution_of_their_table(tmp_path: Path) -> None:
    curve = load_cascade("sdxs").scores
    drawn = [curve.score_at((i + 0.5) / 5000) for i in range(5000)]
    path = tmp_path / "dist_made.txt"
    path.write_text("".join(f"{1 - score:.18e}\n" * 4 for score in drawn))
    scores = read_scores(path)
    for threshold, share in zip(curve.thresholds, curve.deferred, strict=True):
        assert abs(sum(score < threshold - 1e-12 for score in scores) / 5000 - share) <= 1 / 5000
