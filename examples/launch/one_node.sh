#!/usr/bin/env bash
# All GPUs of this machine: CONFIG=run.yaml OUTPUT=run bash examples/launch/one_node.sh [options of train]
# A crash is started again, at most RESTARTS times; the exit code is the run's own.
set -euo pipefail
: "${CONFIG:?name the configuration of the run}" "${OUTPUT:?name the folder that the run writes}"

exec python -m tokenkit.launch "$OUTPUT" --restarts "${RESTARTS:-5}" -- \
  torchrun --standalone --nproc-per-node "${GPUS:-gpu}" --max-restarts 0 \
  --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 --shutdown-timeout "${GRACE:-240}" \
  -m tokenkit.train --config "$CONFIG" --output "$OUTPUT" --resume "$@"
