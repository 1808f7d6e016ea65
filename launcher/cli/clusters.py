"""The commands about cluster profiles.

They read profiles and ask Slurm; none of them submits anything.
"""

import dataclasses
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import yaml

from launcher import templates
from launcher.cli import completion
from launcher.cli.options import override
from launcher.cluster import catalog, discover, json_schema, profile
from launcher.cluster.profile import ClusterProfile
from launcher.common import printable, terminal
from launcher.diagnose import profile_check
from launcher.diagnose.profile_check import ProfileFinding
from launcher.errors import MixlaunchError

WORDS = {"ok": ("", "ok"), "failed": ("red", "failed"), "unknown": ("yellow", "can't tell")}
COLUMNS = ("CLUSTER", "SCHEDULER", "GPUS A NODE", "CONTAINER", "DESCRIPTION")

JSON = click.Option(["--json", "as_json"], is_flag=True, help="For programs.")
PROFILE = click.argument("name", metavar="[NAME|FILE.yaml]", required=False, shell_complete=completion.clusters)


@click.group(invoke_without_command=True)
@click.pass_context
def clusters(ctx: click.Context) -> None:
    """List cluster profiles, show, check or make one."""
    if ctx.invoked_subcommand is None:
        ctx.invoke(clusters_list, as_json=False)


@clusters.command("list", params=[JSON])
def clusters_list(as_json: bool) -> None:
    """Every profile that --cluster can name."""
    if as_json:
        terminal.as_json(_listed())
    else:
        _table()


@clusters.command("show", params=[override(), JSON])
@PROFILE
def clusters_show(name: str | None, override: tuple[str, ...], as_json: bool) -> None:
    """Show a profile with parents merged, variables expanded and defaults filled in."""
    path, cluster = _read(name, override)
    if as_json:
        terminal.as_json(_dumped(cluster))
        return
    printable.out(f"# {path}", err=True)
    terminal.code(_text(cluster), "yaml")


@clusters.command("check", params=[override(), JSON])
@PROFILE
def clusters_check(name: str | None, override: tuple[str, ...], as_json: bool) -> None:
    """Compare a profile with the live cluster.

    It checks partition, account, QoS, reservation, features, node shape, time limit, version, image and paths. Then
    it runs sbatch --test-only for a whole node. Exits with 2 if something in the profile is wrong, and with 1 if
    Slurm can't be asked.
    """
    path, cluster = _read(name, override)
    findings = []
    for finding in profile_check.check(cluster):
        findings.append(finding)
        if not as_json:
            _show_finding(finding)
    wrong = any(finding.verdict == "failed" for finding in findings)
    if as_json:
        found = [dataclasses.asdict(finding) for finding in findings]
        terminal.as_json({"cluster": cluster.name, "file": str(path), "ok": not wrong, "findings": found})
    sys.exit(2 if wrong else 0)


@clusters.command("schema")
def clusters_schema() -> None:
    """Print the JSON schema of a profile, for editors.

    Begin a profile with `# yaml-language-server: $schema=FILE`. The editor then completes and checks keys as you
    type.
    """
    terminal.as_json(json_schema.schema())


@clusters.command("template")
@click.argument("part", required=False)
def clusters_template(part: str | None) -> None:
    """Print a part of the script's template. To change it, name your copy under `templates:` in a profile.

    Without PART, print the names of all parts.
    """
    printable.out(templates.source(part) if part else "\n".join(templates.names()), end="" if part else "\n")


@clusters.command("new")
@click.argument("name", required=False)
@click.option("--output", type=click.Path(path_type=Path), metavar="FILE.yaml", help="Where to.")
def clusters_new(name: str | None, output: Path | None) -> None:
    """Write a profile for the cluster of this login node.

    It asks Slurm. What Slurm can't tell becomes a comment to fill in. The default NAME is the cluster's own name.
    The file goes into the folder of your own profiles. An existing file is never changed.
    """
    written = discover.write(name, output)
    terminal.done(f"{written} is written; read it, then run: mixlaunch clusters check {discover.called(written)}")


def _every() -> Iterator[tuple[str, Path, ClusterProfile | MixlaunchError]]:
    """Name, file and profile of each that --cluster can name; for a broken profile, its error instead."""
    for name, path in sorted(catalog.available().items()):
        try:
            yield name, path, profile.read(path)
        except MixlaunchError as error:
            yield name, path, error


def _table() -> None:
    """One line a profile; a broken one says what is wrong with it."""
    rows = []
    for name, _, cluster in _every():
        if isinstance(cluster, MixlaunchError):
            rows.append((name, "", "", "", str(cluster).splitlines()[0]))
            continue
        node = cluster.node
        memory = f" x {node.gpu_memory_gb:g} GB" if node.gpu_memory_gb else ""
        gpus = f"{node.gpus}{memory}" if node.gpus else ""
        default = "*" if name == catalog.default() else ""
        rows.append((name + default, cluster.scheduler, gpus, cluster.container.runtime, cluster.description))
    terminal.table(COLUMNS, rows)


def _listed() -> list[dict[str, Any]]:
    """The same for programs: a profile or an error each."""
    found = []
    for name, path, cluster in _every():
        entry = {"name": name, "file": str(path), "default": name == catalog.default()}
        if isinstance(cluster, MixlaunchError):
            found.append(entry | {"error": str(cluster)})
        else:
            found.append(entry | {"profile": _dumped(cluster)})
    return found


def _text(cluster: ClusterProfile) -> str:
    """A profile as YAML that reads back as the same profile."""
    return yaml.safe_dump(_dumped(cluster), sort_keys=False, allow_unicode=True)


def _dumped(cluster: ClusterProfile) -> dict[str, Any]:
    """A profile's values with defaults filled in; empty values are left out."""
    return cluster.model_dump(mode="json", exclude_none=True)


def _show_finding(found: ProfileFinding) -> None:
    """One line a question."""
    style, word = WORDS[found.verdict]
    terminal.say(f"{word:<11}{found.what}: {found.why}", style)


def _read(name: str | None, overrides: Sequence[str] = ()) -> tuple[Path, ClusterProfile]:
    """The file and the profile of a command's cluster."""
    path = catalog.find(name or catalog.default())
    return path, profile.read(path, overrides)


COMMANDS = (clusters,)
