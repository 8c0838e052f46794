#!/usr/bin/env bash
# Llama 3 8B under the Qwen2.5 tokenizer, without training: rows by FVT (docs/zett.md). With TEXT, all ways to make rows
# are scored on it before that.
#
#   STUDENT=models/llama TARGET=tokenizers/qwen2.5 TEXT=heldout.txt bash examples/zett.sh
#
# STUDENT, TARGET: local folders in place of names on the hub. OUTPUT: the folder of the model. Words behind the script
# go to the `tokenkit zett` that writes it.
set -euo pipefail

pair=(--config zett)
[ -z "${STUDENT:-}" ] || pair+=(student="$STUDENT")
[ -z "${TARGET:-}" ] || pair+=(target="$TARGET")
output=${OUTPUT:-outputs/llama3_to_qwen2_zett}

[ -z "${TEXT:-}" ] || tokenkit zett "${pair[@]}" --compare --ppl-eval-data "$TEXT" --output "$output-scores"
exec tokenkit zett "${pair[@]}" --output "$output" "$@"
