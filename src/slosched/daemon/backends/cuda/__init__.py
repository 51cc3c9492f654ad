"""One CUDA GPU: exact starts, CUDA graphs, weights in pages, copies beside inference.

    driver.py       what of CUDA is needed, as a protocol; bindings.py has it from NVIDIA's cuda-bindings
    pages.py        which pages of the weights cache hold whose weights
    program.py      one architecture that can run: torch_program.py, cupy_program.py
    device.py       the core's Device: lanes for exec (exec_lane.py) and for copies (copy_lanes.py)
    background.py   one thread for everything slow, which runs only in the slices that the loop gives it
    preparing.py    building, capturing and measuring a model, in that thread
    backend.py      all of it behind the worker's Backend protocol

Tests run the device on a driver in virtual time (tests/fake_cuda.py). docs/exact_time.md explains.
"""
