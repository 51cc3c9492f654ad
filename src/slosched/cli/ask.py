"""One question to a controller, one answer: `infer`, `models`, `status`, `unload` and `drain`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slosched.cli.output import print_json, say, table_text
from slosched.cli.values import LOCAL_CONTROLLER, duration_ns, one_address
from slosched.codes import code_name
from slosched.errors import InvalidConfig, RequestFailed
from slosched.signature import Tensor, described, single
from slosched.units import NS_PER_MS, format_duration

if TYPE_CHECKING:
    from slosched.clients.inference import Unloaded
    from slosched.messages import ModelInfo

#: Names of one library's models that `models` prints; more of them it counts.
_OF_A_LIBRARY_AT_MOST = 20
_LEAST_INTERVAL_NS = 100 * NS_PER_MS

Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
Inputs = Annotated[
    bool | None,
    typer.Option(
        "--inputs/--no-inputs",
        help="Send an input with each request, or let the worker make them. Default: send, unless "
        "CLOCKWORK_DISABLE_INPUTS=1.",
    ),
]
Address = Annotated[
    str | None,
    typer.Argument(
        metavar="[host:port]",
        help=f"Where the controller listens for clients. Default {LOCAL_CONTROLLER}.",
        show_default=False,
    ),
]


def controller_address(ctx: typer.Context, given: str | None) -> str:
    """Return the address given here, or before the command (`client host:port ...`), or the default."""
    if given is not None:
        return one_address(given)
    return ctx.obj if isinstance(ctx.obj, str) else LOCAL_CONTROLLER


# -------------------------------------------------------------------------------------- infer


def infer(
    ctx: typer.Context,
    model: Annotated[str, typer.Argument(help="A model's name; `slosched models` lists them.")],
    inputs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[IMAGE|ARRAY.npy|ARRAYS.npz|TEXT|NAME=FILE|NAME=TEXT]...",
            help="The inputs: an image, scaled and normalised as for ImageNet; a numpy array, or an .npz file "
            "with one for each input; a text, or a file of it, where the model takes BYTES. Several inputs: "
            "each as NAME=FILE or NAME=TEXT. If left out, the worker generates an input, and no output is "
            "returned.",
            show_default=False,
        ),
    ] = None,
    slo: Annotated[
        str | None,
        typer.Option(
            metavar="DURATION",
            help="From the request's send to the receipt of its answer, for example 25ms; a bare number is "
            "in seconds. Default: the controller's.",
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Send one request; print the top 5 classes or the output's shape, and the whole answer.

    The answer is printed in any case. Exit code 1: the request was refused, was given up or failed;
    exit code 2: the request was wrong (unknown model, wrong shape, impossible SLO).

    \b
    Examples:
      slosched client infer resnet50_v2 cat.jpg --slo 25ms
      slosched client cluster02:12346 infer bert_base tokens.npy --json
      slosched client infer sentences input_ids=ids.npy attention_mask=mask.npy
    """
    if slo is not None:
        duration_ns("--slo", slo)
    from slosched.clients.inference import Inference
    from slosched.clients.one_shot import OneShot, infer_once

    try:
        result = infer_once(controller_address(ctx, None), model, inputs, slo)
    except RequestFailed as error:
        answer = error.reply
        if not isinstance(answer, Inference):
            raise
        # The controller answered: its details matter as much as a success's, and are printed once.
        if json:
            print_json(OneShot(answer, ()).as_dict())
        else:
            say(f"{answer.model.name}: {answer.explain()}")
        raise type(error)(
            f"model {answer.model.name!r}: not served, {code_name(error.code)} (code {error.code})",
            code=error.code,
            reply=answer,
        ) from None
    if json:
        print_json(result.as_dict())
    else:
        say(result.render())


# ------------------------------------------------------------------------------------- models


def models(ctx: typer.Context, address: Address = None, json: Json = False) -> None:
    """List the models that are loaded, and the names that can be loaded.

    b1 is the batch-1 time on the fastest GPU, frozen when the model was loaded: an SLO factor
    multiplies it. Times are printed with their unit; --json gives them in ns.

    \b
    Examples:
      slosched models
      slosched models cluster02:12346 --json
    """
    where = controller_address(ctx, address)
    loaded, loadable = _ask(where, "models")
    if json:
        import msgspec

        # A ModelInfo is an array on the wire; programs that read this want names.
        documents: list[dict[str, Any]] = [msgspec.structs.asdict(m) for m in loaded]
        for each in documents:
            if each["function"] is not None:
                each["function"] = msgspec.structs.asdict(each["function"])
        print_json({"models": msgspec.to_builtins(documents), "loadable": list(loadable)})
        return
    models_alone = tuple(each for each in loaded if each.function is None)
    if models_alone:
        say(_models_table(models_alone))
    else:
        say("no model is loaded; a client loads one by using it")
    if len(models_alone) < len(loaded):
        count = len(loaded) - len(models_alone)
        say(f"{count:,} function(s) as well; `slosched functions list` shows them")
    say(f"loadable: {_loadable_text(loadable) or 'nothing (no worker has joined)'}")


def _loadable_text(names: Sequence[str]) -> str:
    """The names; of a library that offers hundreds, only their number."""
    counts = Counter(name.partition("/")[0] for name in names if "/" in name)
    many = {library: count for library, count in counts.items() if count > _OF_A_LIBRARY_AT_MOST}
    shown = [name for name in names if name.partition("/")[0] not in many]
    shown += [f"{library}/... ({count:,}; --json lists them)" for library, count in many.items()]
    return ", ".join(shown)


def _models_table(loaded: tuple[ModelInfo, ...]) -> str:
    rows = [
        (
            m.model_id,
            m.name,
            m.copy,
            format_duration(m.b1_ns),
            format_duration(m.weights_ns),
            f"{m.weights_bytes / 1e6:.1f} MB",
            ",".join(map(str, m.batch_sizes)),
            _tensors(m.inputs, m.input_shape, m.input_dtype, m.lengths),
            _tensors(m.outputs, m.output_shape, m.output_dtype),
            m.gpus_resident,
            m.clients,
            _weights(m),
        )
        for m in loaded
    ]
    headings = (
        "id",
        "name",
        "copy",
        "b1",
        "transfer",
        "weights",
        "batches",
        "input",
        "output",
        "on GPUs",
        "clients",
        "weights are",
    )
    return table_text(headings, rows)


def _weights(model: ModelInfo) -> str:
    if "emulated" in model.labels:
        return "none"
    return "random" if model.random_weights else "given"


def _tensors(
    tensors: Sequence[Tensor], shape: Sequence[int], dtype: str, lengths: Sequence[int] = ()
) -> str:
    """The tensors with their names; a single one of a fixed shape without: "3x224x224 float32"."""
    if not tensors or single(tensors) is not None:
        return f"{'x'.join(map(str, shape)) or 'scalar'} {dtype}"
    classes = f" at {'/'.join(map(str, lengths))}" if lengths else ""
    return f"{described(tensors)}{classes}"


# ------------------------------------------------------------------------------------- status


def status(
    ctx: typer.Context,
    address: Address = None,
    json: Json = False,
    watch: Annotated[
        bool, typer.Option("--watch", help="Refresh until Ctrl-C, and show rates.")
    ] = False,
    interval: Annotated[
        str,
        typer.Option(help="Interval for --watch (at least 100ms). A bare number is in seconds."),
    ] = "1s",
) -> None:
    """Show a controller's state: policy and options, workers and GPUs, clients, models, counts.

    With --watch it shows current rates, latencies, prediction errors and the utilisation of each GPU,
    and waits for a controller that went away. With --json as well, it prints one JSON object per line.

    \b
    Examples:
      slosched status
      slosched status cluster02:12346 --json
      slosched status --watch --interval 2s
    """
    where = controller_address(ctx, address)
    interval_ns = duration_ns("--interval", interval)
    if interval_ns < _LEAST_INTERVAL_NS:
        raise InvalidConfig(f"--interval {interval} is too short; at least 100ms")
    if watch:
        from slosched.cli.watch import run_watch

        run_watch(where, interval_ns=interval_ns, as_json=json)
        return
    report: dict[str, Any] = _ask(where, "status")
    if json:
        print_json(report)
        return
    from slosched.cli.status_text import status_text

    say(status_text(where, report))


# ------------------------------------------------------------------------------------- unload


def unload(
    ctx: typer.Context,
    model: Annotated[str, typer.Argument(help="A model's name; `slosched models` lists them.")],
    address: Address = None,
    force: Annotated[
        bool,
        typer.Option(
            "--force", help="Take the model from clients that use it. Operators only; see above."
        ),
    ] = False,
    name: Annotated[
        str,
        typer.Option(
            "--name",
            help="Name of this client at the controller; for --force, one of its --operators. "
            "Default: slosched unload.",
            show_default=False,
        ),
    ] = "",
    json: Json = False,
) -> None:
    """Unload a model: its instances leave the workers' host memory.

    Without --force the instances that no client uses are unloaded, and the others are kept. With --force
    all are: clients that use the model lose it, and their waiting requests are answered with code 1; what
    runs already is served. The controller must list this client's name in its option --operators.

    A client that needs the model again loads it again, which takes as long as the first time. Exit code 0:
    done, even if every instance is kept; exit code 2: no instance of the model is loaded, this client is
    not an operator, or the controller keeps everything (INFER4, SMART, --fidelity paper, --placement demand).

    \b
    Examples:
      slosched unload resnet50_v2
      slosched unload resnet50_v2 cluster02:12346 --force --name ops
      slosched client cluster02:12346 unload bert_base --json
    """
    where = controller_address(ctx, address)
    answer: Unloaded = _ask(where, "unload", model, name=name, force=force)
    if json:
        print_json({"model": model, "unloaded": answer.unloaded, "kept": answer.kept})
        return
    say(f"{model}: {_outcome(answer)}")


def _outcome(answer: Unloaded) -> str:
    noun = "instance" if answer.unloaded == 1 else "instances"
    text = f"{answer.unloaded:,} {noun} unloaded"
    if not answer.kept:
        return text
    return f"{text}, {answer.kept:,} kept: other clients use {'it' if answer.kept == 1 else 'them'}"


# -------------------------------------------------------------------------------------- drain


def drain(
    ctx: typer.Context,
    worker: Annotated[
        str,
        typer.Argument(help="A worker's name, number or address; `slosched status` shows them."),
    ],
    address: Address = None,
    undo: Annotated[bool, typer.Option("--undo", help="Take the worker back into use.")] = False,
    name: Annotated[
        str,
        typer.Option(
            "--name",
            help="Name of this client at the controller: one of its --operators. Default: slosched drain.",
            show_default=False,
        ),
    ] = "",
    json: Json = False,
) -> None:
    """Take a worker out of use: it gets no new work, and what it holds ends first.

    `slosched status` shows it as draining, then as drained; its process may then be ended. Its models stay in
    its memory for --undo. A new process that registers under its name is used again. The controller must list
    this client's name in its option --operators.

    \b
    Examples:
      slosched drain gpu01/cuda:0 --name ops
      slosched drain 2 cluster02:12346 --name ops
      slosched drain gpu01/cuda:0 --undo --name ops
    """
    where = controller_address(ctx, address)
    worker_id, state = _ask(where, "drain_worker", worker, name=name or "slosched drain", undo=undo)
    if json:
        print_json({"worker": worker, "worker_id": worker_id, "state": state})
        return
    say(f"worker {worker_id} ({worker}): {state}")


def _ask(address: str, question: str, *values: Any, name: str = "", **options: Any) -> Any:
    """Connect as `name`, call the client's method `question` with the rest, and return its answer.

    The method's own time limit bounds the wait, and that for a connection is 5 s.
    """
    import uvloop

    from slosched.clients.aio import connect

    async def main() -> Any:
        async with connect(address, name=name or f"slosched {question}") as client:
            return await getattr(client, question)(*values, **options)

    return uvloop.run(main())
