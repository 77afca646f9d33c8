#!/usr/bin/env bash
# The kernels with older versions of what they are built on: torch 2.11 breaks operators that torch 2.13 takes, and
# Triton 3.6 assigns registers otherwise than 3.9. Makes an environment of them and runs the kernels' tests in it.
#
#   tests/second_environment.sh          everything: operators, GPU encoder on its twins, interpreter, machine code
#   tests/second_environment.sh fast     what takes less than two minutes of one core, for continuous integration
#
# Where the environment cannot be had (no network, no space, not Linux on x86-64), says why and ends with 0.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${SECOND_ENVIRONMENT:-build/torch-2.11}
packages=(torch==2.11.0 triton==3.6.0 transformers==5.17.0 'numpy<2.4' pytest hypothesis scipy scikit-learn tqdm)

skip() {
  echo "skipped: the second environment (torch 2.11, Triton 3.6): $1"
  exit 0
}

[ "$(uname -sm)" = "Linux x86_64" ] || skip "Triton has no wheel for $(uname -sm)"
if ! "$folder/bin/python" -c 'import torch, triton, pytest; assert torch.__version__.startswith("2.11.")' 2>/dev/null; then
  mkdir -p "$(dirname "$folder")"
  [ "$(df --output=avail -k "$(dirname "$folder")" | tail -n 1)" -gt 12000000 ] || skip "it takes 12 GB of disk, with pip's files"
  rm -rf "$folder"
  python3 -m venv "$folder"
  # torch 2.11 comes with 2.5 GB of CUDA, which nothing here uses, wherever there is no index of builds without.
  timeout "${INSTALL_SECONDS:-240}" "$folder/bin/pip" install -q "${packages[@]}" 2> "$folder/pip.log" || {
    tail -n 3 "$folder/pip.log"
    rm -rf "$folder"
    skip "pip could not install ${packages[*]} in ${INSTALL_SECONDS:-240} s"
  }
fi
export OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 PYTHONPATH=$PWD HF_HUB_OFFLINE=1
run() { "$folder/bin/python" -m pytest -q -p no:cacheprovider "$@"; }
"$folder/bin/python" -c 'import torch, triton; print("torch", torch.__version__, "Triton", triton.__version__)'
if [ "${1:-}" = fast ]; then
  run tests/kernels/test_dispatch.py tests/inference/test_gpu.py
  run tests/kernels/test_machine_code.py -k "default_tiles and sm_90 and not 16- or attention or fp16_product"
  TRITON_INTERPRET=1 run tests/helpers/encoder_in_interpreter.py -k "static"
else
  run tests/kernels tests/inference/test_gpu.py
fi
