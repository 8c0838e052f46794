#!/usr/bin/env bash
# Several machines: the same command on each, all of them again after a crash, with another RUN_ID.
#   CONFIG=run.yaml OUTPUT=/shared/run NODES=4 HEAD=node-0 RUN_ID=run-1 bash examples/launch/many_nodes.sh
# OUTPUT lies on a disk that all see. HEAD is one of the nodes; its port (PORT) is open to the others and to
# nobody else: torch.distributed has neither passwords nor encryption.
set -euo pipefail
: "${CONFIG:?name the configuration of the run}" "${OUTPUT:?name the folder that the run writes}"
: "${NODES:?say how many machines}" "${HEAD:?name one of them}" "${RUN_ID:?a name of this start, new each time}"

# torchrun asks the name of the machine where HEAD is; with ADDRESS it is told
place=()
if [ -n "${ADDRESS:-}" ]; then
  [ "$ADDRESS" = "$HEAD" ] && here=1 || here=0
  place=(--local-addr "$ADDRESS" --rdzv-conf "is_host=$here")
fi

# no restarts of torchrun or of launch here: they lose to a node that is gone
exec python -m tokenkit.launch "$OUTPUT" -- \
  torchrun --nnodes "$NODES" --nproc-per-node "${GPUS:-gpu}" --max-restarts 0 \
  --rdzv-backend c10d --rdzv-id "$RUN_ID" --rdzv-endpoint "$HEAD:${PORT:-29400}" "${place[@]}" \
  --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 --shutdown-timeout "${GRACE:-240}" \
  -m tokenkit.train --config "$CONFIG" --output "$OUTPUT" --resume "$@"
