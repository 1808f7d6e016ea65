"""Submits the whole chain: download -> convert, prepare -> finetune -> export, each step after its inputs.

Every step is planned and checked before the first is submitted. If a submission fails, the earlier ones are
cancelled.
"""

import datetime
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from secrets import token_hex
from typing import Any

from launcher.cluster import paths
from launcher.cluster.profile import ClusterProfile
from launcher.errors import Fault, Interrupted, MixlaunchError, SubmitError, UsageError
from launcher.planning import describe, inputs, jobs, secrets
from launcher.planning.plan import Ask, Axes, JobPlan, PipelineStep
from launcher.runs import record, states
from launcher.runs.record import Run
from launcher.script import lint, render
from launcher.submit import start
from megatron_mixtral.spec.shape import MODEL, MixtralShape


@dataclass(frozen=True, kw_only=True)
class PipelineJob:
    """One job of a pipeline: its name in it, its run directory, and the paths that exist once it is done."""

    name: str
    plan: JobPlan
    path: Path
    makes: tuple[str, ...]

    def after(self, jobs: "Sequence[PipelineJob]") -> "list[PipelineJob]":
        """Those of `jobs` that make this one's inputs."""
        needed = {given.path for given in self.plan.inputs}
        return [job for job in jobs if needed & set(job.makes)]


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """What is to be submitted, in order, and what was left out because it is there."""

    jobs: tuple[PipelineJob, ...]
    there: tuple[tuple[str, str], ...] = ()  # (name, path)


def plan(
    profile: ClusterProfile,
    *,
    files: tuple[str, ...] = (),
    model: str = MODEL,
    data: str | tuple[str, ...] | None = None,
    output: str | None = None,
    axes: Axes,
    ask: Ask,
    shape: MixtralShape | None = None,
    values: Mapping[str, Any] = {},
) -> Pipeline:
    """The chain for finetune's options; `UsageError` or `LayoutError` if any of its jobs can't be."""
    draft = _Draft(profile, ask)
    weights = draft.weights(model)
    if files:
        if isinstance(data, tuple):
            raise UsageError("--data: FILES are prepared into one prefix; give one --data, or prepare them before")
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
    """A chain that is being planned; its runs share the end of their names."""

    def __init__(self, profile: ClusterProfile, asked: Ask) -> None:
        self._profile, self._asked = profile, asked
        self._end = f"{datetime.datetime.now():%Y%m%d-%H%M%S}-{token_hex(2)}"
        self._jobs: list[PipelineJob] = []
        self._there: list[tuple[str, str]] = []

    def ask(self, step: str) -> Ask:
        """A step's name, and the options of every step."""
        name = step if self._asked.name is None else f"{self._asked.name}-{step}"
        return Ask(name=name, secrets=self._asked.secrets)

    def add(self, name: str, made: JobPlan, *, makes: str | None = None) -> Path:
        """`made` as the next step; its run directory."""
        path = Path(self._profile.paths.runs) / f"{made.name}-{self._end}"
        self._jobs.append(PipelineJob(name=name, plan=made, path=path, makes=(makes or str(path),)))
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

    def chain(self) -> Pipeline:
        return Pipeline(jobs=tuple(self._jobs), there=tuple(self._there))


def check(pipeline: Pipeline, *, force: bool) -> None:
    """Everything that can be known before the first submission; `UsageError` names the job."""
    made = {path for job in pipeline.jobs for path in job.makes}
    absent = []
    for job in pipeline.jobs:
        try:
            describe.require(job.plan, force=force)
            secrets.require(job.plan)
            lint.check(render.render(job.plan, str(job.path)), job.plan.profile.slurm_version)
        except UsageError as error:
            error.args = (f"{job.name}: {error}",)
            raise
        left = [given for given in inputs.missing(job.plan) if given.path not in made]
        absent += [f"{job.name}: {i.what}: {i.path} doesn't exist\n  {i.hint}".rstrip() for i in left]
    if absent:
        raise UsageError("\n".join(absent))


def submit(pipeline: Pipeline, *, asked: Sequence[str]) -> list[Run]:
    """Submit all jobs to the queue, each after those that make its inputs; all of them, or none stays."""
    started: dict[str, Run] = {}
    for number, job in enumerate(pipeline.jobs, 1):
        before = [started[other.name] for other in job.after(pipeline.jobs)]
        link = PipelineStep(
            pipeline=pipeline.jobs[-1].path.name,
            step=number,
            steps=len(pipeline.jobs),
            after=tuple(run.name for run in before),
            jobs=tuple(str(run.job_id) for run in before),
        )
        try:
            started[job.name] = start.run(replace(job.plan, link=link), asked=asked, path=job.path)
        except BaseException as error:
            raise _taken_back(error, job, list(started.values())) from error
    return list(started.values())


def _taken_back(error: BaseException, job: PipelineJob, started: Sequence[Run]) -> MixlaunchError:
    """Cancel what was submitted before `job` failed to be, and say so."""
    said = str(error) or "interrupted"
    told = [f"{job.name}: {said}"]
    if isinstance(error, Interrupted):
        started = [*started, record.read(job.plan.profile.host.place(job.path))]
    for run in started:
        try:
            states.cancel(run)
            told.append(f"{run.name}, job {run.job_id}, is cancelled again")
        except Fault as fault:
            told.append(f"{run.name}, job {run.job_id}, may continue ({fault}); `scancel {run.job_id}` ends it")
    message = "\n".join(told)
    if isinstance(error, Interrupted | KeyboardInterrupt):
        return Interrupted(message, "")
    return UsageError(message) if isinstance(error, UsageError) else SubmitError(message)


def run_in_turn(pipeline: Pipeline, *, asked: Sequence[str]) -> Iterator[Run]:
    """Start the jobs on this machine, each when the next one is asked for: once the one before has ended."""
    for number, job in enumerate(pipeline.jobs, 1):
        link = PipelineStep(pipeline=pipeline.jobs[-1].path.name, step=number, steps=len(pipeline.jobs))
        yield start.run(replace(job.plan, link=link), asked=asked, path=job.path)
