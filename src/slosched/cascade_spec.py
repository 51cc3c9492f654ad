"""What a cascade is: a light program with its judge, a heavy program, and what is known of their scores.

A request runs in the light program first, whose result carries a score of the answer: the judge's confidence
that it is as good as the heavy program's. At or above the threshold the light answer is accepted; below it the
request is deferred to the heavy program (DiffServe, MLSys'25, section 3). No files are read here.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import inf
from typing import Annotated

from msgspec import Meta

from slosched.errors import InvalidConfig
from slosched.field_types import AtLeast0, AtLeast1, check_types
from slosched.gpu_profile import PAGE_BYTES, GpuProfile, ModelProfile
from slosched.options import Option

#: The GPU of DiffServe's artifact, an A100 of 80 GB, which holds both programs of each of its cascades.
MEMORY_BYTES = 80_000_000_000

Share = Annotated[float, Meta(ge=0, le=1)]


def interpolate(xs: Sequence[float], ys: Sequence[float], x: float) -> float:
    """The value at `x` of the line through the points (xs ascending); its ends hold beyond them."""
    if x <= xs[0]:
        return ys[0]
    if x >= xs[-1]:
        return ys[-1]
    place = bisect_right(xs, x)
    low, high = xs[place - 1], xs[place]
    return ys[place - 1] + (ys[place] - ys[place - 1]) * (x - low) / (high - low)


@dataclass(frozen=True)
class ScoreCurve:
    """The distribution of scores: f(t), the share of scores below each threshold t; both never decrease."""

    thresholds: tuple[float, ...]
    deferred: tuple[float, ...]

    def __post_init__(self) -> None:
        check_types(self)
        if len(self.thresholds) != len(self.deferred) or len(self.thresholds) < 2:
            raise InvalidConfig("scores: thresholds and deferred must be two or more pairs")
        if any(a >= b for a, b in pairwise(self.thresholds)):
            raise InvalidConfig("scores: thresholds must rise")
        if not (self.thresholds[0] >= 0 and self.thresholds[-1] <= 1):
            raise InvalidConfig("scores: thresholds must be within 0..1")
        if any(a > b for a, b in pairwise(self.deferred)):
            raise InvalidConfig("scores: deferred must never fall")
        if not (self.deferred[0] == 0 and 0 < self.deferred[-1] <= 1):
            raise InvalidConfig("scores: deferred must begin with 0 and end with at most 1")

    def share_below(self, threshold: float) -> float:
        """f(threshold): the share of requests that it defers."""
        return interpolate(self.thresholds, self.deferred, threshold)

    def threshold_for(self, share: float) -> float:
        """The greatest threshold that defers at most `share` of the requests."""
        deferred, thresholds = self.deferred, self.thresholds
        if share >= deferred[-1]:
            return thresholds[-1]
        place = bisect_right(deferred, max(share, 0.0))
        low, high = deferred[place - 1], deferred[place]
        step = (share - low) / (high - low)
        return thresholds[place - 1] + (thresholds[place] - thresholds[place - 1]) * max(step, 0.0)

    def score_at(self, share: float) -> float:
        """The score with `share` (in [0, 1)) of all scores below it: the inverse of f.

        Where f ends below 1, the rest of the scores are its last threshold.
        """
        deferred, thresholds = self.deferred, self.thresholds
        if share >= deferred[-1]:
            return thresholds[-1]
        place = bisect_left(deferred, share)
        if place == 0:
            return thresholds[0]
        low, high = deferred[place - 1], deferred[place]
        step = (share - low) / (high - low)
        return thresholds[place - 1] + (thresholds[place] - thresholds[place - 1]) * step


@dataclass(frozen=True)
class QualityCurve:
    """FID (less is better) by the share of answers from the light program, where the judge chose them."""

    light_shares: tuple[float, ...]
    fids: tuple[float, ...]

    def __post_init__(self) -> None:
        check_types(self)
        shares = self.light_shares
        if len(shares) != len(self.fids) or len(shares) < 2 or (shares[0], shares[-1]) != (0, 1):
            raise InvalidConfig("quality: light_shares and fids must be pairs from share 0 to 1")
        if any(a >= b for a, b in pairwise(shares)):
            raise InvalidConfig("quality: light_shares must rise")
        if not all(0 <= fid < inf for fid in self.fids):
            raise InvalidConfig("quality: fids must be finite and at least 0")

    def fid(self, light_share: float) -> float:
        """By the table, linear between its points: what holds if the judge chose every light answer."""
        return interpolate(self.light_shares, self.fids, light_share)

    def blind_fid(self, light_share: float) -> float:
        """A pessimistic value for a mix that no judge chose: the line from all heavy to all light."""
        return self.fids[0] + (self.fids[-1] - self.fids[0]) * light_share

    def pessimistic_fid(self, chosen: int, forced: int, heavy: int) -> float:
        """From counts of answers: `forced` light answers count as all light ones do, the rest by the table."""
        judged = chosen + heavy
        share = forced / (judged + forced) if judged + forced else 0.0
        by_table = self.fid(chosen / judged) if judged else self.fids[-1]
        return (1 - share) * by_table + share * self.fids[-1]

    @property
    def best_light_share(self) -> float:
        """The share of light answers with the least FID."""
        return self.light_shares[self.fids.index(min(self.fids))]


@dataclass(frozen=True)
class StageSpec:
    """One program of a cascade: the worker's name of the model, and its exec times by batch size.

    A program of `steps` equal steps (0: it runs as a whole) can be interrupted between two of them. `step_ns`
    is the time of one by batch size; where it is not known, the steps take all of the exec time.
    """

    model: str
    exec_ns: dict[int, int]
    weights_ns: AtLeast0 = 0
    weights_bytes: AtLeast0 = 0
    steps: AtLeast0 = 0
    step_ns: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_types(self)
        if not self.model.strip() or not self.model.isprintable():
            raise InvalidConfig("a stage needs the name of its model")
        if 1 not in self.exec_ns or any(b < 1 or ns <= 0 for b, ns in self.exec_ns.items()):
            raise InvalidConfig(
                f"stage {self.model!r}: exec_ns needs batch size 1, and sizes and times above 0"
            )
        self._check_steps()

    def _check_steps(self) -> None:
        if self.step_ns and not self.steps:
            raise InvalidConfig(f"stage {self.model!r}: step_ns needs the number of steps")
        if self.step_ns and self.step_ns.keys() != self.exec_ns.keys():
            raise InvalidConfig(
                f"stage {self.model!r}: step_ns must have the batch sizes of exec_ns"
            )
        for batch, ns in self.steps_ns.items():
            if ns <= 0 or ns * self.steps > self.exec_ns[batch]:
                raise InvalidConfig(
                    f"stage {self.model!r}: step_ns of batch {batch} must be above 0, and {self.steps} steps "
                    "at most its exec_ns"
                )

    @property
    def steps_ns(self) -> dict[int, int]:
        """The time of one step by batch size; empty for a program without steps."""
        if self.step_ns or not self.steps:
            return self.step_ns
        return {batch: ns // self.steps for batch, ns in self.exec_ns.items()}


@dataclass(frozen=True)
class CascadeSpec:
    """A cascade under `name`. Times of the light program do not include `judge_ns` for each batch.

    `scores` say how scores are distributed; with `live_scores` those of requests come with the results, else
    they are drawn from the distribution, or taken from `recorded` (by user id, from 1). `threshold` holds until
    a policy sets another. With `passes_output` the light output is the heavy program's input, else the
    request's own input is. `quality` is None where nothing is known of it.
    """

    name: str
    light: StageSpec
    heavy: StageSpec
    slo_ns: AtLeast1
    scores: ScoreCurve
    quality: QualityCurve | None = None
    judge_ns: AtLeast0 = 0
    threshold: Share = 0.5
    live_scores: bool = False
    passes_output: bool = False
    seed: AtLeast0 = 0  # of scores that are drawn
    recorded: tuple[Share, ...] = ()
    #: What a fixed plan for `static_gpus` GPUs is: threshold, GPUs and batch size of each stage.
    static_gpus: AtLeast0 = 0
    static_plan: tuple[float, ...] = field(default=())

    def __post_init__(self) -> None:
        check_types(self)
        if not self.name or len(self.name) > 128 or not self.name.isprintable():
            raise InvalidConfig("a cascade needs a name of at most 128 printable characters")
        if self.light.model == self.heavy.model:
            raise InvalidConfig(f"cascade {self.name!r}: both stages are {self.light.model!r}")
        if self.name in (self.light.model, self.heavy.model):
            raise InvalidConfig(f"cascade {self.name!r}: a stage has the cascade's own name")
        if len(self.static_plan) != (5 if self.static_gpus else 0):
            raise InvalidConfig(
                f"cascade {self.name!r}: static_plan must be a threshold, the GPUs of each stage and the "
                "batch size of each, with static_gpus"
            )

    @property
    def light_ns(self) -> dict[int, int]:
        """Exec times of the light program with its judge, by batch size."""
        return {batch: ns + self.judge_ns for batch, ns in self.light.exec_ns.items()}

    def profile(
        self, *, memory_bytes: int = MEMORY_BYTES, page_bytes: int = PAGE_BYTES
    ) -> GpuProfile:
        """An emulated GPU that runs both programs, any batch size up to the largest.

        With `preempt` light batches may interrupt heavy ones there, but for those that take as long as those.
        """
        stages = ((self.light, self.light_ns), (self.heavy, self.heavy.exec_ns))
        output: tuple[tuple[int, ...], str] = ((1,), "float32")
        prompt: tuple[tuple[int, ...], str] = ((77,), "int32")  # tokens
        inputs = dict.fromkeys((each.model for each, _ in stages), prompt)
        if self.passes_output:
            inputs[self.heavy.model] = output
        models = {
            stage.model: ModelProfile(
                name=stage.model,
                exec_ns=exec_ns,
                weights_ns=stage.weights_ns,
                weights_bytes=stage.weights_bytes,
                input_shape=inputs[stage.model][0],
                input_dtype=inputs[stage.model][1],
                output_shape=output[0],
                output_dtype=output[1],
                steps=stage.steps,
                step_ns=stage.steps_ns,
            ).interpolated()
            for stage, exec_ns in stages
        }
        shorter = [ns for ns in self.light_ns.values() if ns < self.heavy.exec_ns[1]]
        return GpuProfile(
            name=f"cascade-{self.name}",
            models=models,
            weights_cache_bytes=memory_bytes,
            page_bytes=page_bytes,
            urgent_at_most_ns=max(shorter, default=0),
        )


ROUTINGS = ("least-loaded", "random")
BATCHINGS = ("plan", "aimd")
TIES = ("fewest-changes", "first")


@dataclass(frozen=True)
class CascadeOptions:
    """How the policies of cascades decide. DiffServe's artifact: factor 1.2, random routing, drop at 1.5.

    `over_provision` multiplies the demand that a plan is made for. A request is dropped when its wait so far
    and the exec time to come are above `drop_at` times its SLO (0: never). With `queue_term` a plan leaves
    time for the queues (Little's law). `fixed_threshold` within 0..1 holds for the whole run (-1: none). With
    `blind_scores` scores are drawn at random and say nothing of the request. Only published policies heed
    `routing`, `batching`, `drop_at` and `queue_term`.

    `ties` says which of DIFFSERVE's plans with the greatest threshold is taken: the one that changes the fewest
    roles, or the first one that an enumeration by ascending batch sizes finds.

    Without `rejected_answers` no request gets a light answer below the threshold: one whose heavy answer cannot
    be in time is refused. `deferred_part` is the part of what the heavy program can take that CASCADE defers:
    above 1 more waits in vain, below 1 GPUs are idle. Only CASCADE and INFER5 heed the first.
    """

    plan_every_ns: AtLeast1 = 5_000_000_000
    over_provision: Annotated[float, Meta(ge=1, le=10)] = 1.05
    drop_at: Annotated[float, Meta(ge=0, le=100)] = 1.0
    routing: Annotated[str, Option(one_of=ROUTINGS)] = "least-loaded"
    batching: Annotated[str, Option(one_of=BATCHINGS)] = "plan"
    ties: Annotated[str, Option(one_of=TIES)] = "fewest-changes"
    queue_term: bool = True
    fixed_threshold: Annotated[float, Meta(ge=-1, le=1)] = -1.0
    blind_scores: bool = False
    fixed_batch: AtLeast0 = 0
    rejected_answers: bool = True
    deferred_part: Annotated[float, Meta(ge=0.1, le=10)] = 1.0
    seed: AtLeast0 = 0  # of routing, and of scores that are drawn at random

    def __post_init__(self) -> None:
        check_types(self)
        if -1 < self.fixed_threshold < 0:
            raise InvalidConfig(
                f"fixed_threshold must be within 0..1, or -1, not {self.fixed_threshold}"
            )
