"""The models that Triton and slosched are asked about in conformance.py: the same, for each of the two.

`pair` adds and subtracts two inputs, `shout` writes texts in capitals, `slow` keeps its instance for SLOW_S,
and `spare` is in the repository but not loaded.
"""

from __future__ import annotations

from triton_process import Model

SLOW_S = 0.05

_PAIR = """
import numpy as np
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        responses = []
        for request in requests:
            left = pb_utils.get_input_tensor_by_name(request, "left").as_numpy()
            right = pb_utils.get_input_tensor_by_name(request, "right").as_numpy()
            found = {"sum": left + right, "difference": left - right}
            wanted = [name for name in found if name in request.requested_output_names()]
            outputs = [pb_utils.Tensor(name, found[name].astype(np.float32)) for name in wanted]
            responses.append(pb_utils.InferenceResponse(outputs))
        return responses
"""

_PAIR_CONFIG = """
name: "NAME"
backend: "python"
max_batch_size: 16
input [ { name: "left" data_type: TYPE_FP32 dims: [ 4 ] }, { name: "right" data_type: TYPE_INT32 dims: [ 4 ] } ]
output [
  { name: "sum" data_type: TYPE_FP32 dims: [ 4 ] }, { name: "difference" data_type: TYPE_FP32 dims: [ 4 ] }
]
instance_group [ { kind: KIND_CPU count: 1 } ]
dynamic_batching { }
"""

_SHOUT = """
import numpy as np
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        responses = []
        for request in requests:
            texts = pb_utils.get_input_tensor_by_name(request, "texts").as_numpy()
            loud = [each.decode().upper().encode() for each in texts.flat]
            loud = np.array(loud, object).reshape(texts.shape)
            responses.append(pb_utils.InferenceResponse([pb_utils.Tensor("loud", loud)]))
        return responses
"""

_SHOUT_CONFIG = """
name: "shout"
backend: "python"
max_batch_size: 16
input [ { name: "texts" data_type: TYPE_STRING dims: [ 2 ] } ]
output [ { name: "loud" data_type: TYPE_STRING dims: [ 2 ] } ]
instance_group [ { kind: KIND_CPU count: 1 } ]
dynamic_batching { }
"""

_SLOW = f"""
import time
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        time.sleep({SLOW_S})
        x = [pb_utils.get_input_tensor_by_name(request, "input").as_numpy() for request in requests]
        return [pb_utils.InferenceResponse([pb_utils.Tensor("output", each)]) for each in x]
"""

# A request's own timeout counts only if it is shorter than the default one; without a default none counts.
_SLOW_CONFIG = """
name: "slow"
backend: "python"
max_batch_size: 1
input [ { name: "input" data_type: TYPE_FP32 dims: [ 1 ] } ]
output [ { name: "output" data_type: TYPE_FP32 dims: [ 1 ] } ]
instance_group [ { kind: KIND_CPU count: 1 } ]
dynamic_batching {
  default_queue_policy {
    timeout_action: REJECT default_timeout_microseconds: 60000000 allow_timeout_override: true
  }
}
"""

LOADED = ("pair", "shout", "slow")
#: For Triton.
MODELS = (
    Model("pair", _PAIR_CONFIG.replace("NAME", "pair"), _PAIR),
    Model("spare", _PAIR_CONFIG.replace("NAME", "spare"), _PAIR),
    Model("shout", _SHOUT_CONFIG, _SHOUT),
    Model("slow", _SLOW_CONFIG, _SLOW),
)
