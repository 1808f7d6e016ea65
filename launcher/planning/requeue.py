"""The rule by which a job starts again by itself, in words and as the rest of the launcher sees it.

The rule itself is the template `requeue`. Another rule changes that and this module.
"""

import re

from launcher.planning.plan import JobPlan

# What a job's script counts in the run directory, and what a new attempt by hand makes of it.
COUNTS = {"faults": "- 0\n", "came_back": ""}
GAVE_UP = re.compile(r"(\d+ faults without a newer checkpoint than \S+);")  # in the script's last word


def when(plan: JobPlan) -> str:
    """After what the job starts again, in a few words."""
    if plan.retried:
        return "after a fault or a preemption"
    return "after a preemption" if plan.resumable and not plan.profile.is_local else "never"


def course(plan: JobPlan) -> str:
    """What the script does when something happens, in whole sentences."""
    if not plan.resumable:
        return "It runs once: a fault ends it, and it isn't queued again."
    if not plan.retried:
        return "A fault ends it; after a preemption Slurm queues it again."
    again = "starts again" if plan.profile.is_local else "asks for its place in the queue back"
    return (
        f"Near its time limit or a preemption every rank saves and leaves, and the job {again}. After a fault it "
        "does so too, while it gets further, and stops after three faults in one place. Exit codes: 0 done, 2 a "
        "mistake in what was asked for, anything else the fault's own."
    )
