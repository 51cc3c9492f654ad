"""The commands of DiffServe's artifact with its flags and ports, over our controller, workers and clients.

Its guide starts a controller, a load balancer, a sink, workers and a client, each in a terminal of its own. The
load balancer and the sink have nothing to do in our design: they say so, and stay until they are ended.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from slosched.cascade_spec import CascadeOptions, CascadeSpec
from slosched.cli.output import Announcer
from slosched.clock import now_ns
from slosched.codes import Code
from slosched.errors import InvalidConfig, InvalidRequest, SloschedError
from slosched.output_files import check_folder, write_file
from slosched.units import NS_PER_S

CONTROLLER_PORT, LOAD_BALANCER_PORT, CLIENT_PORT = 50050, 50048, 51050
WORKER_PORT, SINK_PORT = 50051, 50100

#: -ap: the artifact's policies, and ours of the same rule.
POLICIES = {
    "5": "DIFFSERVE",
    "6": "CLIPPER-HEAVY",
    "7": "CLIPPER-LIGHT",
    "8": "DIFFSERVE-STATIC",
}
_BROKEN = {
    "1": "round robin",
    "2": "tail-heavy",
    "3": "cost ILP",
    "4": "InferLine",
}
#: What the artifact's constants are in our options.
OPTIONS = CascadeOptions(over_provision=1.2, drop_at=1.5, routing="random")


def _cascade(help: str, *, show_default: bool = False) -> Any:
    return typer.Option(
        "--cascade", "-c", metavar="NAME|FILE", help=help, show_default=show_default
    )


def _port(*flags: str, help: str) -> Any:
    return typer.Option(*flags, min=1, max=65535, help=help)


_Cascade = Annotated[str, _cascade("sdturbo, sdxs, sdxlltn, or a file.toml.")]
_ControllerIp = Annotated[
    str, typer.Option("--controller_ip", "-cip", metavar="HOST", help="Host of the controller.")
]
_ControllerPort = Annotated[int, _port("--controller_port", "-cport", help="Its port.")]
_Ip = Annotated[
    str,
    typer.Option(
        "--ip_address", "-ip", metavar="HOST", help="Host at which the controller reaches it."
    ),
]
_Logs = Annotated[
    Path, typer.Option("--logs", metavar="DIR", help="Folder of the logs and the CSV files.")
]
_JoinKey = Annotated[
    str,
    typer.Option(
        metavar="FILE",
        help="File with the cluster's join key (`slosched keys join FILE`), for workers on other hosts.",
    ),
]


_OwnPort = Annotated[int, _port("--port", "-p", help="Port to listen on.")]
_UnusedPort = Annotated[int, _port("--port", "-p", help="Taken and not used.")]


class _Log:
    """Lines for stdout that a log file in `folder` gets as well, with the time of each in seconds."""

    def __init__(self, folder: Path, name: str) -> None:
        check_folder(folder)
        self.path = folder / f"{name}.log"
        self._announce = Announcer()
        write_file(self.path, b"")

    def __call__(self, line: str) -> None:
        self._announce(line)
        self.note(line)

    def note(self, line: str) -> None:
        """Write `line` into the file alone."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(f"{now_ns() / NS_PER_S:.3f} {line}\n")


def _dated(name: str) -> str:
    """The artifact's name of a log: with the time at which the process began."""
    return f"{name}_{now_ns() / NS_PER_S:.6f}"


def controller(
    allocation_policy: Annotated[
        str,
        typer.Option(
            "--allocation_policy",
            "-ap",
            metavar="5|6|7|8",
            help="5: DiffServe. 6: all heavy (Clipper-Heavy). 7: all light (Clipper-Light). 8: static.",
            show_default=False,
        ),
    ],
    cascade: _Cascade,
    port: _OwnPort = CONTROLLER_PORT,
    logs: _Logs = Path("logs"),
    join_key: _JoinKey = "",
) -> None:
    """Run the controller. Workers and clients find it by its address; the order of starting is free.

    It has the artifact's settings: factor 1.2, random routing, requests dropped at 1.5 SLO. SIGTERM or
    Ctrl-C ends it, and then the three CSV files are in the logs' folder, beside all other logs of the run.
    `slosched controller CASCADE --cascade sdturbo` is our own policy.

    \b
    Examples:
      slosched cascade controller -ap 5 -c sdturbo
      slosched cascade controller -p 50050 -ap 8 -c sdxs
    """
    from slosched.config import ControllerConfig, SchedulerConfig
    from slosched.core.scheduler.policies import resolved
    from slosched.daemon.controller import run_controller
    from slosched.workloads.cascades import load_cascade

    policy = policy_of(allocation_policy)
    spec = load_cascade(cascade)
    tell = _Log(logs, _dated("controller"))
    run_dir = logs / _dated("run")
    config = ControllerConfig(
        scheduler=SchedulerConfig(policy=policy, cascades=(spec,), cascade=OPTIONS),
        workers=(),
        port=port,
        http_port=-1,
        log_dir=str(run_dir),
        join_key=join_key,
    )
    resolved(config.scheduler)
    tell(f"-ap {allocation_policy} is {policy}; the run's logs go to {run_dir}")
    code = run_controller(config, announce=tell)
    _write_csv(run_dir, logs, tell)
    raise typer.Exit(code)


def policy_of(allocation_policy: str) -> str:
    """Our policy for a value of -ap. Raises InvalidConfig for one that has none."""
    if allocation_policy in POLICIES:
        return POLICIES[allocation_policy]
    works = "take 5 (DiffServe), 6 (all heavy), 7 (all light) or 8 (static)"
    if allocation_policy in _BROKEN:
        raise InvalidConfig(
            f"-ap {allocation_policy} ({_BROKEN[allocation_policy]}) fails in the artifact too, and has no "
            f"counterpart: {works}"
        )
    raise InvalidConfig(f"-ap {allocation_policy!r} is unknown: {works}")


def _write_csv(run_dir: Path, logs: Path, tell: Callable[[str], None]) -> None:
    from slosched.cascade.artifact_logs import write_artifact_logs
    from slosched.cascade.outcome import read_outcome

    try:
        files = write_artifact_logs(read_outcome(run_dir), logs)
    except InvalidConfig as error:  # as where no request came
        tell(f"no CSV files: {error}")
        return
    for file in files:
        tell(f"wrote {file}")


def load_balancer(
    cascade: _Cascade,
    port: _UnusedPort = LOAD_BALANCER_PORT,
    controller_ip: _ControllerIp = "localhost",
    controller_port: _ControllerPort = CONTROLLER_PORT,
    logs: _Logs = Path("logs"),
) -> None:
    """Stand in for the load balancer, which this design does not need: the controller chooses each GPU.

    \b
    Example:
      slosched cascade load-balancer -cip localhost -c sdturbo
    """
    _stay(
        _Log(logs, _dated("load_balancer")),
        f"load balancer: not needed, the controller at {controller_ip}:{controller_port} chooses each GPU; "
        "waiting for Ctrl-C",
    )


def sink(
    cascade: _Cascade = "",
    ip_address: _Ip = "localhost",
    port: _UnusedPort = SINK_PORT,
    controller_ip: _ControllerIp = "localhost",
    controller_port: _ControllerPort = CONTROLLER_PORT,
    logs: _Logs = Path("logs"),
) -> None:
    """Stand in for the sink, which this design does not need: the controller answers each client.

    The same as `slosched cascade worker --is_sink`.

    \b
    Example:
      slosched cascade sink -cip 10.0.0.4 -p 50100 -c sdturbo
    """
    _stay(
        _Log(logs, f"worker_{port}"),
        f"sink: not needed, the controller at {controller_ip}:{controller_port} answers each client; waiting "
        "for Ctrl-C",
    )


def _stay(tell: Callable[[str], None], line: str) -> None:
    """Say `line`, and wait for SIGTERM or Ctrl-C."""
    ends = {signal.SIGINT, signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_BLOCK, ends)
    tell(line)
    signal.sigwait(ends)
    tell("ended")


def worker(
    cascade: _Cascade,
    ip_address: _Ip = "localhost",
    port: _OwnPort = WORKER_PORT,
    controller_ip: _ControllerIp = "localhost",
    controller_port: _ControllerPort = CONTROLLER_PORT,
    is_sink: Annotated[
        bool, typer.Option("--is_sink", help="Stand in for the sink instead.")
    ] = False,
    do_simulate: Annotated[
        bool,
        typer.Option("--do_simulate", help="Emulate a GPU: programs take the cascade's times."),
    ] = False,
    logs: _Logs = Path("logs"),
    join_key: _JoinKey = "",
) -> None:
    """Run a worker with one emulated GPU, which registers with the controller and tries until it is there.

    SIGTERM or Ctrl-C finishes what runs and ends it.

    \b
    Examples:
      slosched cascade worker -cip localhost -p 50051 -c sdturbo --do_simulate
      slosched cascade worker -cip 10.0.0.4 -p 50052 -c sdturbo --do_simulate --join-key cluster.key
    """
    if is_sink:
        sink(cascade, ip_address, port, controller_ip, controller_port, logs)
        return
    if not do_simulate:
        raise InvalidConfig(
            "real diffusion models do not run here yet; add --do_simulate for an emulated GPU"
        )
    from slosched.config import WorkerConfig
    from slosched.daemon.worker import run_worker
    from slosched.workloads.cascades import load_cascade

    spec = load_cascade(cascade)
    model_log = _Log(logs, f"model_{port}")
    profile = _write_profile(spec, logs / f"model_{port}.toml")
    model_log(f"emulates {spec.light.model} and {spec.heavy.model}, with the times of {profile}")
    tell = _Log(logs, f"worker_{port}")
    config = WorkerConfig(
        device="emulated",
        gpus=1,
        port=port,
        controller=f"{controller_ip}:{controller_port}",
        advertise="" if ip_address == "localhost" else ip_address,
        join_key=join_key,
        profile=str(profile),
    )
    raise typer.Exit(run_worker(config, announce=tell))


def _write_profile(spec: CascadeSpec, path: Path) -> Path:
    from slosched.config_file import write_profile

    write_profile(path, spec.profile(), replacing=True)
    return path


def client(
    trace_file: Annotated[
        str,
        typer.Option(
            "--trace_file",
            "-trace",
            metavar="NAME|FILE",
            help="1to8, 2to16, 2_5to20, 3to24, 4to32, with or without qps; or a file with MS,PROMPT a line.",
        ),
    ] = "4to32",
    ip_address: Annotated[
        str, typer.Option("--ip_address", "-ip", metavar="HOST", help="Taken and not used.")
    ] = "localhost",
    port: _UnusedPort = CLIENT_PORT,
    lb_ip: Annotated[
        str,
        typer.Option(
            "--lb_ip", "-lbip", metavar="HOST", help="Host of the controller, unless -cip says it."
        ),
    ] = "localhost",
    lb_port: Annotated[
        int, _port("--lb_port", "-lbport", help="Taken and not used.")
    ] = LOAD_BALANCER_PORT,
    controller_ip: Annotated[
        str,
        typer.Option(
            "--controller_ip", "-cip", metavar="HOST", help="Host of the controller. Default -lbip."
        ),
    ] = "",
    controller_port: _ControllerPort = CONTROLLER_PORT,
    cascade: Annotated[
        str, _cascade("The cascade that the controller serves.", show_default=True)
    ] = "sdturbo",
    seed: Annotated[int, typer.Option(min=0, help="Chooses arrivals and prompts.")] = 0,
    duration: Annotated[
        str | None, typer.Option(help="End after this time (60s). Default: when the trace ends.")
    ] = None,
    logs: _Logs = Path("logs"),
) -> None:
    """Replay a trace, and say "Trace ended" when the last prompt was answered.

    It connects to the controller, since there is no load balancer. The artifact's client does not say which
    cascade it is for; here --cascade does, as each request carries the cascade's SLO.

    \b
    Examples:
      slosched cascade client -lbip localhost -trace 1to8qps
      slosched cascade client -cip 10.0.0.4 --cascade sdxs -trace 4to32
    """
    from slosched.cli.run import run_live
    from slosched.cli.values import duration_ns, one_address
    from slosched.workloads import parse_workload

    workload = parse_workload("cascade", [cascade, trace_file])
    address = one_address(f"{controller_ip or lb_ip}:{controller_port}")
    within_ns = None if duration is None else duration_ns("--duration", duration)
    name = _dated("client")
    tell = _Log(logs, name)
    tell.note(f"{workload.describe()}, at {address}")
    try:
        code = run_live(
            address,
            workload,
            inputs=False,
            seed=seed,
            duration_ns=within_ns,
            out=logs / name,
            json=False,
        )
    except SloschedError as error:
        tell.note(f"failed: {error}")
        if isinstance(error, InvalidRequest) and error.code == Code.UNKNOWN_MODEL:
            tell("if the controller serves another cascade, name that one with --cascade")
        raise
    tell("Trace ended")
    raise typer.Exit(code)
