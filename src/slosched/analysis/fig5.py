"""Figure 5: goodput and latency of one GPU under closed loops, for several SLOs (OSDI'20, §6.1).

One run for each SLO, and for each scheduler that is compared. The published ten minutes of each run
count, which end one minute before its last answer. Goodput is what was in time per second; latency
quantiles are of *all* requests, refused and failed ones with the time until their answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from slosched.analysis.drawn import Drawn, columns_text, plain
from slosched.analysis.runs import policy_of, read_requests
from slosched.analysis.tails import named_quantiles, tail, tail_axis
from slosched.errors import InvalidConfig
from slosched.units import NS_PER_MS, NS_PER_S, format_duration

WINDOW_NS = 600 * NS_PER_S
MARGIN_NS = 60 * NS_PER_S
_COLUMNS = ("t", "result", "latency", "deadline", "deadline_met")
#: A run of exactly the wanted length has its first and last answer a little nearer than that.
_ENOUGH = 0.97


@dataclass(frozen=True)
class Bar:
    """One run. Rates are per second of the window, `latency_ms` names quantiles of all requests."""

    run: str
    policy: str
    slo_ns: int
    requests: int
    throughput_rps: float
    goodput_rps: float
    latency_ms: dict[str, float]
    nines: list[float]
    quantiles_ms: list[float]


def plot_fig5(
    run_dirs: Sequence[Path],
    out: Path,
    *,
    window_ns: int = WINDOW_NS,
    margin_ns: int = MARGIN_NS,
) -> Drawn:
    """Draw the runs into the directory `out` as fig5.png and .pdf.

    The `window_ns` of each run count that end `margin_ns` before its last answer. Raises
    InvalidConfig if a run is shorter or has no request log, MalformedLog, MissingPackage.
    """
    if not run_dirs:
        raise InvalidConfig("nothing to draw: name at least one run directory")
    bars = [_measure(Path(path), window_ns, margin_ns) for path in run_dirs]
    bars.sort(key=lambda bar: bar.slo_ns)  # policies stay in the order in which they were named
    return Drawn(_draw(bars, out), _numbers(bars, window_ns), _text(bars))


def _measure(path: Path, window_ns: int, margin_ns: int) -> Bar:
    log = read_requests(path, only=_COLUMNS)
    end = int(log["t"].max()) - margin_ns
    start = end - window_ns
    span_ns = int(log["t"].max() - log["t"].min())
    if span_ns < _ENOUGH * (window_ns + margin_ns):
        raise InvalidConfig(
            f"{path} lasted {format_duration(span_ns)}; the figure takes "
            f"{format_duration(window_ns)} that end {format_duration(margin_ns)} before its end. "
            "For a short run give --window and --margin, for example --window 20s --margin 2s"
        )
    inside = (log["t"] >= start) & (log["t"] < end)
    served = inside & (log["result"] == 0)
    latency_ms = log["latency"][inside] / NS_PER_MS
    if not len(latency_ms):
        raise InvalidConfig(f"{path} answered nothing in the window; give another --margin")
    seconds = window_ns / NS_PER_S
    nines, quantiles = tail(latency_ms)
    return Bar(
        run=str(path),
        policy=policy_of(path),
        slo_ns=int(np.median(log["deadline"][inside])),
        requests=len(latency_ms),
        throughput_rps=int(np.count_nonzero(served)) / seconds,
        goodput_rps=int(np.count_nonzero(served & (log["deadline_met"] == 1))) / seconds,
        latency_ms=named_quantiles(latency_ms),
        nines=nines,
        quantiles_ms=quantiles,
    )


def _policies(bars: Sequence[Bar]) -> list[str]:
    return list(dict.fromkeys(bar.policy for bar in bars))


def _slos(bars: Sequence[Bar]) -> list[int]:
    return sorted({bar.slo_ns for bar in bars})


# ------------------------------------------------------------------------------------- drawing


def _draw(bars: Sequence[Bar], out: Path) -> list[Path]:
    from slosched.analysis import style

    policies = _policies(bars)
    with style.look():
        width = max(9.0, 3.6 * len(policies))
        figure = style.Figure(figsize=(width, 6.6), layout="constrained")
        figure.get_layout_engine().set(h_pad=0.08, w_pad=0.08)
        places = [f"tail {index}" for index in range(len(policies))]
        axes = figure.subplot_mosaic([["goodput"] * len(places), places], height_ratios=[1, 1.15])
        _draw_goodput(axes["goodput"], bars)
        most = max(max(bar.quantiles_ms[-1], bar.slo_ns / NS_PER_MS) for bar in bars)
        # Refusals take next to no time; what is of interest begins with the medians.
        least = min(bar.latency_ms["p50"] for bar in bars) / 4
        least = min(least, 0.8 * min(bar.slo_ns for bar in bars) / NS_PER_MS)
        for place, policy in zip(places, policies, strict=True):
            _draw_tails(axes[place], bars, policy, legend=place == places[0])
            axes[place].set_xlim(max(least, 0.05), most * 1.4)
        return style.save(figure, out, "fig5")


def _draw_goodput(ax: Any, bars: Sequence[Bar]) -> None:
    from slosched.analysis.style import COLOURS

    policies, slos = _policies(bars), _slos(bars)
    width = 0.8 / len(policies)
    for series, policy in enumerate(policies):
        chosen = [bar for bar in bars if bar.policy == policy]
        places = [
            slos.index(bar.slo_ns) + (series - (len(policies) - 1) / 2) * width for bar in chosen
        ]
        colour = COLOURS[series % len(COLOURS)]
        heights = [bar.goodput_rps for bar in chosen]
        drawn = ax.bar(
            places, heights, width * 0.9, color=colour, label=policy or "goodput", zorder=3
        )
        if len(policies) * len(slos) <= 24:
            ax.bar_label(drawn, fmt="{:.0f}", padding=2, fontsize=8)
        # What was served too late stands above in outline.
        served = [bar.throughput_rps for bar in chosen]
        ax.bar(places, served, width * 0.9, fill=False, edgecolor=colour, linewidth=0.9, zorder=2)
    ax.set_xticks(range(len(slos)), [format_duration(slo) for slo in slos])
    ax.set_ylim(0, max(1.0, 1.28 * max(bar.throughput_rps for bar in bars)))
    ax.set_xlabel("SLO")
    ax.set_ylabel("Requests/s")
    ax.set_title("Goodput; in outline what was served, in time or late")
    ax.grid(visible=False, axis="x")
    if len(policies) > 1:
        ax.legend(loc="upper left", ncols=len(policies))


def _draw_tails(ax: Any, bars: Sequence[Bar], policy: str, *, legend: bool) -> None:
    from slosched.analysis.style import FuncFormatter, LogLocator, NullLocator, shade

    slos = _slos(bars)
    chosen = [bar for bar in bars if bar.policy == policy]
    for bar in chosen:
        colour = shade(slos.index(bar.slo_ns), len(slos))
        label = format_duration(bar.slo_ns)
        ax.plot(bar.quantiles_ms, bar.nines, color=colour, label=label, linewidth=1.7)
        ax.axvline(bar.slo_ns / NS_PER_MS, color=colour, linewidth=0.9, linestyle=":", zorder=1)
    ax.set_xscale("log")
    ax.xaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    tail_axis(ax, max(bar.nines[-1] for bar in bars))
    ax.set_xlabel("Latency of all requests (ms); SLOs dotted")
    ax.set_title(policy or "Latency")
    if legend:  # the others have the same colours
        ax.legend(loc="upper left", title="SLO", fontsize=8, title_fontsize=8)


# --------------------------------------------------------------------------------------- numbers


def _numbers(bars: Sequence[Bar], window_ns: int) -> dict[str, Any]:
    return {"window_ns": window_ns, "runs": [plain(asdict(bar)) for bar in bars]}


def _text(bars: Sequence[Bar]) -> str:
    named = ("p50", "p99", "p99.9", "max")
    rows = [
        (
            bar.policy or "-",
            format_duration(bar.slo_ns),
            bar.requests,
            bar.goodput_rps,
            bar.throughput_rps,
            *(bar.latency_ms.get(name) for name in named),
        )
        for bar in bars
    ]
    headings = ("scheduler", "SLO", "requests", "goodput r/s", "served r/s")
    return columns_text((*headings, *(f"{name} ms" for name in named)), rows)
