#!/usr/bin/env bash
# A session on a lent GPU; results are appended to $OUT as they come: session.log, results.jsonl, tiles.json, qat.md.
#
#   CALL=1 SECONDS_LEFT=330 bash experiments/bench/gpu_session.sh      facts, exactness, first numbers
#   CALL=2 SECONDS_LEFT=420 bash experiments/bench/gpu_session.sh      exactness, tuning, all numbers, memory checks, KD-QAT
#
# .gpu/ (made by gpu_prefill.py) travels along: Triton's cache, made of the same commit; a model and SST-2 for KD-QAT.
# QBERT_GPU_SESSION=dry tries everything but the GPU, in seconds.
set -uo pipefail
cd "$(dirname "$0")/../.."
: "${OUT:=$PWD/outputs/gpu_session}" "${CALL:=1}" "${SECONDS_LEFT:=330}" "${QBERT_CARRIED:=$PWD/.gpu}"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
# The group files of the carried cache hold absolute paths: it must lie where it was made.
: "${PYTHON:=python3}" "${TRITON_CACHE_DIR:=$(cat "$QBERT_CARRIED/triton_cache_dir" 2>/dev/null || echo "$scratch/triton")}"
mkdir -p "$OUT" "$TRITON_CACHE_DIR"
export PATH=$PATH:/usr/local/cuda/bin
export OUT QBERT_CARRIED TRITON_CACHE_DIR PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1
export PYTHONPATH=$PWD:$PWD/experiments:$PWD/experiments/bench${PYTHONPATH:+:$PYTHONPATH}
export TRITON_STORE_BINARY_ONLY=1  # as where the cache was filled
export QBERT_TILES=${QBERT_TILES:-$OUT/tiles.json} QBERT_CACHE=$scratch/qbert QBERT_TRACEBACK=1
export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}
export TORCHINDUCTOR_CACHE_DIR=$scratch/inductor TORCHINDUCTOR_COMPILE_THREADS=14
{
  date -u
  command -v nvidia-smi gcc nvcc compute-sanitizer
  nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm,clocks.mem,power.limit --format=csv,noheader
  if [ -f "$QBERT_CARRIED/triton_cache.tar.xz" ]; then
    tar -xJf "$QBERT_CARRIED/triton_cache.tar.xz" -C "$TRITON_CACHE_DIR" ||
      "$PYTHON" -m tarfile -e "$QBERT_CARRIED/triton_cache.tar.xz" "$TRITON_CACHE_DIR"
    echo "$(find "$TRITON_CACHE_DIR" -name '*.cubin' | wc -l) kernels in Triton's cache"
    export QBERT_TRITON_KEY=$(cat "$QBERT_CARRIED/triton_key")
  fi
  # A tuned table of an earlier call.
  [ -f "$QBERT_CARRIED/tiles.json" ] && cp -n "$QBERT_CARRIED/tiles.json" "$QBERT_TILES"
  "$PYTHON" experiments/bench/gpu_session.py "$CALL" "$SECONDS_LEFT"
  echo "-- summary"
  grep -hE "FAIL|EXACTNESS|EXCEPTION|ended with" "$OUT/session.log" | tail -n 40 | cut -c1-300
  grep -hE "^(BERT|MiniLM).* us " "$OUT/session.log" | tail -n 12 | cut -c1-700
} 2>&1 | tee -a "$OUT/session.log"
