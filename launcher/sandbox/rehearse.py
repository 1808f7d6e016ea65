"""The rehearsal: runs the cluster's own script on a private Slurm of its shape, with a tiny model.

It tries what fails in a first night: the request, the rendezvous, the layout, the data, three steps, the early
warning, a save, the requeue and the resume. Each comes as a fact once it is known.
"""

import contextlib
import getpass
import importlib.util
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from launcher.common import sample_text, words
from launcher.errors import Fault, UsageError
from launcher.planning.plan import JobPlan
from launcher.runs import logs, states
from launcher.runs.record import Run
from launcher.sandbox import lifecycle, rehearsal_plan
from launcher.sandbox.record import Sandbox
from launcher.submit import start
from megatron_mixtral.spec import rundir

STEPS = 3  # before the warning
AFTER = 2  # after the resume
SILENCE = 600  # most seconds without an event; the slowest part is 32 processes that import torch on two cores
RANK_MEMORY = 400 << 20  # memory of one rank with the tiny model, in bytes
NEEDED = {"torch": "mixtral", "megatron": "mixtral", "transformers": "mixtral", "mistral_common": "dev"}
TEXT = 200_000  # bytes
MODEL, DATA = "models/tiny-megatron", "data/text"  # in the rehearsal's folder
TAIL = 30  # lines of a log

Fact = tuple[str, str]  # what was tried, and what came of it


class Failed(Fault):
    """The rehearsal found a fault. Its folder is kept."""


def check(plan: JobPlan) -> None:
    """Refuse a plan that can't be rehearsed here, before anything starts."""
    if plan.job != "finetune":
        raise UsageError(f"rehearse: {plan.job} can't be rehearsed; only finetune can")
    if plan.profile.is_local:
        raise UsageError(f"rehearse: {plan.profile.name} has no scheduler to rehearse for; give --cluster")
    if packages := lifecycle.missing_packages():
        raise UsageError(f"rehearse: it needs Slurm's daemons; on Debian: apt-get install {' '.join(packages)}")
    for module, extra in NEEDED.items():
        if importlib.util.find_spec(module) is None:
            raise UsageError(f"rehearse: this Python lacks {module}; pip install 'mixlaunch[{extra}]'")
    if (free := _free_memory()) < plan.world * RANK_MEMORY:
        raise UsageError(
            f"rehearse: {plan.world} ranks take about {plan.world * RANK_MEMORY / 2**30:.0f} GiB, "
            f"{free / 2**30:.0f} GiB are free; use fewer --nodes, which rehearses the same script"
        )


def _free_memory() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, value, *_ = line.split()
        if name == "MemAvailable:":
            return int(value) * 1024
    raise Fault("/proc/meminfo names no MemAvailable")


@contextlib.contextmanager
def private_slurm(plan: JobPlan, folder: Path) -> Iterator[Sandbox]:
    """A sandbox that mirrors the plan's cluster, down again at the end."""
    try:
        slurm = lifecycle.up(folder, rehearsal_plan.shape(plan))
        if name := plan.profile.reservation:
            what = ("starttime=now", "duration=1-00:00:00", f"users={getpass.getuser()}", "nodes=ALL")
            create = ("scontrol", "create", "reservation", f"reservationname={name}")
            slurm.host.call(*create, *what)
        yield slurm
    finally:
        lifecycle.down(folder)


def described(plan: JobPlan, slurm: Sandbox) -> Iterator[Fact]:
    """What the sandbox is, and what it can't check."""
    shape = slurm.shape
    nodes = words.plural(shape.nodes, "node")
    yield "sandbox", f"{nodes} x {shape.gpus} GPUs, partition {shape.partitions[0][0]}"
    if not slurm.accounting and (plan.profile.account or plan.profile.qos):
        yield "accounts", lifecycle.why_no_accounting(None) + "; account and QoS aren't checked"


def prepared(plan: JobPlan, folder: Path) -> Iterator[Fact]:
    """A tiny model in Megatron's layout and some text, made by the same jobs as real ones."""
    assert plan.layout is not None
    for name in ("models", "data", "runs", "jobs"):
        (folder / name).mkdir()
    hub, model, data = folder / "models" / "tiny", folder / MODEL, folder / DATA
    yield _core("tiny", rehearsal_plan.tiny(plan.layout, plan.config).config(hub), folder)
    text = folder / "data" / "text.jsonl"
    sample_text.write(text, TEXT)
    yield _core("prepare", {"inputs": [str(text)], "output": str(data), "tokenizer": str(hub)}, folder)
    yield _core("convert", {"source": str(hub), "output": str(model), "layout": plan.config["layout"]}, folder)


def _core(job: str, config: dict[str, Any], folder: Path) -> Fact:
    """Run one job of the core package and keep its output in a file."""
    place = folder / "jobs" / job
    place.mkdir()
    (place / rundir.CONFIG).write_text(yaml.safe_dump(config))
    argv = [sys.executable, "-P", "-m", "megatron_mixtral", job, "--config", str(place / rundir.CONFIG)]
    log = place / "log"
    with log.open("wb") as output:
        done = subprocess.run(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env={**os.environ, **rehearsal_plan.ON_PROCESSORS},
        )
    if done.returncode:
        raise Failed(f"{job} ended with {done.returncode}:\n{log.read_text(errors='replace')[-2000:]}")
    return job, "done"


def mirrored(plan: JobPlan, slurm: Sandbox, folder: Path) -> JobPlan:
    """`plan` as it runs on the sandbox, with the model and the text that were prepared."""
    return rehearsal_plan.rehearsed(
        plan,
        folder=folder,
        slurm_conf=slurm.slurm_conf,
        python=sys.executable,
        model=folder / MODEL,
        data=folder / DATA,
    )


def tried(mirrored: JobPlan, path: Path, *, asked: Sequence[str]) -> Iterator[Fact]:
    """The rehearsal itself, in the run directory `path`; `Failed` where something goes wrong."""
    run = start.run(mirrored, asked=asked, path=path)
    yield "submitted", f"job {run.job_id}, accepted by sbatch as on the cluster"
    yield from _first_attempt(run)
    yield from _warn_and_requeue(run)
    yield from _second_attempt(run)


def _first_attempt(run: Run) -> Iterator[Fact]:
    """Up to three steps."""
    start = _await(run, lambda e: e["event"] == "start", "the ranks to meet and build the model")
    yield ("rendezvous", f"{start['world']} ranks met")
    layout = ", ".join(f"{axis} {size}" for axis, size in start["layout"].items())
    yield ("layout", layout)
    yield ("data", f"{start['tokens']:,} tokens")
    first = _await(run, lambda e: e["event"] == "step", "the first step")
    newest = _await(run, lambda e: e["event"] == "step" and e["step"] >= STEPS, f"step {STEPS}")
    if not math.isfinite(newest["loss"]):
        raise Failed(f"the loss is {newest['loss']} after {STEPS} steps")
    yield (f"{STEPS} steps", f"loss {first['loss']:.3f} -> {newest['loss']:.3f}")


def _warn_and_requeue(run: Run) -> Iterator[Fact]:
    """Send the warning of a time limit or preemption to the batch script, as Slurm does."""
    assert run.job_id is not None
    run.host.call("scancel", "--signal=USR2", "--batch", run.job_id)
    saved = _await(run, lambda e: e["event"] == "checkpoint", "the save after the early warning")
    yield ("early warning", f"saved step {saved['step']} in {saved['seconds']} s")
    # The resumed run is to end by itself, two steps further on.
    config_file = run.path / rundir.CONFIG
    config = yaml.safe_load(config_file.read_text())
    config_file.write_text(yaml.safe_dump({**config, "steps": saved["step"] + AFTER}, sort_keys=False))
    left = _await(run, lambda e: e["event"] == "exit", "the ranks to leave")
    if left["code"] != rundir.REQUEUE:
        raise Failed(f"the ranks left with {left['code']} ({left['reason']}) instead of {rundir.REQUEUE}")


def _second_attempt(run: Run) -> Iterator[Fact]:
    resumed = _await(
        run, lambda e: e["event"] == "start" and e.get("attempt") == 1, "the requeued job to start again"
    )
    yield ("requeue", "the job started again by itself")
    yield ("resume", f"from step {resumed['step']}, {resumed['source']}")
    _await(run, lambda e: e["event"] == "exit" and e["code"] == 0, "the resumed run's end")
    deadline = time.monotonic() + 60
    while (state := states.of_run(run)).active and time.monotonic() < deadline:
        time.sleep(0.5)
    if state.state != "COMPLETED":
        raise Failed(f"the job ended as {state.state} {state.reason}{_tails(run)}")
    yield ("end", f"job {run.job_id} is {state.state}, exit {state.exit_code}")


def _await(run: Run, wanted: Callable[[dict[str, Any]], bool], what: str) -> dict[str, Any]:
    """The first event that is `wanted`; `Failed` when a rank or the job ends first, or nothing happens for long."""
    seen, quiet_since = 0, time.monotonic()
    while True:
        ended = not states.of_run(run).active  # asked before reading, so the last events aren't missed
        events = list(logs.events(run.path))
        if found := next(filter(wanted, events), None):
            return found
        if len(events) > seen:
            seen, quiet_since = len(events), time.monotonic()
        if fault := _fault(run):  # the script would try three times; a rehearsal stops at the first fault
            raise Failed(f"{fault} while waiting for {what}{_tails(run)}")
        if ended:
            raise Failed(f"the job ended ({states.of_run(run).state}) while waiting for {what}{_tails(run)}")
        if time.monotonic() - quiet_since > SILENCE:
            raise Failed(f"nothing happened for {SILENCE} s while waiting for {what}{_tails(run)}")
        time.sleep(0.5)


def _fault(run: Run) -> str:
    """Who left the newest attempt first; nothing for exit code 85, which is no fault."""
    numbers = logs.attempts(run.path)
    if not numbers:
        return ""
    first = logs.first_to_leave(run.path, numbers[-1])
    return (
        f"rank {first.rank} on {first.node} left with {first.code}"
        if first and first.code != rundir.REQUEUE
        else ""
    )


def _tails(run: Run) -> str:
    """The end of the batch script's log and of the log of the rank that left first."""
    numbers = logs.attempts(run.path)
    if not numbers:
        texts = [path for path in (run.path / rundir.LOGS).glob("*.out")]
    else:
        first = logs.first_to_leave(run.path, numbers[-1])
        sources = (logs.BATCH, first.rank if first else 0)
        texts = [logs.path(run.path, numbers[-1], source) for source in sources]
    found = ""
    for path in texts:
        with contextlib.suppress(OSError):
            lines = path.read_text(errors="replace").splitlines()[-TAIL:]
            found += f"\n--- {path.name}\n" + "\n".join(lines)
    return found


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP end a rehearsal like Ctrl-C: its Slurm is taken down."""

    def leave(signum: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
