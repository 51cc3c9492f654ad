"""Where the parts of a run in steps (steps.py) are cut, if they take longer than a run should go on for.

Each part is a chain of nodes like a whole graph, and the places to cut it are found in the same way: by groups
of nodes that are timed. The step is cut once for all steps, so the whole of each step takes the same as before.
What boundaries cost is measured on a few steps, in pieces and whole by turns. Segments of at most `part_ns` are
tried first, then longer ones until the cost is within what choice.py allows.

A run in pieces must answer byte for byte as the whole parts do. It is compared with disturbances in between:
after each part everything that runs share is written over, and within a part all of it but the graph pool,
which is the run's own until the part has ended.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

from slosched.daemon.backends.base import first_line
from slosched.daemon.backends.cuda.background import Yielding
from slosched.daemon.backends.cuda.choice import TOO_SLOW, Aim, Choice, Wish, chosen
from slosched.daemon.backends.cuda.driver import Driver, Graph, Stream
from slosched.daemon.backends.cuda.groups import Ends, Group, aimed_segment, bounds_of, timed_groups
from slosched.daemon.backends.cuda.program import BufferSet, Class, Copies
from slosched.daemon.backends.cuda.recorded import CHECKED_STEPS, RecordedProgram
from slosched.daemon.backends.cuda.runs import GraphRun
from slosched.daemon.backends.cuda.steps import Launch, Parts, SteppedRun
from slosched.daemon.backends.cuda.timing import MOST_TIMED, StepTimes, Stopwatch, steps_timed

#: `started` and the copy of the weights belong to the first piece, the copy of the output and `ended` to the
#: last.
_ENDS = Parts(Ends(2, 0), Ends(0, 0), Ends(0, 2))
_NAMES = Parts("first part", "step", "last part")
#: A segment has about this number of groups, half of it at first.
_FINER, _LEAST_GROUPS = 4, 8
#: A segment that is shorter than this part of the others is not worth a boundary.
_LEAST = 8
#: Segments of `part_ns`, and of twice the length, as often as this, are tried.
_DOUBLED = 3

Chains = Parts[Sequence[Any] | None]
Bounds = Parts[tuple[int, ...]]


class PartCutter:
    """Cuts the parts of runs in steps. In the background thread."""

    def __init__(
        self, driver: Driver, background: Yielding, stream: Stream, watch: Stopwatch, aim: Aim
    ) -> None:
        self._driver, self._background, self._stream = driver, background, stream
        self._watch, self._aim, self._ended = watch, aim, driver.event()

    def cut(
        self,
        program: RecordedProgram,
        of: Class,
        wish: Wish,
        copies: Copies,
        times: StepTimes,
    ) -> str:
        """Make a class in steps run in segments shorter than its parts; returns why it does not, or nothing.

        `times` are those of its parts. Whatever goes wrong leaves its parts whole. Raises DeviceFault if the
        device is lost.
        """
        try:
            return self._cut(program, of, wish, copies, times)
        except Exception as error:  # each library has its own kinds
            self._driver.done(self._ended)  # raises if it is the device that is lost
            return first_line(error)

    def _cut(
        self,
        program: RecordedProgram,
        of: Class,
        wish: Wish,
        copies: Copies,
        times: StepTimes,
    ) -> str:
        runs = program.stepped_runs(of)
        runs[0].aim(copies)
        chains: list[Chains] = [
            Parts(*(self._driver.chain(each) for each in run.captured)) for run in runs
        ]
        groups, whole = self._groups(runs[0], chains, times, wish.part_ns, copies)
        if not any(groups):
            return "its graphs are not chains"
        found = self._found(runs[0], chains[0], groups, wish, copies, times)
        if isinstance(found, str):
            return found
        bounds, choice = found
        pieces: list[SteppedRun] = []
        same = False
        try:
            for run, chain in zip(runs, chains, strict=True):
                pieces.append(run.in_pieces(self._driver, chain, bounds))
            same = self._same(program, program.sets(of), runs, pieces, copies)
        finally:
            if not same:
                for run, each in zip(runs, pieces, strict=False):
                    each.close(but=run)
        if not same:
            return "in pieces it answers otherwise"
        note = f"its {' and its '.join(whole)} in one piece: not a chain" if whole else ""
        program.run_in_steps(of, replace(choice.cut, note=note), pieces)
        return ""

    # ----------------------------------------------------------------------------- measuring

    def _groups(
        self,
        run: SteppedRun,
        chains: Sequence[Chains],
        times: StepTimes,
        part_ns: int,
        copies: Copies,
    ) -> tuple[Parts[list[Group]], list[str]]:
        """Groups of nodes of each part that is to be cut, and the names of those that cannot be."""
        begin = run.begin
        assert isinstance(begin, GraphRun)
        found: list[list[Group]] = []
        whole: list[str] = []
        for place, spent_ns in enumerate(times.parts_ns):
            found.append([])
            if spent_ns <= part_ns:
                continue
            chain = chains[0][place]
            if chain is None or any(len(each[place] or ()) != len(chain) for each in chains):
                whole.append(_NAMES[place])
                continue
            first = not place
            found[place] = timed_groups(
                self._watch,
                partial(self._segment, run.captured[place], chain, copies if first else ()),
                len(chain),
                spent_ns,
                longest_ns=max(1, part_ns // _FINER),
                ends=_ENDS[place],
                count=max(_LEAST_GROUPS, _FINER * spent_ns // (2 * part_ns)),
                # A step counts itself in the state, and may look up what lies at that place: from 0 on.
                before=() if first else (begin.launch,),
            )
        return Parts(*found), whole

    def _segment(
        self, captured: Any, chain: Sequence[Any], copies: Copies, begin: int, end: int
    ) -> Graph:
        return aimed_segment(self._driver, captured, chain, begin, end, copies)

    def _found(
        self,
        run: SteppedRun,
        chains: Chains,
        groups: Parts[list[Group]],
        wish: Wish,
        copies: Copies,
        times: StepTimes,
    ) -> tuple[Bounds, Choice] | str:
        """Where each part is cut, and how the segments are run: the shortest ones that are not too slow.

        If there are none, why.
        """
        tried: set[Bounds] = set()
        for tau_ns in (wish.part_ns << each for each in range(1 + _DOUBLED)):
            least_ns = tau_ns // _LEAST
            bounds: Bounds = Parts(*(bounds_of(each, tau_ns, least_ns=least_ns) for each in groups))
            if not any(bounds):
                return TOO_SLOW if tried else "no part has a place to be cut at"
            if bounds in tried or sum(map(len, bounds)) + len(bounds) > MOST_TIMED:
                continue
            tried.add(bounds)
            pieces = run.in_pieces(self._driver, chains, bounds)
            try:
                choice = self._choice(run, pieces, tau_ns, wish, copies, times.whole_ns)
            finally:
                pieces.close(but=run)
            if choice is not None:
                return bounds, choice
        return TOO_SLOW

    def _choice(
        self,
        whole: SteppedRun,
        pieces: SteppedRun,
        tau_ns: int,
        wish: Wish,
        copies: Copies,
        whole_ns: int,
    ) -> Choice | None:
        """How `pieces` are best run in segments of at most `tau_ns`; None if that is too slow."""
        pieces.aim(copies)
        most = steps_timed(pieces)
        before = self._watch.steps(whole, whole_ns, most=most)
        times = self._watch.steps(pieces, whole_ns).all
        after = self._watch.steps(whole, whole_ns, most=most)
        groups = [Group(at, at + 1, ns) for at, ns in enumerate(times)]
        bounds = bounds_of(groups, tau_ns, least_ns=tau_ns // _LEAST)
        if not bounds:  # what is left of them this time is not worth a boundary
            return None
        segment_ns = [sum(times[a:b]) for a, b in pairwise((0, *bounds, len(times)))]
        pieces.cut(bounds)
        bubble_ns = self._watch.bubble_ns(pieces.launches, segment_ns, segment_ns[0])
        whole_ns = (before.whole_ns + after.whole_ns) // 2
        return chosen(bounds, segment_ns, bubble_ns, wish, whole_ns=whole_ns, aim=self._aim)

    # -------------------------------------------------------------------------- right answers

    def _same(
        self,
        program: RecordedProgram,
        sets: Sequence[BufferSet],
        wholes: Sequence[SteppedRun],
        runs: Sequence[SteppedRun],
        copies: Copies,
    ) -> bool:
        """True if runs in pieces answer byte for byte as whole parts do, after a few of the steps."""
        return all(
            self._answer(program, buffers, whole, copies, disturbed=False)
            == self._answer(program, buffers, run, copies, disturbed=True)
            for buffers, whole, run in zip(sets, wholes, runs, strict=True)
        )

    def _answer(
        self,
        program: RecordedProgram,
        buffers: BufferSet,
        run: SteppedRun,
        copies: Copies,
        *,
        disturbed: bool,
    ) -> bytes:
        driver, stream = self._driver, self._stream
        host = buffers.staged_out.host
        assert host is not None
        nbytes = buffers.row_out * buffers.batch
        _, weights, size = copies[0]
        with self._watch.alone():
            # What the last run answered must not be taken for the answer of this one.
            driver.copy(buffers.output, weights, min(nbytes, size), stream)
            run.aim(copies)
            if disturbed:
                self._launch_disturbed(program, run)
            else:
                run.launch(stream, steps=CHECKED_STEPS)
            driver.copy(buffers.staged_out.address, buffers.output, nbytes, stream)
            self._wait()
        return host[:nbytes].tobytes()

    def _launch_disturbed(self, program: RecordedProgram, run: SteppedRun) -> None:
        stream = self._stream
        program.disturb(stream)
        for launch, ends in _pieces(run):
            launch(stream)
            self._wait()
            if ends:
                program.disturb(stream)
            else:
                program.disturb_beside(stream)

    def _wait(self) -> None:
        self._driver.record(self._ended, self._stream)
        while not self._driver.done(self._ended):
            self._background.pause()


def _pieces(run: SteppedRun) -> Iterator[tuple[Launch, bool]]:
    """Each piece of a run of a few steps, and whether it ends a part."""
    begin, step, finish = run.pieces
    for part in (begin, *[step] * min(run.steps, CHECKED_STEPS), finish):
        for place, launch in enumerate(part, 1):
            yield launch, place == len(part)
