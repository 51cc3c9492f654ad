"""The models that Triton and slosched are asked about in conformance.py: the same, for each of the two.

`pair` adds and subtracts two inputs, `shout` writes texts in capitals, `slow` keeps its instance for SLOW_S,
and `spare` is in the repository but not loaded. `types` gives back an input of each datatype, floats as FP32;
`seen` takes two inputs of any length, and `grid` gives its only one back.
"""

from __future__ import annotations

from collections.abc import Mapping

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

#: The inputs of `types`, each of a datatype.
TYPES = {
    "truth": "BOOL",
    "uint8": "UINT8",
    "int8": "INT8",
    "int16": "INT16",
    "int64": "INT64",
    "float16": "FP16",
    "float64": "FP64",
}

_TYPES = f"""
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        responses = []
        for request in requests:
            outputs = []
            for name in {[*TYPES]}:
                if f"same_{{name}}" in request.requested_output_names():
                    each = pb_utils.get_input_tensor_by_name(request, name).as_numpy()
                    each = each.astype("float32") if name.startswith("float") else each
                    outputs.append(pb_utils.Tensor(f"same_{{name}}", each))
            responses.append(pb_utils.InferenceResponse(outputs))
        return responses
"""


def _tensors(prefix: str, datatypes: Mapping[str, str]) -> str:
    return ", ".join(
        f'{{ name: "{prefix}{name}" data_type: TYPE_{datatype} dims: [ 2 ] }}'
        for name, datatype in datatypes.items()
    )


_TYPES_CONFIG = f"""
name: "types"
backend: "python"
max_batch_size: 16
input [ {_tensors("", TYPES)} ]
output [ {_tensors("same_", TYPES | {"float16": "FP32", "float64": "FP32"})} ]
instance_group [ {{ kind: KIND_CPU count: 1 }} ]
dynamic_batching {{ }}
"""

_SEEN = """
import numpy as np
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        responses = []
        for request in requests:
            ids = pb_utils.get_input_tensor_by_name(request, "ids").as_numpy()
            mask = pb_utils.get_input_tensor_by_name(request, "mask").as_numpy()
            found = {"seen": (ids * mask).cumsum(1), "shown": mask.sum(1, keepdims=True)}
            wanted = [name for name in found if name in request.requested_output_names()]
            outputs = [pb_utils.Tensor(name, found[name]) for name in wanted]
            responses.append(pb_utils.InferenceResponse(outputs))
        return responses
"""

_SEEN_CONFIG = """
name: "seen"
backend: "python"
max_batch_size: 16
input [
  { name: "ids" data_type: TYPE_INT64 dims: [ -1 ] }, { name: "mask" data_type: TYPE_INT64 dims: [ -1 ] }
]
output [
  { name: "seen" data_type: TYPE_INT64 dims: [ -1 ] }, { name: "shown" data_type: TYPE_INT64 dims: [ 1 ] }
]
instance_group [ { kind: KIND_CPU count: 1 } ]
dynamic_batching { }
"""

_GRID = """
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        x = [pb_utils.get_input_tensor_by_name(request, "input").as_numpy() for request in requests]
        return [pb_utils.InferenceResponse([pb_utils.Tensor("output", each)]) for each in x]
"""

_GRID_CONFIG = """
name: "grid"
backend: "python"
max_batch_size: 16
input [ { name: "input" data_type: TYPE_FP32 dims: [ 2, 2 ] } ]
output [ { name: "output" data_type: TYPE_FP32 dims: [ 2, 2 ] } ]
instance_group [ { kind: KIND_CPU count: 1 } ]
"""

LOADED = ("pair", "shout", "slow", "types", "seen", "grid")
#: For Triton.
MODELS = (
    Model("pair", _PAIR_CONFIG.replace("NAME", "pair"), _PAIR),
    Model("spare", _PAIR_CONFIG.replace("NAME", "spare"), _PAIR),
    Model("shout", _SHOUT_CONFIG, _SHOUT),
    Model("slow", _SLOW_CONFIG, _SLOW),
    Model("types", _TYPES_CONFIG, _TYPES),
    Model("seen", _SEEN_CONFIG, _SEEN),
    Model("grid", _GRID_CONFIG, _GRID),
)
