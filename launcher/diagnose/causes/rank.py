"""Causes that the log of a rank reports: CUDA, NCCL, gloo, the operating system, Python, our own jobs (pure).

Rows are in order of precedence: if a log holds several causes, the first row counts. Secondary failures come last:
those that follow another rank's end.
"""

from launcher.diagnose.causes.cause import LESS_GPU_MEMORY, MARK, RESUME, RETRY, Cause

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
        meaning="The driver showed no GPU, or one that this build of torch can't use.",
        advice=(
            "compare the profile's `gpu_request` and container runtime with what the cluster needs",
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
        advice=("docker: `--ipc host` or a larger `--shm-size`; without docker, look what else is in /dev/shm",),
        rank=(
            r"insufficient shared memory \(shm\)",
            r"unable to (?:write to|open shared memory object|mmap).*torch_",
            r"/dev/shm.*No space left on device",
        ),
    ),
    Cause(
        name="disk_full",
        title="the disk was full, or a quota was used up",
        meaning="There was no room to write a file.",
        advice=(
            "`df -h` and `lfs quota` or `quota -s` on the path in the lines show how much is left; make room",
            "fewer checkpoints: --keep-checkpoints; then " + RESUME,
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
        meaning="A kernel accessed wrong memory or an assertion failed, often before the reported line.",
        advice=(
            "CUDA_LAUNCH_BLOCKING=1 in the profile's `environment` names the right line",
            "if it happens on one node only, that node is to blame: " + RETRY,
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
        meaning="The program that every rank runs doesn't exist on the compute node, or can't be executed.",
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
        meaning="Loss or gradients were NaN or infinite for several steps in a row.",
        advice=("a lower --lr or more --warmup-steps; look for broken documents in the data",),
        rank=(r"updates were skipped",),
    ),
    Cause(
        name="checkpoint",
        title="a checkpoint can't be used",
        meaning="It is incomplete, damaged, someone else's, or made for another model.",
        advice=(
            "the line names the file or tensor; copy or convert it again",
            "a resumed run uses its newest complete checkpoint",
        ),
        rank=(
            r"error: .*(?:checkpoint|tensor \S+ (?:missing|has shape)|mixlaunch\.json|truncated, \d+ b|\.distcp)",
            r"CheckpointException|CheckpointError",
        ),
    ),
    Cause(
        name="mistake",
        title="a mistake in what was asked for",
        meaning="The job reported it and was not retried.",
        advice=("correct what the line names, then submit again",),
        rank=(r"^error: ",),
        codes=(2,),
    ),
    # From here on: secondary failures, when other ranks are gone or slow.
    Cause(
        name="collective_timeout",
        title="ranks waited for each other until a time limit",
        meaning="A collective operation never completed: a rank hangs, does something else, or is very slow.",
        advice=(
            "look first at the ranks that printed nothing: `mixlaunch logs RUN --rank N`",
            "on a GPU, TORCH_NCCL_TRACE_BUFFER_SIZE=2000 in `environment` records which rank is late",
            RESUME,
        ),
        rank=(
            r"Watchdog caught collective operation timeout",
            r"Timed out waiting \d+ms for (?:recv|send) operation",
            r"Timed out after .* waiting for",
            r"(?:client socket has timed out|connect\(\) timed out|Socket Timeout|wait timeout after \d+ms)",
            r"DistStoreError",
        ),
        secondary=True,
    ),
    Cause(
        name="peer_lost",
        title="the connection to another rank broke",
        meaning="Another rank or its node failed first.",
        advice=("look at the rank that left first; " + RESUME,),
        rank=(
            r"Connection (?:closed|reset) by (?:peer|remote)",
            r"Connection reset by peer|Broken pipe|recvValue failed|Connection was likely closed",
            r"ncclRemoteError|remote process exit",
            r"DistNetworkError|DistBackendError: NCCL error|ncclSystemError|ncclInternalError",
            r"failed to recv, got 0 bytes",
            r"terminating due to (?:an? )?(?:exception|error) on (?:other|another) rank",
        ),
        secondary=True,
    ),
)
