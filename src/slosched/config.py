"""Plain configuration: what a scheduler, a worker and a profile are told. No files are read here.

`config_file.py` reads these from TOML. Every class checks itself when it is made and raises
InvalidConfig with the name of the wrong field, for a wrong type as well.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import pairwise
from math import ceil

from slosched.addresses import parse_address, parse_bind
from slosched.errors import InvalidConfig, UnknownName
from slosched.field_types import check_types
from slosched.units import NS_PER_MS, NS_PER_S, format_duration

#: Clockwork's client and worker ports.
WORKER_PORT = 12345
CONTROLLER_PORT = 12346

#: The worker's heartbeat (design; issue of the serving core) and when silence means loss.
HEARTBEAT_NS = 200 * NS_PER_MS
LOST_AFTER_NS = 800 * NS_PER_MS
CLIENT_HEARTBEAT_NS = 1_000 * NS_PER_MS
CLIENT_LOST_AFTER_NS = 5_000 * NS_PER_MS

PAGE_BYTES = 16 * 1024 * 1024  # Clockwork: memory_settings.weights_cache_page_size

#: The seeds' names for models, and the zoo's.
ALIASES = {"resnet50_v2": "resnet50", "resnet18_v2": "resnet18"}

#: Precisions of a model's weights.
DTYPES = ("float32", "float16", "bfloat16")

#: Libraries of models. One of theirs is named LIBRARY/NAME.
LIBRARIES = ("torchvision", "timm")
LIBRARY_PREFIXES = tuple(f"{library}/" for library in LIBRARIES)


def canonical_model(name: str) -> str:
    """Return the zoo's name for `name`: aliases are resolved, other names pass unchanged."""
    return ALIASES.get(name, name)


@dataclass(frozen=True)
class ModelProfile:
    """How long one model takes on one kind of GPU. Shapes are per request, without the batch."""

    name: str
    exec_ns: dict[int, int]  # batch size -> exec time
    weights_ns: int
    weights_bytes: int
    input_shape: tuple[int, ...] = (3, 224, 224)
    input_dtype: str = "float32"
    output_shape: tuple[int, ...] = (1000,)
    output_dtype: str = "float32"

    def __post_init__(self) -> None:
        check_types(self)
        if 1 not in self.exec_ns:
            raise InvalidConfig(f"model {self.name!r}: exec_ns has no batch size 1")
        if any(batch < 1 or ns <= 0 for batch, ns in self.exec_ns.items()):
            raise InvalidConfig(f"model {self.name!r}: batch sizes and exec times must be > 0")
        if self.weights_ns < 0 or self.weights_bytes < 0:
            raise InvalidConfig(f"model {self.name!r}: weights_ns and weights_bytes must be >= 0")

    def interpolated(self) -> ModelProfile:
        """The same model with every batch size up to the largest, its time linear between neighbours.

        For devices that run any size as it comes; without it a batch is padded to the next size listed.
        """
        sizes = sorted(self.exec_ns)
        exec_ns = dict(self.exec_ns)
        for low, high in pairwise(sizes):
            step_ns = (self.exec_ns[high] - self.exec_ns[low]) / (high - low)
            for size in range(low + 1, high):
                exec_ns[size] = round(self.exec_ns[low] + (size - low) * step_ns)
        return replace(self, exec_ns=dict(sorted(exec_ns.items())))

    def pages(self, page_bytes: int) -> int:
        """Pages of `page_bytes` that the weights take; at least 1."""
        return max(1, ceil(self.weights_bytes / page_bytes))


@dataclass(frozen=True)
class GpuProfile:
    """One kind of GPU: its weights cache and the models measured on it."""

    name: str
    models: dict[str, ModelProfile]
    weights_cache_bytes: int
    page_bytes: int = PAGE_BYTES
    clock_mhz: int = 1380

    def __post_init__(self) -> None:
        check_types(self)
        if self.page_bytes <= 0 or self.weights_cache_bytes < self.page_bytes:
            raise InvalidConfig(
                f"profile {self.name!r}: the weights cache must hold one page or more"
            )

    @property
    def pages(self) -> int:
        return self.weights_cache_bytes // self.page_bytes

    def model(self, name: str) -> ModelProfile:
        """Return the profile of `name` (an alias is fine). Raises UnknownName."""
        try:
            return self.models[canonical_model(name)]
        except KeyError:
            raise UnknownName("model", name, list(self.models)) from None


@dataclass(frozen=True)
class EmulationNoise:
    """Seeded disturbances of an emulated GPU. All zero: everything takes what the profile says.

    Exec times are multiplied by a normal factor of mean 1, or by one drawn from `exec_quantiles`: evenly
    spaced quantiles of measured / expected, from the least to the greatest. With `pcie_bytes_per_s`
    copies of inputs and outputs take time, and inputs and weights on their way to a GPU slow each other;
    with `pcie_shared` also those of the other GPUs of the worker.
    """

    seed: int = 0
    exec_sigma: float = 0.0  # relative standard deviation of exec times (normal, cut at 3 sigma)
    exec_quantiles: tuple[float, ...] = ()
    stall_probability: float = 0.0  # per exec
    stall_ns: int = 0
    pcie_bytes_per_s: int = 0
    pcie_shared: bool = False

    def __post_init__(self) -> None:
        check_types(self)
        if not 0 <= self.exec_sigma < 0.5 or not 0 <= self.stall_probability <= 1:
            raise InvalidConfig(
                "noise: exec_sigma must be in [0, 0.5), stall_probability in [0, 1]"
            )
        if self.stall_ns < 0 or self.pcie_bytes_per_s < 0:
            raise InvalidConfig("noise: stall_ns and pcie_bytes_per_s must be at least 0")
        quantiles = self.exec_quantiles
        if quantiles and (
            len(quantiles) < 2 or quantiles[0] <= 0 or any(a > b for a, b in pairwise(quantiles))
        ):
            raise InvalidConfig(
                "noise: exec_quantiles must be two or more numbers above 0 that never decrease"
            )
        if quantiles and self.exec_sigma:
            raise InvalidConfig("noise: give exec_sigma or exec_quantiles, not both")
        if self.pcie_shared and not self.pcie_bytes_per_s:
            raise InvalidConfig("noise: pcie_shared needs pcie_bytes_per_s")


@dataclass(frozen=True)
class ModelSource:
    """Where a worker may take one model from, and in which precision. Only the worker's own config can
    say this.

    Exactly one of `factory` ("package.module:function", called without arguments, returns an
    nn.Module), `pt2` (torch.export file), `safetensors` (weights beside a transformers `config` file) and
    `cupy` ("package.module:function", for the CuPy backend) is set; none means the zoo's, or the
    library's, own of that name. `input_shape` is one request's; these last know theirs. `output` names the
    one of several outputs that is the answer: a key, an attribute or an index ("0").
    """

    name: str
    factory: str = ""
    pt2: str = ""
    safetensors: str = ""
    config: str = ""
    cupy: str = ""
    input_shape: tuple[int, ...] = ()
    input_dtype: str = "float32"
    dtype: str = "float32"  # of its weights, one of DTYPES; inputs and outputs travel as float32
    channels_last: bool = False  # of its weights and, on the device, inputs
    output: str = ""
    folder: str = (
        ""  # where modules are looked for that are not installed: beside the worker's file
    )

    def __post_init__(self) -> None:
        check_types(self)
        if self.dtype not in DTYPES:
            raise InvalidConfig(
                f"model {self.name!r}: dtype {self.dtype!r} is none of {', '.join(DTYPES)}"
            )


#: The number of models that can be put aside (`WorkerConfig.put_aside`), and the longest name and reason.
MOST_PUT_ASIDE = 64
PUT_ASIDE_CHARS = 300

#: When a worker collects garbage: when nothing is due, as Python does by itself, or never.
GC_MODES = ("idle", "auto", "off")


@dataclass(frozen=True)
class WorkerConfig:
    """A worker process. `device` is "auto", "cuda:N", "cpu" or "emulated".

    `dtype` and `channels_last` hold for the models that `models` does not name; the latter for those
    that take images. `libraries` are those whose every classification model can be loaded by name.
    """

    device: str = "auto"
    gpus: int = 1
    port: int = WORKER_PORT
    bind: str = "0.0.0.0"
    profile: str = "v100"  # name of a built-in profile or a file; used when emulated
    weights_cache_bytes: int = 0  # 0: the profile's, or four fifths of the GPU's free memory
    page_bytes: int = PAGE_BYTES
    allow_zero_size_inputs: bool = True
    dtype: str = "float32"  # one of DTYPES
    channels_last: bool = False
    libraries: tuple[str, ...] = ()  # of LIBRARIES
    models: tuple[ModelSource, ...] = ()
    noise: EmulationNoise = field(default_factory=EmulationNoise)
    torch_threads: int = 1
    host_cache_bytes: int = 0  # pinned host memory for models' weights; 0: what they take
    host_images: int = 1  # pinned images of one model's weights, shared by its instances
    #: The core that the loop's thread stays on, of several processes the first's; -1: any.
    cpu: int = -1
    gc: str = "idle"  # one of GC_MODES
    #: Busy-poll instead of sleeping: saves one wake-up of latency on an idle worker, costs a whole core.
    busy_poll: bool = False
    #: (name, reason) of models that ended this worker's process too often: they are not offered. Said by
    #: the supervisor alone, in no file.
    put_aside: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        check_types(self)
        if self.host_images < 1 or self.host_cache_bytes < 0:
            raise InvalidConfig("host_images must be at least 1, host_cache_bytes at least 0")
        if self.gpus < 1:
            raise InvalidConfig(f"gpus must be at least 1, not {self.gpus}")
        if self.cpu < -1:
            raise InvalidConfig(f"cpu must be the number of a core, or -1 for any, not {self.cpu}")
        if self.gc not in GC_MODES:
            raise UnknownName("gc", self.gc, list(GC_MODES))
        parse_bind(self.bind)
        if not 0 <= self.port <= 65535:
            raise InvalidConfig(f"port must be within 0..65535, not {self.port}")
        if self.dtype not in DTYPES:
            raise UnknownName("dtype", self.dtype, list(DTYPES))
        for library in self.libraries:
            if library not in LIBRARIES:
                raise UnknownName("library", library, list(LIBRARIES))


FIDELITIES = ("best", "paper")

#: Rules of which weights go to which GPU; core/scheduler/policies/placements.py has them.
PLACEMENTS = ("gain", "demand", "lru")

_LIMITS = (
    "max_slo_ns", "max_client_requests", "max_requests", "max_client_bytes", "max_bytes", "max_client_loads",
    "max_instances", "keep_unused_ns",
)  # fmt: skip

#: What a weight may be: above a hundred it would be a queue of its own in all but name.
WEIGHT_RANGE = (0.01, 100.0)
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

    weight: float
    client: str = ""
    slo_max_ns: int = 0

    def __post_init__(self) -> None:
        check_types(self)
        if bool(self.client) == bool(self.slo_max_ns):
            raise InvalidConfig("a weight is for either client or slo_max: give one of them")
        if self.slo_max_ns < 0:
            raise InvalidConfig(f"slo_max must be above 0, not {self.slo_max_ns}")
        if not is_weight(self.weight):
            raise InvalidConfig(
                f"weight must be within {WEIGHT_RANGE[0]:g}..{WEIGHT_RANGE[1]:g}, not {self.weight:g}"
            )


@dataclass(frozen=True)
class SchedulerConfig:
    """The scheduler's options, in the published order.

    None takes the default of the policy, which core/scheduler/policies knows: `resolved(config)` there fills it
    in, and refuses what the policy cannot heed.
    """

    policy: str = "INFER5"
    generate_inputs: bool = False
    max_gpus: int = 100
    schedule_ahead_ns: int | None = None
    default_slo_ns: int = 100 * NS_PER_MS
    max_exec_ns: int | None = None
    max_batch: int | None = None
    fidelity: str = "best"
    #: What requests are worth to INFER5 (docs/fairness.md); the first rule for a client that matches holds.
    weights: tuple[WeightRule, ...] = ()
    #: A client without a rule may say a weight up to this: by default it can only lower its own.
    max_client_weight: float = 1.0
    #: What a client's weight is: "value" of each of its requests, or its share of the GPUs ("shares").
    client_weights: str = "value"
    #: How early INFER5 refuses what a forecast of its queue gives no chance (core/scheduler/forecast.py): how
    #: many times the wait that is forecast must fit before the deadline. 0: only when it is hopeless.
    early_refusal: float = EARLY_REFUSAL
    placement: str = "gain"  # of the policies that load by demand in our way; others have their own
    #: What is accepted (core/scheduler/limits.py); Clockwork's Figures 7 and 8 have SLOs of a day.
    max_slo_ns: int = 48 * 3600 * NS_PER_S
    max_client_requests: int = 100_000  # unanswered, of one client; and of all
    max_requests: int = 500_000
    max_client_bytes: int = 2 * 2**30  # of the inputs of these
    max_bytes: int = 8 * 2**30
    max_client_loads: int = 256  # LoadModelRequests of one client that wait
    max_instances: int = 200_000  # of all names together
    #: Names of clients that may unload what others use.
    operators: tuple[str, ...] = ()
    keep_unused_ns: int = 3600 * NS_PER_S  # what no client has used for so long is unloaded

    def __post_init__(self) -> None:
        check_types(self)
        if self.fidelity not in FIDELITIES:
            raise UnknownName("fidelity", self.fidelity, list(FIDELITIES))
        if self.client_weights not in CLIENT_WEIGHTS:
            raise UnknownName("client_weights", self.client_weights, list(CLIENT_WEIGHTS))
        if not is_weight(self.max_client_weight):
            raise InvalidConfig(
                f"max_client_weight must be within {WEIGHT_RANGE[0]:g}..{WEIGHT_RANGE[1]:g}, not "
                f"{self.max_client_weight:g}"
            )
        if not 0 <= self.early_refusal <= MOST_EARLY_REFUSAL:
            raise InvalidConfig(
                f"early_refusal must be within 0..{MOST_EARLY_REFUSAL:g}, not {self.early_refusal:g}"
            )
        if self.placement not in PLACEMENTS:
            raise UnknownName("placement", self.placement, list(PLACEMENTS))
        for name in ("max_gpus", "default_slo_ns", *_LIMITS):
            if getattr(self, name) < 1:
                raise InvalidConfig(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.default_slo_ns > self.max_slo_ns:
            raise InvalidConfig(
                f"default_slo of {format_duration(self.default_slo_ns)} is above max_slo of "
                f"{format_duration(self.max_slo_ns)}"
            )
        for name in ("schedule_ahead_ns", "max_exec_ns", "max_batch"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InvalidConfig(f"{name} must be at least 1, not {value}")


@dataclass(frozen=True)
class ControllerConfig:
    """A controller process. `workers` are "host:port"."""

    scheduler: SchedulerConfig
    workers: tuple[str, ...]
    port: int = CONTROLLER_PORT
    bind: str = "0.0.0.0"
    http_port: int = 0  # 0: port + 1 on loopback; -1: none
    busy_poll: bool = (
        False  # busy-poll instead of sleeping: a wake-up less for each message, for a whole core
    )
    log_dir: str = ""  # "": CLOCKWORK_LOG_DIR, else ./slosched-runs
    log_bytes: int = 0  # a log that would be larger begins anew; 0: it grows for ever
    log_keep: int = 8  # older parts of each log that stay

    def __post_init__(self) -> None:
        check_types(self)
        parse_bind(self.bind)
        for worker in self.workers:
            parse_address(worker)
        if not 0 <= self.port <= 65535:
            raise InvalidConfig(f"port must be within 0..65535, not {self.port}")
        if not -1 <= self.http_port <= 65535:
            raise InvalidConfig(f"http_port must be within -1..65535, not {self.http_port}")
        if self.log_bytes < 0 or self.log_keep < 0:
            raise InvalidConfig("log_bytes and log_keep must be at least 0")
