"""What a client holds in its hands: loaded models, answers, and the checks made before sending."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from slosched.clients.tensors import Array, inputs_of, outputs_of, signature_text
from slosched.codes import Code, code_name
from slosched.core.client.interface import HeldModel
from slosched.errors import DeadlineExceeded, InvalidRequest, RequestFailed
from slosched.messages import InferReply, ModelInfo, StageReply
from slosched.signature import Tensor
from slosched.units import NS_PER_S, format_duration
from slosched.verdicts import (
    gives_answer,
    gives_light_after_all,
    stage_name,
    stage_words,
    verdict_name,
)

_DEADLINE_CODES = (Code.TIMED_OUT, Code.SKIPPED, Code.COULD_NOT_START_IN_TIME)


class Model:
    """One loaded instance of a model, as its caller holds it.

    It follows a controller that is restarted: the client loads the model again by itself, and `info` and
    `incarnation` are then of the new process.
    """

    __slots__ = ("held",)

    def __init__(self, info: ModelInfo, incarnation: int) -> None:
        self.held = HeldModel(info, incarnation)

    @classmethod
    def of(cls, held: HeldModel) -> Model:
        """The handle of what a client's brain holds."""
        model = cls.__new__(cls)
        model.held = held
        return model

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Model) and self.held is other.held

    def __hash__(self) -> int:
        return id(self.held)

    def __repr__(self) -> str:
        return f"Model({self.info.name!r}, copy={self.info.copy}, model_id={self.model_id})"

    @property
    def info(self) -> ModelInfo:
        return self.held.info

    @property
    def incarnation(self) -> int:
        """The incarnation of the controller that loaded it."""
        return self.held.incarnation

    @property
    def model_id(self) -> int:
        return self.info.model_id

    @property
    def name(self) -> str:
        return self.info.name

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of one input, without a batch dimension."""
        return self.info.input_shape

    @property
    def input_dtype(self) -> str:
        return self.info.input_dtype

    @property
    def output_shape(self) -> tuple[int, ...]:
        """The shape of one output, without a batch dimension."""
        return self.info.output_shape

    @property
    def b1_ns(self) -> int:
        """Batch-1 exec time on the fastest GPU, in ns: what an SLO factor multiplies."""
        return self.info.b1_ns

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """Its inputs: names, dtypes and shapes of one request; -1 is the request's length."""
        return inputs_of(self.info)

    @property
    def outputs(self) -> tuple[Tensor, ...]:
        """Its outputs, as `inputs`."""
        return outputs_of(self.info)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Its length classes, ascending; empty if no dimension varies."""
        return self.info.lengths

    @property
    def signature(self) -> str:
        """Inputs and outputs as people read them."""
        return signature_text(self.info)


@dataclass(frozen=True, slots=True)
class Unloaded:
    """The answer to `unload`: the number of instances that leave the workers, and of those that stay.

    Instances stay because other clients use them.
    """

    unloaded: int
    kept: int


@dataclass(frozen=True, slots=True)
class Inference:
    """The answer to one request: its outcome, and everything that the controller says about it.

    `outputs` has an array for each output, by name and at the request's own length; it is empty when the
    request failed or inputs are off. Times are in ns; those of `message` are relative to the request's arrival
    at the controller. `round_trip_ns` is the client's own measure, from the call to the answer.
    """

    model: Model
    outputs: dict[str, Array]
    message: InferReply
    round_trip_ns: int

    @property
    def output(self) -> Array | None:
        """The only output; None without one. Raises AttributeError, with the names, for several."""
        if len(self.outputs) > 1:
            raise AttributeError(
                f"model {self.model.name!r} has several outputs, {', '.join(self.outputs)}: take one from "
                ".outputs"
            )
        return next(iter(self.outputs.values()), None)

    @property
    def ok(self) -> bool:
        """True if the model ran. The answer may still be late: see `deadline_met`."""
        return self.message.code == Code.OK

    @property
    def code(self) -> int:
        return self.message.code

    @property
    def reason(self) -> str:
        """Why it ended as it did, in words; empty for a plain success."""
        return self.message.reason

    @property
    def latency_ns(self) -> int:
        """From arrival at the controller until it answered."""
        return self.message.latency_ns

    @property
    def slo_ns(self) -> int:
        """The SLO: from the client's send to the receipt of the answer."""
        return self.message.slo_ns

    @property
    def deadline_met(self) -> bool:
        """In time by the controller's clock, from arrival to departure; `round_trip_ns` judges it here."""
        return self.message.deadline_met

    @property
    def remaining_ns(self) -> int:
        """Time left of the SLO when the controller answered, from arrival there; below 0 if it had passed.

        After an early refusal nothing that this request competes for can change much sooner, so a
        retry that waits a part of this does not spin.
        """
        return self.message.slo_ns - self.message.latency_ns

    @property
    def remaining_s(self) -> float:
        """`remaining_ns` in seconds and at least 0: what asyncio.sleep or time.sleep take."""
        return max(0, self.remaining_ns) / NS_PER_S

    @property
    def predicted_start_ns(self) -> int | None:
        """When the controller expected it to start; for a refusal, the best plan that it found."""
        return self.message.predicted_start_ns if self.message.predicted_start_ns >= 0 else None

    @property
    def predicted_exec_ns(self) -> int | None:
        return self.message.predicted_exec_ns or None

    @property
    def start_ns(self) -> int | None:
        """When it really started on the GPU."""
        return self.message.start_ns if self.message.start_ns >= 0 else None

    @property
    def exec_ns(self) -> int | None:
        return self.message.exec_ns or None

    @property
    def batch_size(self) -> int:
        """How many requests shared the GPU action; 0 if there was none."""
        return self.message.batch_size

    @property
    def cold(self) -> bool:
        """True if the weights had to be loaded onto a GPU for it."""
        return self.message.cold

    @property
    def gpu(self) -> str:
        """Where it ran ("worker 0 GPU 1"); empty if it did not."""
        return _gpu(self.message)

    @property
    def stages(self) -> tuple[StageReply, ...]:
        """The stages of a cascade that the request went through, in order; empty for other models."""
        return self.message.stages

    @property
    def answered_by(self) -> StageReply | None:
        """The stage of a cascade whose output is the answer; None of other models, and of failed requests."""
        if not self.ok or not self.stages:
            return None
        last = self.stages[-1]
        if gives_light_after_all(last.verdict) and len(self.stages) > 1:
            return self.stages[-2]
        return last if gives_answer(last.verdict) else None

    @property
    def verdict(self) -> str:
        """How the last stage of a cascade ended, in words ("accepted"); empty without stages."""
        return verdict_name(self.stages[-1].verdict) if self.stages else ""

    @property
    def score(self) -> float | None:
        """The judge's score of the light answer; None where no judge was asked."""
        return next((stage.score for stage in self.stages if stage.score >= 0), None)

    @property
    def threshold(self) -> float | None:
        """What the score was held against; None where no judge was asked."""
        return next((stage.threshold for stage in self.stages if stage.threshold >= 0), None)

    def explain(self) -> str:
        """Everything the answer says, in one human-readable line."""
        message = self.message
        slo = format_duration(message.slo_ns)
        parts = [f"{code_name(message.code)} after {format_duration(message.latency_ns)} of {slo}"]
        if message.reason:
            parts.append(message.reason)
        if self.remaining_ns >= 0:
            parts.append(f"{format_duration(self.remaining_ns)} left until the deadline")
        else:
            parts.append(f"{format_duration(-self.remaining_ns)} past the deadline")
        parts += self._stages_told() if self.stages else self._run_told()
        if message.attempts > max(1, len(message.stages)):
            parts.append(f"{message.attempts} attempts")
        return "; ".join(parts)

    def _run_told(self) -> list[str]:
        """What was predicted of it and what happened."""
        parts = []
        if self.start_ns is not None:
            parts.append(f"started at {_against(self.start_ns, self.predicted_start_ns)}")
        if self.exec_ns is not None:
            parts.append(f"ran {_against(self.exec_ns, self.predicted_exec_ns)}")
        elif self.predicted_exec_ns is not None:
            parts.append(f"would have run {format_duration(self.predicted_exec_ns)}")
        if self.gpu:
            warmth = "cold" if self.cold else "warm"
            parts.append(f"batch of {self.batch_size} on {self.gpu}, {warmth}")
        return parts

    def _stages_told(self) -> list[str]:
        """Each stage of a cascade's request, with the GPU that it ran on."""
        return [
            stage_words(
                stage.verdict,
                name=f"{stage_name(stage.verdict, place)} {stage.model}{_where(stage)}",
                queued_ns=stage.queued_ns,
                start_ns=stage.start_ns if stage.exec_ns else None,
                exec_ns=stage.exec_ns,
                end_ns=stage.end_ns,
                batch_size=stage.batch_size,
                score=stage.score,
                threshold=stage.threshold,
            )
            for place, stage in enumerate(self.stages)
        ]

    def facts(self) -> dict[str, Any]:
        """How it ended, its times in ns, and where it ran: plain values, for JSON."""
        message = self.message
        return {
            "code": int(message.code),
            "outcome": code_name(message.code),
            "reason": message.reason,
            "slo_ns": message.slo_ns,
            "latency_ns": message.latency_ns,
            "remaining_ns": self.remaining_ns,
            "deadline_met": message.deadline_met,
            "round_trip_ns": self.round_trip_ns,
            "worker_id": message.worker_id,
            "gpu_id": message.gpu_id,
            "cold": message.cold,
            "predicted_start_ns": message.predicted_start_ns,
            "start_ns": message.start_ns,
            "predicted_exec_ns": message.predicted_exec_ns,
            "exec_ns": message.exec_ns,
            "attempts": message.attempts,
        }

    def raise_for_code(self) -> None:
        """Raise what the code stands for, with this answer as `.reply`; nothing for code 0.

        DeadlineExceeded for 4, 7 and 8, InvalidRequest for 6, RequestFailed for the others.
        """
        code = self.message.code
        if code == Code.OK:
            return
        why = self.message.reason or code_name(code)
        text = f"model {self.model.name!r}: {why} (code {code}, {code_name(code)})"
        if code in _DEADLINE_CODES:
            text += (
                f"; deadline {format_duration(self.slo_ns)} after the send, "
                f"{format_duration(max(0, self.remaining_ns))} left when it was answered"
            )
            raise DeadlineExceeded(text, code=code, reply=self)
        if code == Code.INVALID_REQUEST:
            raise InvalidRequest(text, code=code, reply=self)
        raise RequestFailed(text, code=code, reply=self)


def _gpu(ran: InferReply | StageReply) -> str:
    """Where it ran ("worker 0 GPU 1"); empty if it did not, or its controller does not say."""
    return f"worker {ran.worker_id} GPU {ran.gpu_id}" if ran.worker_id >= 0 else ""


def _where(stage: StageReply) -> str:
    gpu = _gpu(stage)
    return f" on {gpu}" if gpu else ""


def _against(actual_ns: int, predicted_ns: int | None) -> str:
    if predicted_ns is None:
        return format_duration(actual_ns)
    return f"{format_duration(actual_ns)} (predicted {format_duration(predicted_ns)})"
