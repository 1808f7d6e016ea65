"""The top of the command line: the commands, their purpose, and how errors are printed.

A command's module is imported when the command is used. So help is fast, and modules import at their top. Exit
codes: 0 done, 2 the user's mistake, 1 anything that failed around them, 130 interrupted.
"""

import importlib
import os
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import click
from click.shell_completion import CompletionItem

from launcher.common import printable
from launcher.errors import MixlaunchError, of_system

# Each command's module in launcher.cli, and the first line of its help.
SECTIONS = {
    "The chain": {
        "download": ("jobs", "Fetch a model from the hub."),
        "prepare": ("jobs", "Tokenize text for training."),
        "convert": ("jobs", "Convert weights, to Megatron's layout or back."),
        "finetune": ("jobs", "Train on prepared data."),
        "serve": ("jobs", "Serve a model over HTTP."),
        "chat": ("chat", "Talk to a server."),
        "pipeline": ("pipeline", "Download, convert, train and export in one go."),
    },
    "Before you submit": {
        "plan": ("plan", "Say whether a job fits, before the queue does."),
        "export": ("export", "Print a job's self-contained script, or write a folder with it."),
        "tokens": ("tokens", "Show a conversation as a model's tokens."),
        "rehearse": ("rehearse", "Run a job's script on a private Slurm first."),
        "clusters": ("clusters", "List cluster profiles, show, check or make one."),
        "sandbox": ("sandbox", "Run a private, real Slurm on this machine."),
    },
    "Your runs": {
        "status": ("status", "Show what runs are doing."),
        "logs": ("logs", "Print a run's log."),
        "plot": ("logs", "Draw a run's loss and expert load."),
        "explain": ("explain", "Say why a run ended, or what it is doing."),
        "resume": ("runs", "Continue a run that ended before it was done."),
        "retry": ("runs", "Run a failed run again."),
        "cancel": ("runs", "End runs: names, prefixes or job ids."),
        "nodes": ("nodes", "Keep jobs away from bad nodes."),
    },
    "To see it all": {
        "demo": ("demo", "Run the whole chain on this machine with a small model."),
        "completion": ("completion", "Print a script that completes commands in a shell."),
    },
}
SHOWN = {name: row for section in SECTIONS.values() for name, row in section.items()}
MODULES = {name: module for name, (module, _) in SHOWN.items()} | {"tiny": "jobs"}


class Failure(click.ClickException):
    """Prints one of our errors: message and exit code, without a traceback."""

    def __init__(self, error: MixlaunchError) -> None:
        super().__init__(str(error))
        self.exit_code = error.exit_code  # type: ignore[misc]  # click reads it here, and declares it for the class

    def show(self, file: Any = None) -> None:
        label = click.style("error:", fg="red", bold=True)
        color = False if os.environ.get("NO_COLOR") else None
        click.echo(f"{label} {printable.clean(self.message)}", file=file or sys.stderr, color=color)


class Commands(Mapping[str, click.Command]):
    """The commands by name; looking one up imports its module, which has it in COMMANDS."""

    def __getitem__(self, name: str) -> click.Command:
        found: tuple[click.Command, ...] = importlib.import_module(f"launcher.cli.{MODULES[name]}").COMMANDS
        return next(command for command in found if command.name == name)

    def __iter__(self) -> Iterator[str]:
        return iter(MODULES)

    def __len__(self) -> int:
        return len(MODULES)


class LazyGroup(click.Group):
    """The top level: it lists commands without importing them, and turns our errors into exit codes."""

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
        for title, rows in SECTIONS.items():
            with formatter.section(title):
                formatter.write_dl([(name, line) for name, (_, line) in rows.items()])

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        found = [
            CompletionItem(name, help=line) for name, (_, line) in SHOWN.items() if name.startswith(incomplete)
        ]
        return [*found, *click.Command.shell_complete(self, ctx, incomplete)]


@click.group(
    cls=LazyGroup,
    commands=Commands(),
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(package_name="mixlaunch")
def cli() -> None:
    """From a Hugging Face Mixtral to a fine-tuned, served one on any Slurm cluster.

    Every command of the chain takes --cluster NAME and --dry-run. `mixlaunch demo` runs the whole chain on this
    machine.
    """


def main() -> None:
    """The console script."""
    try:
        cli(prog_name="mixlaunch")
    except OSError as error:  # stdout itself: a full disk
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # otherwise the interpreter would write it again
        Failure(of_system(error)).show()
        sys.exit(1)
