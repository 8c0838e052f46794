#!/usr/bin/env bash
# Two models of different tokenizers as one: Llama 3.2 3B gets the Qwen2.5 tokenizer, rows by FVT, and is asked together
# with Qwen2.5 1.5B, whose tokenizer cuts the text. A move with training is worth more: examples/llama3_to_qwen2.sh with
# TARGET=Qwen/Qwen2.5-1.5B, then MOVED=outputs/llama3_to_qwen2 here.
#
#   PIVOT=models/qwen STUDENT=models/llama TEXT=heldout.txt bash examples/ensembles.sh
#
# PIVOT, STUDENT: local folders in place of names on the hub. TEXT: what is scored. MOVED: a model that has the pivot's
# tokenizer already. OUTPUT: where the moved model is written. Words behind the script go to `tokenkit eval-ensemble`:
# --combine-strategy mean_logits --prompts "Once upon a time"
set -euo pipefail

pivot=${PIVOT:-Qwen/Qwen2.5-1.5B}
moved=${MOVED:-${OUTPUT:-outputs/ensembles}}

[ -n "${MOVED:-}" ] || tokenkit zett student="${STUDENT:-meta-llama/Llama-3.2-3B-Instruct}" target="$pivot" --output "$moved"
exec tokenkit eval-ensemble "$pivot" "$moved" --text "${TEXT:-heldout.txt}" "$@"
