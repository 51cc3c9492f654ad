"""One inference of the protocol, from its beginning to its end.

    begun --its model is ready--> sent         n rows are n of the controller's requests, which leave together
    begun --its model must be loaded--> loading --> sent
    sent --each row is answered--> Answered
    sent --one row is refused, fails or is lost--> FrontError, and the others are cancelled
    any --cancel--> (nothing is heard)

There is no task and no future in it but for a load: callbacks of the client alone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

from msgspec import structs

from slosched.clients.inference import Model
from slosched.clock import now_ns
from slosched.codes import REJECTIONS, Code, code_name
from slosched.fronts.asked import Answered, Asked, NamedTensor, RegionPart
from slosched.fronts.callers import Caller
from slosched.fronts.errors import FrontError, Refusal, Status
from slosched.fronts.forms import Form
from slosched.fronts.names import name_and_version
from slosched.fronts.sessions import Session
from slosched.fronts.versions import Version
from slosched.messages import InferReply
from slosched.transport.codec import Frame

#: Hears the end of an inference, once.
OnEnd = Callable[[Answered | FrontError], None]
#: Triton's words for a request that waited too long, which clients look for.
_EXPIRED = "Request timeout expired"
#: Codes of a worker that came to an action when its time had passed, and of a request whose own time had.
_LATE = frozenset(
    (
        Code.TIMED_OUT,
        Code.NETWORK_SEND_TOO_LATE,
        Code.LOAD_WEIGHTS_TOO_LATE,
        Code.COPY_INPUT_TOO_LATE,
        Code.EXEC_TOO_LATE,
        Code.COPY_OUTPUT_TOO_LATE,
    )
)
#: Codes of what the controller decided, and of what is over by no fault of the request.
_UNAVAILABLE = frozenset((*REJECTIONS, *_LATE, Code.CANCELLED, Code.INITIALIZING))
_BAD = frozenset((Code.INVALID_REQUEST, Code.INVALID_INPUT))
#: How the controller begins what it says of a model that this gateway holds, and an operator unloaded.
_NO_MODEL = "no model has the id"


class Host(Protocol):
    """What an inference needs of the gateway that it runs in."""

    def ended(self, inference: Inference, result: Answered | FrontError | None) -> None:
        """It has its end; None: it was cancelled. Counts it, and gives back what it took."""

    def take_rows(self, inference: Inference, rows: int) -> None:
        """It is a batch of `rows`; one of them was taken when it began. Raises FrontError, 429."""

    def gone(self, model: Version) -> None:
        """The controller does not know the model any more, which this gateway holds."""

    async def prepare(self, inference: Inference) -> tuple[Version, Session, Model]:
        """The version, loaded, with the caller's session and its handle for it. Raises FrontError."""


class Inference:
    """A Running. `rows` and `size` are what it took of the quotas."""

    __slots__ = (
        "_form",
        "_frames",
        "_host",
        "_ids",
        "_left",
        "_length",
        "_on_end",
        "_slowest",
        "_task",
        "asked",
        "begun_ns",
        "caller",
        "done",
        "ends_ns",
        "model",
        "replies",
        "rows",
        "session",
        "size",
        "slowest",
    )

    def __init__(self, host: Host, asked: Asked, caller: Caller, on_end: OnEnd) -> None:
        self._host, self.asked, self.caller, self._on_end = host, asked, caller, on_end
        self.begun_ns = now_ns()
        self.ends_ns = 0
        self.model: Version | None = None
        self.session: Session | None = None
        self.rows = self.size = 0
        self.done = False
        self.replies: list[InferReply] = []
        self.slowest: InferReply | None = None
        self._ids: dict[int, int] = {}  # of rows without an answer yet: request id -> place
        self._form: Form | None = None
        self._frames: list[Frame] = []
        self._left = self._length = 0
        self._task: asyncio.Task[None] | None = None

    # ---------------------------------------------------------------------------- beginning

    def send(self, model: Version, form: Form, session: Session, handle: Model) -> None:
        """Send its rows, each a request. Raises FrontError, for `fail`."""
        self.model, self.session, self._form = model, session, form
        model.running += 1
        rows = form.rows(self.asked)
        frames, slo_ns = rows.frames, self.asked.slo_ns
        self._host.take_rows(self, len(frames))
        self.ends_ns = now_ns() + session.limit_ns(slo_ns)
        self._length, self._left = rows.length, len(frames)
        self._frames = [b""] * len(frames)
        for place, frame in enumerate(frames):
            request_id = session.submit(
                handle, slo_ns=slo_ns, frame=frame, length=rows.length, row=self
            )
            self._ids[request_id] = place

    def send_later(self) -> None:
        """Load its model, and then send it."""
        self._task = asyncio.get_running_loop().create_task(self._prepared())

    async def _prepared(self) -> None:
        try:
            model, session, handle = await self._host.prepare(self)
            if not self.done:
                assert model.form is not None
                self.send(model, model.form, session, handle)
        except FrontError as error:
            self.fail(error)
        except Exception as error:
            self.broke(error)
        finally:
            self._task = None

    # ----------------------------------------------------------------------------------- ends

    def replied(self, reply: InferReply, frame: Frame | None) -> None:
        """The controller answered one of its rows."""
        assert self.session is not None and self.model is not None
        request_id = reply.request_id
        self.session.replied(request_id)
        if self.done:
            return
        place = self._ids.pop(request_id)
        if reply.code != Code.OK:
            self.fail(self._error(reply))
            return
        if frame is None:
            text = (
                "the controller makes inputs of its own (--generate-inputs), and returns no outputs"
            )
            self.fail(FrontError(Status.INTERNAL, text))
            return
        self._frames[place] = frame
        self.replies.append(reply)
        if self.slowest is None or reply.latency_ns > self.slowest.latency_ns:
            self.slowest = reply
        self._left -= 1
        if not self._left:
            self._answer()

    def lost(self, request_id: int, error: FrontError) -> None:
        """No answer to one of its rows will come."""
        self._ids.pop(request_id, None)
        self.fail(error)

    def _answer(self) -> None:
        model, asked, slowest = self.model, self.asked, self.slowest
        assert model is not None and self._form is not None and slowest is not None
        try:
            outputs = self._form.answer(asked, self._frames, self._length)
            placed = self._in_regions(outputs) if asked.wanted else {}
        except ValueError as error:
            text = f"the output of model '{model.base}' is not what it declares: {error}"
            self.fail(FrontError(Status.INTERNAL, text))
            return
        except FrontError as failed:
            self.fail(failed)
            return
        if placed:
            outputs = tuple(
                structs.replace(each, data=b"") if each.name in placed else each for each in outputs
            )
        latency_ns = now_ns() - self.begun_ns
        slo_ns = asked.slo_ns or slowest.slo_ns
        self._end(
            Answered(
                model=name_and_version(asked.model)[0],  # which may be another name of the model
                version=model.version,
                id=asked.id,
                outputs=outputs,
                in_regions=placed,
                slo_ns=slo_ns,
                latency_ns=latency_ns,
                in_time=latency_ns <= slo_ns,
            )
        )

    def _in_regions(self, outputs: tuple[NamedTensor, ...]) -> dict[str, RegionPart]:
        """Write the outputs that were wanted in a region there. Raises FrontError."""
        placed = {}
        parts = {wanted.name: wanted.part for wanted in self.asked.wanted}
        for tensor in outputs:
            part = parts[tensor.name]
            if part is None:
                continue
            size = len(tensor.data)
            if size > part.byte_size:
                raise FrontError(
                    Status.INVALID_ARGUMENT,
                    f"shared memory size specified with the request for output '{tensor.name}' "
                    f"({part.byte_size} bytes) should be at least {size} bytes to hold the results",
                )
            self.caller.regions.write(part, tensor.data)
            placed[tensor.name] = RegionPart(part.region, part.offset, size)
        return placed

    def fail(self, error: FrontError) -> None:
        """End it with an error; rows that are on their way are cancelled."""
        if not self.done:
            self._cancel_rows()
            self._end(error)

    def broke(self, error: Exception) -> None:
        """The gateway itself failed: its client gets an error, and the log the traceback."""
        _report("a request could not be sent", error)
        self.fail(FrontError(Status.INTERNAL, "an internal error of the gateway; its log has more"))

    def cancel(self) -> None:
        """Its client does not want it any more."""
        if self.done:
            return
        self.done = True
        self._cancel_rows()
        if self._task is not None:
            self._task.cancel()
        self._host.ended(self, None)

    def _cancel_rows(self) -> None:
        ids, self._ids = self._ids, {}
        for request_id in ids:
            assert self.session is not None
            self.session.cancel(request_id)

    def _end(self, result: Answered | FrontError) -> None:
        self.done = True
        self._host.ended(self, result)
        try:
            self._on_end(result)
        except Exception as error:
            # It would cost other requests their answers: this runs within the client's step.
            _report("an answer could not be written", error)

    def _error(self, reply: InferReply) -> FrontError:
        """The reply as the protocol's error."""
        assert self.model is not None
        code, reason = reply.code, reply.reason or code_name(reply.code)
        if code in _UNAVAILABLE:
            text = f"{_EXPIRED}: {reason}" if code in _LATE else reason
            refusal = Refusal(
                code=code,
                predicted_start_ns=reply.predicted_start_ns,
                predicted_exec_ns=reply.predicted_exec_ns or -1,
                time_left_ns=max(0, reply.slo_ns - reply.latency_ns) if reply.slo_ns else 0,
            )
            return FrontError(Status.UNAVAILABLE, text, refusal)
        text = f"model '{self.model.base}': {reason}"
        if code == Code.INVALID_REQUEST and reason.startswith(_NO_MODEL):
            self._host.gone(self.model)
            text = (
                f"model '{self.model.base}' was unloaded at the controller; send the request again"
            )
            return FrontError(Status.UNAVAILABLE, text)
        if code in _BAD:
            return FrontError(Status.INVALID_ARGUMENT, text)
        if code == Code.UNKNOWN_MODEL:
            return FrontError(Status.NOT_FOUND, text)
        if code == Code.LIMIT_REACHED:
            return FrontError(Status.RESOURCE_EXHAUSTED, text)
        return FrontError(Status.INTERNAL, f"{text} (code {code}, {code_name(code)})")


def _report(message: str, error: Exception) -> None:
    """Tell the loop's handler of a fault of this program."""
    asyncio.get_running_loop().call_exception_handler({"message": message, "exception": error})
