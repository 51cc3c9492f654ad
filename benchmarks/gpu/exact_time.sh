#!/usr/bin/env bash
# exact_time.py on a machine where nothing is installed from this repository: rows.sh says how.
#
#   benchmarks/gpu/exact_time.sh OUT_DIR [OPTIONS of exact_time.py]
exec "$(dirname "$0")/rows.sh" exact_time "$@"
