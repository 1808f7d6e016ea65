"""The commands: parse, call, print. What takes time to import is imported inside the command that needs it.

Exit codes: 0 done, 2 the user's mistake, 1 anything that failed around them, 130 interrupted.
"""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from launcher.cli.clusters import clusters
from launcher.cli.nodes import nodes
from launcher.cli.options import FORCE, HELP, PARALLEL, SectionedOption, job_command
from launcher.cli.pipeline import pipeline_command
from launcher.cli.plan import plan_command
from launcher.cli.plot import plot
from launcher.cli.runs import RUN_COMMANDS, roots_of
from launcher.cli.sandbox import sandbox
from launcher.errors import MixlaunchError, of_system

if TYPE_CHECKING:
    from launcher.planning.jobs import JobPlan

SECTIONS = {
    "The chain": ("download", "prepare", "convert", "finetune", "serve", "chat", "pipeline"),
    "Before you submit": ("plan", "export", "rehearse", "clusters", "sandbox"),
    "Your runs": ("status", "logs", "plot", "explain", "resume", "retry", "cancel", "nodes"),
    "To see it all": ("demo", "completion"),
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
        except BrokenPipeError:
            raise  # click ends quietly
        except KeyboardInterrupt:
            sys.exit(130)  # click would say 1
        except (OSError, UnicodeEncodeError) as error:
            raise Failure(of_system(error)) from error

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


def _start(
    plan: "JobPlan",
    *,
    dry_run: bool,
    wait: bool | None,
    follow: bool,
    exclude: tuple[str, ...],
    health_check: bool,
    force: bool = False,
    tunnel: bool = False,
) -> None:
    """Submit `plan`; on this machine a job is watched to its end, on a cluster it is left to the queue."""
    from launcher.cluster import bad_nodes
    from launcher.planning import describe

    plan = bad_nodes.keep_off(plan, exclude, health_check=health_check)
    if dry_run:
        _show(plan)
        describe.require(plan, force=force)
        return
    from launcher.cli import watch
    from launcher.planning import inputs

    describe.require(plan, force=force)
    inputs.require(plan)
    _note(plan)
    sys.exit(watch.submit(plan, asked=tuple(sys.argv[1:]), wait=wait, follow=follow, through_tunnel=tunnel))


def _note(plan: "JobPlan") -> None:
    """What stops nothing and is worth knowing before the queue tells it, on stderr."""
    from launcher.planning import describe

    for remark in describe.remarks(plan):
        click.echo(f"note: {remark}", err=True)


def _show(plan: "JobPlan", *, script: bool = True) -> None:
    """What a submission would do, without doing any of it."""
    from launcher.common import terminal
    from launcher.planning import describe
    from launcher.runs import record
    from launcher.script import lint, render

    run_dir = record.new_path(plan)
    text = render.render(plan, str(run_dir))
    lint.check(text, plan.profile.slurm_version)
    terminal.heading(f"{plan.job}: what would run")
    told = describe.facts(plan.outlook) if plan.outlook else []
    terminal.facts([*describe.plan_facts(plan), *told, ("run", str(run_dir) if script else "")])
    terminal.heading("config.yaml")
    terminal.code(render.config_text(plan), "yaml")
    if script:
        terminal.heading("job.sbatch")
        terminal.code(text, "bash")


def _download(plan: "JobPlan", *, as_job: bool, dry_run: bool, **how: Any) -> None:
    """Downloads need the network, which compute nodes often lack: they run here unless told otherwise."""
    if as_job:
        _start(plan, dry_run=dry_run, **how)
    elif dry_run:
        _show(plan, script=False)
    else:
        from launcher.submit import foreground

        sys.exit(foreground.run(plan))


START = (
    SectionedOption(
        ["--dry-run"], section="Job", is_flag=True, help="Show script, files and layout; touch nothing."
    ),
    SectionedOption(
        ["--wait/--no-wait"],
        section="Job",
        default=None,
        help="Wait for the end.  [default: on this machine; elsewhere `serve` waits until it is ready]",
    ),
    SectionedOption(["--follow"], section="Job", is_flag=True, help="Wait, and print rank 0's log."),
    SectionedOption(
        ["--exclude"], section="Job", multiple=True, metavar="NODES", help="Leave them out; repeat it."
    ),
    SectionedOption(
        ["--health-check"], section="Job", is_flag=True, help="Look at every node before the ranks start."
    ),
)
TUNNEL = SectionedOption(
    ["--tunnel"], section="Job", is_flag=True, help="Wait, then let a port of this machine lead to it until Ctrl-C."
)
AS_JOB = SectionedOption(["--as-job"], section="Job", is_flag=True, help="As a job, not here in the foreground.")

cli.add_command(job_command("download", _download, more=(*START, AS_JOB)))
UNDER = {"convert": (job_command("verify", _start, more=START),)}
for _job in ("prepare", "convert", "finetune", "serve", "tiny"):
    more = (*START, *((FORCE,) if _job in PARALLEL else ()), *((TUNNEL,) if _job == "serve" else ()))
    cli.add_command(job_command(_job, _start, more=more, under=UNDER.get(_job, ())))
cli.commands["tiny"].hidden = True


@cli.group()
def export() -> None:
    """Print a job's script, self-contained, or make a folder of it.

    Plain `sbatch` runs it; all it needs is a Python with megatron_mixtral where the ranks run.
    """


def _export(plan: "JobPlan", *, bundle_dir: Path | None) -> None:
    from launcher.script import lint, render

    if bundle_dir is not None:
        from launcher.common import terminal
        from launcher.script import bundle

        written = bundle.write(plan, bundle_dir, asked=sys.argv[1:])
        terminal.done(f"{', '.join(path.name for path in written)} in {bundle_dir}")
        return
    script = render.render(plan)
    lint.check(script, plan.profile.slurm_version)
    click.echo(script, nl=False)
    _note(plan)


BUNDLE = SectionedOption(
    ["--bundle", "bundle_dir"],
    section="Job",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Make a folder of it: script, config.yaml, README.",
)
for _job in HELP:
    export.add_command(job_command(_job, _export, more=(BUNDLE,)))


@cli.group()
def rehearse() -> None:
    """Run a job's script on a private Slurm first.

    The very script the cluster would get, with its topology: rendezvous, layout, data, three steps, an early
    warning, a save and a resume, with a tiny model on this machine's processors.
    """


def _rehearse(plan: "JobPlan", *, keep: bool) -> None:
    from launcher.sandbox import rehearse as rehearsing

    _note(plan)
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
    from launcher.cli import chat as chatting
    from launcher.runs import servers, tunnel

    with tunnel.if_needed(servers.find(server, roots_of(None))) as found:
        chatting.run(found, prompt=prompt, system=system, raw=raw, settings=chatting.Settings(**how))


@cli.command()
@click.option("--text", type=click.Path(path_type=Path), help="Text of your own.  [default: Python's docstrings]")
@click.option("--folder", type=click.Path(path_type=Path), default=Path("demo"), help="Where to.  [default: demo]")
def demo(text: Path | None, folder: Path) -> None:
    """Run the whole chain on this machine, small.

    It needs no Slurm and no GPU: it makes a small Mixtral, prepares text, converts, trains on 4 processes, converts
    back, serves and asks.
    """
    from launcher.cli import demo as whole_chain

    whole_chain.run(text, folder)


# --- commands of other modules -----------------------------------------------------------------------------------

for _command in (pipeline_command, plan_command, *RUN_COMMANDS, plot, nodes, clusters, sandbox):
    cli.add_command(_command)


@cli.command("completion")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def shell_completion(shell: str) -> None:
    """Print what makes a shell complete words.

    For bash: eval "$(mixlaunch completion bash)" in ~/.bashrc. For zsh the same with zsh in ~/.zshrc. For fish:
    mixlaunch completion fish > ~/.config/fish/completions/mixlaunch.fish
    """
    from launcher.cli import completion

    click.echo(completion.script(shell, cli), nl=False)


def main() -> None:
    """The console script."""
    if "_MIXLAUNCH_COMPLETE" in os.environ:
        from launcher.cli import completion

        completion.equip(cli)
    try:
        cli(prog_name="mixlaunch")
    except OSError as error:  # stdout itself: a full disk
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or the interpreter would try once more
        Failure(of_system(error)).show()
        sys.exit(1)
