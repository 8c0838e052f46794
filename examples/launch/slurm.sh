#!/usr/bin/env bash
# CONFIG=run.yaml OUTPUT=/shared/run sbatch --nodes 4 --gpus-per-node 8 examples/launch/slurm.sh [options of train]
#SBATCH --job-name=tokenkit
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=USR1@300
# 300 s before the time limit the steps of the job hear SIGUSR1, when it is preempted SIGTERM: the run saves and
# ends with 75. One optimizer step and one save must fit into that time, and into the GraceTime of the partition.
set -euo pipefail
: "${CONFIG:?name the configuration of the run}" "${OUTPUT:?name the folder that the run writes}"

export CONFIG OUTPUT NODES="$SLURM_JOB_NUM_NODES" GPUS="${SLURM_GPUS_ON_NODE:-gpu}"
export RUN_ID="$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}" # new after each requeue
HEAD="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
export HEAD PORT="${PORT:-29400}"

# Slurm runs a copy of this file: the other one is named from the folder where sbatch was called
code=0
srun --kill-on-bad-exit=1 bash "${LAUNCH:-$SLURM_SUBMIT_DIR/examples/launch/many_nodes.sh}" "$@" || code=$?

case "$code" in
  75) scontrol requeue "$SLURM_JOB_ID" ;; # stopped and saved: the next start goes on
  1 | 69 | 137 | 143) # a crash, a lost node: a few times
    [ "${SLURM_RESTART_COUNT:-0}" -ge "${RESTARTS:-5}" ] || scontrol requeue "$SLURM_JOB_ID" ;;
esac
exit "$code"
