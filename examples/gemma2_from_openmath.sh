#!/usr/bin/env bash
# Gemma 2 2B keeps its tokenizer and learns from a larger model with another one: OpenMath2, a Llama 3.1 8B trained on
# mathematics, on the problems that it was trained on. The loss is on the solutions.
#
#   STUDENT=models/gemma TEACHER=models/openmath DATA=problems.jsonl bash examples/gemma2_from_openmath.sh
#
# STUDENT, TEACHER, DATA: local folders and files in place of names on the hub; rows of DATA have `prompt` and
# `completion`, or `problem` and `generated_solution` with
#   data.text_template='{problem}
# {generated_solution}'
# OUTPUT: where the run writes. GPUS: processes on this machine. Words behind the script go to `tokenkit train`.
set -euo pipefail

launch=(tokenkit train)
[ "${GPUS:-1}" = 1 ] || launch=(torchrun --nproc-per-node "$GPUS" -m tokenkit.train)
rows=()
[ -n "${DATA:-}" ] || rows=(--data.text-template $'{problem}\n{generated_solution}' --data.streaming)

exec "${launch[@]}" --config cross_tokenizer_distill \
  name=gemma2_from_openmath \
  student="${STUDENT:-google/gemma-2-2b-it}" \
  teacher="${TEACHER:-nvidia/OpenMath2-Llama3.1-8B}" \
  target=null \
  data="${DATA:-nvidia/OpenMathInstruct-2}" \
  output="${OUTPUT:-outputs/gemma2_from_openmath}" \
  losses=[clm,alm_unconstrained] \
  alm_mode=merge_by_space_prob+append_space \
  max_length_teacher=1024 max_length_new=1024 \
  batch_size=64 gradient_accumulation_steps=4 \
  eval_interval=1000 save_interval=1000 \
  "${rows[@]}" "$@"
