"""The four unmodified clients of Triton's Python package, behind one face, for the gateway's tests.

Each takes and gives arrays by name. BYTES are arrays of objects that are bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import tritonclient.grpc
import tritonclient.grpc.aio
import tritonclient.http
import tritonclient.http.aio
from tritonclient.utils import np_to_triton_dtype

Array = npt.NDArray[Any]
Arrays = Mapping[str, Array]
#: What the clients raise for an error answer.
Refused = tritonclient.grpc.InferenceServerException
#: An SLO (microseconds) that a loaded machine keeps.
PATIENT_US = 60_000_000
_WITHIN_S = 60.0


@dataclass(frozen=True)
class Kind:
    """One of the clients. `binary` is whether HTTP's tensors travel as bytes; in JSON otherwise."""

    protocol: str  # http or grpc
    binary: bool = True

    def __str__(self) -> str:
        return self.protocol if self.binary else f"{self.protocol}-json"

    @property
    def is_http(self) -> bool:
        return self.protocol == "http"

    def open(self, address: str, **options: Any) -> Any:
        """A blocking client of `address`; close it."""
        if self.is_http:
            options.setdefault("connection_timeout", _WITHIN_S)
            options.setdefault("network_timeout", _WITHIN_S)
            return tritonclient.http.InferenceServerClient(address, **options)
        return tritonclient.grpc.InferenceServerClient(address, **options)

    def open_async(self, address: str, **options: Any) -> Any:
        """An asynchronous client of `address`, in the running loop; await its close."""
        if self.is_http:
            options.setdefault("conn_timeout", _WITHIN_S)
            return tritonclient.http.aio.InferenceServerClient(address, **options)
        return tritonclient.grpc.aio.InferenceServerClient(address, **options)

    def inputs(self, arrays: Arrays) -> list[Any]:
        module = tritonclient.http if self.is_http else tritonclient.grpc
        found = []
        for name, array in arrays.items():
            tensor = module.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
            if self.is_http:
                tensor.set_data_from_numpy(array, binary_data=self.binary)
            else:
                tensor.set_data_from_numpy(array)
            found.append(tensor)
        return found

    def outputs(self, names: tuple[str, ...]) -> list[Any]:
        if self.is_http:
            return [
                tritonclient.http.InferRequestedOutput(name, binary_data=self.binary)
                for name in names
            ]
        return [tritonclient.grpc.InferRequestedOutput(name) for name in names]

    def ask(self, client: Any, model: str, arrays: Arrays, outputs: tuple[str, ...]) -> Arrays:
        """Infer with a blocking client. Raises Refused."""
        result = client.infer(
            model, self.inputs(arrays), outputs=self.outputs(outputs), timeout=PATIENT_US
        )
        return {name: _as_bytes(result.as_numpy(name)) for name in outputs}

    async def ask_async(
        self, client: Any, model: str, arrays: Arrays, outputs: tuple[str, ...]
    ) -> Arrays:
        """Infer with an asynchronous client. Raises Refused."""
        result = await client.infer(
            model, self.inputs(arrays), outputs=self.outputs(outputs), timeout=PATIENT_US
        )
        return {name: _as_bytes(result.as_numpy(name)) for name in outputs}


def _as_bytes(array: Array) -> Array:
    """BYTES that came in JSON are texts."""
    if array.dtype != np.object_:
        return array
    flat = [each.encode() if isinstance(each, str) else each for each in array.ravel()]
    return np.array(flat, np.object_).reshape(array.shape)


HTTP, GRPC, JSON = Kind("http"), Kind("grpc"), Kind("http", binary=False)
KINDS = (HTTP, GRPC, JSON)


def same(left: Arrays, right: Arrays) -> bool:
    """Whether both have the same names, dtypes, shapes and bytes."""
    if left.keys() != right.keys():
        return False
    for name, array in left.items():
        other = right[name]
        if (array.dtype, array.shape) != (other.dtype, other.shape):
            return False
        if array.dtype == np.object_:
            if array.tolist() != other.tolist():
                return False
        elif array.tobytes() != other.tobytes():
            return False
    return True
