"""The live page's files and data over HTTP: what a browser is told, how large it gets, who waits for it."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable, Mapping
from importlib import resources
from typing import Any

import pytest

from slosched.config import EmulationNoise, GpuProfile, ModelProfile, SchedulerConfig
from slosched.daemon.http import HttpServer
from slosched.daemon.live import (
    MOST_ACTIONS,
    MOST_GPUS,
    MOST_LANES,
    MOST_MODELS,
    LiveState,
    live_routes,
)
from slosched.daemon.status import status_report
from slosched.sim.harness import Demand, Simulation
from slosched.telemetry.recent import KEPT_ACTIONS, KEPT_MISSES, SECONDS, LastMinutes
from synthetic_run import MS, START_NS, S, action, request
from test_http import ask

PAGE = 2**24
POLICY = (
    "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "object-src 'none'"
)


def simulated(*, gpus: int = 2, models: int = 1, copies: int = 3) -> tuple[Simulation, LastMinutes]:
    """A cluster with `copies` of each model loaded, and nothing seen of it yet."""
    exec_ns = {1: 2_600_000, 2: 3_800_000, 4: 5_600_000, 8: 9_100_000}
    named = {
        f"net{i}": ModelProfile(f"net{i}", exec_ns, weights_ns=50_000, weights_bytes=PAGE)
        for i in range(models)
    }
    profile = GpuProfile("gpu", named, weights_cache_bytes=20 * PAGE, page_bytes=PAGE)
    simulation = Simulation(
        SchedulerConfig(max_batch=8, max_gpus=gpus),
        profile,
        gpus_per_worker=(gpus,),
        noise=EmulationNoise(),
        check=False,
    )
    for name in named:
        simulation.load(name, copies)
    return simulation, LastMinutes()


def told(
    simulation: Simulation, recent: LastMinutes, now_ns: int | None = None, **query: str
) -> dict[str, Any]:
    """One whole answer, in Python."""
    live = LiveState(simulation.scheduler, recent, life="7")
    return joined(live, query, simulation.now_ns if now_ns is None else now_ns)


def joined(live: LiveState, query: Mapping[str, str], now_ns: int) -> dict[str, Any]:
    whole: dict[str, Any] = {}
    for key, value in live.parts(query, now_ns):
        if isinstance(value, list):
            whole.setdefault(key, []).extend(value)
        elif key:
            whole[key] = value
    return whole


# --------------------------------------------------------------------------------- over HTTP


def exchange(request_bytes: bytes, *, meanwhile: Callable[[], None] | None = None) -> bytes:
    """What the server says; `meanwhile` is called at each turn that the event loop has until then."""
    simulation, recent = simulated()
    for number in range(3 * KEPT_ACTIONS):
        recent.add_action(action(number * MS, MS, number=number))

    async def run() -> bytes:
        routes = live_routes(simulation.scheduler, recent, clock=lambda: simulation.now_ns)
        server = HttpServer(routes)
        await server.start("127.0.0.1", 0)
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            writer.write(request_bytes)
            asked = asyncio.ensure_future(reader.read())
            while not asked.done():
                await asyncio.sleep(0)
                if meanwhile is not None:
                    meanwhile()
            writer.close()
            return asked.result()
        finally:
            await server.close()

    return asyncio.run(asyncio.wait_for(run(), 20))


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/", "text/html; charset=utf-8"),
        ("/style.css", "text/css; charset=utf-8"),
        ("/live.js", "text/javascript; charset=utf-8"),
        ("/icon.svg", "image/svg+xml"),
        ("/live.json?gpus=w0&models=n&since=7-1", "application/json"),
    ],
)
def test_each_file_says_what_it_is_and_may_load_nothing_from_elsewhere(
    path: str, kind: str
) -> None:
    head, _, body = exchange(ask("GET", path)).partition(b"\r\n\r\n")
    lines = head.decode().split("\r\n")
    headers = dict(line.split(": ", 1) for line in lines[1:])
    assert lines[0].split()[1] == "200" and len(body) == int(headers["content-length"]) > 100
    assert headers["content-type"] == kind
    assert headers["content-security-policy"] == POLICY
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["cache-control"] == "no-store"
    headless, _, nothing = exchange(ask("HEAD", path)).partition(b"\r\n\r\n")
    assert nothing == b"" and headless.split(b"\r\n")[0] == head.split(b"\r\n")[0]


@pytest.mark.parametrize("path", ["/index.html", "/web/live.js", "/live", "/../live.py", "//"])
def test_nothing_else_is_served(path: str) -> None:
    answer = exchange(ask("GET", path))
    assert answer.startswith(b"HTTP/1.1 404") and b"/live.json" in answer


def test_the_loop_has_turns_while_an_answer_is_made() -> None:
    turns = []
    answer = exchange(ask("GET", "/live.json"), meanwhile=lambda: turns.append(1))
    document = json.loads(answer.partition(b"\r\n\r\n")[2])
    assert document["life"] and len(document["series"]["offered"]) == SECONDS
    assert len(document["actions"]) == MOST_ACTIONS
    assert len(turns) > MOST_ACTIONS / 128, "a slice is at most 128 actions"


def test_the_files_ask_for_nothing_from_elsewhere_and_have_nothing_inline() -> None:
    files = resources.files("slosched.daemon") / "web"
    texts = {file.name: file.read_text() for file in files.iterdir()}
    assert set(texts) == {"index.html", "style.css", "live.js", "icon.svg"}
    for name, text in texts.items():
        assert re.findall(r"(?:https?:)?//[a-z0-9.-]+\.[a-z]{2,}", text) in (
            [],
            ["http://www.w3.org"],
        )
        assert "@import" not in text and "url(" not in text, name
    assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\sstyle=|\son\w+=", texts["index.html"])
    banned = (
        "innerHTML|outerHTML|insertAdjacentHTML|document.write|eval\\(|new Function|\\bimport\\b"
    )
    assert not re.search(banned, texts["live.js"])


# ---------------------------------------------------------------------------------- the data


def test_the_figures_are_those_of_the_records_and_of_status() -> None:
    simulation, recent = simulated(gpus=2, copies=3)
    models = tuple(m.info() for m in simulation.scheduler.cluster.models.values())
    demands = [Demand(i * MS, i % 3, slo_ns=(30 if i % 4 else 2) * MS) for i in range(2_000)]
    outcome = simulation.run(models, demands, settle_ns=S)
    for record in outcome.requests:
        recent.add_request(record)
    for done in outcome.actions:
        recent.add_action(done)
    seen = told(simulation, recent)
    status = status_report(simulation.scheduler, now_ns=simulation.now_ns)
    assert seen["requests"]["arrived"] == status["requests"]["arrived"] == 2_000
    assert sum(seen["series"]["offered"]) == seen["requests"]["answered"] == 2_000
    assert sum(seen["series"]["satisfied"]) == sum(r.deadline_met for r in outcome.requests) > 1_000
    by_words = {miss["text"]: sum(miss["counts"]) for miss in seen["series"]["misses"]}
    assert by_words["no plan in time"] == 500, "each fourth asks for less than an exec takes"
    assert len(seen["missed"]) == KEPT_MISSES
    newest = seen["missed"][0]
    assert newest["at_us"] == max(r.departure_ns for r in outcome.requests if r.code) // 1000
    assert newest["slo_us"] == 2_000 and 0 < newest["left_us"] <= 2_000
    assert "takes 2.6ms" in newest["reason"] and newest["model"].startswith("net0 #")
    (model,) = seen["models"]
    assert (model["name"], model["instances"], model["b1_us"]) == ("net0", 3, 2_600)
    assert model["resident"] == sum(m["gpus_resident"] for m in status["models"]) > 0
    assert [c["name"] for c in seen["clients"]] == [c["name"] for c in status["clients"]]
    assert seen["workers_in_all"] == {"workers": 1, "joined": 1}
    assert [gpu["name"] for gpu in seen["gpus"]] == seen["lanes"] == ["W0-GPU0", "W0-GPU1"]
    ran = [row for row in seen["actions"] if not row[2] and not row[3]]
    busy_us = sum(row[9] - row[8] for row in ran)
    shares = sum(sum(gpu["exec"]) for gpu in seen["gpus"])
    # The last whole second ends before what is still shown; shares are whole percents.
    assert busy_us / 10_000 == pytest.approx(shares, rel=0.05)


def test_only_what_is_new_is_told_again() -> None:
    simulation, recent = simulated()
    for number in range(5):
        recent.add_action(action(number * MS, MS, number=number))
    first = told(simulation, recent)
    assert sorted(row[1] for row in first["actions"]) == [0, 1, 2, 3, 4]
    recent.add_action(action(9 * MS, MS, number=5))
    assert [row[1] for row in told(simulation, recent, since=first["next"])["actions"]] == [5]
    for other in ("8-5", "7-x", "-", "7--1", "7-999999999999", "\N{SUPERSCRIPT TWO}"):
        rows = told(simulation, recent, since=other)["actions"]
        assert len(rows) == (0 if other.startswith("7-9") else 6), other


def test_an_answer_has_an_upper_size_and_a_filter_finds_the_rest() -> None:
    simulation, recent = simulated(gpus=MOST_GPUS + 44, models=MOST_MODELS + 50, copies=1)
    for number in range(2 * KEPT_ACTIONS):
        recent.add_action(action(number * MS, MS, number=number))
        recent.add_request(request(number * MS, MS, code=4, number=number))
    seen = told(simulation, recent, START_NS + 20 * S)
    assert seen["gpus_in_all"]["gpus"] == seen["gpus_in_all"]["matching"] == MOST_GPUS + 44
    assert len(seen["gpus"]) == MOST_GPUS and len(seen["lanes"]) == MOST_LANES
    assert len(seen["actions"]) == MOST_ACTIONS < KEPT_ACTIONS
    assert len(seen["models"]) == MOST_MODELS and len(seen["missed"]) == KEPT_MISSES
    assert seen["models_in_all"] == {"names": 150, "instances": 150, "matching": 150}
    assert max(row[1] for row in seen["actions"]) == 2 * KEPT_ACTIONS - 1
    assert len(json.dumps(seen)) < 600_000
    found = told(simulation, recent, gpus="gPu299", models="NET149")
    assert [gpu["name"] for gpu in found["gpus"]] == found["lanes"] == ["W0-GPU299"]
    assert [row["name"] for row in found["models"]] == ["net149"] and found["actions"] == []
    none = told(simulation, recent, gpus="<b>", models="<b>")
    assert none["gpus"] == none["models"] == none["lanes"] == none["actions"] == []
