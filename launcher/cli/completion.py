"""What the shell offers on TAB: clusters, runs, keys of a profile, and all that click knows by itself.

It answers while somebody waits at a prompt: profiles are read, not validated, and nobody is asked over a network.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import click
from click.shell_completion import BashComplete, CompletionItem, FishComplete, ShellComplete, ZshComplete

from launcher.errors import MixlaunchError

SHELLS: dict[str, type[ShellComplete]] = {"bash": BashComplete, "zsh": ZshComplete, "fish": FishComplete}
PROGRAM = "mixlaunch"
ANSWER = "_MIXLAUNCH_COMPLETE"
MOST = 50  # runs; the newest


class _Offer(click.types.StringParamType):
    """Text for which there are proposals."""

    def proposals(self, incomplete: str) -> Iterator[str]:
        raise NotImplementedError

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        try:
            return [CompletionItem(p) for p in self.proposals(incomplete) if p.startswith(incomplete)]
        except (MixlaunchError, OSError):
            return []  # a prompt is no place for errors; the command itself tells them


class Cluster(_Offer):
    """Profiles by name; a path is the shell's own affair."""

    def proposals(self, incomplete: str) -> Iterator[str]:
        from launcher.cluster import catalog

        yield from sorted(catalog.available())

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        found = super().shell_complete(ctx, param, incomplete)
        return found or [CompletionItem(incomplete, type="file")]


class Run(_Offer):
    """Runs by name, the newest first."""

    def proposals(self, incomplete: str) -> Iterator[str]:
        newest = sorted(
            (record for folder in _runs_folders() for record in folder.glob(f"{glob(incomplete)}*/run.json")),
            key=lambda record: record.parent.stat().st_mtime,
            reverse=True,
        )
        yield from dict.fromkeys(record.parent.name for record in newest[:MOST])


class Key(_Offer):
    """Keys of a profile, for -o."""

    def proposals(self, incomplete: str) -> Iterator[str]:
        from launcher.cluster.profile import keys_at

        for key in keys_at(()):
            nested = keys_at((key,))
            yield from (f"{key}.{name}=" for name in nested)
            if not nested:
                yield f"{key}{'.' if key in ('environment', 'extra', 'templates') else '='}"


class Variable(_Offer):
    """Names of the environment, for --env."""

    def proposals(self, incomplete: str) -> Iterator[str]:
        yield from sorted(os.environ)


def glob(text: str) -> str:
    """`text` as a pattern that means itself."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in text)


def _runs_folders() -> list[Path]:
    """The runs folder of every profile that reads, as far as this machine sees them."""
    from launcher.cluster import catalog, yaml_layers

    folders = []
    for path in catalog.available().values():
        try:
            values = yaml_layers.read(path).values
            if (values.get("login") or {}).get("host"):
                from launcher.cluster import profile

                folders.append(profile.read(path).runs_here)
            else:
                folders.append(Path(os.path.expanduser(str(values["paths"]["runs"]))))
        except (MixlaunchError, KeyError, TypeError, AttributeError):
            continue  # `clusters` shows what is wrong with it
    return list(dict.fromkeys(folders))


def equip(command: click.Command) -> None:
    """Give every parameter of `command`, and of those below it, what can be offered for it."""
    for parameter in command.params:
        if parameter.name == "cluster":
            parameter.type = Cluster()
        elif parameter.name == "override":
            parameter.type = Key()
        elif parameter.name == "env":
            parameter.type = Variable()
        elif isinstance(parameter, click.Argument) and "RUN" in (parameter.metavar or ""):
            parameter.type = Run()
        elif isinstance(parameter, click.Argument) and "FILE.yaml" in (parameter.metavar or ""):
            parameter.type = Cluster()
    if isinstance(command, click.Group):
        for nested in command.commands.values():
            equip(nested)


def script(shell: str, command: click.Command) -> str:
    """What the shell is to evaluate."""
    return SHELLS[shell](command, {}, PROGRAM, ANSWER).source()
