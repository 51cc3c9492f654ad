"""What a model needs for interruptions beyond its classes, made in preparation (`--preempt`).

Long classes are cut into segments (cutting.py). The short classes of short models, and all classes of those
whose table says `urgent = true`, are captured once more in a twin: on a stream of higher priority, into a pool
of their own, with active weights and buffers of its own. The twin is checked like the program itself. Either
costs memory and preparation time, which a note and the model's labels say; a model that cannot have it runs
without.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from slosched.clock import Clock, now_ns
from slosched.daemon.backends.base import first_line
from slosched.daemon.backends.cuda.choice import Wish
from slosched.daemon.backends.cuda.cutting import Cutter
from slosched.daemon.backends.cuda.driver import Block, DeviceFault, Driver, OutOfDeviceMemory
from slosched.daemon.backends.cuda.preparing import Bench, Preparable, Source
from slosched.daemon.backends.cuda.program import Class
from slosched.daemon.backends.cuda.recorded import RecordedProgram
from slosched.gpu_profile import ModelProfile
from slosched.units import NS_PER_MS

#: A class that takes no longer may interrupt others, if batch 1 of its model takes no longer.
URGENT_AT_MOST_NS = 3 * NS_PER_MS
_MB = 1_000_000

Note = Callable[[str], None]


class Preemption:
    """Makes programs ready to be interrupted, and to interrupt. In the background thread.

    `bench` is one on the urgent stream, which checks the twins.
    """

    def __init__(
        self, driver: Driver, cutter: Cutter, bench: Bench, *, clock: Clock = now_ns
    ) -> None:
        self._driver, self._cutter, self._bench, self._clock = driver, cutter, bench, clock

    def add(
        self,
        source: Source,
        exec_ns: Mapping[Class, int],
        scratch: Sequence[Block],
        note: Note,
    ) -> None:
        """Cut the long classes, and add a twin to a short program. `exec_ns` are the measured times."""
        program, wish, twin = source.program, source.wish, source.twin
        assert isinstance(program, RecordedProgram)
        before_ns, free_bytes = self._clock(), self._driver.free_bytes()
        self._cut_long(program, wish, exec_ns, scratch, note)
        classes = urgent_classes(exec_ns, wish)
        if twin is not None and classes:
            self._add_twin(program, twin, classes, scratch, note)
        cut = [of for of in program.classes if program.cut_of(of) is not None]
        if cut or program.urgent is not None:
            took_ns = self._clock() - before_ns
            megabytes = max(0, free_bytes - self._driver.free_bytes()) / _MB
            number = len(program.classes)
            what = [f"{len(cut)} of {number} classes in segments"] * bool(cut)
            if program.urgent is not None:
                twins = len(program.urgent.classes)
                of = "" if cut else f" of {number} classes"
                what += [f"{twins}{of} in a twin for urgent runs"]
            cost = f"{megabytes:.0f} MB, {took_ns / NS_PER_MS:.0f} ms"
            program.preemption = f"{' and '.join(what)} ({cost})"
            note(f"{program.name}: {program.preemption}")

    def _cut_long(
        self,
        program: RecordedProgram,
        wish: Wish,
        exec_ns: Mapping[Class, int],
        scratch: Sequence[Block],
        note: Note,
    ) -> None:
        for of, spent_ns in exec_ns.items():
            if spent_ns <= wish.cut_from_ns or not program.captured(of):
                continue
            try:
                why_not = self._cutter.cut(program, of, wish, scratch[0], whole_ns=spent_ns)
            except OutOfDeviceMemory as error:
                why_not = first_line(error)
            cut = program.cut_of(of)
            if cut is None:
                note(f"{program.name} {of} is not interrupted: {why_not}")
            else:
                longest = max(cut.segment_ns) / NS_PER_MS
                note(
                    f"{program.name} {of}: {len(cut.segment_ns)} segments of at most {longest:.3f} ms, "
                    f"{cut.in_flight} in flight" + (f"; {cut.note}" if cut.note else "")
                )

    def _add_twin(
        self,
        program: RecordedProgram,
        twin: Callable[[], Preparable],
        classes: Sequence[Class],
        scratch: Sequence[Block],
        note: Note,
    ) -> None:
        if not all(program.captured(of) for of in program.classes):
            note(f"{program.name} interrupts nothing: it runs by plain execution")
            return
        made: RecordedProgram | None = None
        try:
            built = twin()
            assert isinstance(built, RecordedProgram)
            made = built
            made.answers_with(program.gives, scored=program.scored)
            made.keeps_weights = program.keeps_weights
            for of in classes:
                made.restore_weights(scratch[0])
                made.add_class(of)
            self._bench.check_answers(made, scratch, note)
            why_not = made.not_captured
            if not why_not and made.classes != tuple(sorted(classes)):
                why_not = ", ".join(made.left_out)
        except DeviceFault:
            raise
        except Exception as error:  # each library has its own kinds
            why_not = first_line(error)
        if why_not:
            note(f"{program.name} interrupts nothing: {why_not}")
            if made is not None:
                made.release()
            return
        program.urgent = made


def urgent_classes(exec_ns: Mapping[Class, int], wish: Wish) -> list[Class]:
    """Classes that may interrupt others: all of a model whose table says so, the short ones of a short one."""
    if wish.urgent:
        return list(exec_ns)
    single_ns = min(ns for of, ns in exec_ns.items() if of.batch == 1)
    if single_ns > URGENT_AT_MOST_NS:
        return []
    return [of for of, ns in exec_ns.items() if ns <= URGENT_AT_MOST_NS]


def urgent_ns(program: Preparable, profile: ModelProfile) -> int:
    """The exec time (ns) up to which every class is in the twin; 0 without a twin.

    Classes were chosen by times that were measured before, so one outside may be as short as one inside.
    """
    if program.urgent is None:
        return 0
    inside = set(program.urgent.classes)
    times_ns = {of: profile.times(of.length)[of.batch] for of in program.classes}
    limit_ns = min((ns for of, ns in times_ns.items() if of not in inside), default=None)
    within = [ns for of, ns in times_ns.items() if of in inside]
    return max([ns for ns in within if limit_ns is None or ns < limit_ns], default=0)


def boundaries_ns(program: Preparable, profile: ModelProfile) -> dict[int, dict[int, int]]:
    """By length and batch size, the longest time until a run can be interrupted; empty if no class is cut."""
    cuts = {of: program.cut_of(of) for of in program.classes}
    found: dict[int, dict[int, int]] = {}
    for of, cut in cuts.items() if any(cuts.values()) else ():
        whole_ns = profile.times(of.length)[of.batch]
        found.setdefault(of.length, {})[of.batch] = whole_ns if cut is None else cut.boundary_ns
    return found
