"""The live page in headless Chromium: over a real cluster, and over data that no cluster here would give."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
import time
import urllib.request
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, Route, expect

from browser import browser, page
from slosched import Client
from slosched.codes import ActionType
from slosched.errors import RequestFailed
from slosched.experiment.children import Child, Children
from slosched.telemetry.recent import KEPT_ACTIONS
from synthetic_run import MS, START_NS, S, action, request
from test_live import simulated, told

__all__ = ["browser", "page"]

pytestmark = pytest.mark.browser

#: A name may have 64 characters.
EVIL = "<img src=x onerror=\"document.title='owned'\"><b>x</b>"
CANVASES = ("rates", "misses", "latency", "busy", "timeline")


def number(text: str | None) -> float:
    """The first number of a text as the page writes it."""
    found = re.search(r"[\d\u202f]+(?:\.\d+)?", text or "")
    assert found, f"no number in {text!r}"
    return float(found[0].replace("\u202f", ""))


def has_no_sideways_scroll(page: Page, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 900})
    page.wait_for_timeout(100)
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def colours_in(page: Page, canvas: str) -> int:
    """How many different colours are on a canvas: one, if nothing was drawn."""
    return int(
        page.evaluate(
            """id => { const c = document.getElementById(id);
                const d = c.getContext("2d").getImageData(0, 0, c.width, c.height).data;
                const seen = new Set(new Uint32Array(d.buffer)); return seen.size; }""",
            canvas,
        )
    )


# --------------------------------------------------------------------------- a real cluster


class Cluster:
    """A controller over one worker of two emulated GPUs; `restart` starts it on the same ports."""

    def __init__(self, children: Children, directory: Path) -> None:
        self._children, self._directory = children, directory
        worker = children.start(
            "worker",
            ["worker", "--device", "emulated", "--gpus", "2", "--bind", "127.0.0.1", "--port", "0"],
            directory / "w.log",
        )
        self._worker_port = children.wait_ready(worker, within_s=30)
        self.port = self.http_port = 0
        self.controller = self.restart()

    def restart(self) -> Child:
        log = self._directory / f"c{time.monotonic_ns()}.log"
        self.controller = self._children.start(
            "controller",
            [
                "controller",
                "INFER5",
                "--workers",
                f"127.0.0.1:{self._worker_port}",
                "--bind",
                "127.0.0.1",
                "--port",
                str(self.port),
                "--http-port",
                str(self.http_port),
                "--log-dir",
                str(log.with_suffix("")),
            ],
            log,
        )
        self.port = self._children.wait_ready(self.controller, within_s=30)
        self.http_port = int(log.read_text().split("http://127.0.0.1:")[1].split(";")[0])
        return self.controller

    def kill(self) -> None:
        os.kill(self.controller.process.pid, signal.SIGKILL)
        self.controller.process.wait(10)
        self._children.forget(self.controller)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http_port}"

    def status(self) -> dict[str, Any]:
        with urllib.request.urlopen(f"{self.url}/status", timeout=5) as answer:
            report: dict[str, Any] = json.load(answer)
            return report


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    with Children() as children:
        yield Cluster(children, tmp_path)


class Load:
    """Requests each 10 ms from a thread, each fourth with an SLO that nothing can meet."""

    def __init__(self, port: int, name: str) -> None:
        self._client = Client(f"127.0.0.1:{port}", name=name)
        self._models = self._client.load("resnet50_v2", copies=3)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.failures: list[BaseException] = []

    def _run(self) -> None:
        try:
            i = 0
            while not self._stop.wait(0.01):
                i += 1
                try:
                    slo = "1ms" if i % 4 == 0 else "2s"
                    self._client.infer(self._models[i % 3], slo=slo, timeout_s=10)
                except RequestFailed:
                    pass
        except BaseException as failure:
            self.failures.append(failure)

    def __enter__(self) -> Load:
        self._thread.start()
        return self

    def stop(self) -> None:
        """Send no more; the client stays connected."""
        self._stop.set()
        self._thread.join(20)
        assert not self.failures and not self._thread.is_alive()

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join(20)
        self._client.close()


# Real processes, but nothing depends on how fast they are: other tests beside this one do no harm.
def test_the_page_shows_a_real_load_and_agrees_with_status(cluster: Cluster, page: Page) -> None:
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    with Load(cluster.port, EVIL) as load:
        page.goto(cluster.url)
        expect(page.locator("#connection")).to_have_text("connected")
        page.wait_for_function(
            """() => parseFloat(document.querySelector("#tile-offered").textContent) > 5
                 && document.querySelector("#tile-p99").textContent.endsWith("ms")"""
        )
        for canvas in CANVASES:
            assert colours_in(page, canvas) > 5, f"nothing is drawn on {canvas}"
        keys = page.locator("#timeline").get_attribute("aria-label")
        assert keys is not None and "2 GPUs" in keys and number(keys.split("GPUs, ")[1]) > 3
        page.locator("#timeline").press("ArrowLeft")
        expect(page.locator("#pause")).to_have_attribute("aria-pressed", "true")
        detail = page.locator("#action")
        expect(detail).to_contain_text(re.compile(r"resnet50 #\d, on W0-GPU\d: ran [\d.]+ ms from"))
        before = detail.text_content()
        page.locator("#timeline").press("ArrowLeft")
        assert detail.text_content() != before
        page.locator("#pause").click()
        load.stop()
        agrees_with_status(page, cluster)
        refused_are_explained(page)
        for width in (1280, 800):
            has_no_sideways_scroll(page, width)
        expect(page.locator("#clients tbody td").first).to_have_text(EVIL)
        assert page.locator("img, b").count() == 0 and page.title() == "slosched controller"
        page.locator("#models-filter").fill("nothing of that name")
        expect(page.locator("#models tbody")).to_have_text("no model of that name is loaded")
    assert {url.split("/")[2] for url in asked} == {cluster.url.split("/")[2]}


def agrees_with_status(page: Page, cluster: Cluster) -> None:
    status = cluster.status()
    requests = status["requests"]
    assert requests["arrived"] == requests["answered"] > 50
    answered = f"{requests['answered']:,}".replace(",", "\u202f")
    expect(page.locator("#tile-answered")).to_have_text(answered)
    expect(page.locator("#tile-unanswered")).to_have_text("0")
    expect(page.locator("#tile-workers")).to_have_text("1 of 1")
    row = page.locator("#models tbody tr td")
    assert row.first.text_content() == status["models"][0]["name"]
    resident = sum(model["gpus_resident"] for model in status["models"])
    assert [number(row.nth(i).text_content()) for i in (1, 2, 3, 4)] == [3, 0, resident, 2.6]
    gpus = page.locator("#gpus tbody tr")
    assert gpus.count() == len(status["workers"][0]["gpus"]) == 2
    assert page.locator("#workers tbody td").nth(2).text_content() == "joined"


def refused_are_explained(page: Page) -> None:
    newest = page.locator("#missed tbody tr").first.locator("td")
    cells = newest.all_text_contents()
    assert re.fullmatch(r"\d\d:\d\d:\d\d\.\d{3}", cells[0]) and cells[2].startswith("resnet50 #")
    left_ms = float(
        cells[4].replace("\u2212", "-")
    )  # of a millisecond, which a busy machine may use up
    assert cells[3] == "1.00" and left_ms <= 1
    assert cells[5] == "no plan in time" and "takes 2.6ms; the deadline is in 1ms" in cells[6]
    expect(page.locator("#misses-key")).to_contain_text("no plan in time")


# Real processes, but nothing depends on how fast they are: other tests beside this one do no harm.
def test_a_controller_that_goes_away_is_missed_and_found_again(
    cluster: Cluster, browser: Browser
) -> None:
    # Not the `page` fixture: Chromium itself calls each refused connection an error of the console.
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page = context.new_page()
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    try:
        page.goto(cluster.url)
        expect(page.locator("#connection")).to_have_text("connected")
        with Load(cluster.port, "first") as load:
            expect(page.locator("#tile-answered")).not_to_have_text("0", timeout=10_000)
            load.stop()
        cluster.kill()
        said = page.locator("#connection")
        expect(said).to_have_text(re.compile(r"no answer since \d\d:\d\d:\d\d"), timeout=10_000)
        assert "grayscale" in page.locator("main").evaluate("e => getComputedStyle(e).filter")
        cluster.restart()
        expect(said).to_have_text("connected", timeout=10_000)
        assert page.locator("main").evaluate("e => getComputedStyle(e).filter") == "none"
        expect(page.locator("#tile-answered")).to_have_text("0")
        with Load(cluster.port, "second"):
            expect(page.locator("#clients tbody td").first).to_have_text("second", timeout=10_000)
            expect(page.locator("#tile-answered")).not_to_have_text("0", timeout=10_000)
    finally:
        context.close()
    assert not errors


# ------------------------------------------------------------------------------- made-up data


def serve(page: Page, answer: dict[str, Any]) -> str:
    """Give the page's files and `answer` for every question; the address to open."""
    files = resources.files("slosched.daemon") / "web"
    kinds = {
        "html": "text/html",
        "css": "text/css",
        "js": "text/javascript",
        "svg": "image/svg+xml",
    }

    def fulfil(route: Route) -> None:
        name = route.request.url.split("?")[0].rpartition("/")[2] or "index.html"
        if name == "live.json":
            route.fulfill(json=answer)
        else:
            text = (files / name).read_text()
            route.fulfill(body=text, content_type=kinds[name.rpartition(".")[2]])

    page.route("**/*", fulfil)
    return "http://localhost:1/"


def crowded() -> dict[str, Any]:
    """An answer as large as they get: 300 GPUs, 150 names, every ring full."""
    from slosched.telemetry.recent import LastMinutes

    simulation, _ = simulated(gpus=300, models=150, copies=1)
    recent = LastMinutes()
    for i in range(KEPT_ACTIONS):
        kind = ActionType.LOAD_WEIGHTS if i % 9 == 0 else ActionType.INFER
        recent.add_action(action(i * MS // 8, (i % 7 + 1) * MS, kind=kind, number=i))
        recent.add_request(request(i * MS, (i % 40 + 1) * MS, code=(0, 4, 8)[i % 3], number=i))
    return told(simulation, recent, START_NS + 9 * S)


def poisoned(value: Any, key: str = "") -> Any:
    """`value` with every text in it replaced, where a peer could have said it."""
    if isinstance(value, dict):
        return {k: poisoned(v, k) for k, v in value.items()}
    if isinstance(value, list):
        return [poisoned(v, key) for v in value]
    return EVIL if isinstance(value, str) and key not in ("life", "next") else value


def test_every_text_is_shown_as_text(page: Page) -> None:
    page.goto(serve(page, poisoned(crowded())))
    expect(page.locator("#connection")).to_have_text("connected")
    for table in ("gpus", "models", "clients", "workers", "missed"):
        expect(page.locator(f"#{table} tbody")).to_contain_text(EVIL)
    page.locator("#timeline").press("ArrowLeft")
    assert page.locator("img, b").count() == 0
    assert page.title() == "slosched controller"


def test_the_largest_answer_stays_small_on_the_page(page: Page) -> None:
    answer = crowded()
    page.goto(serve(page, answer))
    expect(page.locator("#connection")).to_have_text("connected")
    expect(page.locator("#gpus-count")).to_contain_text(
        "256 of 300 GPUs; the first 64 in the table, 8 as timelines"
    )
    expect(page.locator("#models-count")).to_have_text("100 of 150 names, 150 instances")
    page.wait_for_timeout(3_000)
    elements = page.evaluate("document.getElementsByTagName('*').length")
    assert elements < 4_000
    page.wait_for_timeout(2_500)
    assert page.evaluate("document.getElementsByTagName('*').length") == elements
    heights = [page.locator(f"#{canvas}").bounding_box() for canvas in CANVASES]
    assert all(box is not None and box["height"] < 400 for box in heights)
    for width in (1280, 800):
        has_no_sideways_scroll(page, width)


def test_a_line_for_each_cascade_is_there_with_cascades_alone(page: Page) -> None:
    simulation, recent = simulated()
    plain = told(simulation, recent)
    stages = [
        {"stage": "light", "model": "small", "queued": 3, "gpus": 1, "gpus_resident": 4},
        {"stage": "heavy", "model": EVIL, "queued": 5, "gpus": None, "gpus_resident": 4},
    ]
    verdicts = {"accepted": 1200, "deferred": 0, "blind light": 7}
    shown = {"name": "pair", "ready": True, "threshold": 0.55, "stages": stages}
    page.goto(serve(page, plain | {"cascades": [shown | {"verdicts": verdicts}]}))
    expect(page.locator("#cascades li")).to_have_text(
        f"Cascade pair: threshold 0.550; light small: 3 queued, 1 GPU; heavy {EVIL}: 5 queued; "
        "1\u202f200 accepted, 7 blind light"
    )
    has_no_sideways_scroll(page, 800)
    page.unroute_all()
    page.goto(serve(page, plain))
    expect(page.locator("#connection")).to_have_text("connected")
    expect(page.locator("#cascades")).to_be_hidden()


def test_functions_and_slots_are_there_with_functions_alone(page: Page) -> None:
    simulation, recent = simulated()
    plain = told(simulation, recent)
    row = {
        "name": EVIL,
        "gpu": False,
        "queued": 3,
        "ready_on": 2,
        "calls": 1234,
        "failed": 5,
        "cold": 1,
        "wait_us": 1500,
        "run_us": 250.5,
        "suspended_us": 0,
    }
    host = {"host": True, "slots": 4, "running": 4, "suspended": 7, "outstanding": 6}
    gpus = [plain["gpus"][0] | host, *plain["gpus"][1:]]
    page.goto(serve(page, plain | {"functions_in_all": 60, "functions": [row], "gpus": gpus}))
    cells = page.locator("#functions tbody td")
    expect(cells).to_have_text(
        [EVIL, "host", "2", "3", "1\u202f234", "5", "1", "1.50", "0.25", "0.00"]
    )
    expect(page.locator("#functions-count")).to_have_text("1 of 60 functions")
    expect(page.locator("#gpus tbody tr").first).to_contain_text("(host, 4 slots)")
    expect(page.locator("#gpus tbody tr").first).to_contain_text("6, 7 suspended")
    has_no_sideways_scroll(page, 800)
    page.unroute_all()
    page.goto(serve(page, plain | {"functions_in_all": 60}))  # none has a name that fits the filter
    expect(page.locator("#functions tbody")).to_have_text("no function of that name is offered")
    page.unroute_all()
    page.goto(serve(page, plain))
    expect(page.locator("#connection")).to_have_text("connected")
    expect(page.locator("#functions-section")).to_be_hidden()


def test_the_page_follows_the_scheme_and_is_reached_by_keyboard(page: Page) -> None:
    page.goto(serve(page, crowded()))
    expect(page.locator("#connection")).to_have_text("connected")
    background = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(background)
    page.emulate_media(color_scheme="dark")
    assert page.evaluate(background) != light
    reached = []
    for _ in range(18):
        page.keyboard.press("Tab")
        reached.append(
            page.evaluate("document.activeElement.id || document.activeElement.ariaLabel")
        )
    wanted = [
        "span",
        "rates",
        "misses",
        "latency",
        "gpus-filter",
        "Table of GPUs",
        "window",
        "pause",
    ]
    assert [name for name in dict.fromkeys(reached) if name in wanted] == wanted
    assert {"timeline", "models-filter", "Table of workers"} <= set(reached)
    page.locator("#rates").press("ArrowLeft")
    expect(page.locator("#rates-key")).to_contain_text(re.compile(r"\d\d:\d\d:\d\d:.*offered"))
    for canvas in CANVASES:
        label = page.locator(f"#{canvas}").get_attribute("aria-label")
        assert label and len(label) > 30
    for field in page.locator("input, select").all():
        assert field.evaluate("e => e.labels.length") == 1
