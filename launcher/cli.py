"""The commands: parse, call, print. What takes time to import is imported inside the command that needs it.

Exit codes: 0 done, 2 the user's mistake, 1 anything that failed around them, 130 interrupted.
"""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from launcher.errors import MixlaunchError
from launcher.options import HELP, SectionedOption, job_command

if TYPE_CHECKING:
    from launcher.jobs import JobPlan

SECTIONS = {
    "The chain": ("download", "prepare", "convert", "finetune", "serve", "chat"),
    "Before you submit": ("export", "rehearse", "clusters", "sandbox"),
    "Your runs": ("status", "logs", "cancel"),
    "To see it all": ("demo",),
}


class Failure(click.ClickException):
    """One of our errors on its way out: its message, its exit code, no traceback."""

    def __init__(self, error: MixlaunchError) -> None:
        super().__init__(str(error))
        self.exit_code = error.exit_code  # type: ignore[misc]  # click reads it here, and declares it for the class

    def show(self, file: Any = None) -> None:
        label = click.style("error:", fg="red", bold=True)
        color = False if os.environ.get("NO_COLOR") else None
        click.echo(f"{label} {self.message}", file=file or sys.stderr, color=color)


class Commands(click.Group):
    """The top level: our errors become exit codes, and help lists commands by what they are for."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except MixlaunchError as error:
            raise Failure(error) from error

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for title, names in SECTIONS.items():
            with formatter.section(title):
                formatter.write_dl([(name, self.commands[name].get_short_help_str(70)) for name in names])


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="mixlaunch")
def cli() -> None:
    """From a Hugging Face Mixtral to a fine-tuned, served one on any Slurm cluster.

    Every command of the chain takes --cluster NAME and --dry-run. `mixlaunch demo` shows it all on this machine.
    """


# --- the chain ---------------------------------------------------------------------------------------------------


def _start(plan: "JobPlan", *, dry_run: bool, wait: bool | None, follow: bool) -> None:
    """Submit `plan`; on this machine a job is watched to its end, on a cluster it is left to the queue."""
    if dry_run:
        _show(plan)
        return
    from launcher import inputs, watch

    inputs.require(plan)
    waits = follow or (plan.profile.is_local if wait is None else wait)
    sys.exit(watch.submit(plan, asked=tuple(sys.argv[1:]), wait=waits, follow=follow))


def _show(plan: "JobPlan", *, script: bool = True) -> None:
    """What a submission would do, without doing any of it."""
    from launcher import lint, render, runs, screen

    run_dir = runs.new_path(plan)
    text = render.render(plan, str(run_dir))
    lint.check(text)
    screen.heading(f"{plan.job}: what would run")
    screen.facts([*screen.plan_facts(plan), ("run", str(run_dir) if script else "")])
    screen.heading("config.yaml")
    screen.code(render.config_text(plan), "yaml")
    if script:
        screen.heading("job.sbatch")
        screen.code(text, "bash")


def _download(plan: "JobPlan", *, as_job: bool, dry_run: bool, **how: Any) -> None:
    """Downloads need the network, which compute nodes often lack: they run here unless told otherwise."""
    if as_job:
        _start(plan, dry_run=dry_run, **how)
    elif dry_run:
        _show(plan, script=False)
    else:
        from launcher import foreground

        sys.exit(foreground.run(plan))


START = (
    SectionedOption(
        ["--dry-run"], section="Job", is_flag=True, help="Show script, files and layout; touch nothing."
    ),
    SectionedOption(
        ["--wait/--no-wait"], section="Job", default=None, help="Wait for the end.  [default: on this machine]"
    ),
    SectionedOption(["--follow"], section="Job", is_flag=True, help="Wait, and print rank 0's log."),
)
AS_JOB = SectionedOption(["--as-job"], section="Job", is_flag=True, help="As a job, not here in the foreground.")

cli.add_command(job_command("download", _download, more=(*START, AS_JOB)))
for _job in ("prepare", "convert", "finetune", "serve", "tiny"):
    cli.add_command(job_command(_job, _start, more=START))
cli.commands["tiny"].hidden = True


@cli.group()
def export() -> None:
    """Print a job's script, self-contained.

    Plain `sbatch` runs it; all it needs is a Python with megatron_mixtral where the ranks run.
    """


def _export(plan: "JobPlan") -> None:
    from launcher import lint, render

    script = render.render(plan)
    lint.check(script)
    click.echo(script, nl=False)


for _job in HELP:
    export.add_command(job_command(_job, _export))


@cli.group()
def rehearse() -> None:
    """Run a job's script on a private Slurm first.

    The very script the cluster would get, with its topology: rendezvous, layout, data, three steps, an early
    warning, a save and a resume, with a tiny model on this machine's processors.
    """


def _rehearse(plan: "JobPlan", *, keep: bool) -> None:
    from launcher import rehearse as rehearsing

    sys.exit(rehearsing.run(plan, keep=keep))


KEEP = SectionedOption(["--keep"], section="Job", is_flag=True, help="Keep the rehearsal's folder.")
rehearse.add_command(job_command("finetune", _rehearse, more=(KEEP,)))


@cli.command()
@click.argument("server", required=False)
@click.option("-p", "--prompt", help="Ask this and leave.  [default: a conversation, or what is piped in]")
@click.option("--system", help="What the model is told before all else.")
@click.option("--raw", is_flag=True, help="Continue the text instead of answering it.")
@click.option("--max-tokens", type=click.IntRange(1), metavar="N", help="Longest answer.")
@click.option("--temperature", type=click.FloatRange(0), metavar="X", help="0 always says the likeliest.")
@click.option("--seed", type=int, metavar="N", help="Makes a sampled answer repeatable.")
def chat(server: str | None, prompt: str | None, system: str | None, raw: bool, **how: Any) -> None:
    """Talk to a server.

    SERVER is HOST:PORT, a URL or the server's run; by default the one that was started last.
    """
    from launcher import chat as chatting
    from launcher import servers

    found = servers.find(server, _roots(None))
    chatting.run(found, prompt=prompt, system=system, raw=raw, settings=chatting.Settings(**how))


@cli.command()
@click.option("--text", type=click.Path(path_type=Path), help="Text of your own.  [default: Python's docstrings]")
@click.option("--folder", type=click.Path(path_type=Path), default=Path("demo"), help="Where to.  [default: demo]")
def demo(text: Path | None, folder: Path) -> None:
    """Run the whole chain on this machine, small.

    It needs no Slurm and no GPU: it makes a small Mixtral, prepares text, converts, trains on 4 processes, converts
    back, serves and asks.
    """
    from launcher import demo as whole_chain

    whole_chain.run(text, folder)


# --- runs --------------------------------------------------------------------------------------------------------


def _of_cluster(command: click.Command) -> click.Command:
    command.params.append(
        click.Option(["--cluster"], metavar="NAME|FILE.yaml", help="Only runs of this cluster.  [default: all]")
    )
    return command


def _roots(cluster: str | None) -> list[Path]:
    """Where runs may lie: one cluster's folder, or every profile's."""
    from launcher import profile

    if cluster:
        return [Path(profile.load(cluster).paths.runs)]
    roots = [Path(profile.load().paths.runs)]
    for path in profile.available().values():
        try:
            roots.append(Path(profile.read(path).paths.runs))
        except MixlaunchError:
            continue  # `clusters` shows what is wrong with it
    return list(dict.fromkeys(roots))


@_of_cluster
@cli.command()
@click.argument("names", metavar="[RUN]...", nargs=-1)
@click.option("--all", "everything", is_flag=True, help="Not only the newest 20.")
def status(names: tuple[str, ...], everything: bool, cluster: str | None) -> None:
    """Show what runs are doing.

    All of them, newest first, or the details of RUNs: names, prefixes or job ids.
    """
    from launcher import overview, runs

    roots = _roots(cluster)
    if names:
        overview.details([runs.find(name, roots) for name in names])
    else:
        found = runs.every(roots)
        overview.table(found if everything else found[:20], roots)


@_of_cluster
@cli.command("logs")
@click.argument("name", metavar="[RUN]", default="newest")
@click.option("-f", "--follow", is_flag=True, help="Go on as lines come, also into the next attempt.")
@click.option("--rank", type=int, metavar="N", default=0, help="Which rank's log.  [default: 0]")
@click.option("--batch", is_flag=True, help="The batch script's own log.")
@click.option("--attempt", type=int, metavar="N", help="Which attempt's.  [default: the newest]")
def show_logs(name: str, follow: bool, rank: int, batch: bool, attempt: int | None, cluster: str | None) -> None:
    """Print a run's log.

    RUN is a name, a prefix or a job id; by default the newest run.
    """
    from launcher import logs, runs, watch

    run = runs.find(name, _roots(cluster))
    source = logs.BATCH if batch else rank
    if not follow:
        click.echo(logs.find(run.path, attempt=attempt, source=source).read_text(errors="replace"), nl=False)
        return
    for line in logs.follow(run.path, source=source, attempt=attempt, active=watch.active(run)):
        click.echo(line)


@_of_cluster
@cli.command()
@click.argument("names", metavar="RUN...", nargs=-1, required=True)
def cancel(names: tuple[str, ...], cluster: str | None) -> None:
    """End runs: names, prefixes or job ids."""
    from launcher import runs, screen

    roots = _roots(cluster)
    for run in [runs.find(name, roots) for name in names]:
        if runs.cancel(run):
            screen.done(f"{run.name} is told to end")
        else:
            screen.say(f"{run.name} has ended already")


# --- clusters ----------------------------------------------------------------------------------------------------


@cli.group(invoke_without_command=True)
@click.pass_context
def clusters(ctx: click.Context) -> None:
    """List cluster profiles, or show one."""
    if ctx.invoked_subcommand is None:
        ctx.invoke(clusters_list)


@clusters.command("list")
def clusters_list() -> None:
    """Every profile that --cluster can name."""
    from launcher import overview

    overview.clusters()


@clusters.command("show")
@click.argument("name", required=False)
def clusters_show(name: str | None) -> None:
    """A profile as it is understood: variables expanded, defaults filled in."""
    import yaml

    from launcher import profile, screen

    path = profile.find(name or profile.default())
    shown = profile.read(path).model_dump(mode="json", exclude_none=True)
    click.echo(f"# {path}", err=True)
    screen.code(yaml.safe_dump(shown, sort_keys=False, allow_unicode=True), "yaml")


@cli.group()
def sandbox() -> None:
    """A private, real Slurm on this machine.

    Its profile is the cluster `sandbox`. It runs as you, in a folder and on ports of its own, and touches no other.
    """


@sandbox.command("up")
@click.option("--nodes", type=click.IntRange(1, 64), default=4, show_default=True, help="Nodes to pretend.")
@click.option("--gpus", type=click.IntRange(0, 16), default=8, show_default=True, help="GPUs a node to pretend.")
@click.option("--accounting/--no-accounting", default=None, help="sacct and accounts.  [default: if installed]")
def sandbox_up(nodes: int, gpus: int, accounting: bool | None) -> None:
    """Start it and wait until its nodes are idle."""
    from launcher import sandbox as private
    from launcher import screen
    from launcher.sandbox_config import Shape

    started = private.up(shape=Shape(nodes=nodes, gpus=gpus), accounting=accounting)
    screen.done(f"sandbox is up: {started.shape.nodes} nodes x {started.shape.gpus} GPUs")
    configuration = f"SLURM_CONF={started.folder}/slurm.conf"
    screen.facts(
        [
            ("accounts", "" if started.accounting else private.why_no_accounting(accounting)),
            ("use it", "mixlaunch finetune --cluster sandbox"),
            ("or", f"{configuration} sinfo"),
        ]
    )


@sandbox.command("down")
def sandbox_down() -> None:
    """End its jobs and daemons and remove its folder."""
    from launcher import sandbox as private
    from launcher import screen

    if private.down():
        screen.done("sandbox is gone")
    else:
        screen.say("there was no sandbox")


@sandbox.command("status")
def sandbox_status() -> None:
    """Say whether it is up and what its nodes do; exits with 1 when it isn't."""
    from launcher import sandbox as private
    from launcher import screen

    found = private.status()
    screen.say(f"sandbox is {found.state}: {found.folder}")
    screen.facts([("dead", ", ".join(found.dead)), *found.nodes.items()])
    sys.exit(0 if found.state == "up" else 1)


def main() -> None:
    """The console script."""
    try:
        cli(prog_name="mixlaunch")
    except KeyboardInterrupt:
        sys.exit(130)
