"""`slosched cascade compare`: differences, folders that hold runs already; Ctrl-C while figures are drawn."""

from __future__ import annotations

import json
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from cascade_cli import SHORT, done, ran
from made_cascade_run import mixed_run
from slosched.analysis import style
from slosched.cascade.cascade_file import write_cascade
from slosched.cascade.compare import Cell, Comparison
from slosched.cascade.presets import Variant
from slosched.cascade.run import Experiment
from slosched.cli.app import app
from slosched.cli.cascade_experiment import variants_of
from slosched.cli.sim_display import SimDisplay
from slosched.workloads.cascades import load_cascade


def test_a_comparison_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("compare", "sdturbo", *SHORT, "--policies", "clipper-light,diffserve", "--seeds", "2")
    out = ("--out", str(tmp_path))
    result = done(*words, *out)
    assert "FID (table)" in result.output and " +- " in result.output
    document = json.loads((tmp_path / "compare.json").read_text())
    assert document["cells_reused"] == 0 and document["seeds"] == [0, 1]
    light = document["policies"]["clipper-light"]
    assert light["estimates"]["fid"] == {"mean": 22.77, "half": 0.0}
    assert [cell["seed"] for cell in light["cells"]] == [0, 1]
    table = (tmp_path / "compare.md").read_text().splitlines()
    assert table[0].startswith("| policy | violations | FID (table) | FID (pessimistic) |")
    assert len(table) == 4 + 1 + 3
    assert table[5] == "| clipper-light | violations | FID (table) | FID (pessimistic) |"
    assert table[7].startswith("| less diffserve | ")
    names = {path.name for path in (tmp_path / "figures").glob("*.png")}
    assert "sdturbo_quality_violations.png" in names and len(names) == 4

    (tmp_path / "diffserve" / "seed=1" / "summary.json").unlink()
    monkeypatch.setattr("slosched.cascade.compare._draw", lambda *_: [])
    again = done(*words, *out, "--json")
    resumed = json.loads(again.stdout)
    assert resumed["cells_reused"] == 3
    assert resumed["policies"] == document["policies"]


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes most of a short comparison's time."""
    monkeypatch.setattr("slosched.cascade.compare._draw", lambda *_: [])


@pytest.mark.usefixtures("no_figures")
def test_differences_are_of_the_same_seeds(tmp_path: Path) -> None:
    words = (
        "compare",
        "sdturbo",
        *SHORT,
        "--policies",
        "diffserve,cascade,clipper-light",
        "--seeds",
        "2",
    )
    result = done(*words, "--out", str(tmp_path))
    document = json.loads((tmp_path / "compare.json").read_text())
    cells = {name: each["cells"] for name, each in document["policies"].items()}
    differences = document["differences"]
    assert differences["of"] == "cascade"  # wherever it stands
    assert list(differences["less"]) == ["diffserve", "clipper-light"]
    for name, keys in differences["less"].items():
        for key, estimate in keys.items():
            one, two = (a[key] - b[key] for a, b in zip(cells["cascade"], cells[name], strict=True))
            assert estimate["mean"] == pytest.approx((one + two) / 2)
            # Student's t of one degree of freedom, times the error of the mean of two.
            assert estimate["half"] == pytest.approx(12.706 * abs(one - two) / 2)
    mean = differences["less"]["clipper-light"]["fid"]["mean"]
    [line] = [line for line in result.output.splitlines() if line.startswith("less clipper-light ")]
    assert f"{mean:+.2f} +- " in line


def test_one_seed_has_differences_without_intervals() -> None:
    variants = (Variant("a", "DIFFSERVE"), Variant("b", "PROTEUS"))
    cell = {"fid": None, "pessimistic_fid": None}
    summaries = {
        name: [{"summary": {**cell, "violation_ratio": ratio}}]
        for name, ratio in (("a", 0.25), ("b", 0.5))
    }
    comparison = Comparison("mine", variants, (0,), summaries, 0)
    assert comparison.subject == "a"  # the first, where ours is not there
    assert comparison.difference_rows()[1] == [["less b", "-0.2500", "-", "-"]]


def test_a_preset_takes_the_options_that_are_given() -> None:
    given = {"drop_at": 3.0, "routing": None}
    variants = variants_of(None, "sanity", Experiment("sdturbo"), given)
    assert {each.options.drop_at for each in variants} == {3.0}
    assert [each.options.routing for each in variants] == ["random"] * 4 + ["least-loaded"]


# --------------------------------------------------------------------------------------- Ctrl-C


def press_ctrl_c(*_: object, **__: object) -> None:
    """What stands for a drawing function: SIGINT comes while it runs. By itself it would go on drawing."""
    signal.raise_signal(signal.SIGINT)


def interrupted(result: Result) -> None:
    assert result.exit_code == 130
    assert result.stderr.splitlines()[-1] == "slosched: interrupted"
    assert "Traceback" not in result.output and "stopping" not in result.output


def drafts(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.name.startswith(".slosched-")]


@pytest.fixture
def ctrl_c_while_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second figure is being drawn when Ctrl-C is pressed: the first one is there."""
    save = style.save
    saved: list[str] = []

    def save_one(figure: Any, out: Path, stem: str, **more: Any) -> list[Path]:
        if saved:
            press_ctrl_c()
        saved.append(stem)
        return save(figure, out, stem, **more)

    monkeypatch.setattr(style, "save", save_one)


@pytest.mark.usefixtures("ctrl_c_while_drawing")
def test_ctrl_c_ends_a_run_at_once_while_figures_are_drawn(tmp_path: Path) -> None:
    words = ("run", "sdturbo", *SHORT, "--policy", "clipper-light", "--out", str(tmp_path))
    interrupted(ran(*words))
    assert not (tmp_path / "summary.json").exists()  # it says that all files are there
    assert [path.name for path in sorted((tmp_path / "figures").iterdir())] == [
        "sdturbo_confidence_threshold.pdf",
        "sdturbo_confidence_threshold.png",
    ]
    assert not drafts(tmp_path)


@pytest.mark.usefixtures("ctrl_c_while_drawing")
def test_ctrl_c_ends_a_comparison_at_once_while_figures_are_drawn(tmp_path: Path) -> None:
    words = ("compare", "sdturbo", *SHORT, "--policies", "clipper-light", "--seeds", "1")
    interrupted(ran(*words, "--out", str(tmp_path)))
    assert (tmp_path / "compare.json").is_file() and not drafts(tmp_path)
    assert len(list((tmp_path / "figures").iterdir())) == 2
    json.loads((tmp_path / "compare.json").read_text())


@pytest.mark.usefixtures("ctrl_c_while_drawing")
def test_ctrl_c_ends_a_plot_at_once(tmp_path: Path) -> None:
    run = mixed_run(tmp_path / "run")
    interrupted(CliRunner().invoke(app, ["plot", "cascade", "--cascade", "sdturbo", str(run)]))
    assert len(list((run / "figures").iterdir())) == 2 and not drafts(tmp_path)


def test_ctrl_c_between_the_files_of_two_runs_ends_a_comparison(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []

    def finish_one(cell: Cell, *rest: Any) -> dict[str, Any]:
        made.append(cell.name)
        press_ctrl_c()  # which is noted, and the files of this run are finished
        return {}

    monkeypatch.setattr("slosched.cascade.compare._finished", finish_one)
    words = ("compare", "sdturbo", *SHORT, "--policies", "clipper-light", "--seeds", "2")
    result = ran(*words, "--out", str(tmp_path))
    assert result.exit_code == 130 and "Traceback" not in result.output
    assert f"--out {tmp_path} continues the comparison" in result.stderr
    assert made == ["clipper-light seed=0"] and not (tmp_path / "compare.json").exists()


def test_ctrl_c_in_a_run_says_where_its_parts_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        SimDisplay, "__call__", lambda self, progress: signal.raise_signal(signal.SIGTERM)
    )
    monkeypatch.setattr("slosched.sim.run._PROGRESS_EVERY_NS", 0)
    result = ran("run", "sdturbo", *SHORT, "--out", str(tmp_path))
    assert result.exit_code == 128 + signal.SIGTERM
    assert f"partial results are in {tmp_path}" in result.output
    assert not (tmp_path / "figures").exists()


# ------------------------------------------------------------------------------ folders of others


@pytest.mark.parametrize("command", [("run",), ("compare", "--seeds", "1")])
@pytest.mark.parametrize("place", ["file", "file/below/it"])
def test_a_file_where_the_folder_goes_is_named(
    command: tuple[str, ...], place: str, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    result = ran(*command, "sdturbo", *SHORT, "--out", str(tmp_path / place))
    assert result.exit_code == 2 and not result.stdout
    assert f"{tmp_path / 'file'} is not a directory" in result.stderr


@pytest.mark.usefixtures("no_figures")
def test_a_cascade_without_a_fixed_plan_and_a_table_of_fid(tmp_path: Path) -> None:
    plain = replace(
        load_cascade("sdturbo"), name="plain", static_gpus=0, static_plan=(), quality=None
    )
    file = str(write_cascade(plain, tmp_path))
    out = ("--out", str(tmp_path / "out"))
    named = ran("compare", file, *SHORT, "--policies", "cascade,diffserve-static", *out)
    alone = ran("run", file, *SHORT, "--policy", "diffserve-static", *out)
    for result in (named, alone):
        assert result.exit_code == 2 and not (tmp_path / "out").exists()
        assert (
            "diffserve-static needs a fixed plan, and the cascade 'plain' has none" in result.stderr
        )
    result = done("compare", file, *SHORT, "--seeds", "1", *out)
    assert "diffserve-static is left out" in result.stderr
    assert not (tmp_path / "out" / "diffserve-static").exists()
    assert "FID is that" not in result.stdout  # there is none


def test_a_run_beyond_its_gpus_says_what_no_policy_can_reach(tmp_path: Path) -> None:
    words = (
        "--workers",
        "1",
        "--trace",
        "fixed_50",
        "--duration",
        "6s",
        "--policy",
        "clipper-light",
    )
    result = done("run", "sdturbo", *words, "--out", str(tmp_path))
    lost = json.loads((tmp_path / "summary.json").read_text())["bound"]["lost"]
    assert lost > 1 and f"fluid bound: at least {lost} violations, heavy share" in result.stdout


@pytest.mark.usefixtures("no_figures")
def test_few_scores_get_a_warning(tmp_path: Path) -> None:
    scores, trace = tmp_path / "scores.csv", tmp_path / "trace.txt"
    scores.write_text("content_id,light\n1,0.5\n2,0.25\n")
    words = ("compare", "sdturbo", "--policies", "clipper-light", "--seeds", "1", "--workers", "4")
    for prompt, warned in ((2, False), (9, True)):
        trace.write_text(f"0,1\n100,{prompt}\n")
        out = ("--out", str(tmp_path / str(prompt)))
        result = done(*words, "--trace", str(trace), "--scores", str(scores), *out)
        assert (
            "has scores of 3 prompts, and the trace asks for prompts up to 9" in result.stderr
        ) == warned


@pytest.mark.usefixtures("no_figures")
def test_a_damaged_summary_is_named(tmp_path: Path) -> None:
    words = ("compare", "sdturbo", *SHORT, "--policies", "clipper-light", "--seeds", "1")
    out = ("--out", str(tmp_path))
    assert "sdturbo under clipper-light; trace fixed_4, 4 workers" in done(*words, *out).stdout
    summary = tmp_path / "clipper-light" / "seed=0" / "summary.json"
    document = json.loads(summary.read_text())
    for damaged in (
        {**document, "summary": {}},
        {**document, "summary": {**document["summary"], "fid": "none"}},
        {**document, "bound": None},
    ):
        summary.write_text(json.dumps(damaged))
        result = ran(*words, *out)
        assert result.exit_code == 2 and f"{summary} lacks numbers; remove it" in result.stderr


@pytest.mark.usefixtures("no_figures")
def test_a_run_that_was_continued_is_drawn_from_its_last_part(tmp_path: Path) -> None:
    words = ("compare", "sdturbo", *SHORT, "--policies", "clipper-light", "--seeds", "1")
    cell = mixed_run(tmp_path / "out" / "clipper-light" / "seed=0")  # as a run that was stopped
    (cell / "manifest.json").write_text('{"complete": false}')
    done(*words, "--out", str(tmp_path / "out"))
    assert json.loads((cell / "summary.json").read_text())["run_dir"] == "run-002"
    moved = (tmp_path / "out").rename(tmp_path / "moved") / "clipper-light" / "seed=0"
    result = CliRunner().invoke(app, ["plot", "cascade", str(moved), "--json"])
    (run,) = json.loads(result.stdout)["runs"].values()
    assert run["violations"] == 0 and run["light"] == run["requests"] > 8
    result = CliRunner().invoke(app, ["plot", "cascade", str(tmp_path / "moved")])
    assert result.exit_code == 2
    assert f"name its runs, as {tmp_path / 'moved'}/POLICY/seed=0" in result.stderr


@pytest.mark.usefixtures("no_figures")
def test_a_folder_of_other_settings_is_refused(tmp_path: Path) -> None:
    words = ("compare", "sdturbo", *SHORT, "--policies", "clipper-light", "--seeds", "1")
    done(*words, "--out", str(tmp_path))
    result = ran(*words, "--drop-at", "3", "--out", str(tmp_path))
    assert result.exit_code == 2
    assert "holds a run of other settings (drop_at is 1.0, not 3.0)" in result.output


@pytest.mark.usefixtures("no_figures")
def test_a_run_of_another_source_is_made_again_unless_its_settings_were_others(
    tmp_path: Path,
) -> None:
    words = ("compare", "sdturbo", *SHORT, "--policies", "clipper-light", "--seeds", "1", "--json")
    out = ("--out", str(tmp_path))
    done(*words, *out)
    summary = tmp_path / "clipper-light" / "seed=0" / "summary.json"
    document = json.loads(summary.read_text())
    older = {**document, "source": "another", "spec_sha256": "another"}
    del older["options"]["queue_term"]  # an option that its version did not have
    summary.write_text(json.dumps(older))
    again = json.loads(CliRunner().invoke(app, ["cascade", *words, *out]).stdout)
    assert again["cells_reused"] == 0
    summary.write_text(json.dumps({**document, "spec_sha256": "another"}))
    assert "(another content of a file that it read)" in ran(*words, *out).output
