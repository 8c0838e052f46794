#!/usr/bin/env bash
# Llama 3.2 3B Instruct becomes a model that reads and writes bytes (docs/bytes.md): every weight is trained, the hidden
# states are compared too, each byte also feeds the longest old token that ends there, and the head is its own matrix.
# The recipe is the one that users of tokenkit in JAX know; what it is worth at this size was not measured here.
#
#   STUDENT=models/llama DATA=chats.jsonl bash examples/llama3_to_byte.sh
#
# STUDENT, DATA: a local folder and file in place of names on the hub. OUTPUT: where the run writes.
# GPUS: processes on this machine. Words behind the script go to `tokenkit train`: --steps 10 --dtype float32
set -euo pipefail

launch=(tokenkit train)
[ "${GPUS:-1}" = 1 ] || launch=(torchrun --nproc-per-node "$GPUS" -m tokenkit.train)
student=${STUDENT:-meta-llama/Llama-3.2-3B-Instruct}

exec "${launch[@]}" --config cross_tokenizer_distill \
  name=llama3_to_byte \
  student="$student" \
  target="${TARGET:-$student:conversion=byte}" \
  data="${DATA:-allenai/tulu-3-sft-mixture}" \
  output="${OUTPUT:-outputs/llama3_to_byte}" \
  losses=[clm,alm_unconstrained,alm_latents] loss_weights=null \
  multitask_aggregation_fn=approx_gradmag_preserve_mag \
  alm_mode=merge_by_space_prob+append_space \
  train_model_mode=full expand_input_ids=true output_embeddings_mode=untie \
  max_length_new=2048 optimizer.learning_rate=3e-5 \
  batch_size=64 gradient_accumulation_steps=4 \
  eval_interval=1000 save_interval=1000 \
  "$@"
