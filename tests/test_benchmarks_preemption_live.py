"""benchmarks/gpu/preemption_live.py: which mixes a run has, and that its page is that of its results."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

GPU = Path(__file__).parent.parent / "benchmarks" / "gpu"
sys.path[:0] = [str(GPU.parent), str(GPU)]  # its programs import one another as neighbours

import preemption  # noqa: E402
import preemption_live as live  # noqa: E402

from slosched.loadgen.results import RunResult  # noqa: E402

TIMES = {"short": [[1, 2_100_000], [2, 3_000_000]], "long": [[1, 43_000_000]]}


def test_a_run_has_the_mixes_of_which_every_class_was_measured() -> None:
    boundaries = {"short": [[1, 400_000]], "long": [[1, 1_500_000], [2, 4_000_000]]}
    found = live.mixes_of(TIMES, boundaries, {"short": 2_200_000, "long": 0})
    assert list(found) == [0, 1]
    short, long = found[1].classes
    assert (short.b1_ms, long.b1_ms) == (2.1, 43)
    assert found[1].boundary_ns == 1_500_000
    assert found[1].profile.urgent_at_most_ns == 2_200_000
    assert found[1].profile.models["short"].exec_ns == {1: 2_100_000, 2: 3_000_000}


def test_unknown_mixes_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        live.main(["--out", "nowhere", "--mixes", "1,7"])
    assert "choose from 0,1,2" in capsys.readouterr().err


def test_the_page_has_a_line_for_every_class_of_every_cell_that_was_run() -> None:
    documents = json.loads(live.RESULTS.read_text(encoding="utf-8"))["runs"]
    text = live.PAGE.read_text(encoding="utf-8")
    cells = sum(
        len(live.NOMINAL[mix].classes)
        for document in documents
        for mix, _ in {(row["mix"], row["load"]) for row in document["rows"]}
    )
    assert sum(line.startswith(("| 0", "| 1", "|  |")) for line in text.splitlines()) == cells
    compared = sum(row["compared"] for document in documents for row in document["rows"])
    assert f"{compared:,} answers were compared" in text and "; 0 were wrong" in text
    for document in documents:
        for row in document["rows"]:
            result = RunResult.from_dict(row["result"])
            for words in preemption.texts_of(result, live.NOMINAL[row["mix"]]):
                assert f"| {words} |" in text
