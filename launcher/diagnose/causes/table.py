"""All causes: those of the host, those of ranks, those of an exit code alone, and those of a run that says nothing.

A cause is found by a line of the host's log or of a rank's, by the first exit code, or by Slurm's state. Patterns
are the programs' own words.
"""

from collections.abc import Iterable, Iterator

from launcher.diagnose.causes.cause import MARK, RESUME, RETRY, Cause
from launcher.diagnose.causes.host import HOST
from launcher.diagnose.causes.rank import RANK
from megatron_mixtral.spec import rundir

# What only the first exit code says.
EXITS = (
    Cause(
        name="requeue",
        title="it saved and asked to be requeued",
        meaning="The job was warned of its time limit or of a preemption, and saved everything.",
        advice=(RESUME,),
        codes=(rundir.REQUEUE,),
    ),
    Cause(
        name="killed",
        title="a rank was killed from outside (SIGKILL)",
        meaning="Most often the kernel, because the node's memory was full; else an administrator or a script.",
        advice=(
            "`dmesg -T | grep -i oom` on that node tells; more memory for the job: `node.memory_gb` in the profile",
            RESUME,
        ),
        codes=(137, 9),
    ),
    Cause(
        name="crashed",
        title="a rank crashed in native code",
        meaning="SIGSEGV, SIGBUS, SIGILL, SIGFPE or an abort: a bug in a compiled library, or bad memory.",
        advice=(
            "PYTHONFAULTHANDLER=1 in the profile's `environment` shows where it happened",
            "if it happens on one node only, that node is to blame: " + RETRY,
        ),
        codes=(139, 135, 134, 132, 136, 11, 6, 7),
    ),
    Cause(
        name="terminated",
        title="the ranks were told to end from outside (SIGTERM)",
        meaning="No reason was recorded. It can be an scancel, a preemption, or an administrator.",
        advice=(RESUME, "`sacct -j ID -o state,end,reason` may know more"),
        codes=(143, 15),
    ),
    Cause(
        name="interrupted",
        title="the ranks were interrupted",
        meaning="SIGINT: a Ctrl-C where the job was started.",
        advice=(RESUME,),
        codes=(130,),
    ),
)

# A Python exception that no other cause matches.
EXCEPTION = Cause(
    name="exception",
    title="an exception ended a rank",
    meaning="The last lines of the log show the exception and its place.",
    advice=("the traceback names the line; if the error isn't yours, report it with the log",),
    rank=(
        r"^(?:\[rank\d+\]:\s*)?(?:[A-Za-z_][\w.]*\.)?[A-Z]\w*(?:Error|Exception|Interrupt|Exit|Warning)\b(?::|$)",
    ),
)
# srun says this of a node where no rank left a code of its own. After a failure it also says so of slow ranks.
NODE_LOST = Cause(
    name="node_lost",
    title="everything on a node was killed at once",
    meaning="Its ranks had no time to print anything: the node went down, or something killed the job there.",
    advice=(RETRY, MARK, "`sinfo -R` and the node's own log may say what happened"),
    host=(r"srun: error: (?P<node>\S+): tasks? (?P<rank>\d+)\S*: Killed",),
    bad_node=True,
)
CANCELLED = Cause(
    name="cancelled",
    title="it was cancelled",
    meaning="Somebody ended it on purpose.",
    advice=(RESUME,),
    states=("CANCELLED",),
)
SCRIPT_KILLED = Cause(
    name="script_killed",
    title="the batch script was killed",
    meaning="It had no time to print its end: it got a SIGKILL, or its machine went down.",
    advice=(RESUME, "`dmesg -T` on that machine may show that memory was full, and `last -x` a restart"),
)
NO_OUTPUT = Cause(
    name="no_output",
    title="Slurm couldn't begin the job",
    meaning="It ended before its first line: its output file or working directory can't be opened on the node.",
    advice=("is `paths.runs` of the profile on a file system that the compute nodes see and you may write?", RETRY),
)
UNKNOWN = Cause(
    name="unknown",
    title="no cause was found",
    meaning="mixlaunch knows no line of its logs.",
    advice=("the last lines are below; `mixlaunch logs RUN --rank all` has the rest",),
)


def of_rank_lines(lines: Iterable[str]) -> Iterator[tuple[int, Cause]]:
    """(index, cause) of every line that matches a cause, in order; a plain exception counts only if nothing else
    matches.
    """
    for place, line in enumerate(lines):
        if cause := next((cause for cause in (*HOST, *RANK) if cause.match_rank(line)), None):
            yield place, cause
        elif EXCEPTION.match_rank(line):
            yield place, EXCEPTION


def of_code(code: int) -> Cause | None:
    """The cause that the first exit code alone shows."""
    return next((cause for cause in (*EXITS, *RANK) if code in cause.codes), None)
