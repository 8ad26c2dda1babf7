#!/bin/bash
# A run on SLURM: Ray is started on the nodes of the job, and the run on the first of them.
#
#   sbatch clusters/slurm.sh my_run.yaml checkpoint.every=10
#
# Two minutes before the time is over (or when the job is pre-empted) the run saves its last step, and the job is queued
# again; it then goes on from there. Change the sizes, and VENV, which all nodes must see.
#SBATCH --job-name=gnomon
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

: "${VENV:=$PWD/.venv}" "${PORT:=6379}"
export PATH="$VENV/bin:$PATH" RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$HOME/.gnomon-ray-token-$SLURM_JOB_ID"
(umask 077 && python -c 'import secrets; print(secrets.token_hex(32), end="")' > "$RAY_AUTH_TOKEN_PATH")

mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=$(srun --nodes=1 --ntasks=1 --nodelist="${hosts[0]}" hostname --ip-address | awk '{print $1}')

on_node() { # NODE COMMAND...: beside the batch step, until the job ends
  local node=$1
  shift
  srun --overlap --nodes=1 --ntasks=1 --nodelist="$node" "$@" &
}

on_node "${hosts[0]}" ray start --block --head --node-ip-address="$head" --port="$PORT" --include-dashboard=false
wait_for_nodes() { # NUMBER
  until [ "$(ray status --address "$head:$PORT" 2> /dev/null | grep -c '^ 1 node_')" -ge "$1" ]; do sleep 2; done
}
wait_for_nodes 1
for host in "${hosts[@]:1}"; do
  on_node "$host" ray start --block --address="$head:$PORT"
done
wait_for_nodes "${#hosts[@]}"

RAY_ADDRESS="$head:$PORT" srun --overlap --nodes=1 --ntasks=1 --nodelist="${hosts[0]}" \
  python -m engine run "$@" &
run=$!
trap 'kill -TERM "$run"; wait "$run" || true; scontrol requeue "$SLURM_JOB_ID"; exit 0' TERM
code=0
wait "$run" || code=$?
rm -f "$RAY_AUTH_TOKEN_PATH"
exit "$code"
