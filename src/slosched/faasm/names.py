"""The tasks, switches and variables of the original, and what each is here. Plain data.

docs/faasm.md, `slosched exp names` and the aliases of `slosched exp` are made from these tables, and a test
holds each line against what the command line does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

#: Stands in each output.
REPLACED = (
    "Nothing here is Faasm: a wasm Faaslet is replaced by a warm slot of a worker, a Knative container by a "
    "process per instance."
)


@dataclass(frozen=True, kw_only=True)
class Task:
    """One task of the original, `inv NAME ARGUMENTS [SWITCHES]`.

    `runs` are the words of our command; {NAME} in them is the value of that argument. `switches` say what a
    switch adds to these words (the later of two equal options counts; {} is the switch's own value), or, as a
    text, why it has no effect. One that takes a value ends with "=". Without `runs` the task has no effect,
    for the reason `why`, which also says what to run instead. `documented`: its page of experiments names it.
    """

    name: str
    arguments: tuple[str, ...] = ()
    runs: tuple[str, ...] = ()
    switches: Mapping[str, tuple[str, ...] | str] = field(default_factory=dict)
    why: str = ""
    documented: bool = False

    @property
    def usage(self) -> str:
        """The task as the original writes it."""
        options = [f"[{switch}{'N' if switch.endswith('=') else ''}]" for switch in self.switches]
        return " ".join([self.name, *self.arguments, *options])

    @property
    def ours(self) -> str:
        """What it is here, for the table."""
        if not self.runs:
            return f"no effect: {self.why}"
        words = [word.strip("{}") if word.startswith("{") else word for word in self.runs]
        more = [
            f"{switch.rstrip('=')}: {' '.join(added).replace('{}', 'N')}"
            for switch, added in self.switches.items()
            if not isinstance(added, str)
        ]
        return f"`slosched {' '.join(words)}`" + (f" ({'; '.join(more)})" if more else "")


@dataclass(frozen=True, kw_only=True)
class Variable:
    """A variable of the original. `fields` are our options that it may set, the first that the
    experiment has; `why` it has no effect where there is none. `unit` is that of its number. `quiet`: also
    other programs use the name, so that it is heeded as NAME=VALUE alone."""

    fields: tuple[str, ...] = ()
    unit: str = ""
    why: str = ""
    quiet: bool = False

    def written(self, value: str) -> str:
        """The value as our option takes it."""
        return f"{value}{self.unit}" if value.replace(".", "", 1).isdigit() else value


# ------------------------------------------------------------------------------------------ reasons

_IN_PLACE = "each run makes its data in place, from its seed, and drops them when it ends"
_NO_BUILD = "functions are Python modules, which workers import; nothing is built"
_STARTS = "an experiment starts the workers that it needs; --workers says how many slots"
_ENDS = "each command ends what it started, and fails if anything is left"
_OUT_OF_SCOPE = "this benchmark of the original is not among slosched's experiments"
_BILLED = "bills are always made: only the run's own processes are sampled"
_BARE = "the original takes it, and does the same without"
_HOSTS = "there is no upload service"
_CLOUD = "there is no cluster to choose"
_LADDER = ("exp", "coldstart")
_NOBILL: dict[str, tuple[str, ...] | str] = {"--nobill": _BILLED}
_REPLICAS: dict[str, tuple[str, ...] | str] = {"--replicas=": _STARTS}
_MICRO: dict[str, tuple[str, ...] | str] = {
    "--micro": "slosched exp sgd --size micro takes the micro set"
}
_HARD: dict[str, tuple[str, ...] | str] = {"--hard": _ENDS}
_HOST: dict[str, tuple[str, ...] | str] = {"--host=": _HOSTS, "--local-copy": _HOSTS}
_MATRICES = (
    *("exp", "matrices", "--scale", "published", "--workers", "{N_WORKERS}"),
    *("--systems", "slots"),
)


def _pull(experiment: str) -> tuple[str, ...]:
    return ("exp", "pull", experiment, "{USER}", "{HOST}")


# -------------------------------------------------------------------------------------------- tasks

_DATA = (
    Task(
        name="data.reuters-state",
        switches={**_MICRO, "--host=": _HOSTS, "--knative": _CLOUD},
        why=f"{_IN_PLACE}; run slosched exp sgd",
        documented=True,
    ),
    Task(
        name="data.matrix-upload-s3",
        why=f"{_IN_PLACE}; there is no S3; run slosched exp matrices",
        documented=True,
    ),
    Task(
        name="data.matrix-download-s3",
        why=f"{_IN_PLACE}; there is no S3; run slosched exp matrices",
        documented=True,
    ),
    Task(name="data.reuters-upload-s3", switches=_MICRO, why=f"{_IN_PLACE}; there is no S3"),
    Task(name="data.reuters-download-s3", switches=_MICRO, why=f"{_IN_PLACE}; there is no S3"),
    Task(
        name="data.matrix-state",
        arguments=("MAT_SIZE", "N_SPLITS"),
        switches={"--host=": _HOSTS, "--knative": _CLOUD},
        why=f"{_IN_PLACE}; run slosched exp matrices --sizes MAT_SIZE --splits N_SPLITS",
    ),
    Task(name="data.genomics-upload-s3", why=_OUT_OF_SCOPE),
    Task(name="data.genomics-download-s3", why=_OUT_OF_SCOPE),
    Task(
        name="matrix-data.generate-all",
        why=f"{_IN_PLACE}; run slosched exp matrices",
        documented=True,
    ),
    Task(
        name="matrix-data.generate",
        arguments=("MATRIX_SIZE", "N_SPLITS"),
        why=f"{_IN_PLACE}; run slosched exp matrices --sizes MATRIX_SIZE --splits N_SPLITS",
    ),
    Task(
        name="tf.upload",
        switches=_HOST,
        why="the model is built from its seed by the workers; run slosched exp inference-latency",
        documented=True,
    ),
    Task(
        name="tf.state",
        switches={"--host=": _HOSTS},
        why="the model is built from its seed by the workers; run slosched exp inference-latency",
        documented=True,
    ),
)

_BUILDS = (
    Task(name="libs.native", why=_NO_BUILD, documented=True),
    Task(
        name="upload",
        arguments=("USER", "FUNC"),
        switches={
            "--py": _NO_BUILD,
            "--ts": _NO_BUILD,
            "--ibm": _CLOUD,
            "--file=": _NO_BUILD,
            **_HOST,
        },
        why=f"{_NO_BUILD}; slosched functions check MODULE says what is wrong with one",
        documented=True,
    ),
    Task(
        name="knative.build-native",
        arguments=("USER", "FUNC"),
        switches={"--host": _HOSTS, "--clean": _NO_BUILD, "--nopush": _NO_BUILD},
        why=_NO_BUILD,
        documented=True,
    ),
    Task(name="tf.lib", switches={"--clean": _NO_BUILD}, why=_NO_BUILD),
    Task(name="tf.func", switches={"--clean": _NO_BUILD}, why=_NO_BUILD),
)

_DEPLOYMENTS = (
    Task(
        name="knative.deploy",
        switches={**_REPLICAS, "--local": _CLOUD, "--ibm": _CLOUD, "--gke": _CLOUD},
        why=f"{_STARTS}; slosched worker --functions MODULE --slots N starts one of your own",
        documented=True,
    ),
    Task(
        name="knative.deploy-native",
        arguments=("USER", "FUNC"),
        switches=_REPLICAS,
        why=f"{_STARTS}; the baselines are among the systems of each experiment",
        documented=True,
    ),
    Task(
        name="knative.deploy-native-python",
        switches=_REPLICAS,
        why=f"{_STARTS}; the baselines are among the systems of each experiment",
        documented=True,
    ),
    Task(
        name="knative.delete-native",
        arguments=("USER", "FUNC"),
        switches=_HARD,
        why=_ENDS,
        documented=True,
    ),
    Task(name="knative.delete-native-python", switches=_HARD, why=_ENDS),
    Task(name="knative.delete-worker", switches=_HARD, why=_ENDS, documented=True),
    Task(name="knative.delete-full", switches={"--local": _CLOUD}, why=_ENDS),
    Task(name="knative.native-local", why=_STARTS),
    Task(name="knative.native-python-local", switches={"--host": _HOSTS}, why=_STARTS),
    Task(name="knative.install", why="nothing is installed on a cluster; pip installs slosched"),
)

_EXPERIMENTS = (
    Task(
        name="experiments.sgd",
        arguments=("WORKERS", "INTERVAL"),
        runs=(
            *("exp", "sgd", "--workers", "{WORKERS}", "--interval", "{INTERVAL}"),
            *("--size", "full", "--modes", "shared"),
        ),
        switches={
            "--native": ("--modes", "copies"),
            "--bm": _BARE,
            "--micro": ("--size", "micro"),
            **_NOBILL,
        },
        documented=True,
    ),
    Task(
        name="experiments.sgd-multi",
        runs=("exp", "sgd", "--scale", "published", "--size", "full", "--modes", "shared"),
        switches={"--native": ("--modes", "copies"), "--micro": ("--size", "micro"), **_NOBILL},
    ),
    Task(
        name="experiments.matrix-multi",
        arguments=("N_WORKERS",),
        runs=_MATRICES,
        switches={"--native": ("--systems", "instances"), **_NOBILL},
        documented=True,
    ),
    Task(
        name="experiments.matrix",
        arguments=("N_WORKERS", "MAT_SIZE", "N_SPLITS"),
        runs=(*_MATRICES, "--sizes", "{MAT_SIZE}", "--splits", "{N_SPLITS}"),
        switches={"--native": ("--systems", "instances"), **_NOBILL},
    ),
    Task(
        name="experiments.tf-lat",
        runs=(
            *("exp", "inference-latency", "--scale", "published"),
            *("--systems", "slosched,container", "--cold", "5,50,500", "--rungs", "L3"),
        ),
        documented=True,
    ),
    Task(
        name="experiments.tf-tpt",
        # The intervals of cold starts are those that the original has for each of its systems.
        runs=(
            *("exp", "inference-throughput", "--scale", "published"),
            *("--systems", "slosched", "--cold", "500"),
        ),
        switches={
            "--native": ("--systems", "container", "--cold", "5,10,20,40,80"),
            **_NOBILL,
        },
        documented=True,
    ),
    Task(
        name="experiments.sgd-pull-results",
        arguments=("USER", "HOST"),
        runs=_pull("sgd"),
        documented=True,
    ),
    Task(
        name="experiments.matrix-pull-results",
        arguments=("USER", "HOST"),
        runs=_pull("matrices"),
        documented=True,
    ),
    Task(
        name="experiments.tf-lat-pull-results",
        arguments=("USER", "HOST"),
        runs=_pull("inference-latency"),
        documented=True,
    ),
    Task(
        name="experiments.tf-tpt-pull-results",
        arguments=("USER", "HOST"),
        runs=_pull("inference-throughput"),
        switches=_NOBILL,
        documented=True,
    ),
    Task(
        name="experiments.sgd-parse-results",
        why="a run writes its tables itself; slosched exp report DIR makes them again",
    ),
    Task(
        name="experiments.tf-tpt-parse-results",
        why="a run writes its tables itself; slosched exp report DIR makes them again",
    ),
    Task(
        name="experiments.tf-plot-billing",
        arguments=("RESULT_DIR",),
        why="a run keeps its samples in billing/; slosched exp report DIR draws its figures again",
    ),
)

_BENCHES = (
    Task(name="bench.time", runs=_LADDER, switches={"--runtime=": "all rungs are measured"}),
    Task(name="bench.mem", runs=_LADDER, switches={"--runtime=": "all rungs are measured"}),
    Task(
        name="bench.tpt",
        switches={"--runtime=": _OUT_OF_SCOPE},
        why="benchmarks/functions in a checkout measures calls per second",
    ),
    *(
        Task(name=f"bench.{name}", why=f"{_OUT_OF_SCOPE}; slosched exp coldstart says how many fit")
        for name in ("max-threads", "container-count", "faasm-count")
    ),
    Task(
        name="bench.spawn-containers",
        arguments=("N",),
        switches={"--network=": _OUT_OF_SCOPE},
        why=f"{_OUT_OF_SCOPE}; slosched exp coldstart says how many instances fit",
    ),
    Task(name="bench.kill-containers", why=_ENDS),
    Task(name="bench.kill-faasm", why=_ENDS),
    Task(
        name="bench.pid",
        arguments=("PID",),
        why="a run keeps samples of its processes in billing/",
    ),
    Task(
        name="bench.plot-pid-mem",
        arguments=("PID",),
        why="a run keeps samples of its processes in billing/",
    ),
    Task(
        name="bench.plot-proc-mem",
        arguments=("NAME",),
        why="a run keeps samples of its processes in billing/",
    ),
    Task(name="bench.print-docker-mem", why=_OUT_OF_SCOPE),
    Task(name="bench.multi-pi", switches={"--number-times=": _OUT_OF_SCOPE}, why=_OUT_OF_SCOPE),
)

_OTHERS = (
    Task(name="polybench.func", switches={"--clean": _NO_BUILD}, why=_OUT_OF_SCOPE),
    Task(name="prk.func", switches={"--clean": _NO_BUILD}, why=_OUT_OF_SCOPE),
    Task(
        name="prk.invoke",
        arguments=("FUNC",),
        switches={"--native": _OUT_OF_SCOPE, "--iface=": _OUT_OF_SCOPE, "--np=": _OUT_OF_SCOPE},
        why=_OUT_OF_SCOPE,
    ),
    Task(name="genomics.func", why=_OUT_OF_SCOPE),
    Task(name="genomics.mapping", switches={"--download": _OUT_OF_SCOPE}, why=_OUT_OF_SCOPE),
    Task(
        name="genomics.mapping-native", switches={"--nthreads=": _OUT_OF_SCOPE}, why=_OUT_OF_SCOPE
    ),
    Task(name="genomics.upload-data", switches=_HOST, why=_OUT_OF_SCOPE),
    Task(
        name="genomics.upload-funcs",
        switches={"--host=": _HOSTS, "--port=": _HOSTS, "--peridx": _OUT_OF_SCOPE},
        why=_OUT_OF_SCOPE,
    ),
    *(
        Task(name=f"genomics.{name}", why=_OUT_OF_SCOPE)
        for name in ("download-genome", "index-genome", "download-reads", "download-output")
    ),
    *(Task(name=f"dev.{name}", why=_NO_BUILD) for name in ("cmake", "cc", "r")),
)

_RUNTIME = (
    Task(
        name="invoke",
        arguments=("USER", "FUNC"),
        switches=dict.fromkeys(
            (
                *("--host=", "--port=", "--input=", "--cmdline=", "--py", "--async", "--knative"),
                *("--native", "--ibm", "--poll", "--debug"),
            ),
            "slosched call has options of its own",
        ),
        why="slosched call FUNCTION calls a function of a controller's workers",
    ),
    Task(
        name="invoke.status",
        arguments=("CALL_ID",),
        why="slosched call waits for the answer; slosched status counts what is in flight",
    ),
    Task(name="invoke.flush", why="a controller and its workers keep no calls when they end"),
    Task(name="redis.clear-queue", why="calls wait in the controller, and not in Redis"),
    Task(name="redis.all-workers", why="slosched status lists a controller's workers"),
    Task(
        name="redis.func-workers",
        arguments=("USER", "FUNC"),
        why="slosched functions list says where each function is warm",
    ),
    Task(
        name="state.upload",
        why="functions write their state (ctx.state); slosched state list shows it",
    ),
    Task(
        name="state.download",
        why="functions read their state (ctx.state); slosched state list shows it",
    ),
)

#: All of them, in the order of the table.
TASKS = {
    task.name: task
    for task in (
        *_DATA,
        *_BUILDS,
        *_DEPLOYMENTS,
        *_EXPERIMENTS,
        *_BENCHES,
        *_OTHERS,
        *_RUNTIME,
    )
}

# ---------------------------------------------------------------------------------------- variables

_AHEAD = "Python functions are not compiled ahead of time"
_OWN_LIMIT = "limits are options of slosched worker and of each function"

VARIABLES = {
    "N_WORKERS": Variable(fields=("workers",)),
    "COLD_START_DELAY_MS": Variable(fields=("delay_ns", "cold_delay_ns"), unit="ms"),
    "COLD_START_INTERVAL": Variable(fields=("cold", "every")),
    "BENCH_DELAY_MS": Variable(fields=("think_ns", "thinks"), unit="ms"),
    "BENCH_MODE": Variable(why="all systems are run; --systems chooses some"),
    "TF_CODEGEN": Variable(why=_AHEAD),
    "SGD_CODEGEN": Variable(why=_AHEAD),
    "PYTHON_CODEGEN": Variable(why=_AHEAD),
    "PYTHON_PRELOAD": Variable(
        why="a worker's template always holds the interpreter and the function's module"
    ),
    "REDIS_STATE_HOST": Variable(why="an experiment starts the stores that it needs"),
    "REDIS_QUEUE_HOST": Variable(why="calls wait in the controller, and not in Redis"),
    "NO_SCHEDULER": Variable(why="the controller schedules every call"),
    "MAX_IN_FLIGHT_RATIO": Variable(why="a slot runs one call at a time"),
    "MAX_WORKERS_PER_FUNCTION": Variable(
        why="slots serve all functions; --workers says how many there are"
    ),
    "THREADS_PER_WORKER": Variable(why="a slot is a process; --workers says how many there are"),
    "BOUND_TIMEOUT": Variable(why="warm slots stay until the run ends"),
    "UNBOUND_TIMEOUT": Variable(why="warm slots stay until the run ends"),
    "GLOBAL_MESSAGE_TIMEOUT": Variable(why=_OWN_LIMIT),
    "CHAINED_CALL_TIMEOUT": Variable(why=_OWN_LIMIT),
    "STATE_MODE": Variable(why="each system of an experiment has the tiers that it is about"),
    "CGROUP_MODE": Variable(why="slots are not confined to cgroups"),
    "NETNS_MODE": Variable(why="slots share the host's network"),
    "HOST": Variable(why="slosched exp pull takes user and host as arguments", quiet=True),
    "HOST_USER": Variable(why="slosched exp pull takes user and host as arguments", quiet=True),
}
