"""A GPU's timeline: segments in any order, and every overlap found."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from slosched.core.timeline import Timeline
from slosched.core.worker.interface import joined
from slosched.messages import Span

SEGMENTS = st.lists(
    st.tuples(st.integers(0, 60), st.integers(1, 9)).map(lambda s: (s[0], s[0] + s[1])), max_size=20
)


@given(SEGMENTS, st.integers(0, 3))
def test_a_segment_is_taken_if_and_only_if_it_overlaps_no_other(
    segments: list[tuple[int, int]], slack_ns: int
) -> None:
    timeline, taken = Timeline(), list[tuple[int, int]]()
    for begin_ns, end_ns in segments:
        overlap = timeline.add(begin_ns, end_ns)
        expected = any(begin_ns < other[1] and other[0] < end_ns for other in taken)
        assert bool(overlap) == expected
        if not overlap:
            taken.append((begin_ns, end_ns))
    assert timeline.segments == sorted(taken)


def test_an_overlap_within_the_slack_is_none_and_the_clause_names_the_other_segment() -> None:
    timeline = Timeline()
    assert not timeline.add(10, 20) and not timeline.add(30, 40)
    assert timeline.add(19, 25) == "before the one ahead of it ended at 20"
    assert timeline.add(25, 31) == "and ended at 31, after the one behind it began at 30"
    assert not timeline.add(19, 31, slack_ns=1)


def test_old_segments_are_forgotten() -> None:
    timeline = Timeline()
    for begin_ns in range(0, 400, 10):
        assert not timeline.add(begin_ns, begin_ns + 10)
    assert len(timeline.segments) == 32 and timeline.segments[-1] == (390, 400)


def test_segments_join_to_one_span_whose_duration_has_no_pause() -> None:
    first, second, third = Span(10, 20, 9), Span(25, 30, 5), Span(37, 40, 2)
    assert joined([first]) == (first, 0)
    assert joined([first, second, third]) == (Span(10, 40, 16), 12)
