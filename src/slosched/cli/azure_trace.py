"""`slosched azure-trace`: write a synthetic trace in the form of the Azure Functions data set."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from slosched.cli.output import say
from slosched.workloads.azure_trace import DAY_MINUTES, SYNTHETIC_ROWS, TRACES

_Out = Annotated[
    Path, typer.Option(help="Directory for the file; made if need be. Nothing is overwritten.")
]
_Rows = Annotated[int, typer.Option(min=1, help="Functions in the trace.")]
_Minutes = Annotated[int, typer.Option(min=1, max=DAY_MINUTES, help="Minutes from midnight on.")]
_Trace = Annotated[
    int, typer.Option(min=1, max=TRACES, help="Which file of the data set it stands for.")
]
_Seed = Annotated[
    int | None, typer.Option(min=0, help="Chooses the trace. Default: the number of the file.")
]


def azure_trace(
    out: _Out,
    rows: _Rows = SYNTHETIC_ROWS,
    minutes: _Minutes = DAY_MINUTES,
    trace: _Trace = 1,
    seed: _Seed = None,
) -> None:
    """Write a synthetic trace of function invocations for the azure workloads.

    It has the form of a file of the Azure Functions data set and statistics like its: a few functions
    with nearly all calls, most of them rare; a daily swing, bursts and timers. The mean is 32 calls a
    minute for each function, which at the scale of `azure 8` makes 18000 functions send 9,600/s. A
    seed gives the same bytes always. Without AZURE_TRACE_DIR the azure workloads replay the default.

    \b
    Examples:
      slosched azure-trace --out traces
      slosched azure-trace --rows 500 --minutes 60 --seed 7 --out traces
      AZURE_TRACE_DIR=traces slosched client azure 6
    """
    from slosched.workloads.azure_synthetic import write_trace

    path = write_trace(out, trace, rows=rows, minutes=minutes, seed=trace if seed is None else seed)
    say(f"wrote {path}: {rows} functions, {minutes} minutes")
