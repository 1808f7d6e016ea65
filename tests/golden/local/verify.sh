#!/bin/bash

# Made by mixlaunch; plain bash runs it. It needs only a Python with megatron_mixtral where the ranks run.
set -uo pipefail

# The run directory: everything that this run writes, and what it reads.
export MIXLAUNCH_RUN=/home/me/state/runs/verify-"$$"
attempt=0
while [ -e "$MIXLAUNCH_RUN/logs/attempt_$attempt/batch.log" ]; do attempt=$((attempt + 1)); done
export MIXLAUNCH_ATTEMPT=$attempt MIXLAUNCH_LOGS="$MIXLAUNCH_RUN/logs/attempt_$attempt"
mkdir -p "$MIXLAUNCH_LOGS" /home/me/state/models /home/me/state/data || exit 1
echo "mixlaunch: attempt $attempt logs to $MIXLAUNCH_LOGS"
exec >>"$MIXLAUNCH_LOGS/batch.log" 2>&1 </dev/null

if [ ! -e "$MIXLAUNCH_RUN/config.yaml" ]; then
  cat >"$MIXLAUNCH_RUN/config.yaml" <<'END_OF_CONFIG' || exit 1
folder: /home/me/converted
END_OF_CONFIG
fi
export OMP_NUM_THREADS=1

export WORLD_SIZE=1
# All ranks are processes of this machine. Each has its own process group, so nothing of it is left behind.
export MASTER_ADDR=127.0.0.1 MASTER_PORT=$((10000 + $$ % 20000))
while (exec 3<>"/dev/tcp/127.0.0.1/$MASTER_PORT") 2>/dev/null; do MASTER_PORT=$((MASTER_PORT + 1)); done
echo "mixlaunch: $WORLD_SIZE ranks on this machine, rendezvous at port $MASTER_PORT"

to_ranks() {
  local pid
  for pid in "${ranks[@]}"; do kill -s "$1" -- "$2$pid" 2>/dev/null; done
}

launch() {
  local rank status interrupted code=0 leave=10 ranks=()
  trap "interrupted=1; to_ranks USR2 ''" USR2
  trap "interrupted=1; code=143 leave=30" TERM INT
  set -m
  for ((rank = 0; rank < WORLD_SIZE; rank++)); do
    RANK=$rank LOCAL_RANK=$rank \
    bash -s <<'END_OF_RANK' &
# One rank. Its output goes to its log file. stdin is this script, so nothing else may read it.
set -u
export PYTHONUNBUFFERED=1
exec >>"$MIXLAUNCH_LOGS/rank_$RANK.log" 2>&1 || exit 1
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
  exec /opt/mixlaunch/bin/python -P -m megatron_mixtral verify --config "$MIXLAUNCH_RUN/config.yaml"
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
    ranks+=($!)
  done
  set +m
  while [ "$code" -eq 0 ] && [ -n "$(jobs -pr)" ]; do
    interrupted=
    wait -n
    status=$?
    [ -n "$interrupted" ] || [ "$status" -eq 127 ] || code=$status
  done
  # If a rank fails, all are ended: after ten seconds by force. After a stop signal they get thirty seconds, as in Slurm.
  [ "$code" -eq 0 ] || to_ranks TERM ""
  for ((rank = 0; rank < leave * 10; rank++)); do
    [ -n "$(jobs -pr)" ] || break
    sleep 0.1
  done
  to_ranks KILL -
  for rank in "${ranks[@]}"; do
    wait "$rank"
    status=$?
    [ "$code" -ne 0 ] || code=$status
  done
  return "$code"
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

finish() {
  echo "mixlaunch: $1; exit $code"
  exit "$code"
}
[ "$code" -ne 0 ] || finish "done"
[ "$code" -ne 2 ] || finish "a mistake in what was asked for, so not retried"
again() {
  [ -z "$ended" ] || finish "$1, but the job was told to end"
  echo "mixlaunch: $1; starting again"
  exec bash "$0"
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
