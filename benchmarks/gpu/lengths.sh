#!/usr/bin/env bash
# lengths.py on a machine where nothing is installed from this repository: PYTHONPATH must hold pyzmq and msgspec.
#
#   benchmarks/gpu/lengths.sh OUT_DIR [OPTIONS of lengths.py]
out=${1:?usage: $0 OUT_DIR [OPTIONS]}
shift
mkdir -p "$out"
exec "${PYTHON:-python3}" "$(dirname "$0")/lengths.py" --out "$out" "$@" 2>&1 | tee "$out/lengths.log"
