"""`slosched exp sgd`: a linear SVM by HOGWILD!, with N workers that share their state or have a copy each.

After Faasm (USENIX ATC'20, section 6.2, figure 6), which trains on Reuters RCV1. Its functions in Faaslets are
calls in warm slots here, its containers processes with copies of all state that they read.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any, ClassVar

import slosched.engines
from slosched.engines.engine import Engine
from slosched.errors import InvalidConfig, MissingPackage
from slosched.faasm import layout
from slosched.faasm.frame import Frame
from slosched.faasm.installed import check_installed
from slosched.faasm.sgd import summary
from slosched.faasm.sgd.examples import Examples, Size, size_named
from slosched.faasm.sgd.kernel import MU, RATE, warm_up
from slosched.faasm.sgd.measure import lack_of_memory, measured, reached_s
from slosched.faasm.sgd.options import Options
from slosched.faasm.sgd.plausibility import by_scikit_learn
from slosched.faasm.sgd.reference import Curve, sequential
from slosched.faasm.sgd.svmlight import check_readable, read_svmlight
from slosched.faasm.sgd.synthetic import synthetic
from slosched.faasm.sgd.training import MODES, NO_INTERVAL, Training, mode_named
from slosched.functions.state.opening import open_store
from slosched.functions.state.state import State
from slosched.functions.state.store import Limits
from slosched.units import NS_PER_S

__all__ = ["Options", "check", "report", "run"]

FUNCTIONS = "slosched.faasm.sgd.functions"
SEQUENTIAL, LIBRARY = "sequential", "scikit-learn"
#: The target is the loss that the first sequential training has after half of its epochs, and this much more.
_TARGET_SLACK = 1.01
#: Beyond the inputs in the global tier: weights, ledger, their drafts.
_MORE_BYTES = 64 << 20
_SAMPLE_S = 0.1
#: Updates are counted in one of this many epochs: the share that is lost does not change over them.
_COUNTED_PART = 4
#: For the estimate of a run's time, on a usual core: an update, a push with what is read behind it, one that
#: adds, a call, a byte that is copied, and what is beside a training.
_UPDATE_S, _PUSH_S, _ADDING_PUSH_S, _CALL_S, _COPIED_BYTE_S = 8e-9, 4e-4, 7e-4, 1e-3, 1e-9
_BESIDE_S = 0.2
#: What every engine trains first, unrecorded, so that its processes are warm and those that wait are known.
_WARM_UP = Size(train=256, held_out=0, features=1000)


def check(options: Options) -> None:
    """Raise InvalidConfig without the file of examples, MissingPackage, and what a store that is not there
    raises."""
    if options.data:
        check_readable(Path(options.data))
    if options.engine == "dask":
        check_installed("the engine dask", "distributed")
    if not options.store.startswith("embedded"):
        with closing(open_store(options.store)) as store:
            store.namespaces()


def run(options: Options, frame: Frame) -> None:
    """Measure what the run directory does not have: see `frame`. Raises what engines and state raise, and
    InvalidConfig for a file of examples that cannot be read."""
    options = options.at_scale(frame.scale)
    data = {}
    for size in options.size or ("data",):
        # Tens of seconds for the full size: said, so that a resumed run is not taken to hang.
        frame.say(f"data of size {size}: {'reading' if options.data else 'making'} them")
        data[size] = _examples(options, size)
    plans = [_Plan(options, frame, size, examples) for size, examples in data.items()]
    for plan in plans:
        plan.check_data()
    max(plans, key=lambda plan: len(plan.examples.train)).published = True
    frame.expect({key: each for plan in plans for key, each in plan.expected_s().items()})
    for plan in plans:
        plan.references()
    for workers in options.workers:
        for (
            mode
        ) in options.modes:  # one after the other, so that what else the machine does is alike
            with ExitStack() as stack:
                engine: _Opened | None = None
                for plan in plans:
                    for seed, counting in plan.missing(mode, workers):
                        if plan.left_out(mode, workers, seed, counting):
                            continue
                        if engine is None:
                            logs = frame.raw(f"{mode}-{workers}-logs")
                            opening = _opened(options, frame, workers, plans, logs)
                            engine = stack.enter_context(opening)
                        plan.train(engine, mode, workers, seed, counting)
    for plan in plans:
        plan.library()


def report(options: Options, frame: Frame) -> None:
    """Tables and figures, from the records alone."""
    summary.show(frame)


class _Opened:
    """An engine with the state of its calls."""

    def __init__(self, engine: Engine, state: State) -> None:
        self.engine, self.state = engine, state


@contextmanager
def _opened(
    options: Options, frame: Frame, workers: int, plans: list[_Plan], logs: Path
) -> Iterator[_Opened]:
    """Processes for one number of workers in one mode: none has memory of another configuration.

    What slosched's processes print goes to the folder `logs`.
    """
    room = max(plan.examples.nbytes for plan in plans) + _MORE_BYTES
    limits = Limits(bytes=max(room, Limits().bytes))
    extra: dict[str, Any] = {} if options.engine == "local" else {"slots": workers}
    if options.engine == "slosched":
        extra["logs"] = logs
    with (
        State(frame.new_namespace(options.store), options.store, own=True, limits=limits) as state,
        slosched.engines.open(options.engine, [FUNCTIONS], state=state, **extra) as engine,
    ):
        opened = _Opened(engine, state)
        _warm_up(opened, workers)
        yield opened


def _warm_up(opened: _Opened, workers: int) -> None:
    examples = synthetic(_WARM_UP, 0)
    training = _training("warm-up", examples, mode="shared", workers=workers, seed=0, epochs=2)
    truth = sequential(training, examples.train, examples.counts)
    unbilled = nullcontext(_NoBill())
    measured(
        opened.engine,
        opened.state,
        training,
        examples,
        truth=truth,
        target=0.0,
        billed=lambda: unbilled,
    )


class _NoBill:
    """What is not billed."""

    processes: ClassVar[dict[Any, Any]] = {}

    def record(self) -> dict[str, Any]:
        return {}


class _Plan:
    """The cells of one size."""

    def __init__(self, options: Options, frame: Frame, size: str, examples: Examples) -> None:
        self.options, self.frame, self.size, self.examples = options, frame, size, examples
        self._curves: dict[int, Curve] = {}
        #: Whether --layout faasm has it: the published folders' names do not say the size.
        self.published = False

    def expected_s(self) -> dict[str, float]:
        """The cells, and about how long each takes, in s."""
        options = self.options
        updates = options.epochs * self.examples.train.nonzeros
        found = {self._sequential_key(seed): updates * _UPDATE_S for seed in options.seeds}
        for workers in options.workers:
            for mode in options.modes:
                took_s = self._training_s(mode, workers, updates)
                for seed, counting in self._wanted(workers):
                    key = self.key(mode, workers, seed, counting)
                    found[key] = 2 * took_s / _COUNTED_PART if counting else took_s
        return found | {self._library_key: 4 * updates * _UPDATE_S}

    def _training_s(self, mode: str, workers: int, updates: int) -> float:
        options, how = self.options, mode_named(mode)
        steps = options.epochs * workers
        pushes = steps if options.interval == NO_INTERVAL else steps + updates // options.interval
        found = updates * _UPDATE_S + pushes * (_ADDING_PUSH_S if how.merge == "sum" else _PUSH_S)
        if how.private:
            found += workers * self.examples.nbytes * _COPIED_BYTE_S
        cores = len(os.sched_getaffinity(0))
        uploaded_s = self.examples.nbytes * _COPIED_BYTE_S
        return found / min(workers, cores) + steps * _CALL_S + uploaded_s + _BESIDE_S

    def _counted(self, workers: int) -> bool:
        """Whether updates are counted: one worker loses none."""
        return self.options.count_lost and workers > 1

    def check_data(self) -> None:
        """Raise InvalidConfig if a run that is continued began with other data."""
        for each in self.frame.records(self._sequential_key(self.options.seed)):
            if each["data"]["sha256"] != self.examples.digest():
                raise InvalidConfig(
                    f"the data of size {self.size} are not those that the run in {self.frame.directory} began "
                    "with; give another --out"
                )

    # ----------------------------------------------------------------------- what it is held to

    def references(self) -> None:
        """The sequential training of each seed."""
        frame, options = self.frame, self.options
        warm_up()
        for seed in options.seeds:
            with frame.cell(self._sequential_key(seed)) as cell:
                if cell:
                    cell.row(self._sequential(seed))

    def library(self) -> None:
        """What scikit-learn finds. Last of all: its semaphores are in the way of processes started later."""
        frame, options = self.frame, self.options
        with frame.cell(self._library_key) as cell:
            if cell:
                named = {"size": self.size, "system": LIBRARY}
                try:
                    for row in by_scikit_learn(
                        self.examples, epochs=options.epochs, seed=options.seed
                    ):
                        cell.row({**named, **row})
                except (MissingPackage, InvalidConfig) as error:
                    cell.row({**named, "why": str(error)})

    def curve(self, seed: int) -> Curve:
        if seed not in self._curves:
            training = self._training("shared", 1, seed, counting=False)
            train = self.examples.train
            self._curves[seed] = sequential(training, train, self.examples.counts)
        return self._curves[seed]

    @property
    def target(self) -> float:
        """The loss whose time is compared. It is fixed before any engine runs."""
        losses = self.curve(self.options.seed).losses
        return losses[(len(losses) - 1) // 2] * _TARGET_SLACK

    def _sequential(self, seed: int) -> dict[str, Any]:
        curve = self.curve(seed)
        ends_s = [each / NS_PER_S for each in curve.ends_ns]
        return {
            "size": self.size,
            "system": SEQUENTIAL,
            "workers": 1,
            "seed": seed,
            "train_s": ends_s[-1],
            "epoch_ends_s": ends_s,
            "losses": curve.losses,
            "loss": curve.losses[-1],
            "accuracy": _accuracy(self.examples, curve),
            "target": self.target,
            "target_s": reached_s(curve.losses, ends_s, self.target),
            "data": self.examples.facts() if seed == self.options.seed else None,
        }

    # --------------------------------------------------------------------------- what is measured

    def _sequential_key(self, seed: int) -> str:
        return f"{self.size} {SEQUENTIAL} seed={seed}"

    @property
    def _library_key(self) -> str:
        return f"{self.size} {LIBRARY}"

    def key(self, mode: str, workers: int, seed: int, counting: bool) -> str:
        return f"{self.size} {mode} n={workers} seed={seed}{' counting' if counting else ''}"

    def _wanted(self, workers: int) -> list[tuple[int, bool]]:
        """(seed, whether updates are counted) of the cells of a mode.

        Counting takes time, so it is a run of its own, with the first seed and a part of the epochs.
        """
        wanted = [(seed, False) for seed in self.options.seeds]
        return wanted + ([(self.options.seed, True)] if self._counted(workers) else [])

    def missing(self, mode: str, workers: int) -> list[tuple[int, bool]]:
        """Those that are to be made."""
        frame = self.frame
        return [
            each
            for each in self._wanted(workers)
            if frame.measures and not frame.has(self.key(mode, workers, *each))
        ]

    def left_out(self, mode: str, workers: int, seed: int, counting: bool) -> bool:
        """Record a configuration that this host has no memory for, as the paper's baseline had at 30."""
        private = mode_named(mode).private
        lack = lack_of_memory(self.examples, workers, private=private)
        if lack:
            with self.frame.cell(self.key(mode, workers, seed, counting)) as cell:
                cell.row({**self._named(mode, workers, seed, counting), "why": lack})
            self.frame.say(f"{cell.key}: left out: {lack}")
        return bool(lack)

    def train(self, opened: _Opened, mode: str, workers: int, seed: int, counting: bool) -> None:
        """One cell."""
        training = self._training(mode, workers, seed, counting=counting)
        options, frame = self.options, self.frame
        with frame.cell(self.key(mode, workers, seed, counting)) as cell:
            record = measured(
                opened.engine,
                opened.state,
                training,
                self.examples,
                truth=self.curve(seed),
                target=self.target,
                billed=lambda: frame.bill(every_s=_SAMPLE_S, own=options.engine == "local"),
            )
            made = {**self._named(mode, workers, seed, counting), **record}
            if self.published and not counting:
                made[layout.PUBLISHED] = layout.sgd(
                    _published(mode),
                    workers=workers,
                    interval=options.interval,
                    run_ns=round(record["train_s"] * NS_PER_S),
                    losses=list(zip(record["epoch_ends_s"], record["losses"], strict=True)),
                )
            cell.row(made)

    def _epochs(self, counting: bool) -> int:
        return max(1, self.options.epochs // _COUNTED_PART) if counting else self.options.epochs

    def _named(self, mode: str, workers: int, seed: int, counting: bool) -> dict[str, Any]:
        return {
            "size": self.size,
            "system": mode,
            "workers": workers,
            "seed": seed,
            "counting": counting,
            "engine": self.options.engine,
            "interval": self.options.interval,
            "epochs": self._epochs(counting),
        }

    def _training(self, mode: str, workers: int, seed: int, *, counting: bool) -> Training:
        words = [self.size, mode, str(workers), str(seed), "counted" if counting else "timed"]
        return _training(
            "-".join(words),
            self.examples,
            mode=mode,
            workers=workers,
            seed=seed,
            epochs=self._epochs(counting),
            interval=self.options.interval,
            count_lost=counting,
        )


def _training(
    name: str,
    examples: Examples,
    *,
    mode: str,
    workers: int,
    seed: int,
    epochs: int,
    interval: int = NO_INTERVAL,
    count_lost: bool = False,
) -> Training:
    """The training of that id, with the published constants."""
    return Training(
        id=name,
        mode=mode,
        workers=workers,
        interval=interval,
        seed=seed,
        epochs=epochs,
        rows=len(examples.train),
        features=examples.features,
        nonzeros=examples.train.nonzeros,
        rate=RATE,
        mu=MU,
        count_lost=count_lost,
    )


def _examples(options: Options, size: str) -> Examples:
    if options.data:
        return read_svmlight(Path(options.data), held_out=options.held_out)
    return synthetic(size_named(size), options.seed)


def _accuracy(examples: Examples, curve: Curve) -> float | None:
    from slosched.faasm.sgd.measure import judged

    return judged(examples, curve.weights)["accuracy"]


def _published(mode: str) -> str:
    """Which of the published systems a mode stands for; sum-delta is none of them."""
    names = {"shared": layout.WARM, "copies": layout.NATIVE}
    assert mode in MODES
    return names.get(mode, mode)
