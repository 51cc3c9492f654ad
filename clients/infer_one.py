"""One blocking request with a deadline, and everything that the answer says.

Usage: python infer_one.py [host:port] [model]
"""

import sys

import numpy as np

import slosched


def main() -> int:
    address = sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:12346"
    name = sys.argv[2] if len(sys.argv) > 2 else "resnet50_v2"
    with slosched.Client(address, name="infer_one") as client:
        [model] = client.load(name)
        print(f"{model.name} takes {model.input_dtype} of shape {model.input_shape}")
        array = np.random.default_rng(0).standard_normal(model.input_shape)
        try:
            answer = client.infer(model, array.astype(model.input_dtype), slo="100ms")
        except slosched.DeadlineExceeded as refused:
            print(f"not served: {refused}")
            return 1
    if answer.output is not None:
        print(f"output of shape {answer.output.shape}, largest at {int(answer.output.argmax())}")
    print(answer.explain())
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except slosched.SloschedError as error:
        sys.exit(f"error: {error}")
