"""The dress rehearsal: the very script a cluster would get, on a private Slurm of its shape, with a tiny model.

It goes through what kills first nights: the request, the rendezvous, the layout, the data, three steps, the early
warning, a save, the requeue and the resume. Everything is this rehearsal's own, and gone afterwards.
"""

import contextlib
import getpass
import importlib.util
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from launcher.common import sample_text, terminal, words
from launcher.errors import Fault, UsageError
from launcher.planning.jobs import JobPlan
from launcher.runs import logs, record
from launcher.runs.record import Run
from launcher.sandbox import lifecycle, rehearsal_plan
from launcher.sandbox.record import Sandbox
from launcher.slurm import client

STEPS = 3  # before the warning
AFTER = 2  # after the resume
SILENCE = 600  # seconds without a new event: the slowest part is 32 Pythons importing torch on two cores
RANK_MEMORY = 400 << 20  # bytes that one rank of the tiny model takes
NEEDED = {"torch": "mixtral", "megatron": "mixtral", "transformers": "mixtral", "mistral_common": "dev"}
TEXT = 200_000  # bytes
TAIL = 30  # lines of a log


class Failed(Fault):
    """The rehearsal found something; its folder stays, to look at."""


def run(plan: JobPlan, *, keep: bool = False) -> int:
    """Rehearse `plan` and say how it went: 0 when all went well, 1 otherwise."""
    _check(plan)
    folder = Path(tempfile.mkdtemp(prefix="rehearsal-"))
    keep_folder = keep
    try:
        with _ended_by_signals(), _sandbox(plan, folder / "slurm") as site:
            _rehearse(plan, site, folder)
    except Failed as failure:
        keep_folder = True
        terminal.say(f"FAILED: {failure}", "bold red")
        return 1
    finally:
        if keep_folder:
            terminal.say(f"everything of this rehearsal is in {folder}")
        else:
            shutil.rmtree(folder)
    terminal.say("The rehearsal went well.", "bold green")
    return 0


def _rehearse(plan: JobPlan, site: Sandbox, folder: Path) -> None:
    assert plan.layout is not None
    model, data = _prepare(plan, folder)
    mirrored = rehearsal_plan.rehearsed(
        plan, folder=folder, slurm_conf=site.slurm_conf, python=sys.executable, model=model, data=data
    )
    path = record.new_path(mirrored)
    _show_differences(plan, mirrored, path)
    terminal.heading("the rehearsal")
    started = record.start(mirrored, asked=sys.argv[1:], path=path)
    _say("submitted", f"job {started.job_id}, accepted by sbatch as it would be there")
    _first_attempt(started)
    _warn_and_requeue(started)
    _second_attempt(started)


def _first_attempt(run: Run) -> None:
    """Up to three steps."""
    start = _await(run, lambda e: e["event"] == "start", "the ranks to meet and build the model")
    _say("rendezvous", f"{start['world']} ranks met")
    layout = ", ".join(f"{axis} {size}" for axis, size in start["layout"].items())
    _say("layout", layout)
    _say("data", f"{start['tokens']:,} tokens")
    first = _await(run, lambda e: e["event"] == "step", "the first step")
    newest = _await(run, lambda e: e["event"] == "step" and e["step"] >= STEPS, f"step {STEPS}")
    if not math.isfinite(newest["loss"]):
        raise Failed(f"the loss is {newest['loss']} after {STEPS} steps")
    _say(f"{STEPS} steps", f"loss {first['loss']:.3f} -> {newest['loss']:.3f}")


def _warn_and_requeue(run: Run) -> None:
    """The warning that a time limit or a preemption sends, as Slurm sends it: to the batch script."""
    assert run.job_id is not None
    client.call("scancel", "--signal=USR2", "--batch", run.job_id, environment=run.environment)
    saved = _await(run, lambda e: e["event"] == "checkpoint", "the save after the early warning")
    _say("early warning", f"saved step {saved['step']} in {saved['seconds']} s")
    # The resumed run is to end by itself, two steps further on.
    config_file = run.path / "config.yaml"
    config = yaml.safe_load(config_file.read_text())
    config_file.write_text(yaml.safe_dump({**config, "steps": saved["step"] + AFTER}, sort_keys=False))
    left = _await(run, lambda e: e["event"] == "exit", "the ranks to leave")
    if left["code"] != 85:
        raise Failed(f"the ranks left with {left['code']} ({left['reason']}) instead of 85")


def _second_attempt(run: Run) -> None:
    resumed = _await(
        run, lambda e: e["event"] == "start" and e.get("attempt") == 1, "the requeued job to start again"
    )
    _say("requeue", "the job started again by itself")
    _say("resume", f"from step {resumed['step']}, {resumed['source']}")
    _await(run, lambda e: e["event"] == "exit" and e["code"] == 0, "the resumed run's end")
    deadline = time.monotonic() + 60
    while (state := record.state_of(run)).active and time.monotonic() < deadline:
        time.sleep(0.5)
    if state.state != "COMPLETED":
        raise Failed(f"the job ended as {state.state} {state.reason}{_tails(run)}")
    _say("end", f"job {run.job_id} is {state.state}, exit {state.exit_code}")


def _await(run: Run, wanted: Callable[[dict[str, Any]], bool], what: str) -> dict[str, Any]:
    """The first event that is `wanted`; `Failed` when a rank or the job ends before, or all is quiet for long."""
    seen, quiet_since = 0, time.monotonic()
    while True:
        ended = not record.state_of(run).active  # asked before reading, so that the last events aren't missed
        events = list(logs.events(run.path))
        if found := next(filter(wanted, events), None):
            return found
        if len(events) > seen:
            seen, quiet_since = len(events), time.monotonic()
        if fault := _fault(run):  # the script would try thrice; for a rehearsal once is enough
            raise Failed(f"{fault} while waiting for {what}{_tails(run)}")
        if ended:
            raise Failed(f"the job ended ({record.state_of(run).state}) while waiting for {what}{_tails(run)}")
        if time.monotonic() - quiet_since > SILENCE:
            raise Failed(f"nothing happened for {SILENCE} s while waiting for {what}{_tails(run)}")
        time.sleep(0.5)


def _fault(run: Run) -> str:
    """Who left the newest attempt first, unless it was with 85, which is no fault."""
    numbers = logs.attempts(run.path)
    if not numbers:
        return ""
    first = logs.first_to_leave(run.path, numbers[-1])
    return f"rank {first.rank} on {first.node} left with {first.code}" if first and first.code != 85 else ""


def _tails(run: Run) -> str:
    """The end of the batch script's log and of the log of the rank that left first."""
    numbers = logs.attempts(run.path)
    if not numbers:
        texts = [path for path in (run.path / "logs").glob("*.out")]
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


def _show_differences(plan: JobPlan, mirrored: JobPlan, path: Path) -> None:
    terminal.heading(f"what {plan.profile.name} would get, and what runs here")
    terminal.code(rehearsal_plan.script_diff(plan, mirrored, path), "diff")
    terminal.heading("what differs from the real thing")
    for line in rehearsal_plan.differences(plan.profile, mirrored.profile):
        terminal.say(f"  {line}")
    terminal.say(
        "  GPUs: processors and gloo instead of GPUs and NCCL; memory and speed say nothing about the cluster"
    )
    terminal.say(
        "  nodes: all of them are this machine, at one address; the network and the file system aren't tried"
    )
    left_out = [f"--{key.replace('_', '-')}" for key in rehearsal_plan.ONLY_THERE if key in plan.config]
    if left_out:
        terminal.say(f"  settings: without {', '.join(left_out)}, which want a GPU or a key")
    terminal.say(f"  model: {_described(mirrored)}; batches are as small as the layout allows")


def _described(mirrored: JobPlan) -> str:
    assert mirrored.layout is not None
    small = rehearsal_plan.tiny(mirrored.layout, mirrored.config)
    return f"{small.layers} layers of {small.hidden}, {small.experts} experts, random weights"


def _prepare(plan: JobPlan, folder: Path) -> tuple[Path, Path]:
    """A tiny model in Megatron's layout and some text, made by the same jobs that make the real ones."""
    assert plan.layout is not None
    for name in ("models", "data", "runs", "jobs"):
        (folder / name).mkdir()
    hub, model, data = folder / "models" / "tiny", folder / "models" / "tiny-megatron", folder / "data" / "text"
    terminal.heading("a tiny model and some text")
    _core("tiny", rehearsal_plan.tiny(plan.layout, plan.config).config(hub), folder)
    text = folder / "data" / "text.jsonl"
    sample_text.write(text, TEXT)
    _core("prepare", {"inputs": [str(text)], "output": str(data), "tokenizer": str(hub)}, folder)
    _core("convert", {"source": str(hub), "output": str(model), "layout": plan.config["layout"]}, folder)
    return model, data


def _core(job: str, config: dict[str, Any], folder: Path) -> None:
    """Run one job of the core package in this process's place, its output kept in a file."""
    place = folder / "jobs" / job
    place.mkdir()
    (place / "config.yaml").write_text(yaml.safe_dump(config))
    argv = [sys.executable, "-P", "-m", "megatron_mixtral", job, "--config", str(place / "config.yaml")]
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
    _say(job, "done")


def _check(plan: JobPlan) -> None:
    """Refuse what can't be rehearsed here, before anything starts."""
    if plan.job != "finetune":
        raise UsageError(f"rehearse: {plan.job} has no rehearsal; finetune has")
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
            f"{free / 2**30:.0f} GiB are free; fewer --nodes rehearse the same script"
        )


def _free_memory() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, value, *_ = line.split()
        if name == "MemAvailable:":
            return int(value) * 1024
    raise Fault("/proc/meminfo names no MemAvailable")


@contextlib.contextmanager
def _sandbox(plan: JobPlan, folder: Path) -> Iterator[Sandbox]:
    """A sandbox that mirrors the plan's cluster, down again at the end."""
    terminal.heading(f"a private Slurm in the shape of {plan.profile.name}")
    try:
        site = lifecycle.up(folder, rehearsal_plan.shape(plan))
        shape = site.shape
        _say(
            "sandbox",
            f"{words.plural(shape.nodes, 'node')} x {shape.gpus} GPUs, partition {shape.partitions[0][0]}",
        )
        if not site.accounting and (plan.profile.account or plan.profile.qos):
            _say("accounts", lifecycle.why_no_accounting(None) + "; account and QoS aren't checked")
        if name := plan.profile.reservation:
            what = ("starttime=now", "duration=1-00:00:00", f"users={getpass.getuser()}", "nodes=ALL")
            client.call(
                "scontrol", "create", "reservation", f"reservationname={name}", *what, environment=site.environment
            )
        yield site
    finally:
        lifecycle.down(folder)


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP end a rehearsal as Ctrl-C does: with its Slurm taken down."""

    def leave(signum: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _say(what: str, text: str) -> None:
    terminal.facts([(f"{what:<14}", text)])
