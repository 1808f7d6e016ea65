"""Why runs end, as a table: the words that give a cause away, what it means and what to do about it (pure).

A cause is found by lines of the host's log (`host`) or of a rank's (`rank`), by the first exit code, or by Slurm's
state. Rows are in order of precedence: the first that fits wins. Named groups `node` and `rank` of a pattern tell
where it was. Patterns are the programs' own words.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Cause:
    """One way to end. `echo`: what a rank says when another one failed; `bad_node`: it speaks against the node."""

    name: str
    title: str
    meaning: str
    advice: tuple[str, ...]
    host: tuple[str, ...] = ()
    rank: tuple[str, ...] = ()
    codes: tuple[int, ...] = ()
    states: tuple[str, ...] = ()
    echo: bool = False
    bad_node: bool = False

    def match_host(self, line: str) -> "re.Match[str] | None":
        return _search(self.host, line)

    def match_rank(self, line: str) -> "re.Match[str] | None":
        return _search(self.rank, line)


RESUME = "`mixlaunch resume RUN` goes on from what is saved"
RETRY = "`mixlaunch retry RUN --exclude-failed` runs it again without that node"
MARK = "`mixlaunch explain RUN --mark-bad` keeps later jobs off it"
LESS_GPU_MEMORY = (
    "less on each GPU: a smaller --micro-batch or --sequence, --recompute full, or more --tp, --pp or nodes"
)

# What Slurm and the host say: it outranks what the ranks say, because it is why they say it.
HOST = (
    Cause(
        name="health_check",
        title="the health check found a bad node",
        meaning="Before the ranks started, each node was looked at; one wasn't fit to work with.",
        advice=("the job came back without it, as often as it may; nothing needs doing if others are free", MARK),
        host=(r"health check: (?P<node>\S+) is bad: ",),
        bad_node=True,
    ),
    Cause(
        name="health_check_failed",
        title="the health check failed on every node",
        meaning="What it looks at is wrong everywhere: the Python, the folder, the network. No node is to blame.",
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
        title="the time limit came",
        meaning="The job was still running when its time was up; what wasn't saved by then is lost.",
        advice=(
            "`mixlaunch resume RUN --time LIMIT` goes on from what is saved, with another limit if given",
            "if it was cut off while it saved, raise `signal_lead` in the profile: the warning comes earlier",
        ),
        host=(r"CANCELLED AT \S+ DUE TO TIME LIMIT",),
        states=("TIMEOUT", "DEADLINE"),
    ),
    Cause(
        name="memory_limit",
        title="a node's memory limit was exceeded",
        meaning="On one node the job used more main memory than it had asked for, and Slurm killed it.",
        advice=(
            "ask for more: `node.memory_gb` in the profile, or `exclusive: true` for all of a node's memory",
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
            r"execve\(\): (?:apptainer|singularity|docker|enroot): ",
            r"enroot.*(?:No such file|\[ERROR\])",
            r"\[ERROR\] (?:No such file or directory|Could not open|Invalid image)",
        ),
        rank=(
            r"FATAL:\s+could not open image",
            r"(?:apptainer|singularity|docker|enroot): command not found",
            r"(?:apptainer|singularity|docker|enroot): No such file or directory",
            r"docker: (?:Error response from daemon|Cannot connect to the Docker daemon)",
            r"Unable to find image '",
            r"could not select device driver",
        ),
    ),
    Cause(
        name="step_refused",
        title="Slurm refused to start the ranks",
        meaning="The batch script ran, and the step in it asked for something that the job hasn't got.",
        advice=(
            "compare the srun line of job.sbatch with its #SBATCH lines",
            "`mixlaunch clusters check` asks Slurm",
        ),
        host=(r"srun: error: Unable to create step", r"srun: fatal: ", r"srun: unrecognized option"),
    ),
)

# What a rank itself says.
RANK = (
    Cause(
        name="cuda_oom",
        title="a GPU's memory was full",
        meaning="torch asked for more GPU memory than was free.",
        advice=(LESS_GPU_MEMORY, "`mixlaunch plan` shows what each GPU has to hold"),
        rank=(
            r"(?:torch|cuda)\.OutOfMemoryError",
            r"CUDA out of memory",
            r"CUDA error: out of memory",
            r"CUBLAS_STATUS_ALLOC_FAILED",
            r"Cuda failure .*out of memory|Failed to CUDA (?:calloc|malloc)",
        ),
    ),
    Cause(
        name="gpu_fault",
        title="a GPU is broken",
        meaning="The device reported an error of its own: memory, NVLink, its bus or its fabric.",
        advice=(
            RETRY,
            MARK,
            "tell the administrators; `nvidia-smi -q` and `dmesg | grep -i xid` on that node show it",
        ),
        rank=(
            r"uncorrectable (?:ECC|NVLink) error",
            r"fallen off the bus",
            r"NVRM: Xid",
            r"CUDA-capable device\(s\) is/are busy or unavailable",
            r"system not yet initialized",
            r"nvidia-smi has failed because it couldn't communicate",
            r"Unable to determine the device handle for (?:GPU|gpu)",
        ),
        host=(r"NVRM: Xid",),
        bad_node=True,
    ),
    Cause(
        name="no_gpu",
        title="a rank saw no GPU",
        meaning="The driver showed it none, or one that its build of torch can't use.",
        advice=(
            "compare the profile's `gpu_request` with what the cluster wants, and the container's runtime",
            "if other nodes work, this one is at fault: " + RETRY,
        ),
        rank=(
            r"No CUDA GPUs are available",
            r"CUDA driver version is insufficient",
            r"no kernel image is available",
            r"Found no NVIDIA driver",
            r"CUDA driver initialization failed",
        ),
    ),
    Cause(
        name="shm",
        title="shared memory was full",
        meaning="/dev/shm of the node or container is too small for what the processes share.",
        advice=(
            "docker: `--ipc host` or a larger `--shm-size`; elsewhere see what else lies in /dev/shm on that node",
        ),
        rank=(
            r"insufficient shared memory \(shm\)",
            r"unable to (?:write to|open shared memory object|mmap).*torch_",
            r"/dev/shm.*No space left on device",
        ),
    ),
    Cause(
        name="disk_full",
        title="the disk was full, or a quota used up",
        meaning="A file couldn't be written for want of room.",
        advice=(
            "`df -h` and `lfs quota` or `quota -s` on the path in the lines show how much is left; make room",
            "fewer checkpoints: --keep; then " + RESUME,
        ),
        rank=(r"No space left on device", r"Disk quota exceeded", r"File too large"),
        host=(r"(?:No space left on device|Disk quota exceeded)",),
    ),
    Cause(
        name="file_system",
        title="the file system failed",
        meaning="A path that should be there gave an input/output error, went stale or is mounted read-only.",
        advice=(RETRY, "if other nodes see the path, the node's mount is at fault"),
        rank=(
            r"Input/output error",
            r"Stale file handle",
            r"Read-only file system",
            r"Transport endpoint is not connected",
        ),
        bad_node=True,
    ),
    Cause(
        name="host_memory",
        title="main memory ran out",
        meaning="A process asked for more memory than the node or its limit gives.",
        advice=(
            "more memory for the job: `node.memory_gb` in the profile, or `exclusive: true`",
            "or fewer ranks a node",
        ),
        rank=(
            r"^(?:\[rank\d+\]: )?MemoryError",
            r"DefaultCPUAllocator: (?:can't|not enough) ",
            r"Cannot allocate memory",
            r"std::bad_alloc",
        ),
    ),
    Cause(
        name="limits",
        title="a limit of the operating system was reached",
        meaning="Too many processes, threads or open files for the user on that node.",
        advice=("`ulimit -a` in a job there shows the limits; fewer workers, or ask the administrators",),
        rank=(r"Too many open files", r"Resource temporarily unavailable", r"can't start new thread"),
    ),
    Cause(
        name="port_in_use",
        title="the rendezvous port was taken",
        meaning="Rank 0 couldn't listen: another program, often what is left of an earlier job, has the port.",
        advice=("try again: the port follows from the job's id, so " + RESUME + " with another",),
        rank=(r"[Aa]ddress already in use", r"EADDRINUSE"),
    ),
    Cause(
        name="duplicate_gpu",
        title="two ranks took the same GPU",
        meaning="The ranks of a node don't each see a GPU of their own.",
        advice=("look at `gpu_request` in the profile and at what binds GPUs to tasks on this cluster",),
        rank=(r"Duplicate GPU detected",),
    ),
    Cause(
        name="network",
        title="the fabric failed",
        meaning="NCCL met an error of the network itself, not the end of another rank.",
        advice=(
            "NCCL_DEBUG=INFO in the profile's `environment` shows the interface, NCCL_SOCKET_IFNAME chooses it",
            RETRY,
        ),
        rank=(
            r"NET/IB : Got completion from peer .* with (?:error|status)",
            r"ibv_\w+ failed",
            r"Bootstrap : no socket interface found",
            r"No usable listening interface",
            r"No route to host",
        ),
        bad_node=True,
    ),
    Cause(
        name="cuda_error",
        title="a CUDA kernel failed",
        meaning="Wrong memory was touched or an assertion failed on the device, often before that line.",
        advice=(
            "CUDA_LAUNCH_BLOCKING=1 in the profile's `environment` names the right line",
            "if it only ever happens on one node, that is to blame: " + RETRY,
        ),
        rank=(
            r"illegal memory access",
            r"device-side assert",
            r"unspecified launch failure",
            r"CUBLAS_STATUS_(?:EXECUTION_FAILED|INTERNAL_ERROR)",
        ),
    ),
    Cause(
        name="import",
        title="a module is missing or doesn't load",
        meaning="The Python that the ranks run lacks something that the job needs.",
        advice=(
            "where the ranks run, `pip install 'mixlaunch[mixtral]'`; serving needs `[serve]`",
            "`python` in the profile says which Python that is, inside the container if there is one",
        ),
        rank=(
            r"ModuleNotFoundError: ",
            r": No module named ",
            r"ImportError: ",
            r"version `(?:GLIBC|CXXABI)\w*_[\d.]+' not found",
        ),
    ),
    Cause(
        name="no_python",
        title="the Python of the profile isn't there",
        meaning="The program that every rank runs doesn't exist, or may not be run, on the compute node.",
        advice=(
            "`python` in the profile is the path as the compute nodes see it, inside the container if there is one",
        ),
        rank=(
            r"line \d+: .*: No such file or directory",
            r"line \d+: .*: Permission denied",
            r"line \d+: .*: command not found",
            r"bad interpreter",
            r"Exec format error",
        ),
    ),
    Cause(
        name="diverged",
        title="the training diverged",
        meaning="Loss or gradients stopped being numbers for several steps in a row.",
        advice=("a lower --lr or a longer --warmup; look for broken documents in the data",),
        rank=(r"updates were skipped",),
    ),
    Cause(
        name="checkpoint",
        title="a checkpoint can't be used",
        meaning="It is incomplete, damaged, someone else's, or made for another model.",
        advice=(
            "the line names the file or tensor; copy or convert it again",
            "a run that resumes falls back on its newest complete checkpoint",
        ),
        rank=(
            r"error: .*(?:checkpoint|tensor \S+ (?:missing|has shape)|mixlaunch\.json|truncated, \d+ b|\.distcp)",
            r"CheckpointException|CheckpointError",
        ),
    ),
    Cause(
        name="mistake",
        title="a mistake in what was asked for",
        meaning="The job said so itself and was not retried.",
        advice=("mend what the line names, then submit again",),
        rank=(r"^error: ",),
        codes=(2,),
    ),
    # From here on: what ranks say when others are gone or slow.
    Cause(
        name="collective_timeout",
        title="ranks waited for one another until the time was up",
        meaning="A collective operation never completed: a rank hangs, is elsewhere, or its node is very slow.",
        advice=(
            "the ranks that said nothing are the ones to look at first; `mixlaunch logs RUN --rank N`",
            "on a GPU, TORCH_NCCL_TRACE_BUFFER_SIZE=2000 in `environment` records who is late",
            RESUME,
        ),
        rank=(
            r"Watchdog caught collective operation timeout",
            r"Timed out waiting \d+ms for (?:recv|send) operation",
            r"Timed out after .* waiting for",
            r"(?:client socket has timed out|connect\(\) timed out|Socket Timeout|wait timeout after \d+ms)",
            r"DistStoreError",
        ),
        echo=True,
    ),
    Cause(
        name="peer_lost",
        title="the connection to another rank broke",
        meaning="Another rank or its node went away first.",
        advice=("look at the rank that left first; " + RESUME,),
        rank=(
            r"Connection (?:closed|reset) by (?:peer|remote)",
            r"Connection reset by peer|Broken pipe|recvValue failed|Connection was likely closed",
            r"ncclRemoteError|remote process exit",
            r"DistNetworkError|DistBackendError: NCCL error|ncclSystemError|ncclInternalError",
            r"failed to recv, got 0 bytes",
            r"terminating due to (?:an? )?(?:exception|error) on (?:other|another) rank",
        ),
        echo=True,
    ),
)

# What only the first exit code tells.
EXITS = (
    Cause(
        name="requeue",
        title="it saved and asked for its place in the queue back",
        meaning="A warning came, of the time limit or of a preemption; everything is saved.",
        advice=(RESUME,),
        codes=(85,),
    ),
    Cause(
        name="killed",
        title="a rank was killed from outside (SIGKILL)",
        meaning="Most often the kernel, because the node's memory was full; else an administrator or a clean-up.",
        advice=(
            "`dmesg -T | grep -i oom` on that node tells; more memory for the job: `node.memory_gb` in the profile",
            RESUME,
        ),
        codes=(137, 9),
    ),
    Cause(
        name="crashed",
        title="a rank crashed in native code",
        meaning="SIGSEGV, SIGBUS, SIGILL, SIGFPE or an abort: a bug in a compiled library, or memory gone bad.",
        advice=(
            "PYTHONFAULTHANDLER=1 in the profile's `environment` shows where it was",
            "if it only ever happens on one node, that is to blame: " + RETRY,
        ),
        codes=(139, 135, 134, 132, 136, 11, 6, 7),
    ),
    Cause(
        name="terminated",
        title="the ranks were told to end from outside (SIGTERM)",
        meaning="Nobody left a reason: somebody's scancel, a preemption, or an administrator.",
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

# A Python exception that nothing above knows by name.
EXCEPTION = Cause(
    name="exception",
    title="an exception ended a rank",
    meaning="Its last lines say which and where.",
    advice=("the traceback names the line; if it isn't your doing, report it with the log",),
    rank=(
        r"^(?:\[rank\d+\]:\s*)?(?:[A-Za-z_][\w.]*\.)?[A-Z]\w*(?:Error|Exception|Interrupt|Exit|Warning)\b(?::|$)",
    ),
)
# Where no rank left a code of its own: srun's word on a node. After a failure it says the same of the slow ones.
NODE_LOST = Cause(
    name="node_lost",
    title="everything on a node was killed at once",
    meaning="Its ranks had no time to leave a word: the node went down, or something killed the job there.",
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
NO_OUTPUT = Cause(
    name="no_output",
    title="Slurm couldn't begin the job",
    meaning="It ended before its first line: its output file or working directory can't be opened on the node.",
    advice=("is `paths.runs` of the profile on a file system that the compute nodes see and you may write?", RETRY),
)
UNKNOWN = Cause(
    name="unknown",
    title="nobody said why",
    meaning="No line of its logs is one that mixlaunch knows.",
    advice=("the last lines are below; `mixlaunch logs RUN --rank all` has the rest",),
)


def of_rank_lines(lines: Iterable[str]) -> Iterator[tuple[int, Cause]]:
    """(place, cause) of every line that a cause knows, in the lines' order; an exception is the last resort."""
    for place, line in enumerate(lines):
        if cause := next((cause for cause in (*HOST, *RANK) if cause.match_rank(line)), None):
            yield place, cause
        elif EXCEPTION.match_rank(line):
            yield place, EXCEPTION


def of_code(code: int) -> Cause | None:
    """What a first exit code alone says."""
    return next((cause for cause in (*EXITS, *RANK) if code in cause.codes), None)


def _search(patterns: tuple[str, ...], line: str) -> "re.Match[str] | None":
    return next((match for pattern in patterns if (match := re.search(pattern, line))), None)
