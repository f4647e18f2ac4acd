#!/bin/bash
# bash .trial/go.sh SECONDS [more options of trial.py]
# Trains and measures the groups of plan.json within SECONDS; results.json, log.txt and a file of weights a group go to $OUT.
cd "$(dirname "$0")"
export TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE=1
OUT="${OUT:-/tmp/trial}"
mkdir -p "$OUT"
set -o pipefail
${PYTHON:-python3} trial.py --seconds "${1:-340}" --out "$OUT" "${@:2}" 2>&1 | tee "$OUT/log.txt"
