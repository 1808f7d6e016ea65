"""Turns typed options into a plan. It writes nothing. A model behind a login node is read there."""

from collections.abc import Iterable
from typing import Any

from launcher.cli.options import PARALLEL, setting_key
from launcher.cluster import profile
from launcher.cluster.profile import ClusterProfile
from launcher.common import printable
from launcher.planning import describe, inputs, jobs, uploads
from launcher.planning.plan import Ask, Axes, JobPlan
from megatron_mixtral.spec.jobs import JOBS, MISTRAL
from megatron_mixtral.spec.layout import Layout
from megatron_mixtral.spec.options import Option, options, own
from megatron_mixtral.spec.shape import MODEL


def planned(job: str, typed: dict[str, Any]) -> JobPlan:
    """The plan of `job` for the options as click read them."""
    cluster, arguments = understood(job, typed)
    return jobs.PLANS[job](cluster, **arguments)


def understood(job: str, typed: dict[str, Any]) -> tuple[ClusterProfile, dict[str, Any]]:
    """The profile, and the other arguments of the function that plans `job`."""
    cluster = profile.load(typed.pop("cluster"), typed.pop("override"))
    given = {name: value for name, value in typed.items() if value is not None}
    uploads.require_whole_paths(cluster, given)
    if "files" in given:
        given["files"] = uploads.redirect(cluster, given["files"])
    values = _given(given, own(JOBS[job]))
    if values.get("chat_template") not in (None, MISTRAL):
        values["chat_template"] = uploads.redirect(cluster, (values["chat_template"],))[0]
    asked = {name: given.pop(name) for name in ("name", "nodes", "time") if name in given}
    arguments: dict[str, Any] = {"ask": Ask(secrets=given.pop("env"), **asked), "values": values}
    if job == "serve":
        given["model"] = inputs.servable(cluster, given.get("model", MODEL))
    if job in PARALLEL:
        arguments["axes"] = Axes(**_given(given, options(Layout).values()))
        arguments["shape"] = inputs.shape(cluster, given.get("model", MODEL))
    return cluster, arguments | given


def _given(typed: dict[str, Any], known: Iterable[Option]) -> dict[str, Any]:
    """What was typed for `known` options, by their fields; it is taken out of `typed`."""
    return {option.name: typed.pop(setting_key(option)) for option in known if setting_key(option) in typed}


def print_remarks(plan: JobPlan, head: str = "") -> None:
    """Print to stderr what a user should know before the job waits in the queue. Nothing is refused."""
    for remark in describe.remarks(plan):
        printable.out(f"note: {head}{remark}", err=True)
