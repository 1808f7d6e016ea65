"""What is in a run directory by which name, how a job ends, and what it tells on the way.

The launcher writes and reads these files, the job does too, and batch scripts read the exit codes.
"""

from typing import Literal

from megatron_mixtral.errors import InputError, Requeue

RECORD = "run.json"
CONFIG = "config.yaml"
SCRIPT = "job.sbatch"
SECRETS = "secrets.env"
EVENTS = "events.jsonl"
SERVER = "server.json"  # exists only while a server answers
LOGS = "logs"
ATTEMPT = "attempt_"  # in LOGS: attempt_N of the job's Nth start
FIRST_EXIT = "first_exit"  # in an attempt's folder: code, rank and node of whoever left first
CHECKPOINTS = "checkpoints"
MARKER = "mixlaunch.json"  # of a folder of weights: written last, so what lacks it isn't complete
LATEST = "latest_checkpointed_iteration.txt"  # what upstream Megatron reads to find a checkpoint

DONE = 0
MISTAKE = InputError.exit_code  # never tried again
REQUEUE = Requeue.exit_code  # all is saved, and the job wants its place in the queue back

EventKind = Literal["start", "load", "step", "eval", "saving", "checkpoint", "progress", "note", "ready", "exit"]
