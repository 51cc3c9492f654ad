"""Plain configuration: what a scheduler, a worker and a profile are told. No files are read here.

A field is an option: its one row in the table of `options.py`, from which the command line, the keys of TOML
files (`config_file.py`) and what status shows follow. Every class checks itself when it is made and raises
InvalidConfig with the name of the wrong field, for a wrong type or a number out of bounds as well.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from msgspec import Meta

from slosched.addresses import parse_address, parse_bind
from slosched.cascade_spec import CascadeOptions, CascadeSpec
from slosched.errors import InvalidConfig
from slosched.field_types import AtLeast0, AtLeast1, Port, check_types
from slosched.gpu_profile import ALIASES as ALIASES
from slosched.gpu_profile import PAGE_BYTES as PAGE_BYTES
from slosched.gpu_profile import EmulationNoise as EmulationNoise
from slosched.gpu_profile import GpuProfile as GpuProfile
from slosched.gpu_profile import ModelProfile as ModelProfile
from slosched.gpu_profile import canonical_model as canonical_model
from slosched.model_source import DTYPES as DTYPES
from slosched.model_source import LIBRARIES as LIBRARIES
from slosched.model_source import LIBRARY_PREFIXES as LIBRARY_PREFIXES
from slosched.model_source import FunctionOptions as FunctionOptions
from slosched.model_source import ModelSource as ModelSource
from slosched.model_source import RepositoryOptions as RepositoryOptions
from slosched.options import (
    ADDRESSES,
    ADMISSION,
    MEMORY,
    MODELS,
    PROCESSOR,
    SCHEDULER,
    Option,
)
from slosched.units import NS_PER_MS, NS_PER_S, format_duration

#: Clockwork's client and worker ports.
WORKER_PORT = 12345
CONTROLLER_PORT = 12346

#: The worker's heartbeat (design; issue of the serving core) and when silence means loss.
HEARTBEAT_NS = 200 * NS_PER_MS
LOST_AFTER_NS = 800 * NS_PER_MS
CLIENT_HEARTBEAT_NS = 1_000 * NS_PER_MS
CLIENT_LOST_AFTER_NS = 5_000 * NS_PER_MS

#: The number of models that can be put aside (`WorkerConfig.put_aside`), and the longest name and reason.
MOST_PUT_ASIDE = 64
PUT_ASIDE_CHARS = 300

#: When a worker collects garbage: when nothing is due, as Python does by itself, or never.
GC_MODES = ("idle", "auto", "off")


Bind = Annotated[
    str,
    Option(
        help="Address to listen on, as 127.0.0.1, ::1 or :: (all).",
        metavar="ADDRESS",
        panel=ADDRESSES,
    ),
]

JoinKey = Annotated[
    str,
    Option(
        help="File with the cluster's join key (`slosched keys join FILE` writes one), the same for "
        "controller and workers. Needed for workers that register from another host.",
        metavar="FILE",
        panel=ADDRESSES,
    ),
]


@dataclass(frozen=True)
class WorkerConfig(FunctionOptions, RepositoryOptions):
    """A worker process. `device` is "auto", "cuda:N", "cpu", "emulated" or "none" (functions alone).

    `dtype` and `channels_last` hold for the models that `models` does not name; the latter for those
    that take images. `libraries` are those whose every classification model can be loaded by name.
    """

    device: Annotated[
        str,
        Option(
            help="auto, cuda:N, cpu, emulated, none (functions alone), or one of another package. Default "
            "{default}: every GPU of the host, else the CPU; none with --functions and without models.",
            metavar="DEVICE",
        ),
    ] = "auto"
    gpus: Annotated[
        AtLeast1,
        Option(
            help="Number of GPUs. Emulated: all behind one address, default 1. Real: one process each, on "
            "consecutive ports, default all."
        ),
    ] = 1
    port: Annotated[
        Port,
        Option(
            help="Port to listen on; the first of several for several real GPUs. Default {default}; 0 takes "
            "a free one.",
            panel=ADDRESSES,
        ),
    ] = WORKER_PORT
    bind: Bind = "0.0.0.0"
    controller: Annotated[
        str,
        Option(
            help="Register with the controller at this address, which then needs no --workers list, and go on "
            "trying. Default: wait to be greeted.",
            metavar="HOST:PORT",
            panel=ADDRESSES,
        ),
    ] = ""
    name: Annotated[
        str,
        Option(
            help="Name under which it registers, one for each worker of the cluster; several real GPUs get "
            "-0, -1, ... behind it. Default: HOST/cuda:N, or HOST/DEVICE:PORT without a real GPU.",
            metavar="NAME",
            panel=ADDRESSES,
        ),
    ] = ""
    advertise: Annotated[
        str,
        Option(
            help="Host or address at which the controller reaches this worker. Default: that from which it "
            "registers.",
            metavar="HOST",
            panel=ADDRESSES,
        ),
    ] = ""
    join_key: JoinKey = ""
    profile: Annotated[
        str,
        Option(
            help="The profile of an emulated GPU: a built-in one, a TOML file of `slosched profile`, or "
            "cascade:NAME|FILE.",
            metavar="NAME|FILE",
        ),
    ] = "v100"
    weights_cache_bytes: Annotated[
        AtLeast0,  # 0: the default that its help names
        Option(
            help="GPU memory for weights, for example 10GiB. Default: the profile's, or four fifths of the "
            "free memory.",
            panel=MEMORY,
        ),
    ] = 0
    preempt: Annotated[
        bool,
        Option(
            help="On a GPU, real or emulated, urgent inferences may interrupt long ones (the controller needs "
            "--preempt too).",
            panel=MODELS,
        ),
    ] = False
    urgent_share: Annotated[
        float,
        Meta(gt=0, lt=1),
        Option(
            help="With --preempt on a CUDA GPU: the part of its time that urgent requests are expected to "
            "take. Long models are cut where boundaries and waiting for them cost the least then. "
            "Default {default}.",
            panel=MODELS,
        ),
    ] = 0.5
    urgent_slo_ns: Annotated[
        AtLeast1,
        Option(
            help="With --preempt on a CUDA GPU: the SLO of urgent requests. The shorter it is, the closer the "
            "boundaries. A bare number is in seconds.",
            panel=MODELS,
        ),
    ] = 10 * NS_PER_MS
    page_bytes: AtLeast1 = PAGE_BYTES
    allow_zero_size_inputs: bool = True
    dtype: Annotated[
        str,
        Option(
            help=f"Precision of the weights: {', '.join(DTYPES)}. Default {{default}}. Inputs and outputs "
            "travel as float32 in any case. For models that --config does not name.",
            metavar="DTYPE",
            panel=MODELS,
            one_of=DTYPES,
        ),
    ] = "float32"
    channels_last: Annotated[
        bool,
        Option(
            help="Memory format of models that take images; with float16, convolutions run faster in it. "
            "For models that --config does not name.",
            panel=MODELS,
        ),
    ] = False
    libraries: Annotated[
        tuple[str, ...],
        Option(
            help="torchvision, timm, diffusion or originals, or several (torchvision,timm), where they are "
            "installed: their models can be loaded by name, as timm/resnet10t, diffusion/sd15, originals/gpt2.",
            panel=MODELS,
            one_of=LIBRARIES,
            one_is="library",
        ),
    ] = ()
    models: tuple[ModelSource, ...] = ()
    noise: EmulationNoise = field(default_factory=EmulationNoise)
    torch_threads: Annotated[
        AtLeast1,
        Option(help="CPU threads of one inference on the device cpu.", panel=PROCESSOR),
    ] = 1
    host_cache_bytes: Annotated[
        AtLeast0,  # 0: as much as the models need
        Option(
            help="Pinned host memory for models' weights, for example 8GiB; a model that does not fit is not "
            "prepared. Default: as much as the models need.",
            panel=MEMORY,
        ),
    ] = 0
    host_images: Annotated[
        AtLeast1,
        Option(
            help="Pinned copies of each model's weights, shared by its instances, so that loads come from "
            "different memory.",
            panel=MEMORY,
        ),
    ] = 1
    cpu: Annotated[
        int,
        Meta(ge=-1, description="the number of a core, or -1 for any"),
        Option(
            help="Keep the loop on this core; with several real GPUs, theirs are this one and the next. "
            "Other threads may run elsewhere. Default {default}: any core.",
            panel=PROCESSOR,
        ),
    ] = -1
    #: Busy-poll instead of sleeping: saves one wake-up of latency on an idle worker, costs a whole core.
    busy_poll: Annotated[
        bool,
        Option(
            help="Busy-poll in the loop of a real GPU: a request to an idle worker is served about 0.1 ms "
            "sooner, at the cost of a whole core.",
            flag="--busy-poll/--sleep",
            panel=PROCESSOR,
        ),
    ] = False
    gc: Annotated[
        str,
        Option(
            help="When garbage is collected: idle (when nothing is due for 5 ms), auto (as Python does by "
            "itself) or off (never; memory may grow).",
            panel=PROCESSOR,
            one_of=GC_MODES,
        ),
    ] = "idle"
    #: (name, reason) of models that ended this worker's process too often: they are not offered. The
    #: supervisor alone says it.
    put_aside: Annotated[tuple[tuple[str, str], ...], Option(in_file=False)] = ()

    def __post_init__(self) -> None:
        check_types(self)
        parse_bind(self.bind)
        if self.controller:
            parse_address(self.controller)
        elif self.name or self.advertise or self.join_key:
            raise InvalidConfig(
                "name, advertise and join_key are for a worker that registers: give controller"
            )
        if self.namespace and not self.state:
            raise InvalidConfig("namespace is one of the state's: give state, too")
        if self.device == "none" and not self.functions:
            raise InvalidConfig("a worker of the device none runs functions alone: give functions")
        if self.repository and self.device in ("none", "emulated"):
            why = (
                "runs functions alone" if self.device == "none" else "has the models of its profile"
            )
            raise InvalidConfig(f"a worker of the device {self.device} {why}: leave repository out")


FIDELITIES = ("best", "paper")

#: Rules of which weights go to which GPU; core/scheduler/policies/placements.py has them.
PLACEMENTS = ("gain", "demand", "lru")


#: What a weight may be: above a hundred it would be a queue of its own in all but name.
WEIGHT_RANGE = (0.01, 100.0)
Weight = Annotated[float, Meta(ge=WEIGHT_RANGE[0], le=WEIGHT_RANGE[1])]
CLIENT_WEIGHTS = ("value", "shares")


#: At 1 a request that a forecast gives no chance is refused, above it also some that it gives one. The earliest
#: that costs 0.3 points at most over the policy cases (analysis/early_refusal/early_refusal.md).
EARLY_REFUSAL = 1.0
#: More would leave GPUs idle beside requests that were refused.
MOST_EARLY_REFUSAL = 10.0


def is_weight(value: float) -> bool:
    """True for a number within WEIGHT_RANGE (NaN is none)."""
    return WEIGHT_RANGE[0] <= value <= WEIGHT_RANGE[1]


@dataclass(frozen=True)
class WeightRule:
    """The operator's weight for the clients whose name matches `client` (a pattern with * and ?), or
    for requests with an SLO of at most `slo_max_ns`. Exactly one of the two is given.
    """

    weight: Weight
    client: str = ""
    slo_max_ns: Annotated[int, Meta(ge=0, description="above 0"), Option(name="slo_max")] = 0

    def __post_init__(self) -> None:
        check_types(self)
        if bool(self.client) == bool(self.slo_max_ns):
            raise InvalidConfig("a weight is for either client or slo_max: give one of them")


def _admission(help_: str, *, name: str = "") -> Option:
    """An option about what is accepted."""
    return Option(help=help_, name=name, panel=ADMISSION, in_status=False, simulated=False)


@dataclass(frozen=True)
class SchedulerConfig:
    """The scheduler's options, in the published order.

    None takes the default of the policy, which core/scheduler/policies knows: `resolved(config)` there fills it
    in, and refuses what the policy cannot heed.
    """

    policy: Annotated[str, Option(in_status=False)] = "INFER5"
    generate_inputs: Annotated[
        bool,
        Option(
            help="Generate inputs in the controller for requests without one, to load the network.",
            panel=SCHEDULER,
            simulated=False,
        ),
    ] = False
    max_gpus: Annotated[
        AtLeast1,
        Option(help="Use at most this many GPUs.", panel=SCHEDULER, simulated=False),
    ] = 100
    schedule_ahead_ns: Annotated[
        AtLeast1 | None,
        Option(
            help="How far ahead work is committed to a GPU, at most. A bare number is in seconds. "
            "Default 10ms.",
            panel=SCHEDULER,
        ),
    ] = None
    default_slo_ns: Annotated[
        AtLeast1,
        Option(
            help="The SLO of requests that name none. A bare number is in seconds.", panel=SCHEDULER
        ),
    ] = 100 * NS_PER_MS
    max_exec_ns: Annotated[
        AtLeast1 | None,
        Option(
            help="No batch above 1 that takes longer. A bare number is in seconds. "
            "Default 25ms (paper: 250ms).",
            panel=SCHEDULER,
        ),
    ] = None
    max_batch: Annotated[
        AtLeast1 | None,
        Option(help="No larger batch. Default 16 (paper: 8).", panel=SCHEDULER),
    ] = None
    fidelity: Annotated[
        str,
        Option(
            help="best, or paper: the published code's behaviour and constants.",
            panel=SCHEDULER,
            one_of=FIDELITIES,
            in_status=False,
        ),
    ] = "best"
    #: The first rule for a client that matches holds. In a file they are [[weights]] beside [scheduler].
    weights: Annotated[
        tuple[WeightRule, ...],
        Option(
            help="What requests are worth under overload (docs/fairness.md): by client, 'batch-*=0.2', and by "
            "SLO, 'slo<=10ms=2'. Default 1 for all.",
            metavar="NAME=WEIGHT,...",
            panel=SCHEDULER,
            in_file=False,
            in_status=False,
        ),
    ] = ()
    #: In a file they are `cascades`, names and files, and the table [cascade] beside [scheduler].
    cascades: Annotated[
        tuple[CascadeSpec, ...],
        Option(
            help="Cascades to serve (docs/cascades.md): built-in names (sdturbo), or TOML files.",
            name="cascade",
            metavar="NAME|FILE,...",
            panel=SCHEDULER,
            in_file=False,
            in_status=False,
        ),
    ] = ()
    cascade: Annotated[
        CascadeOptions, Option(name="cascade_options", in_file=False, in_status=False)
    ] = field(default_factory=CascadeOptions)
    max_client_weight: Annotated[
        Weight,
        Option(
            help="The highest weight that a client without a rule may give itself.",
            panel=SCHEDULER,
            in_status=False,
            simulated=False,
        ),
    ] = 1.0
    client_weights: Annotated[
        str,
        Option(
            help="value: a client's weight is that of each of its requests; shares: its share of the GPUs, "
            "which no other client can take.",
            panel=SCHEDULER,
            one_of=CLIENT_WEIGHTS,
            in_status=False,
        ),
    ] = "value"
    early_refusal: Annotated[
        float,
        Meta(ge=0, le=MOST_EARLY_REFUSAL),
        Option(
            help="How early INFER5 refuses what a forecast of its queue gives no chance: how many times the "
            "wait that is forecast must fit before the deadline; 0: only when it is hopeless "
            "(docs/policy.md).",
            panel=SCHEDULER,
        ),
    ] = EARLY_REFUSAL
    preempt: Annotated[
        bool,
        Option(
            help="INFER5: a request that would be late may interrupt a long inference, on workers with "
            "--preempt, where more is in time then.",
            panel=SCHEDULER,
        ),
    ] = False
    mix_lengths: Annotated[
        bool,
        Option(
            help="INFER5: a batch may hold requests of several length classes of a model, where that takes "
            "less GPU time than batches apart.",
            panel=SCHEDULER,
        ),
    ] = True
    placement: Annotated[
        str,
        Option(
            help="Which weights are loaded over which: gain (requests in time gained for each ms of PCIe), "
            "demand (Clockwork's rule) or lru. Default {default}. Not for paper, nor for a TYPE with its own.",
            panel=SCHEDULER,
            one_of=PLACEMENTS,
        ),
    ] = "gain"
    #: What is accepted (core/scheduler/limits.py); Clockwork's Figures 7 and 8 have SLOs of a day.
    max_slo_ns: Annotated[
        AtLeast1,
        _admission("Refuse requests with a longer SLO."),
    ] = 48 * 3600 * NS_PER_S
    max_requests: Annotated[
        AtLeast1,
        _admission("Maximum number of unanswered requests; further ones are refused."),
    ] = 500_000
    max_client_requests: Annotated[
        AtLeast1, _admission("Maximum number of unanswered requests of one client.")
    ] = 100_000
    max_bytes: Annotated[
        AtLeast1,
        _admission("Maximum total size of the inputs of unanswered requests.", name="max_bytes"),
    ] = 8 * 2**30
    max_client_bytes: Annotated[
        AtLeast1, _admission("The same for one client.", name="max_client_bytes")
    ] = 2 * 2**30
    max_client_loads: Annotated[
        AtLeast1, _admission("Maximum number of waiting loads of one client.")
    ] = 256
    max_instances: Annotated[
        AtLeast1, _admission("Maximum number of model instances, of all names.")
    ] = 200_000
    max_workers: Annotated[
        AtLeast1, _admission("Maximum number of workers, those of --workers included.")
    ] = 1000
    operators: Annotated[
        tuple[str, ...],
        _admission("Names of clients that may unload models that others use, and drain workers."),
    ] = ()
    keep_unused_ns: Annotated[
        AtLeast1, _admission("Unload instances that no client has used for this long.")
    ] = 3600 * NS_PER_S

    def __post_init__(self) -> None:
        check_types(self)
        names = [cascade.name for cascade in self.cascades]
        if len(set(names)) != len(names):
            raise InvalidConfig(f"each cascade needs a name of its own, not {names}")
        if self.default_slo_ns > self.max_slo_ns:
            raise InvalidConfig(
                f"default_slo of {format_duration(self.default_slo_ns)} is above max_slo of "
                f"{format_duration(self.max_slo_ns)}"
            )


@dataclass(frozen=True)
class ControllerConfig:
    """A controller process. `workers` are "host:port"; others may register."""

    scheduler: SchedulerConfig
    workers: tuple[str, ...] = ()
    port: Annotated[
        Port,
        Option(help="Port for clients. Default {default}; 0 takes a free one.", panel=ADDRESSES),
    ] = CONTROLLER_PORT
    bind: Bind = "0.0.0.0"
    http_port: Annotated[
        int,
        Meta(ge=-1, le=65535),
        Option(
            help="Loopback port of /healthz, /readyz and /status. Default {default}: "
            f"{CONTROLLER_PORT + 1} beside the default --port, else a free one; -1: none.",
            panel=ADDRESSES,
        ),
    ] = 0
    join_key: JoinKey = ""
    cluster_id: Annotated[
        str,
        Option(
            help="Name or number of the cluster. A controller that is started again with the same one takes "
            "over what the workers hold. Default: another one at each start.",
            metavar="ID",
            panel=ADDRESSES,
        ),
    ] = ""
    busy_poll: Annotated[
        bool,
        Option(
            help="Busy-poll: at light load a request is planned about 0.1 ms sooner, at the cost of a whole "
            "core.",
            flag="--busy-poll/--sleep",
            panel=PROCESSOR,
        ),
    ] = False
    io_threads: Annotated[
        int,
        Meta(ge=0, le=16),  # 0: the default that its help names
        Option(
            help="Threads that move inputs and outputs between sockets and memory. Default: 1 on up to 3 CPUs, "
            "else one for every 2, at most 4.",
            panel=PROCESSOR,
        ),
    ] = 0
    log_dir: Annotated[
        str,
        Option(
            help="Directory for the telemetry; a run in it is never overwritten. Default "
            "$CLOCKWORK_LOG_DIR, else ./slosched-runs/<time>-controller.",
            metavar="DIR",
        ),
    ] = ""
    log_bytes: Annotated[
        AtLeast0,  # 0: it grows for ever
        Option(
            help="Rotate each log at this size; the older file becomes NAME.1. Default: no rotation.",
            name="log_size",
        ),
    ] = 0
    log_keep: Annotated[
        AtLeast0, Option(help="With --log-size: number of older files kept of each log.")
    ] = 8

    def __post_init__(self) -> None:
        check_types(self)
        parse_bind(self.bind)
        for worker in self.workers:
            parse_address(worker)
        if len(self.cluster_id) > 128 or not self.cluster_id.isprintable():
            raise InvalidConfig("cluster_id must be at most 128 printable characters")
