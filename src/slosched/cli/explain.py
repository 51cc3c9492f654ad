"""`slosched explain`: why a request of a finished run ended as it did."""

from __future__ import annotations

from pathlib import Path
from textwrap import shorten
from typing import Annotated

import typer

from slosched.cli.ask import Json
from slosched.cli.output import print_json, say, table_text
from slosched.codes import code_name

_REASON_CHARACTERS = 70

_RunDir = Annotated[
    Path,
    typer.Argument(
        metavar="RUN_DIR",
        help="The controller's run directory, or that of a simulation.",
        show_default=False,
    ),
]
_Request = Annotated[
    int | None,
    typer.Argument(
        metavar="[REQUEST]",
        help="The client's number of the request, the column request_id of the logs. Left out: how many "
        "requests had which reason, with one request of each.",
        show_default=False,
    ),
]


def explain(run_dir: _RunDir, request: _Request = None, *, json: Json = False) -> None:
    """Say why a request was refused, failed or late: the reason, what was predicted, what happened.

    Works on finished and on running runs, live and simulated. Each request that the controller did not
    answer in time has its reason and predictions in request_reasons.jsonl. If two clients used the same
    number, each such request is explained. docs/why_refused.md has an example.

    \b
    Examples:
      slosched explain slosched-runs/20260101T120000Z-controller
      slosched explain run-n12-r600 1741
    """
    from slosched.analysis.explain import explain as explained
    from slosched.analysis.explain import printable, summary

    if request is not None:
        requests = explained(run_dir, request)
        if json:
            print_json([vars(each) for each in requests])
            return
        say("\n\n".join("\n".join(each.lines) for each in requests))
        return
    reasons = summary(run_dir)
    if json:
        print_json([vars(each) for each in reasons])
        return
    if not reasons:
        say("every request was answered in time by the controller")
        return
    rows = [
        (
            each.code,
            code_name(each.code) if each.code else "answered, but late",
            f"{each.requests:,}",
            each.example,
            shorten(printable(each.reason), _REASON_CHARACTERS, placeholder=" ...") or "-",
        )
        for each in reasons
    ]
    say(table_text(("code", "meaning", "requests", "for example", "its reason"), rows))
    say(f"`slosched explain {run_dir} {reasons[0].example}` says more about that request")
