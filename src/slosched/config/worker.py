"""The options of a worker: its device, its models, its repository and its functions."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from msgspec import Meta

from slosched.addresses import parse_address, parse_bind
from slosched.config.listening import WORKER_PORT, Bind, JoinKey
from slosched.errors import InvalidConfig
from slosched.field_types import AtLeast0, AtLeast1, Port, check_types
from slosched.gpu_profile import PAGE_BYTES, EmulationNoise
from slosched.model_source import DTYPES, LIBRARIES, ModelSource
from slosched.options import ADDRESSES, FUNCTIONS, MEMORY, MODELS, PROCESSOR, Option
from slosched.units import NS_PER_MS

#: The number of models that can be put aside (`WorkerConfig.put_aside`), and the longest name and reason.
MOST_PUT_ASIDE = 64
PUT_ASIDE_CHARS = 300

#: When a worker collects garbage: when nothing is due, as Python does by itself, or never.
GC_MODES = ("idle", "auto", "off")


@dataclass(frozen=True, kw_only=True)
class RepositoryOptions:
    """Which folder of models a worker offers beside its own (WorkerConfig has this field)."""

    repository: Annotated[
        str,
        Option(
            help="Folder of models, as NAME/VERSION/model.pt2, which are offered as NAME:VERSION and noticed "
            "while the worker runs (docs/repository.md). Default: none.",
            metavar="FOLDER",
            panel=MODELS,
        ),
    ] = ""


@dataclass(frozen=True, kw_only=True)
class FunctionOptions:
    """Which functions a worker runs, and in what (WorkerConfig has these fields).

    `state` is the store of ctx.state (functions/state/opening.py). Calls use `namespace` in it; without one,
    the worker makes one and drops it when it ends.
    """

    functions: Annotated[
        tuple[str, ...],
        Option(
            help="Functions to offer: package.module, package.module:function, entry-points (of installed "
            "packages) or entry-points:NAME, or several of these (a.b,c.d). Default: none.",
            metavar="MODULE,...",
            panel=FUNCTIONS,
        ),
    ] = ()
    slots: Annotated[
        int,
        Meta(ge=0, le=1024),
        Option(
            help="Number of calls that run at a time on this host. Default: its cores, divided by the "
            "number of real GPUs.",
            panel=FUNCTIONS,
        ),
    ] = 0
    most_calls: Annotated[
        int,
        Meta(ge=1, le=10_000),
        Option(
            help="Most calls that have begun and not ended, those that await others included. Each has a "
            "process. Default {default}.",
            panel=FUNCTIONS,
        ),
    ] = 256
    call_memory_bytes: Annotated[
        AtLeast0,
        Option(
            help="Memory that a call may take beyond what its function's init left, unless the function "
            "declares more. Default {default}; 0 means no limit.",
            panel=FUNCTIONS,
        ),
    ] = 1024**3
    state: Annotated[
        str,
        Option(
            help="Store of the state that calls share (ctx.state): embedded, or redis://HOST:PORT for several "
            "hosts. Default: none.",
            metavar="STORE",
            panel=FUNCTIONS,
        ),
    ] = ""
    namespace: Annotated[
        str,
        Option(
            help="Namespace of the state, which then outlives this worker. Default: one of its own, dropped "
            "when it ends.",
            metavar="NAME",
            panel=FUNCTIONS,
        ),
    ] = ""


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
