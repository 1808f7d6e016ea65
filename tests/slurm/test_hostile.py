"""Hostile text in every field of every job: refused by name or intact in the running job, never run by a shell."""

import os
from pathlib import Path

import click
import pytest
import yaml
from hostile_texts import CANARY, FIELDS, HOSTILE, NAME, OF_PROFILE, fields, typed
from running import story, wait_until

from launcher.cli.main import cli
from launcher.cli.options import OptionType
from launcher.cli.planned import planned as plan_of
from launcher.cluster import yaml_layers
from launcher.errors import UsageError
from launcher.planning import jobs
from launcher.runs import record, states
from launcher.submit import start

SMALL = {  # one rank
    "convert": ["--processes", "1"],
    "verify": ["--processes", "1"],
    "finetune": ["--pp", "1", "--ep", "1", "--global-batch", "1"],
    "serve": ["--pp", "1"],
}
TELL = 'cat "$MIXLAUNCH_RUN/config.yaml" >"$MIXLAUNCH_RUN/seen"; env -0 >"$MIXLAUNCH_RUN/env"'
ARGUMENTS = ("REPO", "FILES", "DIR")
# Beside the job's own fields: where text of a profile arrives.
OF_RUN = ("environment.X", "comment", "extra.mail-user", "paths.runs", "python")


def planned(job: str, words: list[str]) -> jobs.JobPlan:
    """What a command line asks for; whatever is wrong with it as the one error."""
    command = cli.commands["export"].commands[job]
    try:
        typed = command.make_context(job, words).params
        del typed["bundle_dir"]
        return plan_of(job, typed)
    except click.UsageError as error:
        raise UsageError(error.format_message()) from None


def test_every_option_that_takes_text_is_tried():
    for job in jobs.PLANS:
        text = set()
        for parameter in cli.commands["export"].commands[job].params:
            kind = parameter.type
            free = isinstance(kind, click.types.StringParamType) or (
                isinstance(kind, OptionType) and kind.option.kind is str
            )
            if free and parameter.name not in ("cluster", "override", "env"):
                text.add(
                    str(parameter.metavar).strip("[].")
                    if isinstance(parameter, click.Argument)
                    else parameter.opts[0]
                )
        assert text == {option for option, *_ in fields(job)}, job


@pytest.fixture
def tried(cluster, tmp_path):
    """Plan a job with values in fields; what is refused is refused by its name, and left out of what comes back."""
    path = tmp_path / "cluster.yaml"
    values = cluster.model_dump(mode="json", exclude_none=True)
    path.write_text(
        yaml.safe_dump(values | {"node": {**values["node"], "gpus": 1}, "python": str(tmp_path / "tell")})
    )
    (tmp_path / "tell").write_text(f"#!/bin/bash\n{TELL}\n")
    (tmp_path / "tell").chmod(0o755)

    def words(job: str, chosen: dict[str, str]) -> list[str]:
        found = ["--cluster", str(path), *SMALL.get(job, [])]
        arguments = [chosen[name] for name in ARGUMENTS if name in chosen]
        needed = {"prepare": "FILES", "tiny": "--output"}.get(job)
        if needed and needed not in chosen:
            chosen = {**chosen, **({} if needed in ARGUMENTS else {needed: "/x"})}
            arguments += ["/x"] if needed in ARGUMENTS else []
        for name, value in chosen.items():
            if "." in name or name in OF_PROFILE:
                found += ["-o", f"{name}={value}"]
            elif name not in ARGUMENTS:
                found += [f"{name}={value}"]
        return [*found, "--", *arguments]

    def plan(job: str, chosen: dict[str, str]) -> tuple[jobs.JobPlan, dict[str, str]]:
        taken = accepted(job, chosen)
        return planned(job, words(job, taken)), taken

    def accepted(job: str, chosen: dict[str, str]) -> dict[str, str]:
        taken = {}
        for name, value in chosen.items():
            refusal = ""
            try:
                planned(job, words(job, {name: value}))
            except UsageError as error:
                refusal = str(error)
            assert not refusal or name in refusal, f"{name}={value!r}: {refusal}"
            if not refusal:
                taken[name] = value
        return taken

    plan.accepted = accepted
    return plan


def test_what_is_refused_is_refused_by_name(tried):
    for job in FIELDS:
        for option, kind, _ in fields(job):
            for value in HOSTILE:
                tried.accepted(job, {option: typed(option, kind, value, "/shared")})
    for key in OF_PROFILE:
        for value in HOSTILE:
            tried.accepted("tiny", {key: value})


def hand(job: str, number: int, folder: Path) -> dict[str, str]:
    """One hostile value for each field; the next hand deals each field the next value."""
    dealt = {}
    for place, (option, kind, _) in enumerate(fields(job)):
        value = HOSTILE[(number + place) % len(HOSTILE)]
        if option not in ("--name", "--time"):  # tried alone above; two of them only say less
            dealt[option] = typed(option, kind, value, str(folder))
    if job == "verify":  # one or the other
        dealt.pop("--model" if number % 2 else "DIR")
    for place, key in enumerate(OF_RUN):
        value = HOSTILE[(number + 7 * place) % len(HOSTILE)]
        dealt[key] = value if key in ("environment.X", "comment", "extra.mail-user") else f"{folder}/{key}/{value}"
    return dealt


def prepare(dealt: dict[str, str], tell: Path) -> None:
    """The interpreter with the hostile name is there, if a file can have it."""
    path = Path(dealt["python"])
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            path.symlink_to(tell)
    except (OSError, ValueError):
        pass


def arrived(run: record.Run, job: str, taken: dict[str, str]) -> None:
    """Everything that was taken is in the running job what it was when typed."""
    config = yaml.safe_load((run.path / "seen").read_text())
    for option, kind, key in fields(job):
        if option in taken and key and (kind != NAME or option == "REPO"):
            value = taken[option]
            expected = os.path.normpath(value) if kind == "path" else value
            found = config[key][0] if key == "inputs" else config.get(key, "")
            assert found == expected or (kind == "text" and not value), (option, value)
    if "environment.X" in taken:
        environment = dict(item.split("=", 1) for item in (run.path / "env").read_text().split("\0") if "=" in item)
        assert environment["X"] == expanded(taken["environment.X"])


def expanded(value: str) -> str:
    """As a profile means it."""
    return yaml_layers.REFERENCE.sub(lambda match: os.environ[match["braced"] or match["plain"]], value)


def run_hands(hands: list[tuple[str, int]], tried, tmp_path: Path) -> None:
    started = []
    for job, number in hands:
        dealt = hand(job, number, tmp_path / "in")
        prepare(dealt, tmp_path / "tell")
        plan, taken = tried(job, dealt)
        if "python" in taken and not os.path.isfile(plan.profile.python):
            plan, taken = tried(job, {name: value for name, value in dealt.items() if name != "python"})
        started.append((job, taken, start.run(plan)))
    every = [run for _, _, run in started]
    wait_until(lambda: not any(state.active for state in states.of_runs(every).values()), 240)
    told = states.of_runs(every)
    for job, taken, run in started:
        assert told[run.path].state == "COMPLETED", f"{job} {taken}{story(run)}"
        arrived(run, job, taken)
    assert not list(tmp_path.rglob(CANARY))


def test_what_is_taken_arrives_in_the_running_job(tried, tmp_path):
    names = list(FIELDS)
    run_hands([(names[number % len(names)], number) for number in range(len(HOSTILE))], tried, tmp_path)


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("job", FIELDS)
def test_every_value_in_every_field_arrives(job, tried, tmp_path):
    run_hands([(job, number) for number in range(len(HOSTILE))], tried, tmp_path)
