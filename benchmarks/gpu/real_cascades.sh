#!/usr/bin/env bash
# real_cascades.py on a machine where nothing is installed from this repository: rows.sh says how.
#
#   benchmarks/gpu/real_cascades.sh OUT_DIR [OPTIONS of real_cascades.py]
exec "$(dirname "$0")/rows.sh" real_cascades "$@"
