"""`slosched status --watch`: ask a controller again and again, and show what happened in between."""

from __future__ import annotations

import asyncio
import json
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any

import typer

from slosched.cli.rates import rates_between
from slosched.cli.watch_text import watch_text
from slosched.clock import now_ns
from slosched.errors import ConnectionLost, MalformedMessage, PeerUnreachable, RequestFailed
from slosched.units import NS_PER_S

if TYPE_CHECKING:
    from slosched.clients.aio import AsyncClient

#: Time for an answer; an interval if that is longer.
_ANSWER_WITHIN_S = 1.0
_UNANSWERED = (ConnectionLost, MalformedMessage, PeerUnreachable, RequestFailed)


@dataclass
class Look:
    """What is known after one question. `report` is the last that came; `rates` of the interval before it.

    `silent_since_ns` is 0 while the controller answers, else when it was first asked in vain; `why` says
    what was found instead of an answer. Times on this machine's clock.
    """

    report: dict[str, Any] = field(default_factory=dict)
    rates: dict[str, Any] | None = None
    silent_since_ns: int = 0
    why: str = ""

    def silence(self, at_ns: int) -> str:
        """In words; empty while the controller answers."""
        if not self.silent_since_ns:
            return ""
        since = _time_of_day(self.silent_since_ns)
        seconds = (at_ns - self.silent_since_ns) / NS_PER_S
        return f"no answer since {since} ({seconds:.0f} s)"

    def document(self, at_ns: int) -> dict[str, Any]:
        """For programs: one object per look."""
        if self.silent_since_ns:
            return {
                "time_ns": at_ns,
                "no_answer_since_ns": self.silent_since_ns,
                "why": self.why,
                "report": None,
                "rates": None,
            }
        return {
            "time_ns": at_ns,
            "no_answer_since_ns": None,
            "why": "",
            "report": self.report,
            "rates": self.rates,
        }


def run_watch(address: str, *, interval_ns: int, as_json: bool) -> None:
    """Show `address` until Ctrl-C. Raises PeerUnreachable if the first question gets no answer."""
    import uvloop

    with _Screen(address, as_json=as_json) as screen:
        number = uvloop.run(_watch(address, interval_ns / NS_PER_S, screen.show))
    if number == signal.SIGTERM:
        raise typer.Exit(128 + number)


async def _watch(address: str, interval_s: float, show: Callable[[Look], None]) -> int:
    """Ask until a signal comes; return its number."""
    from slosched.clients.aio import connect

    loop = asyncio.get_running_loop()
    stopped: asyncio.Future[int] = loop.create_future()

    def stop(number: int) -> None:
        if not stopped.done():
            stopped.set_result(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop, number)
    watching = asyncio.ensure_future(_look_again(connect, address, interval_s, show))
    await asyncio.wait((watching, stopped), return_when=asyncio.FIRST_COMPLETED)
    if watching.done():
        watching.result()  # it ends by its error alone
    watching.cancel()
    await asyncio.gather(watching, return_exceptions=True)
    return stopped.result()


async def _look_again(
    connect: Callable[..., Any], address: str, interval_s: float, show: Callable[[Look], None]
) -> None:
    loop = asyncio.get_running_loop()
    async with connect(address, name="slosched status --watch") as client:
        look = Look(await client.status(brief=True))
        due_s = loop.time()
        while True:
            show(look)
            due_s = max(due_s + interval_s, loop.time())  # what was missed is not caught up with
            await asyncio.sleep(due_s - loop.time())
            look = await _next(client, look, max(_ANSWER_WITHIN_S, interval_s))


async def _next(client: AsyncClient, last: Look, timeout_s: float) -> Look:
    asked_ns = now_ns()
    try:
        report = await client.status(brief=True, timeout_s=timeout_s)
    except _UNANSWERED as error:
        return Look(last.report, last.rates, last.silent_since_ns or asked_ns, str(error))
    return Look(report, rates_between(last.report, report))


class _Screen:
    """Where looks are shown: the terminal's other screen, or one block or JSON line after the other."""

    def __init__(self, address: str, *, as_json: bool) -> None:
        self._address = address
        self._as_json = as_json
        self._live: Any = None
        self._blocks = "utf" in (sys.stdout.encoding or "").lower()

    def __enter__(self) -> _Screen:
        if not self._as_json and sys.stdout.isatty():
            from rich.console import Console
            from rich.live import Live

            console = Console(highlight=False)
            # Drawn when there is something new: no thread, and nothing moves in between.
            self._live = Live(console=console, screen=True, auto_refresh=False)
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, look: Look) -> None:
        at_ns = now_ns()
        if self._as_json:
            print(json.dumps(look.document(at_ns)), flush=True)
            return
        size = shutil.get_terminal_size((100, 40))
        on_terminal = self._live is not None
        text = watch_text(
            self._address,
            look.report,
            look.rates,
            width=size.columns if on_terminal else 100,
            height=size.lines if on_terminal else None,
            blocks=self._blocks,
            silent=look.silence(at_ns),
        )
        if self._live is None:
            print(f"{_time_of_day(at_ns)}  {text}\n", flush=True)
            return
        from rich.text import Text

        self._live.update(Text(text), refresh=True)


def _time_of_day(at_ns: int) -> str:
    return datetime.fromtimestamp(at_ns / NS_PER_S).strftime("%H:%M:%S")
