#!/usr/bin/env bash
# faasm.py on a machine where nothing is installed from this repository.
#
#   benchmarks/gpu/faasm.sh OUT_DIR [OPTIONS of faasm.py]
#
# PYTHONPATH must hold what the machine lacks of pyzmq and msgspec; numba, timm, CuPy and scikit-learn are used where
# they are. OUT_DIR gets faasm.json and faasm.md (both after each part), faasm.log, and faasm_runs.tgz: the run
# directories of all parts, without products of matrices. Runs go to WORK_DIR (default: a temporary folder, removed
# at the end). A second run goes on where the first stopped: --resume FILE, or the same OUT_DIR and WORK_DIR.
set -uo pipefail
out=${1:?usage: $0 OUT_DIR [OPTIONS]}
shift
mkdir -p "$out"
here=$(cd "$(dirname "$0")" && pwd)
work=${WORK_DIR:-$(mktemp -d)}
export PYTHONUNBUFFERED=1
"${PYTHON:-python3}" "$here/faasm.py" --out "$out" --work "$work" "$@" 2>&1 | tee "$out/faasm.log"
code=$?
(cd "$work" && find . -type f -size -4096k ! -name '*.npy' -print0 | tar czf - --null -T -) > "$out/faasm_runs.tgz"
[ -n "${WORK_DIR:-}" ] || rm -rf "$work"
exit $code
