"""The manual and the Grafana board are held to what a controller serves."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import Metric

from big_controller import big_controller
from made_call_run import a_call
from made_cascade_run import a_plan
from slosched.cascade_spec import CascadeOptions
from slosched.codes import ActionType, Code
from slosched.core.scheduler.cascades import Cascades
from slosched.core.scheduler.state import Gpu, Instance, ModelState
from slosched.daemon.metrics import ControllerCollector
from slosched.messages import FunctionInfo
from slosched.telemetry.tally import Recent
from slosched.workloads.cascades import load_cascade

ROOT = Path(__file__).parent.parent
BOARD = ROOT / "daemon" / "grafana" / "slosched.json"
MANUAL = ROOT / "docs" / "operating.md"
_METRIC = re.compile(r"\b(?:slosched|process)_[a-z0-9_]+\b")
_SUFFIXES = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}


@pytest.fixture(scope="module")
def families() -> list[Metric]:
    """Every family of a controller on which everything has happened once, in a scrape's order."""
    scheduler, tally = big_controller(gpus=2, instances=2)
    scheduler.cluster.cascades = Cascades((load_cascade("sdturbo"),), CascadeOptions())
    tally.cascades.add_plan(a_plan("sdturbo"))
    near = scheduler.cluster.workers[0]
    near.address, near.pid = "127.0.0.1:12345", os.getpid()
    near.gpus.append(Gpu(2, 1, near, 512, 512, 1 << 24, host=True))
    noop = scheduler.cluster.models[99] = Instance(99, "noop", 0, ModelState.LOADED)
    noop.set_function(FunctionInfo())
    tally.calls.add(a_call(1, 0, 1, function="noop"))
    tally.failures[int(ActionType.INFER), int(Code.EXEC_TOO_LATE)] = 1
    return list(ControllerCollector(scheduler, tally, Recent(tally)).collect())


def exposed(family: Metric) -> str:
    return family.name + ("_total" if family.type == "counter" else "")


def labels_of(family: Metric) -> set[str]:
    return {label for sample in family.samples for label in sample.labels} - {"le"}


def test_the_manual_s_table_is_what_is_served(families: list[Metric]) -> None:
    rows = {}
    for line in MANUAL.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 5 and (found := _METRIC.search(cells[0])):
            assert found.group() not in rows, f"{found.group()} is there twice"
            rows[found.group()] = cells[1:]
    served = {exposed(family): family for family in families}
    assert rows.keys() == served.keys()
    for name, (kind, labels, unit, meaning) in rows.items():
        assert kind == served[name].type, name
        assert {label for label in labels.split(", ") if label} == labels_of(served[name]), name
        assert unit and meaning, name


def test_names_end_in_their_unit(families: list[Metric]) -> None:
    for family in families:
        assert re.fullmatch(r"(slosched|process)_[a-z][a-z0-9_]*", family.name)
        assert not re.search(r"(_ms|_ns|_us|_mb|_percent|_total)$", family.name), family.name
        assert family.documentation.endswith("."), family.name


def board() -> dict[str, Any]:
    return dict(json.loads(BOARD.read_text()))


def expressions() -> list[str]:
    return [target["expr"] for panel in board()["panels"] for target in panel["targets"]]


def test_every_metric_of_the_board_is_served_with_its_labels(families: list[Metric]) -> None:
    series = {
        family.name + suffix: labels_of(family) | ({"le"} if suffix == "_bucket" else set())
        for family in families
        for suffix in _SUFFIXES[family.type]
    }
    # A histogram with negative bounds has neither sum nor count.
    for family in families:
        there = {sample.name for sample in family.samples}
        for suffix in ("_sum", "_count"):
            if family.type == "histogram" and family.name + suffix not in there:
                del series[family.name + suffix]
    for expr in expressions():
        names = _METRIC.findall(expr)
        assert names, expr
        assert set(names) <= set(series), expr
        known = set.union(*(series[name] for name in names)) | {"job"}
        by = re.findall(r"by \(([^)]*)\)", expr)
        asked = {label.strip() for group in by for label in group.split(",")}
        asked |= set(re.findall(r"(\w+)=~?\"", expr))
        assert asked <= known, expr


def test_counters_are_asked_for_their_rate_and_gauges_are_not(families: list[Metric]) -> None:
    kinds = {exposed(family): family.type for family in families}
    for expr in expressions():
        for name in _METRIC.findall(expr):
            rated = re.search(rf"(rate|increase)\({name}\b", expr) is not None
            assert rated == (kinds.get(name, "histogram") != "gauge"), expr


def test_legends_name_labels_that_the_expression_leaves() -> None:
    for panel in board()["panels"]:
        for target in panel["targets"]:
            expr = target["expr"]
            for label in re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]):
                whole = "by (" not in expr and not re.search(r"\b(sum|avg|max|count)\(", expr)
                assert whole or re.search(rf"by \([^)]*\b{label}\b[^)]*\)", expr), target


def test_the_board_can_be_imported() -> None:
    panels = board()["panels"]
    numbers = [panel["id"] for panel in panels]
    assert len(panels) >= 20 and len(set(numbers)) == len(numbers)
    titles = [panel["title"] for panel in panels]
    assert len(set(titles)) == len(titles)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        cells = {(at["x"] + i, at["y"] + j) for i in range(at["w"]) for j in range(at["h"])}
        assert not cells & taken, f"{panel['title']} lies over another panel"
        taken |= cells
        assert panel["fieldConfig"]["defaults"]["unit"]
        if panel["type"] == "timeseries":
            assert panel["fieldConfig"]["defaults"]["custom"]["axisLabel"]
        refs = [target["refId"] for target in panel["targets"]]
        assert refs and len(set(refs)) == len(refs)
        assert {t["datasource"]["uid"] for t in panel["targets"]} == {"${datasource}"}
    variables = {variable["name"] for variable in board()["templating"]["list"]}
    used = set(re.findall(r"\$\{?([a-z]\w*)", BOARD.read_text()))
    assert used == variables


@pytest.mark.parametrize(
    "wanted",
    [
        "offered",
        "in time",
        "satisfaction",
        "reject",
        "latency",
        "prediction error",
        "utilisation",
        "queue",
        "loads and evictions",
        "workers",
        "cascade: threshold",
        "cascade: deferred share",
        "cascade: stages by verdict",
        "cascade: waiting for each stage",
        "functions: calls by code",
        "hosts: utilisation of slots",
    ],
)
def test_the_board_shows_what_an_operator_asks_first(wanted: str) -> None:
    assert any(wanted in panel["title"].lower() for panel in board()["panels"])


def test_the_scrape_example_names_the_controller_s_port_and_path() -> None:
    text = (BOARD.parent / "prometheus.yml").read_text()
    assert 'targets: ["127.0.0.1:12347"]' in text and "metrics_path: /metrics" in text
