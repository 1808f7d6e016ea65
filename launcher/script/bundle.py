"""A job as a folder to share: its script, its configuration, and a README.

Plain `sbatch job.sbatch` in the folder runs it, on a cluster without mixlaunch's command line.
"""

import shlex
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

from launcher.common import quoting, words
from launcher.errors import Fault, UsageError
from launcher.planning import requeue
from launcher.planning.plan import JobPlan
from launcher.script import lint, render
from megatron_mixtral.spec.rundir import CONFIG, SCRIPT

README = "README.md"


def write(plan: JobPlan, folder: Path, asked: Sequence[str] = ()) -> list[Path]:
    """Make the bundle and return its files; `UsageError` unless `folder` is absent or empty."""
    quoting.path(quoting.checked(str(folder), "--bundle"), "--bundle")
    script = render.render(plan, bundled=True)
    lint.check(script, plan.profile.slurm_version)
    texts = {SCRIPT: script, CONFIG: render.config_text(plan), README: "\n".join(_readme(plan, asked)) + "\n"}
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UsageError(f"--bundle: {folder} is there and isn't empty; give a new folder")
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            (folder / name).write_text(text)
        (folder / SCRIPT).chmod(0o755)
    except OSError as error:
        raise Fault(f"--bundle: {folder}: {error.strerror}") from error
    return [folder / name for name in texts]


def _readme(plan: JobPlan, asked: Sequence[str]) -> Iterator[str]:
    profile = plan.profile
    command = f"bash {SCRIPT}" if profile.is_local else f"sbatch {SCRIPT}"
    yield f"# {plan.name}: {plan.job} on {profile.name}"
    yield ""
    yield from _code(command)
    yield _paragraph(
        "in this folder runs it. Nothing of mixlaunch is needed where you type that; the ranks need a Python with "
        f"megatron_mixtral, here {_where(plan)}."
    )
    yield ""
    yield from _facts(plan)
    yield ""
    yield _paragraph(
        f"Change what it does in `{CONFIG}`, which the script copies into the run's folder as the job starts, and "
        f"what it asks for at the top of `{SCRIPT}`. The layout stands in both: the product of its axes with data "
        "parallelism is the number of ranks."
    )
    yield ""
    yield _paragraph(requeue.course(plan))
    if asked:
        yield ""
        yield "Made by:"
        yield ""
        yield from _code(shlex.join(["mixlaunch", *asked]))


def _paragraph(text: str) -> str:
    return textwrap.fill(text, 110, break_long_words=False, break_on_hyphens=False)


def _code(command: str) -> Iterator[str]:
    yield "```console"
    yield f"$ {command}"
    yield "```"
    yield ""


def _where(plan: JobPlan) -> str:
    container, python = plan.profile.container, f"`{plan.profile.python}`"
    return f"{python} in `{container.image}` ({container.runtime})" if plan.profile.in_container else python


def _facts(plan: JobPlan) -> Iterator[str]:
    """A list of what it takes and makes."""
    nodes = f"{words.plural(plan.nodes, 'node')} x {plan.tasks_per_node} ranks"
    yield f"* ranks: {plan.world} = {nodes}{f', {plan.gpus_per_node} GPUs a node' if plan.gpus_per_node else ''}"
    if plan.layout and plan.job != "convert":
        yield f"* layout: {plan.layout.describe(plan.world)}"
    if not plan.profile.is_local:
        yield f"* time limit: {plan.time}, with a warning {plan.profile.signal_lead} s before"
    for given in plan.inputs:
        yield f"* reads {given.what}: `{given.path}`{f' ({given.hint})' if given.hint else ''}"
    for path in plan.outputs:
        yield f"* writes: `{path}`"
    number = "$$" if plan.profile.is_local else "JOBID"
    yield f"* its run's folder, with logs and checkpoints: `{plan.profile.paths.runs}/{plan.name}-{number}`"
    for name in plan.secrets:
        yield f"* secret: `{name}` must be set where you type that; only the run's `secrets.env` holds it"
