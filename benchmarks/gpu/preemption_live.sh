#!/usr/bin/env bash
# preemption_live.py on a machine where nothing is installed from this repository: rows.sh says how.
#
#   benchmarks/gpu/preemption_live.sh OUT_DIR [OPTIONS of preemption_live.py]
exec "$(dirname "$0")/rows.sh" preemption_live "$@"
