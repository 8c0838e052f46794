#!/usr/bin/env bash
# Everything that only a GPU can show: correctness first, then the benchmarks of kernels.md.
#
#     bash bench/gpu_check.sh                  on a machine with a GPU, torch and triton
#     bash bench/gpu_check.sh --dry-run        on a CPU with tiny sizes: shows that every command runs
#     MODEL=NAME_OR_PATH bash bench/gpu_check.sh   adds hidden states of a trained model (needs transformers)
#
# Results: bench/results/<gpu>/*.json. PYTHON names the interpreter. Nothing is installed and no setting of
# the card is changed. With pytest the tests run under it, without it as plain functions.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

dry=
if [ "${1:-}" = "--dry-run" ]; then
    dry=yes
elif [ $# -gt 0 ]; then
    echo "gpu_check.sh: expected nothing or --dry-run, got '$1'" >&2
    exit 2
elif ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "gpu_check.sh: no CUDA device: run it on a GPU, or with --dry-run" >&2
    exit 1
fi

heads=(linear_logprob linear_divergence sorted_distance) # one benchmark each, of the same options

if [ -n "$dry" ]; then
    out=$(mktemp -d)
    trap 'rm -rf "$out"' EXIT
    "$python" -m tests.kernels.gpu_checks --dry-run
    for kernel in "${heads[@]}"; do
        "$python" "bench/$kernel.py" --device cpu --tiny --repetitions 2 --save "$out"
    done
    "$python" bench/alm_step.py --device cpu --tokens 128 --vocab 1000 --hidden 32 --repetitions 2 \
        --save "$out/alm_step.json"
    "$python" bench/chunk_likelihood.py --repetitions 2 --save "$out/chunk_likelihood.json"
    "$python" bench/memory.py --device cpu --vocab 1000 --only clm --save "$out/memory.json"
    echo "dry run passed: $(find "$out" -name '*.json' | wc -l) results were written and removed"
    exit 0
fi

unset TRITON_INTERPRET
nvidia-smi
if "$python" -c 'import pytest' 2>/dev/null; then
    "$python" -m pytest tests/kernels -q --ignore tests/kernels/test_aot.py
else
    "$python" -m tests.kernels.gpu_checks
fi
out="bench/results/$("$python" -c 'import sys; sys.path.insert(0, "bench"); from harness import folder_name; print(folder_name("cuda"))')"
for kernel in "${heads[@]}"; do
    "$python" "bench/$kernel.py" --save "$out"
done
"$python" bench/alm_step.py --tokens 8192 --hidden 4096 --repetitions 30 --save "$out/alm_step.json"
"$python" bench/chunk_likelihood.py --repetitions 30 --save "$out/chunk_likelihood.json"
"$python" bench/memory.py --tokens 4096 --hidden 512 --workspace 256 --save "$out/memory.json"
if [ -n "${MODEL:-}" ]; then
    "$python" bench/linear_logprob.py --model "$MODEL" --save "$out"
fi
for kernel in "${heads[@]}"; do
    "$python" "bench/$kernel.py" --grid --save "$out"
done
