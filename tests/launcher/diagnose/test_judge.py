"""Why an attempt ended, judged from logs: those recorded on a real Slurm, and lines of GPUs that are quoted.

A recording is the `logs` folder of a run of two ranks a node, in one file; paths are made up, the rest is not.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import pytest

from launcher.cli.main import cli
from launcher.diagnose import evidence, judge
from launcher.diagnose.causes import table
from launcher.diagnose.causes.cause import Cause
from launcher.runs import logs
from launcher.runs.record import Run
from launcher.runs.states import State
from launcher.slurm import reasons

FAILURES = Path(__file__).parent / "failures"


@dataclass(frozen=True, kw_only=True)
class Expected:
    """The verdict of one recording, its last attempt judged with Slurm's `state`."""

    cause: str
    state: str = "FAILED"
    attempt: int = 0
    rank: int | None = None
    nodes: tuple[str, ...] = ()
    code: int | None = 1
    secondary: tuple[int, ...] = ()
    silent: tuple[int, ...] = ()
    bad: tuple[str, ...] = ()
    says: str = ""


RECORDED = {
    "killed": Expected(cause="killed", rank=2, nodes=("sandbox1",), code=137, says="Killed"),
    "crashed": Expected(cause="crashed", rank=1, nodes=("sandbox2",), code=139, says="Segmentation fault"),
    "exception": Expected(cause="exception", rank=3, nodes=("sandbox1",), says="ValueError: rope_theta must be"),
    "mistake": Expected(cause="mistake", rank=0, nodes=("sandbox2",), code=2, says="error: data: /nowhere.idx"),
    "no_python": Expected(cause="no_python", rank=2, nodes=("sandbox1",), code=127, says="/nowhere/bin/python"),
    "no_module": Expected(cause="import", rank=2, nodes=("sandbox1",), says="No module named megatron_mixtral"),
    "file_too_large": Expected(cause="disk_full", rank=1, nodes=("sandbox0",), says="File too large"),
    "disk_full": Expected(cause="disk_full", rank=1, nodes=("sandbox0",), says="No space left on device"),
    "memory_error": Expected(cause="host_memory", rank=2, nodes=("sandbox1",), says="MemoryError"),
    "peer_killed": Expected(cause="killed", rank=2, nodes=("sandbox3",), code=137, secondary=(1, 3), says="Killed"),
    "peer_raised": Expected(
        cause="exception", rank=2, nodes=("sandbox1",), secondary=(0, 1, 3), says="a tensor is misshapen"
    ),
    "peer_hangs": Expected(
        cause="collective_timeout", rank=2, nodes=("sandbox3",), secondary=(0, 1, 3), silent=(2,), says="Timed out"
    ),
    "time_limit": Expected(cause="time_limit", state="TIMEOUT", code=143, says="DUE TO TIME LIMIT"),
    "memory_limit": Expected(
        cause="memory_limit", nodes=("sandbox2",), code=137, says=r"exceeded memory limit \(1221402624 > 1073741824"
    ),
    "node_failure": Expected(
        cause="node_failure",
        state="NODE_FAIL",
        nodes=("sandbox3",),
        bad=("sandbox3",),
        code=143,
        says="Node failure on sandbox3",
    ),
    "node_failure_requeued": Expected(
        cause="cancelled", state="CANCELLED", attempt=1, code=143, says="CANCELLED AT"
    ),
    "node_lost": Expected(
        cause="node_lost", rank=2, nodes=("sandbox1",), bad=("sandbox1",), code=143, says="tasks 2-3: Killed"
    ),
    "preempted": Expected(cause="preempted", code=143, says="PreemptTime="),
    "no_pyxis": Expected(cause="image", code=255, says="unrecognized option '--container-image"),
    "no_apptainer": Expected(cause="image", code=2, says="apptainer: No such file or directory"),
    "health_check": Expected(
        cause="health_check", state="", nodes=("sandbox1",), bad=("sandbox1",), code=None, says="sandbox1 is bad"
    ),
}


@pytest.fixture
def recorded(tmp_path):
    """Unpack a recording; the run and its evidence by attempt."""

    def unpack(name: str) -> Run:
        parts = re.split(r"^==> (\S+) <==\n", (FAILURES / f"{name}.txt").read_text(), flags=re.M)[1:]
        for path, text in zip(parts[::2], parts[1::2], strict=True):
            file = tmp_path / "logs" / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        return Run(path=tmp_path, record={"tasks_per_node": 2, "jobs": ["1"]})

    return unpack


def judged(run: Run, attempt: int, state: str = "") -> judge.Finding | None:
    told = State(state=state, source="slurm") if state else None
    return judge.judge(evidence.of_attempt(run, attempt, told))


@pytest.mark.parametrize("name", RECORDED)
def test_what_really_happened_is_found(recorded, name):
    expected = RECORDED[name]
    run = recorded(name)
    assert logs.attempts(run.path)[-1] >= expected.attempt
    found = judged(run, expected.attempt, expected.state)
    assert (found.cause.name, found.rank, found.nodes) == (expected.cause, expected.rank, expected.nodes)
    assert (found.secondary, found.silent, found.bad_nodes) == (expected.secondary, expected.silent, expected.bad)
    assert found.code == expected.code
    assert re.search(expected.says, "\n".join(line.text for line in found.lines))
    for line in found.lines:
        assert line.log.is_file()
        assert line.text in line.log.read_text().splitlines()[line.number - 1]


def test_every_recording_is_judged():
    assert {path.stem for path in FAILURES.glob("*.txt")} == RECORDED.keys()


def test_attempts_are_judged_apart(recorded):
    """One lost a node and came back, the next was cancelled: Slurm wrote both ends into one file."""
    run = recorded("node_failure_requeued")
    found = judged(run, 0)
    assert (found.cause.name, found.bad_nodes) == ("node_failure", ("sandbox3",))
    assert all("12:46:35" in line.text or "Node failure" in line.text for line in found.lines)
    assert all("12:46:48" in line.text for line in judged(run, 1, "CANCELLED").lines)


def test_an_attempt_that_did_its_work_has_no_cause(recorded):
    assert judged(recorded("health_check"), 1) is None


def test_the_rank_that_left_first_isnt_blamed_for_what_another_began(recorded):
    """The step was killed for the memory of sandbox2's ranks, and one of sandbox3 was quicker to leave."""
    found = judged(recorded("memory_limit"), 0, "FAILED")
    assert found.first_rank == 3
    assert found.nodes == ("sandbox2",)


@pytest.fixture
def attempt(tmp_path):
    """An attempt of two nodes with two ranks each, from the texts of its logs."""

    def make(ranks: dict[int, str], first: str = "", host: str = "", state: str = "FAILED") -> judge.Finding:
        folder = tmp_path / "logs" / "attempt_0"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "batch.log").write_text(f"mixlaunch: 4 ranks on gpu[07-08], rendezvous at 10.0.0.7:20001\n{host}")
        for rank in range(4):
            (folder / f"rank_{rank}.log").write_text(ranks.get(rank, ""))
        if first:
            (folder / "first_exit").write_text(first)
        return judged(Run(path=tmp_path, record={"tasks_per_node": 2, "jobs": []}), 0, state)

    return make


# Of programs that nobody runs here: the lines that they print, as their users quote them.
QUOTED = {
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.1 "
    "GiB of which 1.20 GiB is free.": "cuda_oom",
    "torch.cuda.OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 MiB": "cuda_oom",
    "RuntimeError: CUDA error: out of memory": "cuda_oom",
    "Cuda failure 'out of memory'": "cuda_oom",
    "RuntimeError: CUDA error: uncorrectable ECC error encountered": "gpu_fault",
    "RuntimeError: CUDA error: CUDA-capable device(s) is/are busy or unavailable": "gpu_fault",
    "NVRM: Xid (PCI:0000:3b:00): 79, GPU has fallen off the bus.": "gpu_fault",
    "RuntimeError: Unexpected error from cudaGetDeviceCount(). Error 802: system not yet initialized": "gpu_fault",
    "RuntimeError: No CUDA GPUs are available": "no_gpu",
    "RuntimeError: Found no NVIDIA driver on your system.": "no_gpu",
    "CUDA error: no kernel image is available for execution on the device": "no_gpu",
    "RuntimeError: CUDA error: an illegal memory access was encountered": "cuda_error",
    "RuntimeError: CUDA error: device-side assert triggered": "cuda_error",
    "ERROR: Unexpected bus error in worker. This might be caused by insufficient shared memory (shm).": ("shm"),
    "OSError: [Errno 122] Disk quota exceeded": "disk_full",
    "OSError: [Errno 116] Stale file handle: '/lustre/data/d.bin'": "file_system",
    "OSError: [Errno 5] Input/output error": "file_system",
    "OSError: [Errno 24] Too many open files": "limits",
    "RuntimeError: The server socket has failed to listen on any local network address. port: 20001, code: -98, "
    "name: EADDRINUSE, message: address already in use": "port_in_use",
    "ncclInvalidUsage: Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 3b000": "duplicate_gpu",
    "gpu07:991:1203 [0] transport/net_ib.cc:295 NCCL WARN NET/IB : Got completion from peer 10.0.0.8<40123> with "
    "status=12 opcode=0 len=0 vendor err 129": "network",
    "NCCL WARN Bootstrap : no socket interface found": "network",
    "ImportError: libcudart.so.12: cannot open shared object file: No such file or directory": "import",
    "ModuleNotFoundError: No module named 'megatron'": "import",
    "error: /runs/r/checkpoints/iter_0000100: tensor output_layer.weight missing (1 in all)": "checkpoint",
    "error: step 40: loss nan, gradient norm nan: the last 10 updates were skipped": "diverged",
    "FATAL:   could not open image /images/mixlaunch.sif: failed to retrieve path": "image",
    "docker: Cannot connect to the Docker daemon at unix:///var/run/docker.sock.": "image",
    "[rank0]:[E1 ProcessGroupNCCL.cpp:629] [Rank 0] Watchdog caught collective operation timeout: WorkNCCL("
    "SeqNum=12, OpType=ALLREDUCE, Timeout(ms)=600000) ran for 600009 milliseconds.": "collective_timeout",
    "torch.distributed.DistBackendError: NCCL error in: ProcessGroupNCCL.cpp:1970, remote process exited or there "
    "was a network error": "peer_lost",
    "RuntimeError: [gloo/transport/tcp/pair.cc:553] Connection closed by peer [10.0.0.8]:49872.": "peer_lost",
    "json.decoder.JSONDecodeError: Expecting value: line 1 column 1 (char 0)": "exception",
    "AssertionError": "exception",
}


@pytest.mark.parametrize(("line", "cause"), QUOTED.items())
def test_a_line_tells_its_cause(line, cause):
    [(place, found)] = table.of_rank_lines([line])
    assert (place, found.name) == (0, cause)


HOST = {
    "slurmstepd: error: Detected 1 oom-kill event(s) in StepId=9.0. Some of your processes may have been killed": (
        "memory_limit",
        None,
        (),
    ),
    "srun: error: gpu08: task 3: Out Of Memory": ("memory_limit", 3, ("gpu08",)),
    "srun: error: Task launch for StepId=9.0 failed on node gpu08: Communication connection failure": (
        "launch_failed",
        None,
        ("gpu08",),
    ),
    "slurmstepd: error: *** STEP 9.0 ON gpu07 CANCELLED AT 2026-01-01T10:00:00 DUE TO PREEMPTION ***": (
        "preempted",
        None,
        (),
    ),
    "slurmstepd: error: pyxis: container start failed with error code: 1": ("image", None, ()),
    "srun: error: Unable to create step for job 9: Invalid generic resource (gres) specification": (
        "step_refused",
        None,
        (),
    ),
}


@pytest.mark.parametrize(("line", "expected"), HOST.items())
def test_the_host_outranks_a_rank_that_was_killed(attempt, line, expected):
    found = attempt({}, first="137 1 gpu07", host=line)
    assert (found.cause.name, found.rank, found.nodes) == expected


LOST = "RuntimeError: Connection closed by peer [10.0.0.8]:49872"


def test_a_node_whose_ranks_all_fell_silent_is_to_blame(attempt):
    found = attempt({0: LOST, 1: LOST}, first="1 0 gpu07")
    assert (found.cause.name, found.rank, found.silent) == ("peer_lost", 2, (2, 3))
    assert found.bad_nodes == ("gpu08",)
    assert found.notes == ("rank 0 on gpu07 left first, with exit code 1, but it isn't the cause",)


def test_one_silent_rank_speaks_against_no_node(attempt):
    found = attempt({0: LOST, 1: LOST, 2: LOST}, first="1 0 gpu07")
    assert (found.rank, found.nodes, found.bad_nodes) == (3, ("gpu08",), ())


def test_a_rank_with_a_cause_of_its_own_is_the_root(attempt):
    """It wasn't the first to leave: the others noticed its end before it had ended."""
    found = attempt({0: LOST, 1: LOST, 3: "torch.OutOfMemoryError: CUDA out of memory."}, first="1 0 gpu07")
    assert (found.cause.name, found.rank, found.nodes, found.secondary) == ("cuda_oom", 3, ("gpu08",), (0, 1))


def test_a_rank_that_failed_before_the_time_limit_is_the_cause(attempt):
    limit = "slurmstepd: error: *** STEP 9.0 ON gpu07 CANCELLED AT 2026-01-01T10:00:00 DUE TO TIME LIMIT ***"
    found = attempt({1: "OSError: [Errno 122] Disk quota exceeded"}, first="1 1 gpu07", host=limit)
    assert found.cause.name == "disk_full"
    assert attempt({1: LOST}, first="143 1 gpu07", host=limit).cause.name == "time_limit"


def test_a_code_that_bash_lost_is_that_of_its_signal(attempt):
    killed = "srun: error: gpu08: tasks 2-3: Killed\n"
    found = attempt({}, first="-1 0 gpu07", host=killed)
    assert (found.cause.name, found.nodes, found.code) == ("node_lost", ("gpu08",), 143)


def test_what_was_survived_isnt_the_cause(attempt):
    steps = "".join(f"step {n}\n" for n in range(300))
    found = attempt({1: f"OSError: [Errno 28] No space left on device\n{steps}"}, first="139 1 gpu07")
    assert found.cause.name == "crashed"


def test_what_nobody_knows_is_called_unknown_and_shown(attempt):
    found = attempt({1: "so long\n"}, first="7777 1 gpu07")
    assert (found.cause.name, [line.text for line in found.lines]) == ("unknown", ["so long"])


def test_a_job_that_never_began(tmp_path):
    run = Run(path=tmp_path, record={"tasks_per_node": 2, "jobs": ["1"]})
    found = judge.judge(evidence.of_attempt(run, None, State(state="FAILED", source="slurm")))
    assert found.cause.name == "no_output"


def test_ranks_that_were_told_to_leave_speak_against_no_node(attempt):
    found = attempt({}, first="143 3 gpu08")
    assert (found.cause.name, found.rank, found.nodes, found.first_rank) == ("terminated", None, (), 3)


def test_a_run_that_gave_up_says_so(attempt):
    found = attempt(
        {1: "ValueError: x"},
        first="1 1 gpu07",
        host="mixlaunch: 3 faults without a newer checkpoint than iter_0000100; exit 1\n",
    )
    assert found.notes == ("not tried again: 3 faults without a newer checkpoint than iter_0000100",)


def test_of_a_traceback_the_last_frame_of_ones_own_and_the_last_of_all_are_shown(recorded):
    found = judged(recorded("peer_hangs"), 0, "FAILED")
    files = [line.text for line in found.lines if 'File "' in line.text]
    assert "/shared/train.py" in files[0]
    assert "distributed_c10d.py" in files[-1]
    assert len(files) == 2


def test_long_logs_are_read_from_their_end(attempt, tmp_path):
    noise = "x" * 99 + "\n"
    found = attempt({1: noise * 5000 + "ValueError: at the end\n"}, first="1 1 gpu07")
    assert found.lines[0].number == 5001


ALL = (
    *table.HOST,
    *table.RANK,
    *table.EXITS,
    table.EXCEPTION,
    table.NODE_LOST,
    table.CANCELLED,
    table.SCRIPT_KILLED,
    table.NO_OUTPUT,
)


@pytest.mark.parametrize("cause", ALL, ids=lambda cause: cause.name)
def test_every_cause_says_what_it_means_and_what_to_do(cause: Cause):
    assert cause.meaning.endswith(".")
    assert cause.advice
    for pattern in (*cause.host, *cause.rank):
        re.compile(pattern)


def options(command) -> set[str]:
    under = [options(one) for one in getattr(command, "commands", {}).values()]
    return {name for parameter in command.params for name in parameter.opts}.union(*under)


def test_every_option_that_advice_names_is_one():
    foreign = {"--ipc", "--shm-size"}  # docker's
    told = {option for cause in ALL for advice in cause.advice for option in re.findall(r"--[a-z-]+", advice)}
    told |= {option for reason in reasons.REASONS for option in re.findall(r"--[a-z-]+", reason.advice)}
    assert told - foreign <= options(cli)


def test_names_are_unique():
    names = [cause.name for cause in (*ALL, table.UNKNOWN)]
    assert len(names) == len(set(names))


def test_every_cause_is_documented():
    documented = re.findall(r"`(\w+)`", (FAILURES.parents[3] / "docs" / "runs.md").read_text())
    assert {cause.name for cause in (*ALL, table.UNKNOWN)} <= set(documented)
