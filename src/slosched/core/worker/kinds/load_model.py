"""LoadModel: a model into host memory, as one or more instances. One at a time, in the host lane."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from slosched.codes import ActionType, Code
from slosched.config import canonical_model
from slosched.core.worker.interface import ModelPrepared, PrepareModel, ReleaseModel
from slosched.core.worker.kinds.base import Acceptance, ActionKind, Fault, peer_span
from slosched.core.worker.lanes import Role
from slosched.core.worker.pipeline import Pipeline
from slosched.core.worker.state import Instance, PendingAction, Step
from slosched.errors import known_names, shown_name
from slosched.messages import LengthClass, LoadModel, LoadModelResult, Span
from slosched.signature import BYTES, row_bytes

#: More copies than any controller makes; a bound on what one message can ask for.
MAX_COPIES = 100_000


class LoadModelKind(ActionKind[LoadModel]):
    message = LoadModel
    action_type = ActionType.LOAD_MODEL

    def __init__(self, pipeline: Pipeline, acceptance: Acceptance) -> None:
        super().__init__(pipeline, acceptance)
        self._prepare = Step(Role.HOST, self._start, self._prepared)

    def check(self, action: PendingAction[LoadModel], frames: tuple[int, ...]) -> Fault | None:
        name = canonical_model(action.message.name)
        for other, reason in self._acceptance.offers.put_aside:
            if other == name:
                return Code.PROCESS_ENDED, f"put aside: {reason}"
        return self._fault(action.message, name) or self._set_window(action, action.message)

    def begin(self, action: PendingAction[LoadModel], now_ns: int) -> None:
        action.prepares = action.message.name
        self._pipeline.enqueue(self._ledger.host, action.earliest_ns, action, self._prepare)

    def _start(self, action: PendingAction[LoadModel], now_ns: int) -> None:
        ledger, message = self._ledger, action.message
        # Before the first clock exchange a window in the controller's time means nothing here.
        if self._clock.synchronised and self._pipeline.late(
            action, Code.LOAD_MODEL_TOO_LATE, now_ns
        ):
            return
        name = canonical_model(message.name)
        if self._taken_meanwhile(action, name, now_ns):
            return
        ledger.host.started.append(action)
        prepare = PrepareModel(
            action_id=action.key,
            name=name,
            model_id=message.model_id,
            copies=message.copies,
            max_batch=message.max_batch,
            max_exec_ns=message.max_exec_ns,
        )
        ledger.effects.append(prepare)

    def _taken_meanwhile(self, action: PendingAction[LoadModel], name: str, now_ns: int) -> bool:
        """True, and the action is answered, if an earlier LoadModel took its ids while this one waited."""
        ledger, message = self._ledger, action.message
        fault = self._fault(message, name)
        if fault is not None:
            ledger.fail(action, *fault, now_ns)
            return True
        ids = range(message.model_id, message.model_id + message.copies)
        known = [ledger.instances[i] for i in ids if i in ledger.instances]
        if len(known) == message.copies:
            self._answer(action, known[0], Span(now_ns, now_ns, 0), now_ns)
            return True
        return False

    def _prepared(
        self, action: PendingAction[LoadModel], event: ModelPrepared, now_ns: int
    ) -> None:
        ledger, message = self._ledger, action.message
        name = canonical_model(message.name)
        if action.key not in ledger.unanswered:  # cancelled meanwhile
            if not ledger.name_in_use(name):
                ledger.effects.append(ReleaseModel(message.model_id, name, last=True))
            return
        profile = event.profile
        if event.code or profile is None:
            code = event.code or Code.RUNTIME_ERROR
            ledger.fail(action, code, event.reason or f"cannot prepare {name!r}", now_ns)
            return
        if self._taken_meanwhile(action, name, now_ns):
            return
        plain = not profile.lengths and all(each.dtype != BYTES for each in profile.takes)
        input_bytes = row_bytes(profile.takes, 0) if plain else -1
        # A function that declares no memory has no pages, and is always there once it is ready.
        pageless = event.function is not None and not profile.weights_bytes
        pages = {
            g.gpu_id: 0 if pageless else profile.pages(g.info.page_bytes)
            for g in ledger.gpus.values()
        }
        for model_id in range(message.model_id, message.model_id + message.copies):
            ledger.instances[model_id] = Instance(
                model_id=model_id,
                name=name,
                profile=profile,
                largest={},  # as each LoadModel of it says (`_answer`)
                input_bytes=input_bytes,
                pages=pages,
                random_weights=event.random_weights,
                labels=event.labels,
                boundaries_ns=event.boundaries_ns,
                urgent_ns=event.urgent_ns,
                function=event.function,
                digest=event.digest,
            )
        self._answer(action, ledger.instances[message.model_id], event.span, now_ns)

    def _answer(
        self, action: PendingAction[LoadModel], instance: Instance, span: Span, now_ns: int
    ) -> None:
        clock, message, profile = self._clock, action.message, instance.profile
        batches = offered_batches(profile.exec_ns, message.max_batch, message.max_exec_ns)
        classes = tuple(
            _offered_class(instance, length, exec_ns, message)
            for length, exec_ns in profile.exec_ns_at.items()
        )
        largest = {each.length: each.batch_sizes[-1] for each in classes} or {0: batches[-1]}
        result = LoadModelResult(
            session=action.message.session,
            action_id=message.action_id,
            span=peer_span(clock, span),
            copies=message.copies,
            batch_sizes=batches,
            exec_ns=tuple(profile.exec_ns[batch] for batch in batches),
            weights_ns=profile.weights_ns,
            weights_bytes=profile.weights_bytes,
            pages=max(instance.pages.values()),
            input_shape=profile.input_shape,
            input_dtype=profile.input_dtype,
            output_shape=profile.output_shape,
            output_dtype=profile.output_dtype,
            random_weights=instance.random_weights,
            received_ns=clock.to_peer_ns(action.received_ns),
            sent_ns=clock.to_peer_ns(now_ns),
            labels=instance.labels,
            inputs=profile.takes,
            outputs=profile.answers,
            length_classes=classes,
            boundaries_ns=_offered_boundaries(instance, max(profile.lengths, default=0), batches),
            urgent_ns=instance.urgent_ns,
            function=instance.function,
            digest=instance.digest,
        )
        for model_id in range(message.model_id, message.model_id + message.copies):
            prepared = self._ledger.instances[model_id]
            prepared.request, prepared.result = message, result
            prepared.largest = largest
        self._ledger.answer(action, result)

    def _fault(self, message: LoadModel, name: str) -> Fault | None:
        """What is wrong with a message for the model of the canonical `name`, now."""
        loadable = self._acceptance.offers.loadable
        if name not in loadable:
            known = known_names(name, loadable)
            return (
                Code.UNKNOWN_MODEL,
                f"this worker has no model {shown_name(message.name)}; it has: {known}",
            )
        if not 1 <= message.copies <= MAX_COPIES:
            reason = f"copies must be within 1..{MAX_COPIES}, not {message.copies}"
            return Code.INVALID_ACTION, reason
        if message.max_batch < 1 or message.model_id < 0:
            return (
                Code.INVALID_ACTION,
                f"max_batch must be at least 1 and model_id at least 0, not {message.max_batch} and "
                f"{message.model_id}",
            )
        for model_id in range(message.model_id, message.model_id + message.copies):
            present = self._ledger.instances.get(model_id)
            if present is not None and present.name != name:
                return (
                    Code.INVALID_MODEL_ID,
                    f"model id {model_id} is {present.name!r} already, so it cannot be {name!r}",
                )
        return None


def offered_batches(
    exec_ns: Mapping[int, int], max_batch: int, max_exec_ns: int
) -> tuple[int, ...]:
    """Batch sizes up to `max_batch` that take at most `max_exec_ns`, ascending; 1 always."""
    return tuple(
        batch
        for batch in sorted(exec_ns)
        if batch == 1 or (batch <= max_batch and exec_ns[batch] <= max_exec_ns)
    )


def _offered_class(
    instance: Instance, length: int, exec_ns: Mapping[int, int], message: LoadModel
) -> LengthClass:
    batches = offered_batches(exec_ns, message.max_batch, message.max_exec_ns)
    boundaries_ns = _offered_boundaries(instance, length, batches)
    return LengthClass(length, batches, tuple(exec_ns[batch] for batch in batches), boundaries_ns)


def _offered_boundaries(instance: Instance, length: int, batches: Sequence[int]) -> tuple[int, ...]:
    known = instance.boundaries_ns.get(length)
    return tuple(known[batch] for batch in batches) if known else ()
