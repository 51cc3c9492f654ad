"""One example of every message, and the one command that makes their golden bytes anew:

    .venv/bin/python tests/golden_wire.py

`golden/wire.json` holds the bytes of each as hex. A field that is appended with a default needs them anew;
every other change is a change of protocol and raises PROTOCOL_VERSION.
"""

from __future__ import annotations

import json
from pathlib import Path

import msgspec

from slosched import join_messages as j
from slosched import messages as m
from slosched.output_files import write_file
from slosched.transport import bundles as b
from slosched.transport.codec import encode

GOLDEN = Path(__file__).parent / "golden" / "wire.json"

_INFO = m.ModelInfo(
    model_id=3,
    name="resnet50",
    copy=1,
    batch_sizes=(1, 2),
    b1_ns=2_600_000,
    weights_ns=8_330_000,
    weights_bytes=102_160_300,
    input_shape=(3, 2, 2),
    input_dtype="float32",
    output_shape=(5,),
    output_dtype="float32",
    random_weights=True,
    gpus_resident=0,
    clients=0,
    labels=(),
)
_SPAN = m.Span(10**18, 10**18 + 5, 5)
_GPU = m.GpuInfo(0, "v100", 1376, 16_777_216, (3, 4))

EXAMPLES: tuple[m.Message, ...] = (
    m.ClientHello(m.PROTOCOL_VERSION, 2**60, "bench", 0.5),
    m.ClientHeartbeat(10**18),
    m.Goodbye(),
    m.LoadModelRequest(7, "resnet50_v2", 12),
    m.UnloadModelRequest(7, "resnet50_v2", force=True),
    m.ListModelsRequest(8),
    m.InferRequest(
        request_id=9,
        model_id=3,
        slo_factor=2.25,
        slo_ns=0,
        user_id=4,
        shape=(3, 2, 2),
        dtype="float32",
        sent_ns=10**18,
    ),
    m.CancelRequest(9),
    m.StatusRequest(10),
    m.DrainWorkerRequest(11, "gpu01/cuda:0", undo=True),
    j.Register(
        protocol=m.PROTOCOL_VERSION,
        incarnation=2**60,
        name="gpu01/cuda:0",
        host="10.0.0.1",
        port=12345,
        nonce=b"n" * 32,
        proof=b"p" * 32,
    ),
    j.Challenge(b"n" * 32),
    j.Registered(3, drained=True),
    j.RegistrationRefused(5, "the name is in use"),
    m.DrainWorkerReply(11, 0, "", 3, "draining"),
    m.Welcome(m.PROTOCOL_VERSION, 2**60, "0.1.0", "INFER5", 100_000_000),
    m.Refused(-1, 6, "say hello first"),
    m.LoadModelReply(7, 0, "", (_INFO,)),
    m.UnloadModelReply(7, 0, "", 9, 3),
    m.ListModelsReply(8, (_INFO,), ("f", "resnet50"), ("f",)),
    m.InferReply(
        9,
        0,
        "",
        3,
        5_850_000,
        3_400_000,
        True,
        2,
        0,
        1,
        False,
        500_000,
        2_600_000,
        480_000,
        2_600_100,
        1,
    ),
    m.StatusReply(10, {"ready": True, "workers": []}),
    m.ControllerHello(m.PROTOCOL_VERSION, 2**60, times_lost=0),
    m.HeartbeatAck(1, 2, 3),
    m.WorkerGoodbye(5),
    m.LoadModel(
        5,
        1,
        name="resnet50",
        model_id=0,
        copies=12,
        max_batch=16,
        max_exec_ns=25_000_000,
        earliest_ns=0,
        latest_ns=10**18,
    ),
    m.UnloadModel(5, 2, 0),
    m.LoadWeights(
        5, 3, model_id=0, gpu_id=1, earliest_ns=0, latest_ns=10**18, expected_duration_ns=8_330_000
    ),
    m.EvictWeights(5, 4, model_id=0, gpu_id=1, earliest_ns=0, latest_ns=10**18),
    m.Infer(
        5,
        6,
        model_id=0,
        gpu_id=1,
        earliest_ns=0,
        latest_ns=10**18,
        expected_duration_ns=5_600_000,
        batch_size=4,
        request_count=3,
        input_sizes=(48, 0, 48),
    ),
    m.Call(
        5,
        9,
        model_id=4,
        gpu_id=2,
        call_id=70,
        expected_duration_ns=1_000_000,
        earliest_ns=0,
        latest_ns=10**18,
        deadline_ns=10**18 + 7,
        input_size=12,
        size_class=3,
        parent_id=69,
    ),
    m.CancelCall(5, 9),
    m.ChildReply(5, 9, child=2, code=104, reason="ValueError: 3", output_size=0, worker_id=1),
    m.ClearCache(5, 7),
    m.GetWorkerState(5, 8),
    m.WorkerWelcome(
        protocol=m.PROTOCOL_VERSION,
        session=5,
        version="0.1.0",
        host="host",
        pid=77,
        device="emulated",
        gpus=(_GPU,),
        loadable=("resnet50",),
    ),
    m.Offer(
        session=5,
        number=2,
        loadable=("digits:2", "resnet50"),
        left_out=(("digits:3", "it has no config.json"),),
    ),
    m.WorkerRefused(5, "it serves another controller"),
    m.Heartbeat(
        session=5,
        sent_ns=10**18,
        clock_offset_ns=-300,
        clock_error_ns=40_000,
        activity="preparing resnet50",
        pending=2,
        errors=1,
        dropped=0,
        preparing=1,
    ),
    m.ErrorResult(5, 6, action_type=2, code=81, reason="too late", received_ns=1, sent_ns=2),
    m.LoadModelResult(
        5,
        1,
        span=_SPAN,
        copies=12,
        batch_sizes=(1, 2),
        exec_ns=(2, 3),
        weights_ns=8,
        weights_bytes=9,
        pages=7,
        input_shape=(3, 2, 2),
        input_dtype="float32",
        output_shape=(5,),
        output_dtype="float32",
        random_weights=True,
        received_ns=1,
        sent_ns=2,
    ),
    m.UnloadModelResult(5, 2, received_ns=1, sent_ns=2),
    m.LoadWeightsResult(5, 3, span=_SPAN, received_ns=1, sent_ns=2),
    m.EvictWeightsResult(5, 4, span=_SPAN, received_ns=1, sent_ns=2),
    m.InferResult(
        5,
        6,
        copy_input=m.NO_SPAN,
        exec=_SPAN,
        copy_output=m.NO_SPAN,
        gpu_id=1,
        gpu_clock_before_mhz=1380,
        gpu_clock_mhz=1380,
        received_ns=1,
        sent_ns=2,
        output_sizes=(20, 20),
    ),
    m.ChildRequest(
        5,
        9,
        child=2,
        function="numbers.square",
        input_size=12,
        slo_ns=20_000_000,
        size_class=3,
        near="weights",
        near_child=1,
        ran_ns=300_000,
    ),
    m.ChildCancel(5, 9, 2),
    m.CallPrepared(5, 9, _SPAN),
    m.CallSuspended(5, 9, 400_000, m.Span(10**18, 10**18 + 100_000, 100_000), (2, 1)),
    m.CallResumed(5, 9),
    m.CallResult(
        5, 9, gpu_id=2, exec=_SPAN, output_sizes=(8,), children=3, received_ns=1, sent_ns=2
    ),
    m.ClearCacheResult(5, 7, received_ns=1, sent_ns=2),
    m.WorkerStateResult(5, 8, gpus=(_GPU,), models=((0, "resnet50"),), received_ns=1, sent_ns=2),
    b.RequestBundle(
        (
            m.InferRequest(request_id=9, model_id=3),
            m.InferRequest(request_id=10, model_id=3, slo_factor=1.5),
        ),
        10**18,
    ),
    b.ReplyBundle(
        (m.InferReply(9, 8, "no plan", 3, 5, 1, False), m.InferReply(10, 0, "", 3, 5, 4, True))
    ),
    b.NotTaken((9, 10), 103, "too many"),
    b.ActionBundle(
        (
            m.Infer(
                5,
                6,
                model_id=0,
                gpu_id=1,
                earliest_ns=0,
                latest_ns=10**18,
                expected_duration_ns=5_600_000,
                batch_size=4,
                request_count=3,
            ),
            m.EvictWeights(5, 4, model_id=0, gpu_id=1, earliest_ns=0, latest_ns=9),
        )
    ),
    b.ResultBundle(
        (
            m.InferResult(
                5,
                6,
                copy_input=_SPAN,
                exec=_SPAN,
                copy_output=_SPAN,
                gpu_id=1,
                gpu_clock_before_mhz=0,
                gpu_clock_mhz=0,
                received_ns=1,
                sent_ns=2,
            ),
            m.ErrorResult(5, 7, action_type=2, code=81, reason="", received_ns=0, sent_ns=0),
        )
    ),
)
_STATS = m.GpuStats(
    gpu_id=1,
    name="NVIDIA H200",
    uuid="GPU-1",
    driver="580.1",
    sm_percent=98,
    memory_percent=40,
    memory_used_bytes=2**36,
    memory_total_bytes=2**37,
    power_mw=689_000,
    energy_mj=10**12,
    temperature_c=61,
    sm_clock_mhz=1980,
    memory_clock_mhz=3201,
    throttle_reasons=4,
)
BEAT_WITH_STATS = m.Heartbeat(
    session=5,
    sent_ns=10**18,
    clock_offset_ns=-300,
    clock_error_ns=40_000,
    activity="",
    pending=0,
    errors=0,
    dropped=0,
    preparing=0,
    gpus=(_STATS,),
)

WELCOME_WITHOUT_BAD = m.WorkerWelcome(
    protocol=m.PROTOCOL_VERSION,
    session=5,
    version="0.1.0",
    host="host",
    pid=77,
    device="cuda:0",
    gpus=(_GPU,),
    loadable=("resnet50",),
    put_aside=(("bad", "it crashed"),),
)

_FUNCTION = m.FunctionInfo(
    gpu=True,
    slo_ns=50_000_000,
    limit_ns=60 * 10**9,
    max_payload_bytes=2**26,
    size_classes=4,
    idempotent=True,
)

WELCOME_WITH_FUNCTIONS = m.WorkerWelcome(
    protocol=m.PROTOCOL_VERSION,
    session=5,
    version="0.1.0",
    host="host",
    pid=77,
    device="host",
    gpus=(m.GpuInfo(0, "host", 64, 16_777_216, slots=8, host=True),),
    loadable=("numbers.square", "resnet50"),
    functions=("numbers.square",),
)

HELLO_OF_A_CLUSTER = m.ControllerHello(
    protocol=m.PROTOCOL_VERSION,
    incarnation=2**60,
    times_lost=1,
    cluster="gpu-hall-2",
    keeps_weights=True,
)

LOADED = next(example for example in EXAMPLES if isinstance(example, m.LoadModelResult))

LOADED_FUNCTION = msgspec.structs.replace(
    LOADED, batch_sizes=(1,), exec_ns=(1_000_000,), pages=0, function=_FUNCTION
)

CALL_OF_A_CLIENT = m.InferRequest(request_id=9, model_id=4, length=3, near="weights")

WELCOME_WITH_INVENTORY = m.WorkerWelcome(
    protocol=m.PROTOCOL_VERSION,
    session=5,
    version="0.1.0",
    host="host",
    pid=77,
    device="cuda:0",
    gpus=(_GPU,),
    loadable=("resnet50",),
    inventory=(
        m.Prepared(
            name="resnet50",
            runs=((3, 2), (9, 1)),
            max_batch=16,
            max_exec_ns=25_000_000,
            result=LOADED,
        ),
    ),
    incarnation=2**60,
    times_lost=1,
)

REPLY_OF_A_CASCADE = m.InferReply(
    9,
    0,
    "",
    3,
    5 * 10**9,
    2_314_000_000,
    True,
    stages=(
        m.StageReply("small", 0, 12, 10**8, 113_000_000, 2, 0.25, 0.5, 2, 1, 0),
        m.StageReply("large", 113_000_000, -1, 0, 2_314_000_000, 0, 0.25, 0.5, 4),
    ),
)

NEWS = b.ResultBundle(
    (m.CallPrepared(5, 9, _SPAN), m.CallSuspended(5, 9, 400_000), m.CallResumed(5, 9))
)

BEAT_WITH_CALLS = m.Heartbeat(
    session=5,
    sent_ns=10**18,
    clock_offset_ns=-300,
    clock_error_ns=40_000,
    pending=2,
    preparing=0,
    calls=(9, 12),
)

ERROR_OF_A_CALL = m.ErrorResult(
    5,
    9,
    action_type=7,
    code=104,
    reason="Traceback\nValueError: 3",
    received_ns=1,
    sent_ns=2,
    part=_SPAN,
)

#: By the name in the golden file.
NAMED: dict[str, m.Message] = {
    **{type(example).__name__: example for example in EXAMPLES},
    "Heartbeat with gpus": BEAT_WITH_STATS,
    "WorkerWelcome with put_aside": WELCOME_WITHOUT_BAD,
    "ControllerHello of a cluster": HELLO_OF_A_CLUSTER,
    "WorkerWelcome with inventory": WELCOME_WITH_INVENTORY,
    "InferReply of a cascade": REPLY_OF_A_CASCADE,
    "WorkerWelcome with functions": WELCOME_WITH_FUNCTIONS,
    "LoadModelResult of a function": LOADED_FUNCTION,
    "InferRequest of a call": CALL_OF_A_CLIENT,
    "ResultBundle with news of calls": NEWS,
    "Heartbeat with calls": BEAT_WITH_CALLS,
    "ErrorResult of a call": ERROR_OF_A_CALL,
}


def make_anew() -> None:
    """Write the bytes of every example."""
    golden = {name: encode(message).hex() for name, message in NAMED.items()}
    write_file(GOLDEN, json.dumps(golden, indent=1).encode() + b"\n")


if __name__ == "__main__":
    make_anew()
