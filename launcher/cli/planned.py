"""Turns typed options into a plan. It writes nothing. A model behind a login node is read there."""

from typing import Any

import click

from launcher.cli.options import AXES, PARALLEL, setting_key
from launcher.cluster import profile
from launcher.cluster.profile import ClusterProfile
from launcher.planning import describe, inputs, jobs, uploads
from launcher.planning.jobs import JobPlan
from launcher.planning.settings import MODEL, SETTINGS


def planned(job: str, typed: dict[str, Any]) -> JobPlan:
    """The plan of `job` for the options as click read them."""
    cluster, options = understood(job, typed)
    return jobs.PLANS[job](cluster, **options)


def understood(job: str, typed: dict[str, Any]) -> tuple[ClusterProfile, dict[str, Any]]:
    """The profile, and the other arguments of the function that plans `job`."""
    cluster = profile.load(typed.pop("cluster"), typed.pop("override"))
    given = {name: value for name, value in typed.items() if value is not None}
    uploads.require_whole_paths(cluster, given)
    if "files" in given:
        given["files"] = uploads.redirect(cluster, given["files"])
    if given.get("chat_template") not in (None, jobs.MISTRAL):
        given["chat_template"] = uploads.redirect(cluster, (given["chat_template"],))[0]
    asked = {name: given.pop(name) for name in ("name", "nodes", "time") if name in given}
    options: dict[str, Any] = {
        "ask": jobs.Ask(secrets=given.pop("env"), **asked),
        "values": {s.name: given.pop(setting_key(s)) for s in SETTINGS[job] if setting_key(s) in given},
    }
    if job == "serve":
        given["model"] = inputs.servable(cluster, given.get("model", MODEL))
    if job in PARALLEL:
        options["axes"] = jobs.Axes(**{axis: given.pop(short) for axis, short, _ in AXES if short in given})
        options["shape"] = inputs.shape(cluster, given.get("model", MODEL))
    return cluster, options | given


def print_remarks(plan: JobPlan, head: str = "") -> None:
    """Print to stderr what a user should know before the job waits in the queue. Nothing is refused."""
    for remark in describe.remarks(plan):
        click.echo(f"note: {head}{remark}", err=True)
