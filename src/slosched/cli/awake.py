"""`slosched awake`: keep this host's cores from halting while deadlines are to be met."""

from __future__ import annotations

from typing import Annotated

import typer

from slosched.cli.output import say
from slosched.cli.stopping import stopped_by_signals
from slosched.cli.values import whole_numbers

_Cores = Annotated[
    str, typer.Option(help="Which cores, as 0-7 or 0,2,4; all: every core that may be used.")
]
_Seconds = Annotated[
    float,
    typer.Option(min=0.0, help="End after this many seconds. Default 0: on Ctrl-C or SIGTERM."),
]


def awake(cores: _Cores = "all", seconds: _Seconds = 0.0) -> None:
    """Keep cores awake, so that a process that is woken there runs at once. Ends on Ctrl-C.

    In a virtual machine an idle core halts, and waking it takes a tenth of a millisecond and sometimes
    several: more than a request spends in the scheduler. This puts a loop in the kernel's idle class on
    each core; the loop yields to any other process that wants the core. It costs power, and speed where
    two cores share one physical core. `slosched doctor` measures how late timers are with and without
    it.

    \b
    Examples:
      slosched awake                     # beside controller, workers and clients, on each host
      slosched awake --cores 0-7
    """
    from slosched.clock import now_ns
    from slosched.daemon.awake import keep_awake
    from slosched.daemon.housekeeping import usable_cores

    chosen = usable_cores() if cores == "all" else whole_numbers("--cores", cores, least=0)
    end_ns = now_ns() + round(seconds * 1e9) if seconds else 2**63
    with stopped_by_signals() as stopping:
        say(f"slosched: keeping {len(chosen)} core(s) awake")
        keep_awake(chosen, until=lambda: stopping() or now_ns() >= end_ns)
