#!/usr/bin/env bash
# preemption.py on a machine where nothing is installed from this repository: rows.sh says how.
#
#   benchmarks/gpu/preemption.sh OUT_DIR [OPTIONS of preemption.py]
exec "$(dirname "$0")/rows.sh" preemption "$@"
