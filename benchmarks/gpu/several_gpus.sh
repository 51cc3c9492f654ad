#!/usr/bin/env bash
# several_gpus.py on a machine where nothing is installed from this repository: rows.sh says how.
#
#   benchmarks/gpu/several_gpus.sh OUT_DIR [OPTIONS of several_gpus.py]
exec "$(dirname "$0")/rows.sh" several_gpus "$@"
