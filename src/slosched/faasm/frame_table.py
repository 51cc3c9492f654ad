"""Which experiments there are: `slosched exp NAME` looks up here what it runs. Nothing is imported.

To add one, write its options and its `run` (frame.py says how), and a row here.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """One experiment.

    `options` is a frozen dataclass with keywords only, whose fields are rows of the option table (options.py),
    in a module that imports nothing heavy. `module` has `run`, and `report` where tables are made apart from
    it. `published` is the folder of the original's results, `<user>_<func>`.
    """

    module: str
    options: str
    published: str
    summary: str


_ROOM = "slosched.faasm"
EXPERIMENTS = {
    "sgd": Experiment(
        module=f"{_ROOM}.sgd.run",
        options=f"{_ROOM}.sgd.options:Options",
        published="sgd_reuters_svm",
        summary="HOGWILD: a linear SVM by stochastic gradient descent, N workers on shared weights.",
    ),
    "matrices": Experiment(
        module=f"{_ROOM}.matrices.run",
        options=f"{_ROOM}.matrices.options:MatricesOptions",
        published="python_mat_mul",
        summary="Divide and conquer: a product of matrices as a graph of calls, 64 + 9 of them.",
    ),
    "inference-latency": Experiment(
        module=f"{_ROOM}.inference.latency",
        options=f"{_ROOM}.inference.options:LatencyOptions",
        published="tf_image",
        summary="MobileNet at low load, by the ratio of cold starts.",
    ),
    "inference-throughput": Experiment(
        module=f"{_ROOM}.inference.throughput",
        options=f"{_ROOM}.inference.options:ThroughputOptions",
        published="tf_image",
        summary="MobileNet under growing load: median latency against achieved throughput.",
    ),
    "coldstart": Experiment(
        module=f"{_ROOM}.coldstart.run",
        options=f"{_ROOM}.coldstart.options:ColdstartOptions",
        published="results",
        summary="The ladder of cold starts: time, CPU time, memory, and how many instances fit.",
    ),
}
