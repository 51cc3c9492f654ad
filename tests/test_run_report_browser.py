"""The page of `slosched report` in a browser: every figure is there, fits can be read, and asks for nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Page

from browser import browser, page
from report_runs import mix_run, sweep_run
from slosched.analysis.report import write_report

__all__ = ["browser", "page"]
pytestmark = pytest.mark.browser

#: Figure -> texts of its axes and titles that have to be there.
AXES = {
    "sweep": [
        "SLO multiplier (times b1)",
        "Satisfaction (share of all requests)",
        "In time (requests/s)",
    ],
    "over-time": ["requests/s", "ms", "Time since the first request (s)"],
    "lost": ["requests/s", "Time since the first request (s)"],
    "latency": ["Latency of what was served (ms); SLO dotted", "Percentile of requests", "99.9"],
    "errors": ["Size of the error (ms)", "Percentile of its side"],
    "batches": ["Batch size (requests in one inference)", "Share of requests (%)"],
    "utilisation": ["Time since the first request (s)", "W0-GPU0", "W1-GPU0"],
    "timeline": ["since", "W0-GPU0", "W1-GPU0"],
}
_LEAST_PX = 9.0

#: For each figure: its box, and of its texts the content, size on the screen and whether it is cut off.
_LOOK = """() => [...document.querySelectorAll('figure')].map(figure => {
  const svg = figure.querySelector('svg'), box = svg.getBoundingClientRect();
  const texts = [...svg.querySelectorAll('text')].map(text => {
    const m = text.getScreenCTM(), t = text.getBoundingClientRect();
    return {said: text.textContent, px: parseFloat(getComputedStyle(text).fontSize) * Math.hypot(m.a, m.b),
      cut: t.left < box.left - 2 || t.right > box.right + 2 || t.top < box.top - 2 || t.bottom > box.bottom + 2,
      colour: getComputedStyle(text).fill};
  });
  return {id: figure.id, left: box.left, right: box.right, width: box.width, height: box.height, texts,
    caption: figure.querySelector('figcaption').textContent, label: svg.getAttribute('aria-label'),
    shapes: svg.querySelectorAll('path, rect, use').length};
})"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The reports of a sweep, of an overloaded mix with loads, and of both together."""
    base = tmp_path_factory.mktemp("reports")
    runs = {"sweep": sweep_run(base / "sweep"), "mix": mix_run(base / "mix")}
    written = {name: write_report([run]).path for name, run in runs.items()}
    return written | {"both": write_report(list(runs.values()), base / "both.html").path}


@pytest.fixture
def shown(page: Page, pages: dict[str, Path]) -> Callable[[str, int], list[dict[str, Any]]]:
    """Opens a report in a window of some width, and returns what its figures look like there."""

    def show(name: str, width: int) -> list[dict[str, Any]]:
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.set_viewport_size({"width": width, "height": 900})
        page.goto(pages[name].as_uri())
        assert asked == [pages[name].as_uri()], "the page asked for more than itself"
        look: list[dict[str, Any]] = page.evaluate(_LOOK)
        return look

    return show


@pytest.mark.parametrize("width", [1280, 800])
@pytest.mark.parametrize("name", ["sweep", "mix", "both"])
def test_figures_are_there_fit_and_can_be_read(
    page: Page, shown: Callable[[str, int], list[dict[str, Any]]], name: str, width: int
) -> None:
    figures = shown(name, width)
    wanted = {"sweep": ["sweep"], "mix": [], "both": ["r1-sweep"]}[name]
    prefixes = ["r1-", "r2-"] if name == "both" else [""]
    wanted += [f"{prefix}{key}" for prefix in prefixes for key in AXES if key != "sweep"]
    assert sorted(figure["id"] for figure in figures) == sorted(wanted)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for figure in figures:
        assert figure["width"] > 0.8 * min(width, 960) and figure["height"] > 80, figure["id"]
        assert figure["left"] >= 0 and figure["right"] <= width, figure["id"]
        assert figure["shapes"] > 10 and figure["label"] and len(figure["caption"]) > 20
        said = " | ".join(text["said"] for text in figure["texts"])
        for axis in _axes(figure["id"]):
            assert axis in said, (figure["id"], axis, said)
        small = {text["said"]: text["px"] for text in figure["texts"] if text["px"] < _LEAST_PX}
        assert not small, (figure["id"], small)
        cut = [text["said"] for text in figure["texts"] if text["cut"]]
        assert not cut, (figure["id"], cut)


def _axes(figure_id: str) -> list[str]:
    """For a run among several, the id has a prefix: r1-sweep."""
    return AXES[figure_id if figure_id in AXES else figure_id.partition("-")[2]]


def test_the_timeline_shows_what_happened(
    page: Page, shown: Callable[[str, int], list[dict[str, Any]]]
) -> None:
    shown("mix", 1280)
    predicted, actual = (page.locator(f"#timeline .{kind}").count() for kind in ("due", "did"))
    assert predicted > 30 and actual > 30
    titles = page.locator("#timeline g > title").all_text_contents()
    assert any(title.startswith("load of model") and "predicted" in title for title in titles)
    assert any("batch" in title and "took" in title and "ended" in title for title in titles)
    # A predicted box stands above the actual one of the same action.
    boxes = page.evaluate(
        "() => [...document.querySelectorAll('#timeline g')].map(g => ['.due', '.did'].map("
        "kind => g.querySelector(kind)?.getBoundingClientRect().top)).filter(([a, b]) => a && b)"
    )
    assert len(boxes) > 20 and all(above < below for above, below in boxes)
    reasons = page.locator("table", has_text="what it means").inner_text()
    assert "timed out" in reasons or "could not start in time" in reasons


def test_the_page_is_dark_where_the_reader_wants_it(
    page: Page, shown: Callable[[str, int], list[dict[str, Any]]]
) -> None:
    def light(colour: str) -> float:
        numbers = colour.partition("(")[2].rstrip(")").split(",")
        return sum(float(number) for number in numbers[:3]) / 3

    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        figures = shown("sweep", 1280)
        paper = light(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        assert (paper > 200) == (scheme == "light")
        for figure in figures:
            if figure["id"] != "timeline":  # whose texts stand on coloured boxes
                assert all(abs(light(text["colour"]) - paper) > 80 for text in figure["texts"]), (
                    figure["id"]
                )
    page.emulate_media(color_scheme="dark", media="print")
    assert light(page.evaluate("getComputedStyle(document.body).backgroundColor")) > 200


def test_the_manifest_opens(page: Page, shown: Callable[[str, int], list[dict[str, Any]]]) -> None:
    shown("mix", 800)
    assert not page.locator("details pre").first.is_visible()
    page.locator("summary").first.click()
    assert '"kind": "simulation"' in page.locator("details pre").first.inner_text()
    assert page.evaluate("document.documentElement.scrollWidth") <= 800
