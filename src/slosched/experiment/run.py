"""One live run: workers, a controller and a client on their hosts, to the client's end, and their files here.

The same code drives hosts over SSH and this host (`this_host`): each process is a far end (remote.py) with a
lifeline, and its output comes here while it runs. What a host of its own wrote is fetched when all have ended.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from slosched.clock import now_ns
from slosched.command_line import command_line
from slosched.config import SchedulerConfig
from slosched.errors import InvalidConfig, PeerUnreachable, SloschedError
from slosched.experiment.children import Child, ChildFailed, Children
from slosched.experiment.fetch import fetch, remove
from slosched.experiment.figures import Part
from slosched.experiment.hosts import Host, Hosts
from slosched.experiment.remote import Order
from slosched.experiment.ssh import SSH_FAILED, failure, far_end, printed_end
from slosched.loadgen.results import RunResult
from slosched.units import NS_PER_S

#: Where a run's directory keeps the telemetry; a client on a host of its own has a folder in it.
RUN = "run"
CLIENT = "client"
#: torch alone may take 30 s to import from a cold disk.
_READY_S = 120.0
_JOINED_S = 60.0
#: Loading all copies, awaiting the last answers, leaving.
_CLIENT_EXTRA_S = 180.0
_POLL_S = 0.25
#: How often the files of a complete run are asked for.
_FETCH_TRIES = 3
#: What a far end needs at most to end its command: both of its waits, and a little.
_STOP_WITHIN_S = 18.0

#: What a process prints once it runs: its ready line, or a client's progress.
_RUNNING = (" ready on ", " in time so far ")

#: Told what happens, a line at a time.
Show = Callable[[str], None]


@dataclass(frozen=True)
class WorkerShare:
    """What one worker brings to a run. `gpus` counts its GPUs; each real one has a port of its own."""

    host: Host
    gpus: int


def worker_shares(part: Part, hosts: Hosts, *, fewer: bool = False) -> list[WorkerShare]:
    """The workers that a run uses, in the order of hosts.toml, with the number of GPUs of each.

    Emulated GPUs whose number no host names are shared out evenly. Raises InvalidConfig if there are fewer than
    the run takes, unless `fewer` may serve.
    """
    named = [host.gpus or (0 if host.emulated else 1) for host in hosts.workers]
    open_places = named.count(0)
    missing = max(0, part.gpus - sum(named))
    shares = []
    for host, gpus in zip(hosts.workers, named, strict=True):
        if not gpus:
            gpus = -(-missing // open_places)
            missing, open_places = missing - gpus, open_places - 1
        shares.append(WorkerShare(host, gpus))
    used: list[WorkerShare] = []
    for share in shares:
        if share.gpus and sum(each.gpus for each in used) < part.gpus:
            used.append(share)
    total = sum(share.gpus for share in used)
    if total < part.gpus and not fewer:
        raise InvalidConfig(
            f"{part.name} takes {part.gpus} GPUs, and the workers have {total}; add workers, say how many GPUs "
            "each has by the key gpus, or run with fewer (--fewer-gpus)"
        )
    return used


def run_part(
    part: Part,
    hosts: Hosts,
    directory: Path,
    *,
    session: str = "",
    fewer: bool = False,
    show: Show = lambda line: None,
) -> RunResult:
    """Make one run; `directory`, which is there, gets all files. Returns what the client measured.

    `session` names the folders on the hosts. The telemetry is in `directory`/run, which is the result's
    `run_dir`. Raises ChildFailed if a process does not start, fails or does not end in time, PeerUnreachable if
    a connection fails; all that was started has ended then.
    """
    run = _Run(part, hosts, directory, session, worker_shares(part, hosts, fewer=fewer), show)
    try:
        result = run.run()
    except SloschedError:
        run.bring_back(best_effort=True)
        raise
    except BaseException:
        run.clean_up()
        raise
    try:
        run.bring_back()
    except (KeyboardInterrupt, SystemExit):
        show("stopped while files were fetched; those that are missing stay on their hosts")
        raise
    return replace(result, run_dir=directory / RUN)


class _Run:
    def __init__(
        self,
        part: Part,
        hosts: Hosts,
        directory: Path,
        session: str,
        shares: Sequence[WorkerShare],
        show: Show,
    ) -> None:
        self._part, self._hosts, self._directory = part, hosts, directory
        self._session, self._shares, self._show = session, shares, show
        self._host_of: dict[str, Host] = {}
        self._lost: set[str] = set()
        self._children = Children(stop_within_s=_STOP_WITHIN_S)

    def run(self) -> RunResult:
        try:
            with self._children as children:
                addresses = self._start_workers()
                controller, port = self._start_controller(addresses)
                self._await_joined(controller, len(addresses))
                client = self._start_client(port)
                self._follow(client)
                # In this order, so that the controller answers and writes everything before its workers go.
                children.end(controller)
        except ChildFailed as error:
            raise self._reason(error) from None
        return self._result()

    # ------------------------------------------------------------------------------- processes

    def _start_workers(self) -> list[str]:
        """Start all, then wait until each is ready; return the addresses at which they serve."""
        started = [(share, self._start_worker(share)) for share in self._shares]
        addresses = []
        for share, child in started:
            port = self._children.wait_ready(child, within_s=_READY_S)
            host = share.host
            # Several real GPUs may be ready in any order, the first of them on the port that was given.
            first = host.worker_port or port
            ports = 1 if host.emulated or host.device == "cpu" else share.gpus
            addresses += [f"{host.reached_at}:{first + place}" for place in range(ports)]
            self._show(f"worker {host.name} is ready: {child.last_line()}")
        return addresses

    def _start_worker(self, share: WorkerShare) -> Child:
        host = share.host
        words = ["worker", "--device", host.device, "--bind", host.bind]
        words += ["--port", str(host.worker_port)]
        if host.worker_config:
            words += ["--config", host.worker_config]
        if host.emulated:
            words += ["--profile", host.profile or self._part.profile]
        if host.device != "cpu":
            words += ["--gpus", str(share.gpus)]
        return self._start(host, f"worker on {host.name}", f"worker-{host.name}.log", words)

    def _start_controller(self, addresses: Sequence[str]) -> tuple[Child, int]:
        host = self._hosts.controller
        words = controller_words(self._part.scheduler, addresses, gpus=self._part.gpus)
        words += ["--bind", host.bind, "--port", str(host.controller_port)]
        words += ["--log-dir", self._place(host, RUN)]
        child = self._start(host, f"controller on {host.name}", "controller.log", words)
        port = self._children.wait_ready(child, within_s=_READY_S)
        self._show(f"controller {host.name} is ready on port {port}")
        return child, port

    def _await_joined(self, controller: Child, workers: int) -> None:
        """Until the controller has every worker. Raises PeerUnreachable with those that it does not reach."""
        deadline_ns = now_ns() + int(_JOINED_S * NS_PER_S)
        joined = 0
        while now_ns() < deadline_ns:
            joined = controller.text().count(" joined: ")
            if joined >= workers:
                self._show(f"{workers} worker process(es) joined")
                return
            self._children.wait(controller, _POLL_S)
            self._children.check()
        raise PeerUnreachable(
            f"only {joined} of {workers} worker processes joined the controller on "
            f"{self._hosts.controller.name} within {_JOINED_S:.0f} s: check reach, bind and worker_port of the "
            f"workers, and firewalls ({printed_end(controller.text())}; all of it: {controller.log})"
        )

    def _start_client(self, port: int) -> Child:
        part, host = self._part, self._hosts.client
        words = ["client", f"{self._hosts.controller.reached_at}:{port}", *part.words]
        words += ["--seed", str(part.seed), "--json", "--duration", f"{part.duration_ns}ns"]
        words += ["--inputs" if part.inputs else "--no-inputs"]
        words += ["--out", self._place(host, self._client_folder())]
        return self._start(
            host, f"client on {host.name}", "client.log", words, stdout=self._summary
        )

    def _client_folder(self) -> str:
        """The controller's own where both are one host, so that the two agree; else one in it."""
        return RUN if self._hosts.client.name == self._hosts.controller.name else f"{RUN}/{CLIENT}"

    def _follow(self, client: Child) -> None:
        """Wait for the client's end, show its progress, and see that the others serve."""
        within_s = self._part.duration_ns / NS_PER_S + _CLIENT_EXTRA_S
        deadline_ns = now_ns() + int(within_s * NS_PER_S)
        with client.log.open("rb") as log:
            code = None
            while code is None:
                code = self._children.wait(client, _POLL_S)
                self._show_last_line(log)
                if code is None:
                    self._children.check()
                    if now_ns() > deadline_ns:
                        raise ChildFailed(
                            f"the {client.name} did not end within {within_s:.0f} s", client
                        )
        if code != 0:
            raise ChildFailed(
                f"the {client.name} ended with exit code {code}: {client.last_line()} "
                f"(all of it: {client.log})",
                client,
                code,
            )
        self._children.forget(client)

    def _show_last_line(self, log: BinaryIO) -> None:
        """Show the last whole line that was added to `log`; a torn one waits for its end."""
        start = log.tell()
        whole, newline, _ = log.read().rpartition(b"\n")
        log.seek(start + len(whole) + len(newline))
        line = whole.rpartition(b"\n")[2].decode(errors="replace").strip()
        if line:
            self._show(line)

    def _start(
        self, host: Host, name: str, log: str, words: Sequence[str], *, stdout: Path | None = None
    ) -> Child:
        order = Order(run=list(words), folder="" if host.local else self._folder(host))
        child = self._children.start_with_lifeline(
            name, far_end(host), order.line(), self._directory / log, stdout=stdout
        )
        self._host_of[name] = host
        return child

    # ------------------------------------------------------------------------------------ files

    @property
    def _summary(self) -> Path:
        return self._directory / "client.json"

    def _folder(self, host: Host) -> str:
        """Where a host keeps the files of this run."""
        return f"{session_folder(host, self._session)}/{self._part.name}"

    def _place(self, host: Host, name: str) -> str:
        """How a process on the host names the file or folder `name` of the run."""
        return str(self._directory.absolute() / name) if host.local else name

    def _result(self) -> RunResult:
        text = self._summary.read_text(encoding="utf-8")
        start = re.search(
            r"^\{", text, re.MULTILINE
        )  # a shell's start-up files may print before it
        try:
            return RunResult.from_dict(json.loads(text[start.start() if start else 0 :]))
        except (ValueError, KeyError, TypeError) as error:
            raise ChildFailed(
                f"the client printed no result that can be read ({error}): {self._summary}"
            ) from None

    def bring_back(self, *, best_effort: bool = False) -> None:
        """Fetch what the hosts wrote, and remove it there. Raises SloschedError unless `best_effort`."""
        for host in self._used_hosts():
            if host.name in self._lost:  # what runs there may still be writing
                place = self._folder(host)
                self._show(f"host {host.name}: the run's files stay in {place} there")
                continue
            try:
                self._fetch(host, tries=1 if best_effort else _FETCH_TRIES)
            except SloschedError as error:
                text = f"{error}; the run's files stay in {self._folder(host)} there"
                if not best_effort:
                    raise type(error)(text) from None
                self._show(text)
                continue
            with suppress(SloschedError):
                remove(host, session_folder(host, self._session))

    def _fetch(self, host: Host, *, tries: int) -> None:
        """Fetch a host's files, over another connection if one failed."""
        for left in reversed(range(tries)):
            try:
                fetch(host, self._folder(host), self._directory)
                return
            except PeerUnreachable as error:
                if not left:
                    raise
                self._show(f"{error}; trying again")

    def clean_up(self) -> None:
        """Remove what the hosts wrote, as far as they can be reached."""
        for host in self._used_hosts():
            if host.name not in self._lost:
                with suppress(SloschedError):
                    remove(host, session_folder(host, self._session))

    def _used_hosts(self) -> list[Host]:
        """The hosts over SSH on which something was started."""
        used = {host.name: host for host in self._host_of.values() if not host.local}
        return list(used.values())

    def _reason(self, error: ChildFailed) -> SloschedError:
        """What a failed process means: where ssh itself failed, which connection and why."""
        host = self._host_of.get(error.child.name) if error.child is not None else None
        if host is None or host.local or error.code != SSH_FAILED or error.child is None:
            return error
        self._lost.add(host.name)
        text = error.child.text()
        reason = failure(host, text, running=any(mark in text for mark in _RUNNING))
        return PeerUnreachable(f"the {error.child.name} is lost: {reason}")


def session_folder(host: Host, session: str) -> str:
    """Where a host keeps what belongs to one session of an experiment."""
    from slosched.experiment.remote import FOLDER_PREFIX

    return f"{host.folder.rstrip('/')}/{FOLDER_PREFIX}{session}-{host.name}"


def controller_words(
    scheduler: SchedulerConfig, addresses: Sequence[str], *, gpus: int
) -> list[str]:
    """The command of a controller with exactly these options, which uses `gpus` GPUs at most."""
    from slosched.core.scheduler.policies import resolved

    scheduler = resolved(replace(scheduler, max_gpus=min(scheduler.max_gpus, gpus)))
    words = ["controller", scheduler.policy, "--workers", ",".join(addresses)]
    return [*words, "--http-port", "-1", *command_line(scheduler)]
