#!/bin/bash
#SBATCH --job-name=serve
#SBATCH --partition=a100
#SBATCH --qos=a100multi
#SBATCH --constraint=a100_80
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=2
#SBATCH --cpus-per-task=16
#SBATCH --gres=gpu:a100:2
#SBATCH --mem=487G
#SBATCH --time=1-00:00:00
#SBATCH --signal=B:USR2@600
#SBATCH --open-mode=append
#SBATCH --requeue

# Made by mixlaunch; plain sbatch runs it. It needs only a Python with megatron_mixtral where the ranks run.
set -uo pipefail
: "${SLURM_JOB_ID:?this script is a Slurm job: run it with sbatch}"

# The run directory: everything that this run writes, and what it reads.
export MIXLAUNCH_RUN=/home/atuin/my_project/mixlaunch/runs/serve-"$SLURM_JOB_ID"
attempt=0
while [ -e "$MIXLAUNCH_RUN/logs/attempt_$attempt/batch.log" ]; do attempt=$((attempt + 1)); done
export MIXLAUNCH_ATTEMPT=$attempt MIXLAUNCH_LOGS="$MIXLAUNCH_RUN/logs/attempt_$attempt"
mkdir -p "$MIXLAUNCH_LOGS" /home/atuin/my_project/mixlaunch/models /home/atuin/my_project/mixlaunch/data || exit 1
echo "mixlaunch: attempt $attempt logs to $MIXLAUNCH_LOGS"
exec >>"$MIXLAUNCH_LOGS/batch.log" 2>&1 </dev/null

if [ ! -e "$MIXLAUNCH_RUN/config.yaml" ]; then
  cat >"$MIXLAUNCH_RUN/config.yaml" <<'END_OF_CONFIG' || exit 1
model: /home/atuin/my_project/mixlaunch/models/Mixtral-8x7B-v0.1-megatron
layout:
  tensor: 2
  pipeline: 1
  expert: 1
  expert_tensor: 2
  context: 1
host: 0.0.0.0
port: 5000
other_port: true
END_OF_CONFIG
fi

# Beyond this machine the server requires a key. It is stored only in secrets.env, which only its owner can read.
if ! grep -qs ^MIXLAUNCH_API_KEY= "$MIXLAUNCH_RUN/secrets.env"; then
  (
    umask 077
    key=$(od -An -N 24 -t x1 /dev/urandom | tr -d ' \n') && echo MIXLAUNCH_API_KEY="$key" >>"$MIXLAUNCH_RUN/secrets.env"
  ) || exit 1
fi
export NCCL_DEBUG=WARN
export NCCL_IB_TIMEOUT=22
export NCCL_SOCKET_IFNAME=ib0
export GLOO_SOCKET_IFNAME=ib0
export TORCH_NCCL_ASYNC_ERROR_HANDLING=1
export CUDA_DEVICE_MAX_CONNECTIONS=1
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
export OMP_NUM_THREADS=8

export WORLD_SIZE=2
# Rank 0 is on the first node. If its name doesn't resolve, its address in Slurm is used.
read -r MASTER_ADDR < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
if ! getent hosts "${MASTER_ADDR:?scontrol named no host of $SLURM_JOB_NODELIST}" >/dev/null; then
  MASTER_ADDR=$(scontrol --oneliner show node "$MASTER_ADDR" | grep -o "NodeAddr=[^ ]*" | cut -d = -f 2)
fi
export MASTER_ADDR="${MASTER_ADDR:?the first node has no address}"
export MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000))
echo "mixlaunch: $WORLD_SIZE ranks on $SLURM_JOB_NODELIST, rendezvous at $MASTER_ADDR:$MASTER_PORT"

launch() {
  exec srun --kill-on-bad-exit=1 --export=ALL --ntasks=2 --ntasks-per-node=2 \
    --cpus-per-task=16 \
    --cpu-bind=cores \
    --distribution=block:block \
    apptainer exec --no-home --nv \
    --bind /home/atuin/my_project:/home/atuin/my_project \
    /home/atuin/my_project/images/mixlaunch.sif \
    bash -s <<'END_OF_RANK'
# One rank. Its output goes to its log file. stdin is this script, so nothing else may read it.
set -u
export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID
export PYTHONUNBUFFERED=1
exec >>"$MIXLAUNCH_LOGS/rank_$RANK.log" 2>&1 || exit 1
export NCCL_DEBUG=WARN
export NCCL_IB_TIMEOUT=22
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
  exec python -P -m megatron_mixtral serve --config "$MIXLAUNCH_RUN/config.yaml"
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
finish "failed, and this job isn't retried"
