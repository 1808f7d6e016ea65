#!/bin/bash
#SBATCH --job-name=finetune
#SBATCH --partition=batch
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=28
#SBATCH --gpus-per-node=8
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=04:00:00
#SBATCH --signal=B:USR2@300
#SBATCH --open-mode=append
#SBATCH --requeue

# Made by mixlaunch; plain sbatch runs it. It needs only a Python with megatron_mixtral where the ranks run.
set -uo pipefail
: "${SLURM_JOB_ID:?this script is a Slurm job: run it with sbatch}"

# The run directory: everything that this run writes, and what it reads.
export MIXLAUNCH_RUN=/lustre/fsw/mixlaunch/runs/finetune-"$SLURM_JOB_ID"
attempt=0
while [ -e "$MIXLAUNCH_RUN/logs/attempt_$attempt/batch.log" ]; do attempt=$((attempt + 1)); done
export MIXLAUNCH_ATTEMPT=$attempt MIXLAUNCH_LOGS="$MIXLAUNCH_RUN/logs/attempt_$attempt"
mkdir -p "$MIXLAUNCH_LOGS" /lustre/fsw/mixlaunch/models /lustre/fsw/mixlaunch/data || exit 1
echo "mixlaunch: attempt $attempt logs to $MIXLAUNCH_LOGS"
exec >>"$MIXLAUNCH_LOGS/batch.log" 2>&1 </dev/null

if [ ! -e "$MIXLAUNCH_RUN/config.yaml" ]; then
  cat >"$MIXLAUNCH_RUN/config.yaml" <<'END_OF_CONFIG' || exit 1
model: /lustre/fsw/mixlaunch/models/Mixtral-8x7B-v0.1-megatron
data: /lustre/fsw/mixlaunch/data/finetune
layout:
  tensor: 1
  pipeline: 4
  expert: 8
  expert_tensor: 1
  context: 1
steps: 1000
lr: 1.0e-05
END_OF_CONFIG
fi
export NCCL_DEBUG=WARN
export NCCL_IB_HCA=mlx5_0,mlx5_3,mlx5_4,mlx5_5,mlx5_6,mlx5_9,mlx5_10,mlx5_11
export NCCL_IB_TIMEOUT=22
export NCCL_IB_QPS_PER_CONNECTION=2
export NCCL_IB_SPLIT_DATA_ON_QPS=0
export NCCL_NVLS_ENABLE=0
export NCCL_SOCKET_IFNAME=ib0
export GLOO_SOCKET_IFNAME=ib0
export TORCH_NCCL_ASYNC_ERROR_HANDLING=1
export CUDA_DEVICE_MAX_CONNECTIONS=1
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
export OMP_NUM_THREADS=8

export WORLD_SIZE=32
# Rank 0 is on the first node. If its name doesn't resolve, its address in Slurm is used.
read -r MASTER_ADDR < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
if ! getent hosts "${MASTER_ADDR:?scontrol named no host of $SLURM_JOB_NODELIST}" >/dev/null; then
  MASTER_ADDR=$(scontrol --oneliner show node "$MASTER_ADDR" | grep -o "NodeAddr=[^ ]*" | cut -d = -f 2)
fi
export MASTER_ADDR="${MASTER_ADDR:?the first node has no address}"
export MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000))
echo "mixlaunch: $WORLD_SIZE ranks on $SLURM_JOB_NODELIST, rendezvous at $MASTER_ADDR:$MASTER_PORT"

launch() {
  exec srun --kill-on-bad-exit=1 --export=ALL --ntasks=32 --ntasks-per-node=8 \
    --cpus-per-task=28 \
    --cpu-bind=none \
    --container-image=/lustre/fsw/mixlaunch/images/mixlaunch.sqsh \
    --container-mounts=/lustre:/lustre \
    --no-container-mount-home \
    --container-env=MASTER_ADDR,MASTER_PORT,WORLD_SIZE,RANK,LOCAL_RANK,SLURM_PROCID,SLURM_LOCALID,SLURM_JOB_ID,MIXLAUNCH_RUN,MIXLAUNCH_LOGS,MIXLAUNCH_ATTEMPT,NCCL_DEBUG,NCCL_IB_HCA,NCCL_IB_TIMEOUT,NCCL_IB_QPS_PER_CONNECTION,NCCL_IB_SPLIT_DATA_ON_QPS,NCCL_NVLS_ENABLE,NCCL_SOCKET_IFNAME,GLOO_SOCKET_IFNAME,TORCH_NCCL_ASYNC_ERROR_HANDLING,CUDA_DEVICE_MAX_CONNECTIONS,PYTORCH_CUDA_ALLOC_CONF,OMP_NUM_THREADS \
    bash -s <<'END_OF_RANK'
# One rank. Its output goes to its log file. stdin is this script, so nothing else may read it.
set -u
export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID
export PYTHONUNBUFFERED=1
exec >>"$MIXLAUNCH_LOGS/rank_$RANK.log" 2>&1 || exit 1
export NCCL_DEBUG=WARN
export NCCL_IB_HCA=mlx5_0,mlx5_3,mlx5_4,mlx5_5,mlx5_6,mlx5_9,mlx5_10,mlx5_11
export NCCL_IB_TIMEOUT=22
export NCCL_IB_QPS_PER_CONNECTION=2
export NCCL_IB_SPLIT_DATA_ON_QPS=0
export NCCL_NVLS_ENABLE=0
export NCCL_SOCKET_IFNAME=ib0
export GLOO_SOCKET_IFNAME=ib0
export TORCH_NCCL_ASYNC_ERROR_HANDLING=1
export CUDA_DEVICE_MAX_CONNECTIONS=1
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
export OMP_NUM_THREADS=8
if [ -r "$MIXLAUNCH_RUN/secrets.env" ]; then
  set -a
  . "$MIXLAUNCH_RUN/secrets.env"
  set +a
fi
interrupted=
pass_on() { interrupted=1; kill -s "$1" "$child" 2>/dev/null; }
# USR2 is ignored until Python handles it: during start-up there is nothing to save, and the warning must not kill the rank.
# -P: modules come from the installation, never from the folder in which the job was submitted.
(
  trap "" USR2
  # Each rank is bound to the cores and the memory near its GPU.
  command -v numactl >/dev/null || { echo "mixlaunch: binding.numa needs numactl where the ranks run"; exit 2; }
  numa=( 0 0 0 0 1 1 1 1 )
  near=(numactl --cpunodebind="${numa[LOCAL_RANK]}" --membind="${numa[LOCAL_RANK]}")
  exec "${near[@]}" python -P -m megatron_mixtral finetune --config "$MIXLAUNCH_RUN/config.yaml"
) </dev/null &
child=$!
trap "pass_on USR2" USR2
trap "pass_on TERM" TERM
trap "pass_on INT" INT
while :; do
  interrupted=
  wait "$child"
  code=$?
  [ -n "$interrupted" ] || break
done
[ "$code" -eq 0 ] && exit 0
# The first rank that fails decides the job's exit code. The others are killed after it, so their codes mean nothing.
(set -C; echo "$code $RANK ${SLURMD_NODENAME:-$(uname -n)}" >"$MIXLAUNCH_LOGS/first_exit") 2>/dev/null
[ "$code" -eq 85 ] && exit 0
exit "$code"
END_OF_RANK
}

# The host waits, passes signals on to the ranks, and decides what the job's end means: 0 done, 2 the user's mistake,
# 85 saved and wants its place in the queue back, anything else a fault.
pass_on() {
  interrupted=1
  echo "mixlaunch: signal $1, passed on to the ranks"
  kill -s "$1" "$step" 2>/dev/null
}
launch &
step=$!
trap "pass_on USR2" USR2
trap "ended=1; pass_on TERM" TERM INT
ended=
while :; do
  interrupted=
  wait "$step"
  code=$?
  [ -n "$interrupted" ] || break
done
if [ -s "$MIXLAUNCH_LOGS/first_exit" ]; then
  read -r code rank node <"$MIXLAUNCH_LOGS/first_exit"
  echo "mixlaunch: rank $rank on $node was the first to leave, with $code"
elif [ -e "$MIXLAUNCH_LOGS/first_exit" ] && [ "$code" -eq 0 ]; then
  code=1 # a rank failed, and on a full disk not even that could be written
fi
# Slurm's present view of the job. Only this shows that the job is being preempted.
[ "$code" -eq 0 ] || echo "mixlaunch: Slurm says" \
  $(scontrol --oneliner show job "$SLURM_JOB_ID" | grep -oE "\b(JobState|Reason|PreemptTime)=[^ ]*")

finish() {
  echo "mixlaunch: $1; exit $code"
  exit "$code"
}
[ "$code" -ne 0 ] || finish "done"
[ "$code" -ne 2 ] || finish "a mistake in what was asked for, so not retried"
again() {
  local job
  # A job that somebody cancelled, or that Slurm preempts and requeues itself, is completing by now: requeueing it
  # would bring it back against their will. One that reached its time limit with everything saved may go on.
  job=$(scontrol --oneliner show job "$SLURM_JOB_ID" | grep -o "JobState=[A-Z_]* Reason=[^ ]*")
  case $job in
    "" | "JobState=RUNNING "* | *Reason=TimeLimit) ;;
    *) finish "$1, but the job was ended from outside" ;;
  esac
  echo "mixlaunch: $1; requeued"
  scontrol requeue "$SLURM_JOB_ID" || finish "scontrol requeue failed"
  exit "$code"
}
[ "$code" -ne 85 ] || again "everything is saved"

# A fault is worth another try while the run gets further, or has failed fewer than three times at one place.
newest_checkpoint() {
  local marker newest=none
  for marker in "$MIXLAUNCH_RUN"/checkpoints/iter_*/mixlaunch.json; do
    [ ! -e "$marker" ] || newest=$(basename "$(dirname "$marker")")
  done
  echo "$newest"
}
at=$(newest_checkpoint) last="" faults=0
[ ! -r "$MIXLAUNCH_RUN/faults" ] || read -r last faults <"$MIXLAUNCH_RUN/faults"
[ "$at" = "$last" ] || faults=0
faults=$((faults + 1))
echo "$at $faults" >"$MIXLAUNCH_RUN/faults" || finish "a fault, and faults can't be counted in $MIXLAUNCH_RUN"
[ "$faults" -lt 3 ] || finish "3 faults without a newer checkpoint than $at"
again "fault $faults with $at as the newest checkpoint"
