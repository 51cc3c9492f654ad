"""A report of runs: one HTML page, made from the files of their directories alone.

The numbers come from `report_data` and `report_actions`, figures from `report_figures` and
`report_timeline`, the page's form from `report_page`; the words are here and in `report_words`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import Any

import msgspec

from slosched.analysis import report_words as words
from slosched.analysis.fig10 import EXACT
from slosched.analysis.report_data import RunReport, Say, read_report
from slosched.analysis.report_page import cards, figure, page, table
from slosched.analysis.runs import distinct_names
from slosched.errors import InvalidConfig, OutputExists
from slosched.output_files import check_output, utf8, utf8_document, write_file

#: Default place of the page within the first run directory.
FILE_NAME = "report.html"
#: A manifest that is longer is cut: it may list thousands of models.
_MANIFEST_CHARACTERS = 60_000


@dataclass(frozen=True)
class Written:
    """The page that was written: its size, the runs in it, and the ids of its figures."""

    path: Path
    bytes: int
    runs: list[str]
    figures: list[str]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**vars(self), "path": str(self.path)}


def write_report(
    run_dirs: Sequence[Path],
    out: Path | None = None,
    *,
    window: tuple[int, int] | None = None,
    force: bool = False,
    say: Say | None = None,
) -> Written:
    """Write the report of one run or several to `out`, else report.html in the first directory.

    `window`, (start, length) in ns after a run's first request, is what its timeline shows; `say` is called
    with what is being done. Raises InvalidConfig if a directory holds no run or no request or the page cannot
    be written, OutputExists if the file is there and `force` is not given, MalformedLog for a
    damaged log, MissingPackage without matplotlib.
    """
    from slosched.analysis import style  # says early if there is no matplotlib

    del style
    say = say or (lambda text: None)
    if not run_dirs:
        raise InvalidConfig("nothing to report: name at least one run directory")
    for run_dir in run_dirs:
        if not run_dir.is_dir():
            what = "is not a directory" if run_dir.exists() else "does not exist"
            raise InvalidConfig(f"{run_dir} {what}; give the directory of a run")
    path = out or run_dirs[0] / FILE_NAME
    check_output(path)  # before the work
    if path.exists() and not force:
        raise OutputExists(
            f"{path} exists and is not overwritten; choose another --out, or replace it: --force"
        )
    reports = [
        replace(read_report(run_dir, window=window, say=say), name=name)
        for run_dir, name in zip(run_dirs, distinct_names(run_dirs), strict=True)
    ]
    say("drawing")
    figures: list[str] = []
    title = "Report of " + ", ".join(report.name for report in reports)
    text = "".join(page(title, _body(title, reports, figures)))
    say(f"writing {path}")
    data = utf8(text).encode()
    write_file(path, data)
    return Written(path, len(data), [str(run_dir) for run_dir in run_dirs], figures)


# ------------------------------------------------------------------------------------------ body


def _body(title: str, reports: Sequence[RunReport], figures: list[str]) -> Iterator[str]:
    yield f"<h1>{escape(title)}</h1>"
    if len(reports) > 1:
        yield from _compared(reports, figures)
    for place, report in enumerate(reports):
        yield from _run(report, f"r{place + 1}" if len(reports) > 1 else "", figures)


def _compared(reports: Sequence[RunReport], figures: list[str]) -> Iterator[str]:
    yield "<h2>The runs side by side</h2>"
    yield table(*words.runs_table(reports))
    sweeps = [report for report in reports if report.is_sweep]
    if len(sweeps) > 1:
        shown = words.compared_figure(sweeps)
        figures.append(shown.key)
        yield figure(shown)


def _run(report: RunReport, prefix: str, figures: list[str]) -> Iterator[str]:
    name = escape(report.name)
    if prefix:
        yield f'<h2 class="run" id="{prefix}">{name}</h2>'
    about = " · ".join(escape(text) for text in words.about(report) if text)
    yield f'<p class="of">{about}</p>'
    for notice in report.notices:
        yield f'<p class="notice">{escape(notice[:1].upper() + notice[1:])}.</p>'
    yield cards(words.headline(report))
    yield f"<p>{escape(words.judged(report))}</p>"
    drawn = {shown.key: shown for shown in words.figures(report, f"{prefix}-" if prefix else "")}
    figures += drawn
    links = "".join(f'<a href="#{key}">{escape(shown.title)}</a>' for key, shown in drawn.items())
    yield f"<nav>{links}</nav>"
    tables = words.tables(report)
    for key, shown in drawn.items():
        yield figure(shown)
        for heading, note, content in tables.pop(key.removeprefix(f"{prefix}-"), ()):
            yield _titled(heading, note, content)
    for left in tables.values():
        for heading, note, content in left:
            yield _titled(heading, note, content)
    if report.actions is not None and all(side.side == EXACT for side in report.actions.errors):
        yield "<p>Every prediction came true to the nanosecond: the GPUs were simulated without noise.</p>"
    yield "<h3>Manifest</h3>"
    for file, document in report.manifests:
        yield _manifest(file, document)
    if not report.manifests:
        yield "<p>There is none.</p>"


def _titled(heading: str, note: str, content: tuple[Any, ...]) -> str:
    paragraph = f"<p>{escape(note)}</p>" if note else ""
    return f"<h3>{escape(heading)}</h3>{paragraph}{table(*content)}" if heading else table(*content)


def _manifest(name: str, document: Mapping[str, Any]) -> str:
    text = msgspec.json.format(msgspec.json.encode(utf8_document(document)), indent=2).decode()
    cut = ""
    if len(text) > _MANIFEST_CHARACTERS:
        cut = f"\n… {len(text) - _MANIFEST_CHARACTERS:,} characters more in the file"
        text = text[:_MANIFEST_CHARACTERS]
    if not document:
        text = "(empty or damaged)"
    return f"<details><summary>{escape(name)}</summary><pre>{escape(text + cut)}</pre></details>"
