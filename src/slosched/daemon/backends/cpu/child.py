"""What a child process does: builds the one model that it is told to, and runs it, message by message.

Whatever the model raises, or however it ends the process, harms this process alone.
"""

from __future__ import annotations

import mmap
import os
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch

from slosched.clock import now_ns
from slosched.codes import Code
from slosched.config import WorkerConfig
from slosched.daemon.backends.base import in_words, preparation_failed
from slosched.daemon.backends.broods import packets
from slosched.daemon.backends.cpu import wire
from slosched.daemon.backends.cpu.measuring import measure_model
from slosched.daemon.backends.cpu.serving import Rows, ServedModel
from slosched.daemon.backends.sources import open_specs, source_spec
from slosched.daemon.backends.zoo import ModelSpec
from slosched.daemon.repository.modules import Packages
from slosched.daemon.repository.opened import changed, opened

Serve = Callable[[socket.socket], None]


def open_models(config: WorkerConfig) -> tuple[Serve, tuple[str, ...], str]:
    """What a child does with its socket, the names that can be prepared, and torch's version.

    Everything that the models of `config` need is imported; no code of a model runs. Raises
    MissingPackage, UnknownName or InvalidConfig.
    """
    specs = open_specs(config)

    def serve(end: socket.socket) -> None:
        torch.set_num_threads(config.torch_threads)
        Child(end, specs, config.repository).serve()

    return serve, tuple(specs), str(torch.__version__)


class Child:
    """Serves the worker behind `end` until it is gone."""

    def __init__(
        self, end: socket.socket, specs: Mapping[str, ModelSpec], repository: str = ""
    ) -> None:
        self._end, self._specs, self._repository = end, specs, repository
        self._packages = Packages()
        self._digest = ""
        self._pid = os.getpid()
        self._name = ""
        self._model: ServedModel | None = None
        self._slots: dict[int, tuple[mmap.mmap, Rows]] = {}

    def serve(self) -> None:
        while True:
            try:
                got = packets.receive(self._end)
            except EOFError:
                return
            assert got is not None  # the socket blocks
            packet, fds = got
            try:
                self._handle(wire.to_child.decode(packet), fds)
            finally:
                packets.close_all(fds)

    def _tell(self, message: wire.FromChild) -> None:
        if os.getpid() != self._pid:
            os._exit(0)  # the model forked, and this is the copy: one answer is enough
        packets.send(self._end, packets.encode(message))

    def _handle(self, message: wire.ToChild, fds: list[int]) -> None:
        if isinstance(message, wire.Exec | wire.Load):
            self._tell(self._carry_out(message))
        elif isinstance(message, wire.Prepare):
            self._tell(self._prepare(message))
        elif self._model is None:
            return  # it could not be built: the worker knows
        elif isinstance(message, wire.AddSlot):
            memory = mmap.mmap(fds[0], message.nbytes)
            layouts = self._model.layouts
            rows = Rows(memory, message.batch, message.length, message.outputs_at, layouts)
            self._slots[message.slot] = (memory, rows)
        elif isinstance(message, wire.DropSlot):
            self._slots.pop(message.slot, None)
        elif isinstance(message, wire.Evict):
            self._model.evict(message.model_id)
        elif isinstance(message, wire.Classes):
            self._model.template.own_state = message.own_state

    # ------------------------------------------------------------------------ preparation

    def _prepare(self, message: wire.Prepare) -> wire.Prepared | wire.PrepareFailed:
        self._name = message.name
        try:
            with self._spec_of(message) as spec:
                model = ServedModel(spec)
            template = model.template
            profile = message.known
            if profile is None:
                profile = measure_model(
                    model,
                    message.batches,
                    max_exec_ns=message.max_exec_ns,
                    progress=self._progress,
                )
            else:
                template.own_state = message.own_state
                model.answers_with(profile.gives)
        except BaseException as error:  # the model's code may raise anything
            code, words = preparation_failed(error)
            return wire.PrepareFailed(code, words)
        self._model = model
        own = ("own state restored after each run",) if template.own_state else ()
        return wire.Prepared(
            profile=profile,
            random_weights=spec.random_weights,
            labels=spec.labels + own,
            own_state=template.own_state,
            pads=dict(spec.pads),
            digest=self._digest,
        )

    @contextmanager
    def _spec_of(self, message: wire.Prepare) -> Iterator[ModelSpec]:
        """The spec of what is to be built, good within the block."""
        if message.version is None:
            yield self._specs[message.name]
            return
        with opened(self._repository, message.version, self._packages) as found:
            if message.digest not in ("", found.digest):
                raise changed(message.version)
            self._digest = found.digest
            yield source_spec(found.source)

    def _progress(self, words: str) -> None:
        self._tell(wire.Progress(words))

    # --------------------------------------------------------------------------------- ops

    def _carry_out(self, message: wire.Exec | wire.Load) -> wire.Done:
        begin_ns = now_ns()
        code, words = 0, ""
        try:
            code, words = self._run(message)
        except BaseException as error:  # the model's code may raise anything
            code, words = Code.RUNTIME_ERROR, f"{self._name}: {in_words(error)}"
        return wire.Done(message.op_id, begin_ns, now_ns(), code, words)

    def _run(self, message: wire.Exec | wire.Load) -> tuple[int, str]:
        model = self._model
        if model is None:
            return Code.RUNTIME_ERROR, f"{self._name}: it is not built"
        if isinstance(message, wire.Load):
            model.load(message.model_id)
            return 0, ""
        if not model.holds(message.model_id):
            return Code.EXEC_WEIGHTS_MISSING, f"no weights of model id {message.model_id} are here"
        _, rows = self._slots[message.slot]
        model.run(message.model_id, rows, message.rows, message.answers)
        return 0, ""
