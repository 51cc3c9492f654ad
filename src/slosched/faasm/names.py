"""The commands of the seed, their switches and variables, and what each is here. Plain data.

`docs/faasm.md`, `slosched exp names`, `slosched exp --help` and the aliases of `slosched exp` are made from these
tables, and a test holds each line against what the command line does.
"""

from __future__ import annotations

#: Stands in each output.
REPLACED = (
    "Nothing here is Faasm: a wasm Faaslet is replaced by a warm slot of a worker, a Knative container by a "
    "process per instance."
)
