"""An emulated device as a model of Triton's Python backend, and the settings of the batcher that are tried.

The device has one timeline, in memory that all instances of a model share under a lock: a batch begins when
`execute` is called or when the device is free, whichever is later, and takes the profile's time for its size.
The instance sleeps until shortly before the end and spins for the rest; how late it then is, is counted.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path

from triton_process import Model

from slosched.units import NS_PER_MS

#: One request: 1 kB in, 64 bytes out.
INPUTS, OUTPUTS = 256, 16
#: Upper bounds of the counts of `Lateness`, ns; the last count has the rest.
LATE_NS = (10_000, 50_000, 100_000, 500_000, 1_000_000)
_FIRST, _STRIDE, _SIZE = 64, 128, 4096

_CODE = """
import ctypes, fcntl, json, mmap, struct, time
import numpy as np
import triton_python_backend_utils as pb_utils

LATE_NS, FIRST, STRIDE, SIZE = @CONSTANTS@
SPIN_NS = 100_000

class TritonPythonModel:
    def initialize(self, args):
        given = json.loads(args["model_config"])["parameters"]
        self.exec_ns = [int(each) for each in given["exec_ns"]["string_value"].split(",")]
        self.file = open(given["timeline"]["string_value"], "r+b")
        self.device = mmap.mmap(self.file.fileno(), SIZE)
        self.counts = FIRST + STRIDE * int(args["model_instance_name"].rpartition("_")[2])
        self.output = np.zeros((1, @OUTPUTS@), np.float32)
        ctypes.CDLL(None).prctl(29, 1000, 0, 0, 0)  # timers to the microsecond

    def execute(self, requests):
        begun = time.monotonic_ns()
        fcntl.flock(self.file, fcntl.LOCK_EX)
        [free] = struct.unpack_from("<q", self.device)
        end = max(begun, free) + self.exec_ns[len(requests)]
        struct.pack_into("<q", self.device, 0, end)
        fcntl.flock(self.file, fcntl.LOCK_UN)
        answers = [pb_utils.InferenceResponse([pb_utils.Tensor("output", self.output)]) for _ in requests]
        rest = end - SPIN_NS - time.monotonic_ns()
        if rest > 0:
            time.sleep(rest / 1e9)
        while time.monotonic_ns() < end:
            pass
        late = time.monotonic_ns() - end
        place = self.counts + 8 * sum(late >= bound for bound in LATE_NS)
        struct.pack_into("<q", self.device, place, struct.unpack_from("<q", self.device, place)[0] + 1)
        return answers
"""

_CONFIG = """
name: "@NAME@"
backend: "python"
max_batch_size: @BATCH@
input [ { name: "input" data_type: TYPE_FP32 dims: [ @INPUTS@ ] } ]
output [ { name: "output" data_type: TYPE_FP32 dims: [ @OUTPUTS@ ] } ]
instance_group [ { kind: KIND_CPU count: @INSTANCES@ } ]
dynamic_batching {
  max_queue_delay_microseconds: @DELAY@
  @PREFERRED@
  default_queue_policy {
    timeout_action: REJECT default_timeout_microseconds: 60000000 allow_timeout_override: true
  }
}
parameters { key: "timeline" value: { string_value: "@TIMELINE@" } }
parameters { key: "exec_ns" value: { string_value: "@EXEC@" } }
"""


@dataclass(frozen=True)
class Batcher:
    """Settings of Triton's dynamic batcher."""

    name: str
    max_batch: int = 16
    delay_us: int = 0
    preferred: tuple[int, ...] = ()


BATCHERS = (
    Batcher("as it is"),
    Batcher("delay 1 ms, prefers 8 and 16", delay_us=1000, preferred=(8, 16)),
    Batcher("batches of 8 at most", max_batch=8),
    Batcher("batches of 4 at most", max_batch=4),
)


@dataclass(frozen=True)
class Rule:
    """What a request's own timeout is: its SLO less some batches' time, but never less than a tenth of it.

    `times` batches of the size `batch`; 0 is the largest that the batcher makes.
    """

    name: str
    times: int
    batch: int

    def timeout_ns(self, slo_ns: int, batcher: Batcher, exec_ns: dict[int, int]) -> int:
        less = self.times * exec_ns[self.batch or batcher.max_batch]
        return max(slo_ns - less, slo_ns // 10)


RULES = (
    Rule("SLO - b1", 1, 1),
    Rule("SLO - largest batch", 1, 0),
    Rule("SLO - 2 largest batches", 2, 0),
)
#: How Triton's documents say it: the time that is left is for one request's execution.
DOCUMENTED = (BATCHERS[0].name, RULES[0].name)


def model_name(batcher: Batcher, instances: int) -> str:
    return f"device_{BATCHERS.index(batcher)}_{instances}"


def triton_model(
    batcher: Batcher, instances: int, exec_ns: dict[int, int], directory: Path
) -> Model:
    """The model with this batcher, and its timeline's file in `directory`. `exec_ns`: each size to 16."""
    name = model_name(batcher, instances)
    timeline = timeline_of(directory, name)
    timeline.write_bytes(bytes(_SIZE))
    preferred = ", ".join(map(str, batcher.preferred))
    words = {
        "NAME": name,
        "BATCH": batcher.max_batch,
        "INPUTS": INPUTS,
        "OUTPUTS": OUTPUTS,
        "INSTANCES": instances,
        "DELAY": batcher.delay_us,
        "PREFERRED": f"preferred_batch_size: [ {preferred} ]" if preferred else "",
        "TIMELINE": timeline,
        "EXEC": ",".join(str(exec_ns.get(size, 0)) for size in range(batcher.max_batch + 1)),
        "CONSTANTS": (LATE_NS, _FIRST, _STRIDE, _SIZE),
    }
    config, code = _CONFIG, _CODE
    for key, value in words.items():
        config, code = (text.replace(f"@{key}@", str(value)) for text in (config, code))
    return Model(name, config, code)


def timeline_of(directory: Path, name: str) -> Path:
    return directory / f"{name}.timeline"


def lateness(timeline: Path, instances: int) -> list[int]:
    """How many batches ended within each of `LATE_NS` after their time, and later than all."""
    found = [0] * (len(LATE_NS) + 1)
    with timeline.open("rb") as file, mmap.mmap(file.fileno(), _SIZE, prot=mmap.PROT_READ) as seen:
        for instance in range(instances):
            counts = struct.unpack_from(f"<{len(found)}q", seen, _FIRST + _STRIDE * instance)
            found = [have + more for have, more in zip(found, counts, strict=True)]
    return found


def profile_text(exec_ns: dict[int, int]) -> str:
    """The same device as a profile of slosched's emulated worker."""
    times = ", ".join(f"{size} = {ns}" for size, ns in exec_ns.items())
    return (
        'name = "beside"\nweights_cache_bytes = 1073741824\npage_bytes = 16777216\n'
        f"\n[models.device]\nexec_ns = {{ {times} }}\nweights_ns = {NS_PER_MS}\n"
        f'weights_bytes = 16777216\ninput_shape = [{INPUTS}]\ninput_dtype = "float32"\n'
        f'output_shape = [{OUTPUTS}]\noutput_dtype = "float32"\n'
    )
