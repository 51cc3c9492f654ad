"""The page of a report: one HTML file with everything in it, no script, and nothing from any network."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from slosched.analysis.report_figures import Figure
from slosched.units import format_duration

#: (headings, rows, which columns are text), as `table` takes them.
Content = tuple[Sequence[str], list[list[str]], Sequence[int]]
Titled = tuple[str, str, Content]

#: The page's colours, light and dark. Texts on a colour (--t) are what is legible there.
_LIGHT = (
    "--paper:#fff;--ink:#222;--pale:#737373;--grid:#e4e4e4;--soft:#f5f5f3;--bad:#b3261e;"
    "--c0:#0072B2;--c1:#D55E00;--c2:#009E73;--c3:#CC79A7;--c4:#E69F00;--c5:#56B4E9;"
    "--t0:#fff;--t1:#fff;--t2:#fff;--t3:#111;--t4:#111;--t5:#111;--other:#a0a0a0;--link:#0a5a8c"
)
_DARK = (
    "--paper:#16181b;--ink:#e6e6e3;--pale:#9a9a9a;--grid:#33363a;--soft:#1f2226;--bad:#ff8a7a;"
    "--c0:#4aa8e0;--c1:#ff8a3d;--c2:#3ecf9f;--c3:#e39cc4;--c4:#f2b632;--c5:#8fd0f5;"
    "--t0:#111;--t1:#111;--t2:#111;--t3:#111;--t4:#111;--t5:#111;--other:#7d7d7d;--link:#7cc4ef"
)
_MODELS = "".join(
    f".m{n} rect{{fill:var(--c{n});stroke:var(--c{n})}}svg.made .m{n} .in{{fill:var(--t{n})}}"
    f".k{n}{{background:var(--c{n})}}"
    for n in range(6)
)
_CSS = f"""
:root{{color-scheme:light dark;{_LIGHT};--font:system-ui,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}}
@media screen and (prefers-color-scheme:dark){{:root{{{_DARK}}}}}
*{{box-sizing:border-box}}
body{{margin:0 auto;max-width:1000px;padding:20px 16px 60px;background:var(--paper);color:var(--ink);
font:15px/1.5 var(--font)}}
@media(max-width:840px){{body{{padding:12px 10px 40px}}}}
h1{{font-size:26px;line-height:1.2;margin:8px 0 4px}}h2{{font-size:21px;margin:44px 0 6px;
border-bottom:1px solid var(--grid);padding-bottom:4px;overflow-wrap:anywhere}}
h3{{font-size:16px;margin:30px 0 2px}}p{{margin:4px 0 8px}}a{{color:var(--link)}}
.of{{color:var(--pale);overflow-wrap:anywhere}}
nav{{font-size:14px;margin:10px 0;display:flex;flex-wrap:wrap;gap:2px 16px}}
.cards{{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:10px;margin:14px 0}}
.card{{background:var(--soft);border-radius:6px;padding:9px 12px}}
.card b{{display:block;font-size:22px;line-height:1.25;font-weight:650}}
.card span{{font-size:13px;color:var(--pale);display:block;line-height:1.35}}
.notice{{border-left:4px solid var(--c4);background:var(--soft);padding:6px 12px;margin:8px 0}}
figure{{margin:0 0 8px}}figcaption{{margin:2px 0 8px;max-width:860px}}
svg{{display:block;width:100%;height:auto}}
svg.drawn{{max-width:920px}}svg.drawn *{{stroke-linejoin:round;stroke-linecap:butt}}
svg.made{{max-width:968px;font-family:var(--font)}}svg.made text{{fill:var(--ink)}}
svg.made .tick,svg.made .axis{{fill:var(--pale)}}svg.made .axis{{fill:var(--ink)}}
svg.made .grid{{stroke:var(--grid);fill:none}}svg.made .empty{{fill:var(--soft)}}
svg.made .c0,svg.made .c1{{shape-rendering:crispEdges}}
svg.made .c0{{fill:var(--c0)}}svg.made .c1{{fill:var(--c1)}}
svg.made .did{{stroke:none}}svg.made .due{{fill-opacity:.3;stroke-width:.8}}
svg.made .late{{stroke:var(--bad);stroke-width:2}}
svg.made .partly{{stroke:var(--bad);stroke-width:1.6;stroke-dasharray:3 2}}
svg.made .fail{{fill:var(--bad);font-weight:700}}svg.made g:hover .did{{opacity:.75}}
{_MODELS}
.mx rect{{fill:var(--other);stroke:var(--other)}}svg.made .mx .in{{fill:#111}}.kx{{background:var(--other)}}
.key{{font-size:13px;margin:2px 0 6px}}.key span{{margin-right:14px;white-space:nowrap}}
.key i{{display:inline-block;width:12px;height:12px;border-radius:2px;margin-right:5px;vertical-align:-1px}}
.key i.p{{opacity:.4;height:7px;background:var(--ink)}}.key i.a{{background:var(--ink)}}
.key i.l{{border:2px solid var(--bad)}}.key b{{color:var(--bad);margin-right:5px}}
.wide{{overflow-x:auto;margin:6px 0 14px}}
table{{border-collapse:collapse;font-size:14px;font-variant-numeric:tabular-nums}}
th,td{{padding:3px 12px 3px 0;text-align:right;white-space:nowrap;border-bottom:1px solid var(--grid)}}
th{{font-weight:600;vertical-align:bottom}}th.t,td.t{{text-align:left}}td.w{{white-space:normal;min-width:240px}}
details{{margin:8px 0}}summary{{cursor:pointer;font-weight:600}}
pre{{background:var(--soft);padding:10px;overflow-x:auto;font-size:12px;line-height:1.4;white-space:pre-wrap;
overflow-wrap:anywhere}}
@media print{{body{{max-width:none;padding:0;font-size:11pt}}table{{font-size:8.5pt}}th,td{{padding-right:8px}}
nav{{display:none}}
figure,table,.cards,.notice{{break-inside:avoid}}h2,h3{{break-after:avoid}}h2.run{{break-before:page}}
*{{-webkit-print-color-adjust:exact;print-color-adjust:exact}}.wide{{overflow:visible}}}}
"""


def page(title: str, body: Iterable[str]) -> Iterable[str]:
    """The parts of the whole document."""
    yield (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        "style-src 'unsafe-inline'; img-src data:\">\n"
        f"<title>{escape(title)}</title>\n<style>{_CSS}</style>\n</head>\n<body>\n"
    )
    for part in body:
        yield part
        yield "\n"
    yield "</body>\n</html>\n"


def figure(shown: Figure) -> str:
    """A figure under its title, with the caption between the two."""
    return (
        f'<figure id="{shown.key}"><h3>{escape(shown.title)}</h3>'
        f"<figcaption>{shown.caption}</figcaption>{shown.svg}</figure>"
    )


def table(
    headings: Sequence[str], rows: Iterable[Sequence[str]], text: Sequence[int] = (0,)
) -> str:
    """A table; the columns in `text` are text and stand to the left, the others are numbers."""

    def row(cells: Sequence[str], tag: str) -> str:
        inside = "".join(
            f"<{tag}{_kind(cell, place in text)}>{escape(cell)}</{tag}>"
            for place, cell in enumerate(cells)
        )
        return f"<tr>{inside}</tr>"

    body = "".join(row(cells, "td") for cells in rows)
    return f'<div class="wide"><table><thead>{row(headings, "th")}</thead><tbody>{body}</tbody></table></div>'


def _kind(cell: str, is_text: bool) -> str:
    if not is_text:
        return ""
    return ' class="t w"' if len(cell) > 40 else ' class="t"'


def time(value_ns: float) -> str:
    """A human-readable duration, with a space before its unit."""
    text = format_duration(value_ns)
    digits = text.rstrip("nsumµ")
    return f"{digits} {text[len(digits) :]}".strip()


def cards(pairs: Iterable[tuple[str, str]]) -> str:
    """Large numbers, each with what it is."""
    inside = "".join(
        f'<div class="card"><b>{escape(number)}</b><span>{escape(what)}</span></div>'
        for number, what in pairs
    )
    return f'<div class="cards">{inside}</div>'
