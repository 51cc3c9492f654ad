#!/usr/bin/env bash
# exact_time.py on a machine where nothing is installed from this repository.
#
#   benchmarks/gpu/exact_time.sh OUT_DIR [OPTIONS of exact_time.py]
#
# PYTHONPATH must hold pyzmq, msgspec, mosec, defspec and offapi where the machine lacks them. OUT_DIR gets
# exact_time.json and exact_time.md (both after each row), exact_time.log, and logs.tgz: what the processes
# said. Rows and run directories go to WORK_DIR (default: a temporary folder, removed at the end). A second
# run goes on where the first stopped: --resume OUT_DIR/exact_time.json, or the same OUT_DIR.
set -uo pipefail
out=${1:?usage: $0 OUT_DIR [OPTIONS]}
shift
mkdir -p "$out"
here=$(cd "$(dirname "$0")" && pwd)
work=${WORK_DIR:-$(mktemp -d)}
export PYTHONUNBUFFERED=1
"${PYTHON:-python3}" "$here/exact_time.py" --out "$out" --work "$work" "$@" 2>&1 | tee "$out/exact_time.log"
code=$?
(cd "$work" && find . \( -name '*.log' -o -name 'manifest*.json' \) -size -512k -print0 |
    tar czf - --null -T -) > "$out/logs.tgz"
[ -n "${WORK_DIR:-}" ] || rm -rf "$work"
exit $code
