#!/usr/bin/env bash
# sharing.py on a machine where nothing is installed from this repository: rows.sh says how.
#
#   benchmarks/gpu/sharing.sh OUT_DIR [OPTIONS of sharing.py]
exec "$(dirname "$0")/rows.sh" sharing "$@"
