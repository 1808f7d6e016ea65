"""The whole chain in one request: download -> convert, prepare -> finetune -> export, each after what it needs.

Every step is planned and checked before the first is submitted; when a submission fails, those before it are taken
back. `steps` is pure but for looking at what is there already.
"""

import datetime
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.cluster import paths
from launcher.errors import Fault, Interrupted, MixlaunchError, SubmitError, UsageError
from launcher.host import copies
from launcher.planning import describe, inputs, jobs
from launcher.planning import secrets as secrets_env
from launcher.planning.jobs import Ask, Axes, JobPlan, Link
from launcher.planning.layout import Shape
from launcher.planning.settings import MODEL
from launcher.runs import record
from launcher.script import lint, render

if TYPE_CHECKING:
    from launcher.cluster.profile import ClusterProfile
    from launcher.runs.record import Run

NEVER = "DependencyNeverSatisfied"  # Slurm's reason for a job that waits for one that failed


@dataclass(frozen=True, kw_only=True)
class Step:
    """One job of a pipeline: its name in it, its run directory, and the paths that exist once it is done."""

    name: str
    plan: JobPlan
    path: Path
    makes: tuple[str, ...]

    def after(self, steps: "Sequence[Step]") -> "list[Step]":
        """Those of `steps` that make this one's inputs."""
        needed = {given.path for given in self.plan.inputs}
        return [step for step in steps if needed & set(step.makes)]


@dataclass(frozen=True, kw_only=True)
class Chain:
    """What is to be submitted, in order, and what was left out because it is there."""

    steps: tuple[Step, ...]
    there: tuple[tuple[str, str], ...] = ()  # (step, path)


def plan(
    profile: "ClusterProfile",
    *,
    files: tuple[str, ...] = (),
    model: str = MODEL,
    data: str | tuple[str, ...] | None = None,
    output: str | None = None,
    axes: Axes,
    ask: Ask,
    shape: Shape | None = None,
    values: Mapping[str, Any] = {},
) -> Chain:
    """The chain for finetune's options; `UsageError` or `LayoutError` if any of its jobs can't be."""
    draft = _Draft(profile, ask)
    weights = draft.weights(model)
    if files:
        if isinstance(data, tuple):
            raise UsageError("--data: FILES are prepared into one prefix; give one, or prepare them before")
        prepared = jobs.plan_prepare(profile, files=files, model=model, output=data, ask=draft.ask("prepare"))
        draft.add("prepare", prepared, makes=f"{prepared.config['output']}.idx")
    trained = jobs.plan_finetune(
        profile,
        model=weights,
        data=data,
        axes=axes,
        ask=replace(draft.ask("finetune"), nodes=ask.nodes, time=ask.time),
        shape=shape,
        values=values,
    )
    run = draft.add("finetune", trained)
    ask = draft.ask("export")
    export = jobs.plan_convert(profile, model=str(run), to="hf", output=output, ask=ask, shape=shape)
    draft.add("export", export, makes=export.config["output"])
    return draft.chain()


class _Draft:
    """A chain in the making: its steps share the end of their runs' names."""

    def __init__(self, profile: "ClusterProfile", asked: Ask) -> None:
        self._profile, self._asked = profile, asked
        self._end = f"{datetime.datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
        self._steps: list[Step] = []
        self._there: list[tuple[str, str]] = []

    def ask(self, step: str) -> Ask:
        """A step's name, and what holds for every step."""
        name = step if self._asked.name is None else f"{self._asked.name}-{step}"
        return Ask(name=name, secrets=self._asked.secrets)

    def add(self, name: str, made: JobPlan, *, makes: str | None = None) -> Path:
        """`made` as the next step; its run directory."""
        path = Path(self._profile.paths.runs) / f"{made.name}-{self._end}"
        self._steps.append(Step(name=name, plan=made, path=path, makes=(makes or str(path),)))
        return path

    def weights(self, model: str) -> str:
        """The model as finetune takes it, after the steps that bring it there."""
        if not paths.is_path(model) and "/" not in model:
            return model  # a run
        if paths.is_path(model) and inputs.is_converted(self._profile, paths.path(model, "--model")):
            return model
        converted = jobs.plan_convert(self._profile, model=model, ask=self.ask("convert"))
        target = str(converted.config["output"])
        if inputs.is_converted(self._profile, target):
            self._there.append(("convert", target))
            return target
        if not paths.is_path(model):
            self._download(model)
        self.add("convert", converted, makes=target)
        return target

    def _download(self, model: str) -> None:
        download = jobs.plan_download(self._profile, model=model, ask=self.ask("download"))
        target = str(download.config["output"])
        if inputs.is_downloaded(self._profile, target):
            self._there.append(("download", target))
        else:
            self.add("download", download, makes=target)

    def chain(self) -> Chain:
        return Chain(steps=tuple(self._steps), there=tuple(self._there))


def check(chain: Chain, *, force: bool) -> None:
    """Everything that can be known before the first submission; `UsageError` names the step."""
    made = {path for step in chain.steps for path in step.makes}
    absent = []
    for step in chain.steps:
        try:
            describe.require(step.plan, force=force)
            secrets_env.require(step.plan)
            lint.check(render.render(step.plan, str(step.path)), step.plan.profile.slurm_version)
        except UsageError as error:
            error.args = (f"{step.name}: {error}",)
            raise
        left = [given for given in inputs.missing(step.plan) if given.path not in made]
        absent += [f"{step.name}: {i.what}: {i.path} doesn't exist\n  {i.hint}".rstrip() for i in left]
    if absent:
        raise UsageError("\n".join(absent))


def submit(chain: Chain, *, asked: Sequence[str]) -> "list[Run]":
    """Submit all steps to the queue, each after those that make its inputs; all of them, or none stays."""
    started: dict[str, Run] = {}
    for number, step in enumerate(chain.steps, 1):
        before = [started[other.name] for other in step.after(chain.steps)]
        link = Link(
            pipeline=chain.steps[-1].path.name,
            step=number,
            steps=len(chain.steps),
            after=tuple(run.name for run in before),
            jobs=tuple(str(run.job_id) for run in before),
        )
        try:
            started[step.name] = record.start(replace(step.plan, link=link), asked=asked, path=step.path)
        except BaseException as error:
            raise _taken_back(error, step, list(started.values())) from error
    return list(started.values())


def _taken_back(error: BaseException, step: Step, started: "Sequence[Run]") -> MixlaunchError:
    """Cancel what was submitted before `step` failed to be, and say so."""
    said = str(error) or "interrupted"
    told = [f"{step.name}: {said}"]
    if isinstance(error, Interrupted):
        started = [*started, record.read(copies.place(step.plan.profile.login_node, step.path))]
    for run in started:
        try:
            record.cancel(run)
            told.append(f"{run.name}, job {run.job_id}, is cancelled again")
        except Fault as fault:
            told.append(f"{run.name}, job {run.job_id}, may go on ({fault}); `scancel {run.job_id}` ends it")
    message = "\n".join(told)
    if isinstance(error, Interrupted | KeyboardInterrupt):
        return Interrupted(message, "")
    return UsageError(message) if isinstance(error, UsageError) else SubmitError(message)


def to_the_end(started: "Sequence[Run]") -> int:
    """Watch the steps one after another; when one fails, what can't start any more is cancelled. The exit code."""
    from launcher.cli import watch
    from launcher.common import terminal

    for place, run in enumerate(started):
        code = watch.to_the_end(run, follow=False)
        if code == Interrupted.exit_code:
            return code
        if code:
            for later in started[place + 1 :]:
                if record.cancel(later):
                    terminal.say(f"{later.name} is cancelled: it can't start any more")
            return code
    return 0


def stuck(found: "Sequence[Run]") -> "list[Run]":
    """Those that can never start: a job that they wait for failed, or can't start itself."""
    states = record.states_of(found)
    waiting = [run for run in found if states[run.path].state == "PENDING"]
    never = [run for run in waiting if states[run.path].reason == NEVER]
    while True:
        ids = {run.job_id for run in never}
        behind = [run for run in waiting if run not in never and ids & _waits_for(run)]
        if not behind:
            return never
        never += behind


def _waits_for(run: "Run") -> set[str]:
    link = run.record.get("pipeline")
    return set(link["jobs"]) if link else set()


def run_here(chain: Chain, *, asked: Sequence[str]) -> int:
    """One step after another as processes of this machine; the first that fails ends it. The exit code."""
    from launcher.cli import watch

    for number, step in enumerate(chain.steps, 1):
        link = Link(pipeline=chain.steps[-1].path.name, step=number, steps=len(chain.steps))
        run = record.start(replace(step.plan, link=link), asked=asked, path=step.path)
        if code := watch.to_the_end(run, follow=False):
            return code
    return 0
