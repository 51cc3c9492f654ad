"""Cascades that are served: which queues their stages have, and what the judge's score decides.

    arrives -> light queue --after--> answered with the light output        ACCEPTED, FORCED
                                 +--> heavy queue --after--> answered       DEFERRED, then HEAVY
                                                 +--> light answer after all    INSTEAD, OUTRANKED
                                                 +--> no answer                 UNANSWERED

A cascade has an id beside those of instances, and is loaded like a model by its name (cascade_loads.py). Its
stages are queues of their own on the instances of its two programs, so that a program may also be served alone.
A policy may decide in place of the threshold (`decide`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from slosched.cascade_spec import CascadeOptions, CascadeSpec
from slosched.codes import Verdict
from slosched.core.scheduler.after import GoOn, Judgement, Reply
from slosched.core.scheduler.interface import Effect, PlanMade
from slosched.core.scheduler.length_classes import lengths_of
from slosched.core.scheduler.stage_ends import StageEnd
from slosched.core.scheduler.state import Instance, ModelState, Queue, Request
from slosched.messages import LoadModelResult, ModelInfo
from slosched.signature import Tensors, described

#: Ids of cascades begin here: above those of instances, below those of their queues.
_FIRST_ID = 2**38
_MASK = 2**64 - 1

#: What follows the light stage of a request with this score at this time: (request, score, now_ns).
Decide = Callable[[Request, float, int], Judgement]


def uniform(seed: int, number: int) -> float:
    """In [0, 1): the same for the same two numbers (SplitMix64's mixing, Steele et al., OOPSLA 2014)."""
    z = (seed * 0x9E3779B97F4A7C15 + (number + 1) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return ((z ^ (z >> 31)) >> 11) * 2.0**-53


class Cascade:
    """One cascade. `light` and `heavy` are the queues of its stages once it is loaded; None before.

    `threshold` is the present one. `decide` says what follows a light stage, and `ready` whether its requests
    can be taken.
    """

    def __init__(self, spec: CascadeSpec, model_id: int, options: CascadeOptions) -> None:
        self.spec, self.model_id, self.options = spec, model_id, options
        self.light: Queue | None = None
        self.heavy: Queue | None = None
        fixed = options.fixed_threshold
        self.threshold = fixed if fixed >= 0 else spec.threshold
        self.decide: Decide = self.by_threshold
        #: Tells a policy that the queues are others than before.
        self.on_bound: Callable[[], None] = _nothing

    # ------------------------------------------------------------------------------ loading

    def bind(self, light: Instance, heavy: Instance) -> str:
        """Serve it on these instances from now on. Returns what speaks against it; empty if nothing does."""
        assert light.result is not None and heavy.result is not None
        wrong = self._unlike(light.result, heavy.result)
        if wrong:
            return f"the cascade {self.spec.name!r} cannot be served: {wrong}"
        if self.light is None or self.light.instance is not light:
            self.light = light.add_queue(light.name, self._after_light, length=light.queue.length)
            self.light.cascade = self.spec.name
        if self.heavy is None or self.heavy.instance is not heavy:
            self.heavy = heavy.add_queue(heavy.name, self._after_heavy, length=heavy.queue.length)
            self.heavy.cascade = self.spec.name
        self.on_bound()
        return ""

    def _unlike(self, light: LoadModelResult, heavy: LoadModelResult) -> str:
        passes = self.spec.passes_output
        given = light.outputs if passes else light.inputs
        # An output goes in under the input's name.
        fits = _unnamed(heavy.inputs) == _unnamed(given) if passes else heavy.inputs == given
        if not fits:
            what = "the output of the light program" if passes else "its inputs"
            return (
                f"the heavy program takes {described(heavy.inputs)}, and {what}: {described(given)}"
            )
        if heavy.outputs != light.outputs:
            return _differ(light.outputs, heavy.outputs)
        heavy_length, light_length = (max(lengths_of(each), default=0) for each in (heavy, light))
        if bool(heavy_length) != bool(light_length) or heavy_length < light_length:
            return (
                f"the heavy program takes lengths up to {heavy_length}, and the light one up to {light_length} "
                "(0: a fixed shape)"
            )
        return ""

    @property
    def ready(self) -> bool:
        """Both programs are loaded, and no client has unloaded one since."""
        return _is_served(self.light) and self.serves_heavy

    def info(self) -> ModelInfo:
        """Its description for clients: the light program's tensors, under its own name and id."""
        assert self.light is not None and self.heavy is not None
        light, heavy = self.light.instance.info(), self.heavy.instance
        return msgspec.structs.replace(
            light,
            model_id=self.model_id,
            name=self.spec.name,
            copy=0,
            weights_bytes=light.weights_bytes + heavy.info().weights_bytes,
            labels=(*light.labels, "cascade"),
        )

    # ---------------------------------------------------------------------------- decisions

    def score_of(self, request: Request, scalars: Sequence[float]) -> float:
        """The judge's score of the light answer: live, recorded, or drawn; NaN if there is none within 0..1.

        A drawn score belongs to the request's user id (of a trace: its prompt), or to the request without one.
        """
        spec = self.spec
        if self.options.blind_scores:
            return spec.scores.score_at(uniform(~self.options.seed & _MASK, request.key))
        if spec.live_scores:
            score = scalars[0] if scalars else float("nan")
            return score if 0 <= score <= 1 else float("nan")
        if spec.recorded:
            return spec.recorded[request.user_id % len(spec.recorded)]
        return spec.scores.score_at(uniform(spec.seed, request.user_id or ~request.key & _MASK))

    def by_threshold(self, request: Request, score: float, now_ns: int) -> Judgement:
        """Accepted at or above the threshold; else deferred, if the heavy program may still be in time.

        A score that is NaN accepts nothing.
        """
        if score >= self.threshold:
            return self.accepted(score)
        assert self.heavy is not None
        late = now_ns + self.heavy.instance.b1_ns > request.deadline_ns
        return self.rejected(score, in_vain=late or not self.serves_heavy)

    def rejected(self, score: float, *, in_vain: bool) -> Judgement:
        """The score is below the threshold. `in_vain`: a heavy answer cannot be in time."""
        if in_vain and self.options.rejected_answers:
            return self.forced(score)
        return self.deferred(score, keeps_output=self.options.rejected_answers)

    @property
    def serves_heavy(self) -> bool:
        """The heavy program is loaded, and no client is unloading it."""
        return _is_served(self.heavy)

    def forced(self, score: float) -> Judgement:
        """The light answer, although the score is below the threshold."""
        return Judgement(Reply.OUTPUT, Verdict.FORCED, _known(score), self.threshold)

    def accepted(self, score: float) -> Judgement:
        return Judgement(Reply.OUTPUT, Verdict.ACCEPTED, score, self.threshold)

    def deferred(self, score: float, *, keeps_output: bool = True) -> Judgement:
        """It goes on; with `keeps_output` the light output is its best answer from now on."""
        assert self.heavy is not None
        goes_on = GoOn(self.heavy, keeps_output, self.spec.passes_output)
        return Judgement(goes_on, Verdict.DEFERRED, _known(score), self.threshold)

    def _after_light(self, request: Request, end: StageEnd) -> Judgement:
        return self.decide(request, self.score_of(request, end.scalars), end.now_ns)

    def _after_heavy(self, request: Request, end: StageEnd) -> Judgement:
        if request.stage:
            before = request.trail[-1]
            return Judgement(Reply.OUTPUT, Verdict.HEAVY, before.score, before.threshold)
        return Judgement(Reply.OUTPUT, Verdict.BLIND_HEAVY)


def blind(request: Request, score: float, now_ns: int) -> Judgement:
    """A `decide` of policies that ask no judge: the light program's answer stands."""
    return Judgement(Reply.OUTPUT, Verdict.BLIND_LIGHT)


class Cascades:
    """The cascades of one controller, by name and by id."""

    def __init__(self, specs: Sequence[CascadeSpec], options: CascadeOptions) -> None:
        self.by_name: dict[str, Cascade] = {}
        for place, spec in enumerate(specs):
            self.by_name[spec.name] = Cascade(spec, _FIRST_ID + place, options)
        self.by_id = {each.model_id: each for each in self.by_name.values()}

    def only(self) -> Cascade:
        """The one that there is, for policies that serve one."""
        (cascade,) = self.by_name.values()
        return cascade

    def naming(self, emit: Callable[[Effect], None]) -> Callable[[Effect], None]:
        """Return `emit`, with the name of the only cascade in plans without one; `emit` itself for several."""
        if len(self.by_name) != 1:
            return emit
        name = self.only().spec.name

        def named(effect: Effect) -> None:
            if isinstance(effect, PlanMade) and not effect.record.cascade:
                effect = PlanMade(msgspec.structs.replace(effect.record, cascade=name))
            emit(effect)

        return named


def _nothing() -> None:
    return


def _known(score: float) -> float:
    return score if score == score else -1.0


def _is_served(queue: Queue | None) -> bool:
    if queue is None:
        return False
    instance = queue.instance
    return instance.state is ModelState.LOADED and not instance.taken and bool(instance.result)


def _unnamed(tensors: Tensors) -> list[tuple[str, tuple[int, ...]]]:
    return [(each.dtype, each.shape) for each in tensors]


def _differ(light: Tensors, heavy: Tensors) -> str:
    return (
        f"its programs answer with different tensors: {described(light)} and {described(heavy)}; a client "
        "could not tell which it gets"
    )
