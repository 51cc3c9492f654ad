"""How fast models run beside one another on one GPU: a model of the rates, for virtual time.

Each job has a rate x between 0 and 1: the share of the speed that it has alone. A job alone has rate 1. What is
known of it is g, the share of its solo time in which the GPU works (NVML's utilization), and

- time slicing (`tm`): `burst`, how long it holds the GPU before it waits for the host, in units of what one
  change of process costs. Processes take turns, so for each burst of its own a job waits for a burst of each
  other process that wants the GPU, and for the change: its GPU part lasts
  1 + sum over others j of (burst_j + 1) / burst_i * min(1, n_j / n_i) times as long, where n = g x / burst is
  the number of bursts a second.
- MPS and streams (`mps`, `streams`): `press`, how much the kernels of a job hold up those of others, whose GPU
  part lasts 1 + (sum over j of press_j g_j x_j)^p times as long, with p = 1 + 0.525 h.

h, `host_share`, is the part of its solo time in which a job's host works: 1 for eager models, 1 - g for graphs.
The host's part of a request overlaps with the GPU's, so a request takes (h^k + (g slowdown)^k)^(1/k) times as
long as alone: about the longer of both (k = 4 in tm, 2 in mps, where the value at slowdown 1 is divided out).

What no sum of such rates may exceed bounds them (many jobs): the GPU's time (sum of g x = 1 in tm; 1.6 in mps
and streams, where kernels overlap: the most that was measured, bert+whisper+GPT-J as graphs on an H200), one
interpreter (sum of h x = 1) for the jobs of mode streams, and the host's cores in the others.

`burst` and `press` of HotCarbon's four models are fitted to the throughputs of the published *pairs* (A6000 and
RTX 4090 in tm and mps, A100 in tm; g of each device's own solo runs); one value serves all devices. The mean
absolute error of the predicted STP, which tests/test_share_contention.py holds:

    tm:  0.03 on the 17 pairs that were fitted, 0.06 on the 10 triples that were not
    mps: 0.06 on the 10 pairs that were fitted, 0.14 on the 4 triples that were not

The form was chosen among several with the triples in view, so they are not a blind test. It fails where a
host-bound job meets the diffusion model under MPS on the A6000 (bert+whisper+diffusion: STP 0.3 too high;
kernels there hold up bert more than its small GPU share explains), it says nothing of tails (a rate is a
mean), and the split between two jobs in tm is off by 0.1 where the stored runs are not transitive
(bert+whisper on the 4090).

Graphs keep the GPU busy: their waits add up linearly (h = 0), and in tm they have slices (time_slices.py).
bert, whisper and diffusion have the press of eager models, which was fitted on other GPUs; GPT-J's is 1.1 in
place of 1.65. On an H200 under MPS the ten mixes are then off by 0.04 in STP and by 11 % in each job's
throughput, on average. A stream of higher priority feels 0.8 of the press of a lower one: a ResNet-50 of batch
1 felt 0.65 of it beside one of batch 64, and 0.93 beside ViT-L/16 of batch 32, whose kernels fill the card.

A thread percentage p slows the GPU part by 100 fills / p where the model fills more of the GPU than that, and
limits its press likewise; that is arithmetic and was not measured.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from slosched.share_spec import Mode

_EXPONENT = {Mode.TM: 4, Mode.MPS: 2, Mode.STREAMS: 2}
_PRESSED = 0.525
_PRIORITY_PRESS = 0.8
#: The most that g x of all jobs add up to.
_CAPACITY = {Mode.TM: 1.0, Mode.MPS: 1.6, Mode.STREAMS: 1.6}
_ROUNDS = 100
_NEAR = 1e-9


class Party(msgspec.Struct, frozen=True, kw_only=True):
    """A job that wants the GPU. `gpu_share`, `host_share`, `fills` are within 0..1; `burst` > 0; `press` >= 0.

    `host_share`: the part of its solo time in which its host works: 1 of an eager model, near 0 of graphs.
    `interprets`: that is in the interpreter that jobs of one process share.
    """

    gpu_share: float
    burst: float
    press: float
    host_share: float = 1.0
    interprets: bool = True
    fills: float = 1.0
    priority: int = 0
    thread_percentage: int = 0

    @property
    def limit(self) -> float:
        """How much of its GPU demand a thread percentage leaves: within 0..1."""
        if not self.thread_percentage:
            return 1.0
        return min(1.0, self.thread_percentage / 100 / max(self.fills, 0.01))


def rates(parties: Sequence[Party], mode: Mode, *, cores: int = 0) -> tuple[float, ...]:
    """The rate of each party, within 0..1, where all of them have work. `mode`: tm, mps or streams.

    `cores`: of the host, for all processes (0: enough). A fixed point by damped iteration; the same parties
    give the same bits.
    """
    limits = [1.0] * len(parties) if mode is Mode.TM else [party.limit for party in parties]
    if len(parties) == 1:
        party = parties[0]
        alone = party.gpu_share / limits[0]
        return (1 / _longer(party, alone, _EXPONENT[mode], scaled_by=party.gpu_share),)
    slow = _slowdown_tm if mode is Mode.TM else _slowdown_mps
    exponent = _EXPONENT[mode]
    now = [1.0] * len(parties)
    for _ in range(_ROUNDS):
        then = [
            0.5 * now[i]
            + 0.5
            / _longer(
                party,
                party.gpu_share / limits[i] * slow(parties, now, i, mode),
                exponent,
                scaled_by=0.0 if mode is Mode.TM else party.gpu_share,
            )
            for i, party in enumerate(parties)
        ]
        moved = max(abs(a - b) for a, b in zip(now, then, strict=True))
        now = then
        if moved < _NEAR:
            break
    return tuple(min(1.0, max(1e-6, rate)) for rate in _bounded(parties, now, mode, cores))


def _bounded(
    parties: Sequence[Party], found: Sequence[float], mode: Mode, cores: int
) -> Sequence[float]:
    """`found`, slowed down where the GPU, the interpreter or the cores would do more than they can."""
    one = mode is Mode.STREAMS
    hosts = 1 if one else cores
    shares = [party.host_share if party.interprets or not one else 0.0 for party in parties]
    busy = sum(share * rate for share, rate in zip(shares, found, strict=True))
    if hosts and busy > hosts:
        slower = busy / hosts - 1
        found = [rate / (1 + share * slower) for share, rate in zip(shares, found, strict=True)]
    used = sum(
        party.gpu_share * party.fills * rate for party, rate in zip(parties, found, strict=True)
    )
    return [rate * min(1.0, _CAPACITY[mode] / used) for rate in found]


def _longer(party: Party, gpu_part: float, exponent: int, *, scaled_by: float) -> float:
    """How much longer a request takes whose GPU part is `gpu_part` of its solo time; 1 at `scaled_by`."""
    host = party.host_share**exponent
    return float(((host + gpu_part**exponent) / (host + scaled_by**exponent)) ** (1 / exponent))


def _slowdown_tm(parties: Sequence[Party], now: Sequence[float], i: int, mode: Mode) -> float:
    mine = parties[i]
    bursts = max(mine.gpu_share * now[i] / mine.burst, 1e-12)
    waits = 0.0
    for j, other in enumerate(parties):
        if j != i:
            as_often = min(1.0, other.gpu_share * now[j] / other.burst / bursts)
            waits += (other.burst + 1) / mine.burst * as_often
    return 1 + waits


def _slowdown_mps(parties: Sequence[Party], now: Sequence[float], i: int, mode: Mode) -> float:
    pressed = 0.0
    for j, other in enumerate(parties):
        if j != i:
            press = other.press * other.limit * other.gpu_share * now[j]
            lower = mode is Mode.STREAMS and other.priority < parties[i].priority
            pressed += press * (_PRIORITY_PRESS if lower else 1.0)
    return float(1 + pressed ** (1 + _PRESSED * parties[i].host_share))
