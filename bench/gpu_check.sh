#!/usr/bin/env bash
# Everything that only a GPU can show, in nine minutes: what is measured, and where it is written, says
#     python bench/gpu_check.py --help
# PYTHON names the interpreter. Arguments go on: --dry-run, --output DIR, --budget SECONDS, --stages ...
set -euo pipefail
cd "$(dirname "$0")/.."
exec "${PYTHON:-python3}" bench/gpu_check.py "$@"
