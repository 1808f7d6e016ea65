"""Causes that Slurm and the host report. They count before what ranks say, because they explain it (pure).

The order is the precedence: the first cause that matches counts.
"""

from launcher.cluster.containers import PROGRAMS
from launcher.diagnose.causes.cause import MARK, RESUME, RETRY, Cause

RUNTIMES = "|".join(PROGRAMS)

HOST = (
    Cause(
        name="health_check",
        title="the health check found a bad node",
        meaning="Each node is tested before the ranks start, and one failed the test.",
        advice=(
            "the job is requeued without it, at most three times; nothing is to be done if other nodes are free",
            MARK,
        ),
        host=(r"health check: (?P<node>\S+) is bad: ",),
        bad_node=True,
    ),
    Cause(
        name="health_check_failed",
        title="the health check failed on every node",
        meaning="Something is wrong everywhere: the Python, the folder or the network. No node is to blame.",
        advice=("the reason is in the line; `logs/attempt_N/health` of the run directory has what each node said",),
        host=(r"health check failed on every node",),
    ),
    Cause(
        name="node_failure",
        title="a node failed",
        meaning="Slurm lost a node of the job, or an administrator took it down, and ended the job on all of them.",
        advice=(RESUME, MARK, "`sinfo -R` shows what the administrators say about it"),
        host=(r"srun: error: Node failure on (?P<node>\S+)", r"CANCELLED AT \S+ DUE TO NODE FAILURE"),
        states=("NODE_FAIL", "BOOT_FAIL"),
        bad_node=True,
    ),
    Cause(
        name="time_limit",
        title="the time limit was reached",
        meaning="The job was still running at its time limit. What wasn't saved is lost.",
        advice=(
            "`mixlaunch resume RUN` continues from what is saved; --time LIMIT sets another limit",
            "if it was killed while it saved, raise `signal_lead` in the profile: the warning then comes earlier",
        ),
        host=(r"CANCELLED AT \S+ DUE TO TIME LIMIT",),
        states=("TIMEOUT", "DEADLINE"),
    ),
    Cause(
        name="memory_limit",
        title="a node's memory limit was exceeded",
        meaning="On one node the job used more main memory than it had requested, and Slurm killed it.",
        advice=(
            "request more: `node.memory_gb` in the profile, or `exclusive: true` for all of a node's memory",
            "or use less: fewer ranks a node, smaller files at a time",
        ),
        host=(
            r"(?:slurmstepd-(?P<node>\S+): )?error: (?:Exceeded job memory limit|\S+ exceeded memory limit)",
            r"(?:slurmstepd-(?P<node>\S+): )?error: Detected \d+ oom[-_ ]kill event",
            r"srun: error: (?P<node>\S+): tasks? (?P<rank>\d+)\S*: Out Of Memory",
        ),
        states=("OUT_OF_MEMORY",),
    ),
    Cause(
        name="preempted",
        title="another job took its nodes",
        meaning="A job of higher priority preempted this one. That is the partition's rule, not a fault.",
        advice=(RESUME, "a partition or QoS that isn't preemptible keeps it from happening again"),
        host=(r"CANCELLED AT \S+ DUE TO (?:PREEMPTION|JOB REQUEUE)", r"Slurm says .*PreemptTime=\d"),
        states=("PREEMPTED",),
    ),
    Cause(
        name="launch_failed",
        title="Slurm couldn't start the ranks on a node",
        meaning="The step never ran there: the node's daemon, its prolog or its file systems are broken.",
        advice=(RETRY, MARK),
        host=(
            r"srun: error: Task launch for \S+ failed on node (?P<node>[^\s:]+)",
            r"srun: error: (?:Unable to resolve|Couldn't resolve|Unable to contact) \"?(?P<node>[\w.-]+)",
            r"slurmstepd(?:-(?P<node>\S+))?: error: .*(?:prolog|task_prolog).*fail",
            r"slurmstepd(?:-(?P<node>\S+))?: error: couldn't chdir to",
        ),
        bad_node=True,
    ),
    Cause(
        name="image",
        title="the container didn't start",
        meaning="Its image is missing or unreadable where the job ran, or the container runtime isn't there.",
        advice=(
            "look at `container` in the profile: image, runtime and mounts, as the compute nodes see them",
            "`mixlaunch clusters check` looks at them from the login node",
        ),
        host=(
            r"pyxis: .*(?:failed|couldn't|error)",
            r"srun: unrecognized option '--container",
            rf"execve\(\): (?:{RUNTIMES}): ",
            r"enroot.*(?:No such file|\[ERROR\])",
            r"\[ERROR\] (?:No such file or directory|Could not open|Invalid image)",
        ),
        rank=(
            r"FATAL:\s+could not open image",
            rf"(?:{RUNTIMES}): command not found",
            rf"(?:{RUNTIMES}): No such file or directory",
            r"docker: (?:Error response from daemon|Cannot connect to the Docker daemon)",
            r"Unable to find image '",
            r"could not select device driver",
        ),
    ),
    Cause(
        name="step_refused",
        title="Slurm refused to start the ranks",
        meaning="The batch script ran, but its srun step requested something that the job doesn't have.",
        advice=(
            "compare the srun line of job.sbatch with its #SBATCH lines",
            "`mixlaunch clusters check` asks Slurm",
        ),
        host=(r"srun: error: Unable to create step", r"srun: fatal: ", r"srun: unrecognized option"),
    ),
)
