"""The options that all simulating commands share, and the SimSpec that they describe.

A command takes them all by being decorated:

    @takes_sim_options
    def simulate(type_: ..., *, sim: SimOptions, seed: ... = 0) -> None: ...

Typer then sees each field of `SimOptions` as an option of the command, and each of the scheduler's options
that holds for simulations (options.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from slosched.cli.config_options import (
    Options,
    declaration,
    kind_written,
    values_of,
    with_parameters,
)
from slosched.cli.values import duration_ns, scheduler_type, size_bytes
from slosched.command_line import command_rows
from slosched.config import WEIGHT_RANGE, SchedulerConfig
from slosched.errors import InvalidConfig, UnknownName
from slosched.options import CLUSTER, NETWORK, NOISE, Row
from slosched.units import NS_PER_S

if TYPE_CHECKING:
    from slosched.config import EmulationNoise, GpuProfile
    from slosched.sim.faults import FaultPlan
    from slosched.sim.network import Network
    from slosched.sim.spec import SimSpec
    from slosched.workloads import Workload

#: Random faults of a run that would never end come within this time.
_FAULTS_FOR_NS = 30 * NS_PER_S
_BITS = re.compile(r"^\s*(\d+\.?\d*)\s*([kKMGT]?)(bit|b)(?:/s|ps)?\s*$")
_STALL = "write it as PROBABILITY:DURATION, for example 0.001:20ms"


def _option(help_: str, panel: str) -> Any:
    return typer.Option(help=help_, rich_help_panel=panel)


@dataclass(frozen=True)
class SimOptions:
    """What the command line says of a simulation, as texts. Defaults are what `--help` says."""

    gpus: Annotated[int, _option("How many GPUs.", CLUSTER)] = 6
    gpus_per_worker: Annotated[
        int, _option("GPUs of one worker process. They have equal profiles.", CLUSTER)
    ] = 1
    profile: Annotated[
        str,
        _option(
            "What the GPUs are: a built-in profile or a TOML file of `slosched profile`. Unequal GPUs: "
            "NAME:COUNT,... for example v100:4,fig7:2.",
            CLUSTER,
        ),
    ] = "v100"
    weights_cache: Annotated[
        str | None,
        _option("GPU memory for weights, for example 10GiB. Default: the profile's.", CLUSTER),
    ] = None
    inputs: Annotated[
        bool,
        typer.Option(
            "--inputs/--no-inputs",
            help="Each request brings an input of its model's size, which --bandwidth and --pcie make "
            "cost time. Default: none travel.",
            rich_help_panel=CLUSTER,
        ),
    ] = False
    latency: Annotated[
        str,
        _option(
            "One way, between any two processes; or four, comma-separated: client to controller, back, "
            "controller to worker, back. A bare number is in seconds.",
            NETWORK,
        ),
    ] = "200us"
    jitter: Annotated[
        str, _option("Mean of an exponential delay on top, for each message.", NETWORK)
    ] = "0"
    bandwidth: Annotated[
        str | None,
        _option(
            "Bandwidth of each host's network card, for example 10Gbit. Default: no limit.",
            NETWORK,
        ),
    ] = None
    exec_sigma: Annotated[
        float, _option("Relative standard deviation of exec times (normal, cut at 3).", NOISE)
    ] = 0.0
    exec_like: Annotated[
        Path | None,
        _option(
            "Draw exec times as a run directory measured them: actual over usual, from its action log.",
            NOISE,
        ),
    ] = None
    stall: Annotated[
        str | None, _option(f"Stalls of a GPU, per inference: {_STALL[12:]}.", NOISE)
    ] = None
    pcie: Annotated[
        str | None,
        _option(
            "Bytes/s from a host to its GPU, for example 12.3GB: copies take time then, and loads and "
            "inputs slow each other. Default: as the profile says, and inputs take none.",
            NOISE,
        ),
    ] = None
    pcie_shared: Annotated[
        bool,
        typer.Option(
            "--pcie-shared",
            help="The GPUs of one worker share --pcie.",
            rich_help_panel=NOISE,
        ),
    ] = False
    clock_offset: Annotated[
        str, _option("Workers' clocks are off by at most this, either way.", NOISE)
    ] = "0"
    clock_drift: Annotated[
        float, _option("Workers' clocks drift by at most this many ppm, either way.", NOISE)
    ] = 0.0
    faults: Annotated[
        str | None,
        _option(
            "What breaks and when: a plan.toml, or random[:SEED] for one drawn over the whole run. "
            "docs/faults.md says what there is.",
            NOISE,
        ),
    ] = None
    check: Annotated[
        bool,
        typer.Option("--check", help="Hold every invariant at every step (slower)."),
    ] = False
    #: The scheduler's options as texts and numbers, by their names; None for what is not given.
    scheduler_options: Options = field(default_factory=dict)

    def __post_init__(self) -> None:
        known = list(_shared_rows())
        for name in self.scheduler_options:
            if name not in known:
                raise UnknownName("option", name, known)

    def spec(
        self, type_: str, workload: Workload, *, seed: int = 0, duration: str | None = None
    ) -> SimSpec:
        """The simulation that these options describe. `type_` is a scheduler TYPE, or TYPE:paper.

        `duration` is as the client's: a bare number is in seconds. Raises InvalidConfig, UnknownName.
        """
        from slosched.sim.spec import SimSpec, WorkerClocks

        for option, count in (("--gpus", self.gpus), ("--gpus-per-worker", self.gpus_per_worker)):
            if count < 1:
                raise InvalidConfig(f"{option} must be at least 1, not {count}")
        until_ns = None if duration is None else duration_ns("--duration", duration)
        return SimSpec(
            workload=workload,
            scheduler=self.scheduler(type_),
            profiles=self._profiles(),
            gpus=self.gpus,
            gpus_per_worker=self.gpus_per_worker,
            network=self._network(),
            noise=self._noise(),
            clocks=WorkerClocks(_time_ns("--clock-offset", self.clock_offset), self.clock_drift),
            seed=seed,
            duration_ns=until_ns,
            inputs=self.inputs,
            check=self.check,
            faults=self._faults(seed, until_ns or workload.duration_ns or _FAULTS_FOR_NS),
        )

    def _faults(self, seed: int, until_ns: int) -> FaultPlan | None:
        if self.faults is None:
            return None
        kind, colon, text = self.faults.partition(":")
        if kind != "random":
            from slosched.sim.fault_file import load_plan

            return load_plan(self.faults)
        if colon and not text.isdigit():
            raise InvalidConfig(f"--faults {self.faults}: the seed must be a whole number")
        from slosched.sim.faults import FaultPlan

        full, last = divmod(self.gpus, self.gpus_per_worker)
        counts = [self.gpus_per_worker] * full + ([last] if last else [])
        return FaultPlan.random(int(text or seed), counts, until_ns=until_ns)

    def scheduler(self, type_: str) -> SchedulerConfig:
        """The scheduler's options. Raises UnknownName, or ExtensionError, for a TYPE that cannot be used."""
        from slosched.core.scheduler.policies import resolved

        policy, fidelity = scheduler_type(type_, self.scheduler_options.get("fidelity"))
        options = {**self.scheduler_options, **fidelity}
        config = SchedulerConfig(
            policy=policy,
            # The user of a simulation also writes its clients, so what they say of themselves is trusted.
            max_client_weight=WEIGHT_RANGE[1],
            **values_of(SchedulerConfig, options),
        )
        resolved(config)  # raises InvalidConfig for what the policy cannot heed
        return config

    def _profiles(self) -> tuple[GpuProfile, ...]:
        from slosched.config_file import load_profile

        names: list[tuple[str, int | None]] = []
        for part in self.profile.split(","):
            name, colon, count = part.strip().rpartition(":")
            if colon and count.isdigit():
                names.append((name, int(count)))
            else:
                names.append((part.strip(), None))
        profiles: list[GpuProfile] = []
        for name, repeats in names:
            profile = load_profile(name)
            if self.weights_cache is not None:
                cache_bytes = size_bytes("--weights-cache", self.weights_cache)
                profile = replace(profile, weights_cache_bytes=cache_bytes)
            profiles += [profile] * (1 if repeats is None else repeats)
        if len(profiles) not in (1, self.gpus):
            raise InvalidConfig(
                f"--profile {self.profile} names {len(profiles)} GPUs, --gpus says {self.gpus}; write "
                "one profile for all, or NAME:COUNT,... that add up"
            )
        return tuple(profiles)

    def _network(self) -> Network:
        from slosched.sim.network import Network

        latencies = [_time_ns("--latency", text) for text in self.latency.split(",")]
        if len(latencies) not in (1, 4):
            raise InvalidConfig(f"--latency takes one time or four, not {len(latencies)}")
        from_client_ns, to_client_ns, to_worker_ns, from_worker_ns = (latencies * 4)[:4]
        return Network(
            to_worker_ns=to_worker_ns,
            from_worker_ns=from_worker_ns,
            from_client_ns=from_client_ns,
            to_client_ns=to_client_ns,
            jitter_ns=_time_ns("--jitter", self.jitter),
            bandwidth_bits_per_s=0 if self.bandwidth is None else bits_per_s(self.bandwidth),
        )

    def _noise(self) -> EmulationNoise:
        from slosched.config import EmulationNoise

        probability, stall_ns = 0.0, 0
        if self.stall is not None:
            share, _, length = self.stall.partition(":")
            try:
                probability = float(share)
            except ValueError:
                raise InvalidConfig(f"--stall {self.stall!r}: {_STALL}") from None
            if not length:
                raise InvalidConfig(f"--stall {self.stall!r}: {_STALL}")
            stall_ns = duration_ns("--stall", length)
        quantiles: tuple[float, ...] = ()
        if self.exec_like is not None:
            from slosched.sim.exec_times import exec_quantiles

            quantiles = exec_quantiles(self.exec_like)
        return EmulationNoise(
            exec_sigma=self.exec_sigma,
            exec_quantiles=quantiles,
            stall_probability=probability,
            stall_ns=stall_ns,
            pcie_bytes_per_s=0 if self.pcie is None else _pcie_bytes_per_s(self.pcie),
            pcie_shared=self.pcie_shared,
        )

    def with_text(self, name: str, text: str) -> SimOptions:
        """The same options but for one, written as on the command line. Raises UnknownName."""
        known = _kinds()
        option = name.removeprefix("--").replace("-", "_")
        if option not in known:
            raise UnknownName("option", name, [key.replace("_", "-") for key in known])
        kind = known[option]
        value: Any = text
        try:
            if kind in (int, int | None):
                value = int(text)
            elif kind in (float, float | None):
                value = float(text)
            elif kind in (bool, bool | None):
                value = {"yes": True, "no": False, "true": True, "false": False}[text]
            elif kind == Path | None:
                value = Path(text)
        except (ValueError, KeyError):
            raise InvalidConfig(f"{name} cannot be {text!r}") from None
        if option in _shared_rows():
            return replace(self, scheduler_options={**self.scheduler_options, option: value})
        return replace(self, **{option: value})

    def by_name(self) -> dict[str, Any]:
        """Every option and its value, the scheduler's among them."""
        own = asdict(self)
        scheduler: dict[str, Any] = own.pop("scheduler_options")
        return own | scheduler


def _shared_rows() -> dict[str, Row]:
    """The scheduler's options that simulations take, by their names."""
    return {row.name: row for row in command_rows(SchedulerConfig) if row.option.simulated}


def _kinds() -> dict[str, Any]:
    """The type of each option, by its name."""
    kinds = get_type_hints(SimOptions)
    del kinds["scheduler_options"]
    return kinds | {name: kind_written(row) for name, row in _shared_rows().items()}


def takes_sim_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give `command` the fields of SimOptions as options; its parameter `sim` gets them as one.

    A parameter of the command's own that is called like a field stands for it: the field then keeps its
    default.
    """
    declared = get_type_hints(SimOptions, include_extras=True)
    del declared["scheduler_options"]
    scheduler = {name: declaration(row) for name, row in _shared_rows().items()}

    def made(values: dict[str, Any]) -> SimOptions:
        options = {name: values.pop(name) for name in scheduler if name in values}
        return SimOptions(**values, scheduler_options=options)

    return with_parameters(
        command, declared | scheduler, SimOptions().by_name(), into="sim", make=made
    )


def sim_spec(
    words: Sequence[str],
    type_: str,
    sim: SimOptions,
    *,
    seed: int = 0,
    duration: str | None = None,
) -> SimSpec:
    """The simulation of the workload that `words` name (a name and its values, or a .toml file)."""
    from slosched.cli.workload import workload_of

    return sim.spec(type_, workload_of(words), seed=seed, duration=duration)


def changed(sim: SimOptions) -> dict[str, Any]:
    """The options that differ from their defaults: what makes a run special, in words."""
    defaults = SimOptions().by_name()
    return {name: value for name, value in sim.by_name().items() if value != defaults.get(name)}


def bits_per_s(text: str) -> int:
    """Bits per second from 10Gbit, 400Mbit/s; at least 1. Raises InvalidConfig."""
    match = _BITS.match(text)
    if match is None:
        raise InvalidConfig(
            f"--bandwidth: {text!r} is not a bandwidth; write it as 10Gbit or 400Mbit"
        )
    number, unit, _ = match.groups()
    bits = int(Decimal(number) * 1000 ** " kMGT".index(unit.replace("K", "k") or " "))
    if bits < 1:
        raise InvalidConfig(
            f"--bandwidth: {text!r} must be above 0; leave it out for cards without limit"
        )
    return bits


def _pcie_bytes_per_s(text: str) -> int:
    value = size_bytes("--pcie", text)
    if value < 1:
        raise InvalidConfig(
            f"--pcie: {text!r} must be above 0; leave it out for copies as the profile says"
        )
    return value


def _time_ns(option: str, text: str) -> int:
    """A duration that may be 0."""
    return duration_ns(option, text.strip(), may_be_0=True)
