#!/usr/bin/env bash
# Everything that the serving core promises on a CUDA device, in one command (about four minutes).
#
#   benchmarks/gpu/serving_core.sh OUT_DIR
#
# Needs torch with CUDA, transformers and slosched's base packages. Leaves in OUT_DIR: doctor.txt,
# profile.toml, demo.txt (the tables), fig7.png of the real sweep and of the emulated one, and gpu.txt.
set -uo pipefail
out=${1:?usage: $0 OUT_DIR}
mkdir -p "$out"
here=$(cd "$(dirname "$0")/../.." && pwd)
export PYTHONPATH="$here/src${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
python=${PYTHON:-python3}
runs=$(mktemp -d)
failed=0
step() { echo "== $*"; "$@"; local code=$?; [ $code -eq 0 ] || { echo "== exit $code: $*"; failed=1; }; }

nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader | tee "$out/gpu.txt"
$python -c "import torch; print('torch', torch.__version__, 'CUDA', torch.version.cuda)" | tee -a "$out/gpu.txt"
step $python -m slosched doctor | tee "$out/doctor.txt"
step $python -m slosched profile resnet50 --device cuda:0 --out "$out/profile.toml"
step $python -m slosched demo --seconds "${SECONDS_EACH:-45}" --out "$runs/demo" > "$out/demo.txt" 2>&1
tail -n 60 "$out/demo.txt"
find "$runs/demo" -name '*.png' | while read -r figure; do
    cp "$figure" "$out/$(echo "${figure#"$runs/demo/"}" | tr '/' '-')"
done
grep -rhi "error\|traceback\|warning" "$runs/demo" --include='*.log' | head -20
if $python -c "import pytest" 2>/dev/null; then
    step $python -m pytest -q -p no:cacheprovider "$here/tests/test_worker_torch.py" "$here/tests/test_zoo.py"
fi
rm -rf "$runs"
exit $failed
