#!/usr/bin/env bash
# A benchmark of rows on a machine where nothing is installed from this repository.
#
#   benchmarks/gpu/rows.sh NAME OUT_DIR [OPTIONS of NAME.py]
#
# PYTHONPATH must hold what the machine lacks of pyzmq, msgspec, mosec, defspec and offapi. OUT_DIR gets
# NAME.json and NAME.md (both after each row), NAME.log, and logs.tgz: what the processes said. Rows and run
# directories go to WORK_DIR (default: a temporary folder, removed at the end). A second run goes on where the
# first stopped: --resume OUT_DIR/NAME.json, or the same OUT_DIR.
set -uo pipefail
name=${1:?usage: $0 NAME OUT_DIR [OPTIONS]}
out=${2:?usage: $0 NAME OUT_DIR [OPTIONS]}
shift 2
mkdir -p "$out"
here=$(cd "$(dirname "$0")" && pwd)
work=${WORK_DIR:-$(mktemp -d)}
export PYTHONUNBUFFERED=1
"${PYTHON:-python3}" "$here/$name.py" --out "$out" --work "$work" "$@" 2>&1 | tee "$out/$name.log"
code=$?
(cd "$work" && find . \( -name '*.log' -o -name 'manifest*.json' \) -size -512k -print0 |
    tar czf - --null -T -) > "$out/logs.tgz"
[ -n "${WORK_DIR:-}" ] || rm -rf "$work"
exit $code
