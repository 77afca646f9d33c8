#!/usr/bin/env bash
# Installs the lowest versions that pyproject.toml allows and runs what a model goes through: one Hessian product,
# quantize, pack, save, load, optimize; then tests of bits, layers, saved models and Hessian products. Run by hand when a
# bound changes: on most machines the oldest torch comes with several gigabytes of CUDA packages.
#
#     tests/packaging/lowest_versions.sh [VENV]     (default: a new environment, removed afterwards)
#
# PYTHON names the interpreter (default: python3), TORCH another torch, where the oldest is too large to fetch and a
# build for CPUs is at hand: TORCH=torch==2.13.0+cpu tries all bounds but its own.
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
venv=${1:-$work/venv}

"${PYTHON:-python3}" - "$root/pyproject.toml" > "$work/lowest.txt" <<'PY'
import sys
import tomllib

with open(sys.argv[1], "rb") as file:
    for requirement in tomllib.load(file)["project"]["dependencies"]:
        print(requirement.replace(">=", "==", 1))
PY
if [ -n "${TORCH:-}" ]; then
    sed -i "s/^torch==.*/$TORCH/" "$work/lowest.txt"
fi
cat "$work/lowest.txt"

"${PYTHON:-python3}" -m venv "$venv"
"$venv/bin/pip" install -q -r "$work/lowest.txt" pytest hypothesis
cd "$work"
export PYTHONPATH=$root OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
"$venv/bin/python" "$root/tests/helpers/core.py" "$work/model" "$root"
"$venv/bin/python" -m pytest -q -p no:cacheprovider --rootdir "$root" -c "$root/pyproject.toml" \
    "$root/tests/test_bits.py" "$root/tests/layers" "$root/tests/saving/test_hf.py" \
    "$root/tests/hessian/test_operator.py" "$root/tests/kernels/test_reference.py"
