"""Headless Chromium for the tests of pages. Import `page` into a test module and mark it `browser`.

Chromium is the machine's own (`chromium` or `google-chrome` on the PATH). Without one these tests are
skipped, except where SLOSCHED_BROWSER_TESTS=required says that they must run (.ci/run).
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

#: Nothing of it may look for a network, and a container has no sandbox of its own.
_ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
_WITHIN_MS = 20_000


def chromium() -> str | None:
    """The path of the machine's Chromium, None without one."""
    names = ("chromium", "chromium-browser", "google-chrome")
    return next((path for name in names if (path := shutil.which(name))), None)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path = chromium()
    if path is None:
        if os.environ.get("SLOSCHED_BROWSER_TESTS") == "required":
            pytest.fail(
                "no Chromium on the PATH, and SLOSCHED_BROWSER_TESTS says that it is needed"
            )
        pytest.skip("no Chromium on the PATH; install the package chromium")
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=path, args=_ARGUMENTS)
        yield started
        started.close()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A page of a window of 1280 by 900; an error in the page's own script fails the test at its end."""
    errors: list[str] = []
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    context.set_default_timeout(_WITHIN_MS)
    opened = context.new_page()
    opened.on("pageerror", lambda error: errors.append(str(error)))
    opened.on("console", lambda said: errors.append(said.text) if said.type == "error" else None)
    yield opened
    context.close()
    assert not errors, errors
