"""The one place where an action ends, whatever its kind and however: done, failed, or lost with its worker.

    worker's report --+
                      +--> books of its kind --> policy --> its requests --> record
    worker lost ------+

A request of an action that came to nothing is tried again while that can help; else it is answered.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from slosched.codes import ENDED, ActionType, Code
from slosched.core.scheduler.actions.kind import Outcome
from slosched.core.scheduler.after import GoOn
from slosched.core.scheduler.answers import Answers, Plan
from slosched.core.scheduler.chains import Chains
from slosched.core.scheduler.cluster import Cluster
from slosched.core.scheduler.policies.base import LoadsByDemand, Policy
from slosched.core.scheduler.replanning import is_pointless, was_handed_back, why_failed
from slosched.core.scheduler.second_tries import MODEL_FAILED, SecondTries
from slosched.core.scheduler.stages import Stages
from slosched.core.scheduler.state import ActionState, Request, RequestState, Worker
from slosched.core.values import Value
from slosched.messages import ErrorResult, Result

#: Answers a request: (request, code, words, plan).
Answer = Callable[[Request, int, str, Plan], object]


class ActionEnds:
    """Ends actions. `answer` is how a request without an output is answered."""

    def __init__(
        self,
        cluster: Cluster,
        policy: Policy,
        second_tries: SecondTries,
        answers: Answers,
        chains: Chains,
        answer: Answer,
    ) -> None:
        self._chains = chains
        self._cluster, self._policy = cluster, policy
        self._second_tries = second_tries
        self._answers, self._answer = answers, answer
        self._stages = Stages(
            cluster.emit,
            lambda request, now_ns: policy.enqueue(request, now_ns=now_ns),
            answers.keeps,
        )

    def reported(
        self, worker: Worker, result: Result, outputs: Sequence[Value], *, now_ns: int
    ) -> None:
        """`worker` says how an action on one of its GPUs ended; what is not outstanding there is ignored."""
        cluster = self._cluster
        action = cluster.actions.get(result.action_id)
        if action is None or action.gpu.worker is not worker:
            return
        kind = cluster.kinds[action.action_type]
        if isinstance(result, ErrorResult):
            self._failed(action, Outcome(result.code, result.reason, result=result), now_ns)
        elif type(result) is kind.result_type:
            outcome = kind.outcome(action, result, now_ns=now_ns)
            del cluster.actions[action.action_id]
            kind.finished(action, outcome, now_ns=now_ns)
            self._tell_policy(action, outcome, outcome.span.end_ns)
            if action.instance.function is not None and action.requests:
                met = self._chains.returned(action, outcome, outputs, now_ns=now_ns)
            else:
                met = self._answer_all(action, outcome, outputs, now_ns) if action.requests else 0
            cluster.record(action, outcome, now_ns=now_ns, met=met)

    def lost(self, worker: Worker, actions: list[ActionState], *, now_ns: int) -> None:
        """`worker` was lost with these outstanding; its GPUs are off the books already."""
        reason = f"worker {worker.worker_id} was lost while it had the request"
        outcome = Outcome(Code.CANCELLED, reason)
        for action in actions:
            self._cluster.record(action, outcome, now_ns=now_ns)
        for action in actions:
            self._tell_policy(action, outcome, now_ns)
            self._try_again(action, outcome, now_ns, process_ended=True)

    def _failed(self, action: ActionState, outcome: Outcome, now_ns: int) -> None:
        del self._cluster.actions[action.action_id]
        kind = self._cluster.kinds[action.action_type]
        kind.failed(action, outcome, now_ns=now_ns)
        self._cluster.record(action, outcome, now_ns=now_ns)
        self._tell_policy(action, outcome, now_ns)
        self._try_again(action, outcome, now_ns)
        model = action.instance
        if kind.carries_requests and not model.resident_on and model.waits:
            self.weights_wanted(model.waiting()[0], now_ns)  # the weights went with the action

    def _tell_policy(self, action: ActionState, outcome: Outcome, end_ns: int) -> None:
        self._policy.action_done(
            action,
            code=outcome.code,
            end_ns=end_ns,
            duration_ns=outcome.span.duration_ns,
            clock_mhz=outcome.clock_mhz,
        )

    def _answer_all(
        self, action: ActionState, outcome: Outcome, outputs: Sequence[Value], now_ns: int
    ) -> int:
        """Answer what an Infer carried; returns how many were in time."""
        met = taken = 0
        sizes, scores, span = outcome.result.output_sizes, outcome.result.scores, outcome.span
        plan = Plan.of(action, start_ns=span.begin_ns, exec_ns=span.duration_ns)
        for place, request in enumerate(action.requests):
            size = sizes[place] if place < len(sizes) else 0
            output = None
            if size:  # an output of 0 bytes has no frame
                output = outputs[taken] if taken < len(outputs) else None
                taken += 1
            if request.state is RequestState.ANSWERED:  # cancelled meanwhile
                continue
            if request.queue.after is not None or request.stage:
                scalars = scores[place : place + 1]
                follows = self._stages.ended(request, action, outcome, output, scalars, now_ns)
                if isinstance(follows, GoOn):
                    self._stages.go_on(request, follows, output, now_ns)
                    continue
                output = follows
            if request.input is None:
                output = None
            met += self._answers.give(
                request, Code.OK, "", plan, now_ns=now_ns, output=output, tell=True
            )
        return met

    # ----------------------------------------------------------------------- what failed

    def _try_again(
        self, action: ActionState, outcome: Outcome, now_ns: int, *, process_ended: bool = False
    ) -> None:
        """An action came to nothing: its requests are tried again while that can help, else answered."""
        if action.action_type is ActionType.CALL:
            self._chains.failed(action, outcome, now_ns=now_ns, lost=process_ended)
            return
        code, reason = outcome.code, outcome.reason
        if self._policy.replans:
            if process_ended or code in ENDED:
                ending = code == Code.PROCESS_ENDED
                self._second_tries.process_ended(action, code, reason, now_ns=now_ns, ending=ending)
                return
            if code in MODEL_FAILED:
                self._second_tries.model_failed(action, code, reason)
                return
        for request in action.requests:
            self._retry(request, action, outcome, now_ns)

    def _retry(self, request: Request, action: ActionState, outcome: Outcome, now_ns: int) -> None:
        """Its action failed for a reason other than the model: replan while that can help, else answer."""
        if request.state is RequestState.ANSWERED:
            return
        code, reason = outcome.code, outcome.reason
        if was_handed_back(action, code):
            request.excused += 1
        if is_pointless(request, self._cluster, self._policy, now_ns):
            self._answer(request, code, why_failed(code, reason), Plan.of(action))
        elif request.tried_alone:
            self._second_tries.again(request)
        else:
            request.move(RequestState.QUEUED)
            self._policy.enqueue(request, now_ns=now_ns)

    def weights_wanted(self, request: Request, now_ns: int) -> None:
        """A queued request lost its model's weights to a second try, or with a process."""
        if isinstance(self._policy, LoadsByDemand):
            self._policy.asked_for(request, now_ns=now_ns)
