#!/usr/bin/env bash
# gpu_preemption.py on a machine where nothing is installed from this repository: rows.sh says how.
#
#   benchmarks/gpu/preemption.sh OUT_DIR [OPTIONS of gpu_preemption.py]
exec "$(dirname "$0")/rows.sh" gpu_preemption "$@"
