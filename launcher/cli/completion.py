"""Shell completion: clusters, runs, keys of a profile, and everything that click completes itself.

It must be fast: profiles are read but not validated, and no network is used.
"""

import functools
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType

import click
from click.shell_completion import BashComplete, CompletionItem, FishComplete, ShellComplete, ZshComplete

from launcher.cluster import catalog, yaml_layers
from launcher.common import printable
from launcher.errors import MixlaunchError
from megatron_mixtral.spec import rundir

SHELLS: dict[str, type[ShellComplete]] = {"bash": BashComplete, "zsh": ZshComplete, "fish": FishComplete}
PROGRAM = "mixlaunch"
ANSWER = "_MIXLAUNCH_COMPLETE"
MOST = 50  # runs; the newest

Offer = Callable[[click.Context, click.Parameter, str], list[CompletionItem]]


def _offer(proposals: Callable[[str], Iterable[str]]) -> Offer:
    """The proposals that begin with what was typed. Errors are left to the command itself to report."""

    @functools.wraps(proposals)
    def offer(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        try:
            return [CompletionItem(p) for p in proposals(incomplete) if p.startswith(incomplete)]
        except (MixlaunchError, OSError):
            return []

    return offer


def clusters(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Profiles by name. A path is completed by the shell itself."""
    return _profiles(ctx, param, incomplete) or [CompletionItem(incomplete, type="file")]


@_offer
def _profiles(incomplete: str) -> Iterable[str]:
    return sorted(catalog.available())


@_offer
def runs(incomplete: str) -> Iterable[str]:
    """Runs by name, the newest first."""
    newest = sorted(
        (record for folder in _runs_folders() for record in folder.glob(f"{glob(incomplete)}*/{rundir.RECORD}")),
        key=lambda record: record.parent.stat().st_mtime,
        reverse=True,
    )
    names = (record.parent.name for record in newest[:MOST])
    return dict.fromkeys(name for name in names if printable.line(name) == name)  # the shell prints it as it is


@_offer
def keys(incomplete: str) -> Iterator[str]:
    """Keys of a profile, for -o."""
    keys_at = _profile().keys_at
    for key in keys_at(()):
        nested = keys_at((key,))
        yield from (f"{key}.{name}=" for name in nested)
        if not nested:
            yield f"{key}{'.' if key in ('environment', 'extra', 'templates') else '='}"


@_offer
def variables(incomplete: str) -> Iterable[str]:
    """Names of the environment, for --env."""
    return sorted(os.environ)


def _profile() -> ModuleType:
    """It imports pydantic, which `--help` and most of TAB do without."""
    from launcher.cluster import profile

    return profile


def glob(text: str) -> str:
    """`text` as a pattern that matches only itself."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in text)


def _runs_folders() -> list[Path]:
    """The runs folder of every profile that reads, as far as this machine sees them."""
    folders = []
    for path in catalog.available().values():
        try:
            values = yaml_layers.read(path).values
            if (values.get("login") or {}).get("host"):
                folders.append(_profile().read(path).runs_here)
            else:
                folders.append(Path(os.path.expanduser(str(values["paths"]["runs"]))))
        except (MixlaunchError, KeyError, TypeError, AttributeError):
            continue  # `clusters` shows what is wrong with it
    return list(dict.fromkeys(folders))


def script(shell: str, command: click.Command) -> str:
    """The script that the shell evaluates."""
    return SHELLS[shell](command, {}, PROGRAM, ANSWER).source()


@click.command("completion")
@click.argument("shell", type=click.Choice(list(SHELLS)))
@click.pass_context
def shell_completion(ctx: click.Context, shell: str) -> None:
    """Print a script that completes commands in a shell.

    For bash: eval "$(mixlaunch completion bash)" in ~/.bashrc. For zsh the same with zsh in ~/.zshrc. For fish:
    mixlaunch completion fish > ~/.config/fish/completions/mixlaunch.fish
    """
    click.echo(script(shell, ctx.find_root().command), nl=False)


COMMANDS = (shell_completion,)
