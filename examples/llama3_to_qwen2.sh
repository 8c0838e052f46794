#!/usr/bin/env bash
# Llama 3.2 3B Instruct moves to the Qwen2.5 tokenizer and keeps its own special tokens and chat template; under its old
# tokenizer it is its own teacher. CLM and ALM, adapters and embeddings.
#
#   STUDENT=models/llama TARGET=tokenizers/qwen2.5 DATA=chats.jsonl bash examples/llama3_to_qwen2.sh
#
# STUDENT, TARGET, DATA: local folders and files in place of names on the hub. OUTPUT: where the run writes.
# GPUS: processes on this machine. Words behind the script go to `tokenkit train`: --steps 10 --dtype float32
set -euo pipefail

launch=(tokenkit train)
[ "${GPUS:-1}" = 1 ] || launch=(torchrun --nproc-per-node "$GPUS" -m tokenkit.train)

exec "${launch[@]}" --config cross_tokenizer_distill \
  name=llama3_to_qwen2 \
  student="${STUDENT:-meta-llama/Llama-3.2-3B-Instruct}" \
  target="${TARGET:-Qwen/Qwen2.5-1.5B:source=Qwen2:target=Llama3}" \
  data="${DATA:-allenai/tulu-3-sft-mixture}" \
  output="${OUTPUT:-outputs/llama3_to_qwen2}" \
  losses=[clm,alm_unconstrained] \
  alm_mode=merge_by_space_prob+append_space \
  train_model_mode=lora model_lora_rank=64 model_lora_alpha=64 \
  batch_size=64 gradient_accumulation_steps=4 \
  eval_interval=1000 save_interval=1000 \
  "$@"
