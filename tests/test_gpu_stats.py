"""What the drivers say of the GPUs, on its way from the worker's brain to `slosched status`."""

from __future__ import annotations

from typing import Any

from msgspec.structs import replace

from made_messages import a_heartbeat
from scheduler_rig import MS, Rig
from slosched.cli.status_text import status_text
from slosched.config import HEARTBEAT_NS
from slosched.daemon.status import status_report
from slosched.messages import PROTOCOL_VERSION, ControllerHello, GpuStats
from slosched.units import NS_PER_S
from worker_rig import VirtualWorker


def said(rig: Rig, *stats: GpuStats, session: int = 50) -> None:
    """A heartbeat with what the drivers of the worker's GPUs say."""
    rig.from_worker(a_heartbeat(session, rig.now_ns - MS // 10, gpus=stats))


def gpus_of(rig: Rig) -> list[dict[str, Any]]:
    report = status_report(rig.scheduler, now_ns=rig.now_ns)
    return list(report["workers"][0]["gpus"])


def test_statistics_travel_in_one_heartbeat_each_and_again_to_a_new_session() -> None:
    worker = VirtualWorker()
    worker.hello()
    worker.run(NS_PER_S)
    assert [beat.gpus for beat in worker.beats] == [()] * len(worker.beats)
    stats = (GpuStats(energy_mj=5),)
    worker.brain.note_gpu_stats(stats)
    worker.beats.clear()
    worker.run(3 * HEARTBEAT_NS)
    assert [beat.gpus for beat in worker.beats] == [stats, (), ()]
    worker.beats.clear()
    worker.give(ControllerHello(PROTOCOL_VERSION, 7, times_lost=1))
    worker.run(10 * MS)
    assert [beat.gpus for beat in worker.beats][:2] == [stats, ()]


def test_what_the_drivers_say_is_in_the_status_with_the_energy_since_joining() -> None:
    rig = Rig()
    rig.join(gpus=2)
    assert [g["stats"] for g in gpus_of(rig)] == [None, None]
    first = GpuStats(
        gpu_id=1,
        name="H200",
        uuid="GPU-1",
        driver="580",
        sm_percent=97,
        memory_percent=41,
        memory_used_bytes=2**33,
        memory_total_bytes=2**37,
        power_mw=689_000,
        energy_mj=5_000_000,
        temperature_c=61,
        sm_clock_mhz=1980,
    )
    said(rig, first, GpuStats(gpu_id=7, name="of no GPU that it named"))
    rig.step(10)
    plain, told = (gpu["stats"] for gpu in gpus_of(rig))
    assert plain is None and told["energy_mj"] == 0 and told["age_ns"] == 10 * MS
    assert (told["sm_percent"], told["power_mw"], told["uuid"]) == (97, 689_000, "GPU-1")
    assert told["memory_clock_mhz"] is None, "not answered"
    said(rig, replace(first, energy_mj=6_234_000))
    assert gpus_of(rig)[1]["stats"]["energy_mj"] == 1_234_000
    text = status_text("here:1", status_report(rig.scheduler, now_ns=rig.now_ns))
    row = next(line for line in text.splitlines() if "H200" in line)
    for words in ("0/1", "97 %", "41 %", "8.0/128.0 GiB", "689 W", "1.234 kJ", "61 C", "1980 MHz"):
        assert words in row
    # A beat without statistics leaves the last ones; a counter that went back counts from there.
    said(rig)
    assert gpus_of(rig)[1]["stats"]["energy_mj"] == 1_234_000
    said(rig, replace(first, energy_mj=100))
    said(rig, replace(first, energy_mj=350))
    assert gpus_of(rig)[1]["stats"]["energy_mj"] == 250


def test_a_card_that_answers_nothing_is_shown_with_dashes_and_others_not_at_all() -> None:
    rig = Rig()
    rig.join()
    assert "SM clock" not in status_text("a:1", status_report(rig.scheduler, now_ns=rig.now_ns))
    said(rig, GpuStats())
    told = gpus_of(rig)[0]["stats"]
    assert {told[name] for name in told if name.endswith(("_mj", "_mw", "_percent", "_mhz"))} == {
        None
    }
    text = status_text("a:1", status_report(rig.scheduler, now_ns=rig.now_ns))
    assert text.splitlines()[-1].split() == ["0/0", *"--------"]


def test_energy_is_counted_anew_when_a_worker_comes_back() -> None:
    rig = Rig()
    rig.join(session=50)
    said(rig, GpuStats(energy_mj=1_000))
    said(rig, GpuStats(energy_mj=3_000))
    rig.join(session=51)  # it restarted
    assert gpus_of(rig)[0]["stats"] is None
    said(rig, GpuStats(energy_mj=9_000), session=51)
    said(rig, GpuStats(energy_mj=9_500), session=51)
    assert gpus_of(rig)[0]["stats"]["energy_mj"] == 500


def test_a_counter_that_answers_late_counts_from_its_first_answer() -> None:
    rig = Rig()
    rig.join()
    for energy_mj in (-1, 7_000, -1, 7_600):
        said(rig, GpuStats(energy_mj=energy_mj))
    assert gpus_of(rig)[0]["stats"]["energy_mj"] == 600
