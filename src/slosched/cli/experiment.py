"""`slosched experiment`: all runs of a published figure by one command, on hosts, on this host or simulated."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from slosched.cli.output import beside, say, warn
from slosched.cli.stopping import stopped_by_signals
from slosched.cli.values import names
from slosched.errors import InvalidConfig, UnknownName

if TYPE_CHECKING:
    from slosched.analysis.drawn import Drawn
    from slosched.experiment.campaign import Experiment
    from slosched.experiment.figures import Figure, Part
    from slosched.experiment.hosts import Hosts

ENGINES = ("ssh", "local", "sim")

_Name = Annotated[str, typer.Argument(metavar="FIGURE", help="fig5 to fig11.", show_default=False)]
_Hosts = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="A hosts.toml: client, controller, workers (see above)."),
]
_Configs = Annotated[
    str,
    typer.Option(
        metavar="NAME,NAME",
        help="Only these runs of the figure, for example n12-r600,n48-r600. Default: all.",
        show_default=False,
    ),
]
_Engine = Annotated[
    str | None,
    typer.Option(
        metavar="ssh|local|sim",
        help="ssh: the hosts of --hosts. local: emulated GPUs on this host. sim: in virtual time. Default: "
        "ssh with --hosts.",
    ),
]
_Scale = Annotated[
    str | None,
    typer.Option(
        metavar="published|quick|smoke",
        help="published: as long as in the paper. quick: minutes. smoke: seconds, to see that all hosts work. "
        "Default: published over ssh, else quick.",
    ),
]
_Out = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR", help="Directory for everything. Default ./slosched-runs/<time>-FIGURE."
    ),
]
_Resume = Annotated[
    bool,
    typer.Option("--resume", help="Keep the runs that are complete in --out; make the others."),
]
_Background = Annotated[
    bool,
    typer.Option("--background", help="Check the hosts, then continue without this terminal."),
]
_Inputs = Annotated[
    bool | None,
    typer.Option(
        "--inputs/--no-inputs",
        help="Send an input with each request. Default over ssh: as published, on for fig5 and fig7; "
        "else on for fig5 alone.",
    ),
]
_Fewer = Annotated[
    bool,
    typer.Option("--fewer-gpus", help="Run although the hosts have fewer GPUs than the figure."),
]
_Jobs = Annotated[int, typer.Option(min=1, help="With --engine sim: processes that simulate.")]


def experiment(
    figure: _Name,
    hosts: _Hosts = None,
    configs: _Configs = "",
    engine: _Engine = None,
    scale: _Scale = None,
    out: _Out = None,
    resume: _Resume = False,
    background: _Background = False,
    inputs: _Inputs = None,
    fewer_gpus: _Fewer = False,
    jobs: _Jobs = 1,
) -> None:
    """Make all runs of a published figure, one after the other, and draw it.

    Each run starts workers, a controller and a client on the hosts that FILE names, follows the client to
    its end, ends them all and copies their logs and telemetry into one directory. Figure 7 has six runs,
    n12-r600 to n48-r2400: about 40 minutes. The last line is Exiting.

    \b
    FIGURE:
      fig5    Goodput and latency of one GPU under closed loops, by SLO.
      fig6    Thousands of models that wake one by one on one GPU.
      fig7    Satisfaction by SLO, six runs.
      fig8    Deadlines in the foreground beside closed loops.
      fig9    A cluster under a trace of thousands of functions.
      fig10   How far predictions of loads and inferences were off.
      fig11   How much load one controller carries.

    \b
    hosts.toml:
      client = "cluster01"
      controller = "cluster02"
      workers = ["cluster03", "cluster04"]
      [defaults]                                 # keys for every host
      user = "alice"
      python = "~/slosched/.venv/bin/python"     # a Python with the same slosched
      folder = "/local/slosched"                 # where a run's files lie while it lasts
      [hosts.cluster04]                          # and where one host differs
      address = "10.0.0.4"                       # also: reach, ssh_port, identity, ssh_config,
      device = "cuda:0"                          # gpus, profile, worker_config, worker_port,
                                                 # controller_port, bind, environment

    ssh must reach each host without a question: a key or an agent, and a known host key. Nothing is
    installed on the hosts and nothing stays there: what runs ends also after Ctrl-C, a killed command or a
    lost connection (within 30 s). Every host is checked before anything starts.

    \b
    Examples:
      slosched experiment fig7 --hosts hosts.toml --scale smoke       # a minute: does all of it work?
      slosched experiment fig7 --hosts hosts.toml --background --out fig7
      slosched experiment fig7 --hosts hosts.toml --out fig7 --resume
      slosched experiment fig7 --engine local --configs n12-r600,n48-r600
      slosched experiment fig9 --engine sim
    """
    from slosched.analysis.style import Figure as _Matplotlib
    from slosched.experiment.figures import chosen_parts, figure_named

    chosen = figure_named(figure)
    engine = _engine_of(engine, hosts, chosen)
    scale = scale or ("published" if engine == "ssh" else "quick")
    parts = tuple(chosen_parts(chosen, scale, names(configs)))
    if inputs is None and engine == "ssh":
        inputs = chosen.inputs_on_hosts
    if inputs is not None:
        parts = tuple(replace(part, inputs=inputs) for part in parts)
    assert _Matplotlib  # missing, it is reported before the runs and not behind them
    if resume and out is None:
        raise InvalidConfig("--resume needs the --out of the experiment that it continues")
    out = out or Path("slosched-runs") / f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{figure}"
    if engine == "sim":
        if background:
            raise InvalidConfig("--background is for live runs; add & to a simulation")
        _simulate(chosen, scale, parts, out, jobs)
        return
    from slosched.experiment.campaign import Experiment

    _run_live(
        Experiment(
            figure=chosen,
            scale=scale,
            parts=parts,
            hosts=_hosts_of(engine, hosts),
            out=out,
            session=f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{secrets.token_hex(3)}",
            resume=resume,
            fewer_gpus=fewer_gpus,
        ),
        background=background,
    )


def _engine_of(engine: str | None, hosts: Path | None, figure: Figure) -> str:
    if engine is not None and engine not in ENGINES:
        raise UnknownName("engine", engine, list(ENGINES))
    if engine is None and hosts is None:
        raise InvalidConfig(
            "give --hosts FILE, or --engine local (this host) or sim (virtual time)"
        )
    engine = engine or "ssh"
    if engine == "ssh" and hosts is None:
        raise InvalidConfig("--engine ssh needs --hosts FILE")
    if engine != "ssh" and hosts is not None:
        raise InvalidConfig(f"--hosts is not used by --engine {engine}; leave one of them out")
    if engine == "sim" and figure.live_only:
        raise InvalidConfig(
            f"{figure.name} asks for CPU time, which virtual time does not have; take --engine local or ssh"
        )
    return engine


def _hosts_of(engine: str, path: Path | None) -> Hosts:
    from slosched.experiment.hosts import load_hosts, this_host

    if engine == "local" or path is None:
        return this_host()
    return load_hosts(path)


def _run_live(experiment: Experiment, *, background: bool) -> None:
    from slosched.experiment.background import detach
    from slosched.experiment.campaign import LOG, alone_in, claim, finished
    from slosched.experiment.children import ended_by_signals
    from slosched.experiment.run import worker_shares

    for part in experiment.parts:
        worker_shares(part, experiment.hosts, fewer=experiment.fewer_gpus)
        finished(experiment, part)
    with ended_by_signals():
        _check(experiment.hosts)
    claim(experiment)
    log = experiment.out / LOG
    with alone_in(experiment.out):
        if not background:
            with _also_in(log) as tell:
                _work(experiment, tell)
            return
        pid = detach(log)
        if not pid:
            _work(experiment, say)
            return
    say(f"running in the background as process {pid}; everything goes to {experiment.out}")
    say(f"follow it: tail -f {log}    (it is over when the last line is Exiting)")
    say(f"stop it:   kill {pid}")


def _check(hosts: Hosts) -> None:
    """Preflight of the hosts over SSH, with a line for each."""
    from slosched.experiment.preflight import check_hosts
    from slosched.experiment.ssh import check_ssh

    if hosts.client.local:
        return
    check_ssh()
    for name, answer in check_hosts(hosts).items():
        host = next(host for host in hosts.all() if host.name == name)
        beside(
            f"{name} ({hosts.roles(host)}): slosched {answer.slosched}, Python {answer.python}, "
            f"{answer.cores} cores, {answer.free_bytes / 2**30:.0f} GiB free"
        )


def _work(experiment: Experiment, tell: Callable[[str], None]) -> None:
    """Everything from the first run to the word Exiting."""
    from slosched.experiment.campaign import run_experiment
    from slosched.experiment.children import ended_by_signals

    def timed(line: str) -> None:
        tell(f"{datetime.now():%H:%M:%S} {line}")

    timed(f"{experiment.figure.name}, scale {experiment.scale}: {experiment.figure.text}")
    timed(f"process {os.getpid()}; everything goes to {experiment.out}")
    try:
        with ended_by_signals():
            drawn = run_experiment(experiment, timed)
        _show(drawn, tell)
    except KeyboardInterrupt:
        timed("stopped by Ctrl-C; --resume continues")
        raise
    except SystemExit as error:
        timed(f"stopped by a signal (exit code {error.code}); --resume continues")
        raise
    except BaseException as error:
        timed(f"error: {error or type(error).__name__}")
        raise
    finally:
        tell("Exiting")


@contextmanager
def _also_in(log: Path) -> Iterator[Callable[[str], None]]:
    """Lines for stdout that the file `log` gets as well, each at once."""
    with log.open("a", encoding="utf-8", buffering=1) as file:

        def tell(line: str) -> None:
            file.write(f"{line}\n")
            say(line)

        yield tell


def _simulate(figure: Figure, scale: str, parts: tuple[Part, ...], out: Path, jobs: int) -> None:
    from slosched.errors import SloschedError
    from slosched.experiment.result import document, write_result
    from slosched.experiment.simulated import simulate_parts

    with stopped_by_signals():
        results, reused = simulate_parts(parts, out, processes=jobs, show=warn)
    runs = []
    for part, result in zip(parts, results, strict=True):
        if result.run_dir is None or not result.complete:
            raise SloschedError(f"the run {part.name} is not complete: {result.problem}")
        runs.append(Path(result.run_dir))
    place = out / "figures"
    drawn = figure.draw(parts, runs, scale, place)
    more = {"runs_reused": reused}
    numbers = document(figure, parts, drawn, kind="simulated", scale=scale, more=more)
    made_by = f"made by `slosched experiment {figure.name} --engine sim --scale {scale}`"
    files = write_result(numbers, figure, drawn, place, made_by=made_by)
    _show(replace(drawn, files=[*drawn.files, *files]), say)
    say("Exiting")


def _show(drawn: Drawn, tell: Callable[[str], None]) -> None:
    tell(f"{drawn.text}\n")
    for file in drawn.files:
        tell(f"wrote {file}")
