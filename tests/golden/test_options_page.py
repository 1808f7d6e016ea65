"""docs/options.md says what the fields of each job's configuration say.

Record it anew with `MIXLAUNCH_RECORD=1 python -m pytest tests/golden`, then read the difference.
"""

import os
from dataclasses import MISSING
from pathlib import Path

from launcher.cli.options import plain
from megatron_mixtral.spec.jobs import JOBS, flag_of
from megatron_mixtral.spec.layout import Layout
from megatron_mixtral.spec.options import options

PAGE = Path(__file__).parent.parent.parent / "docs" / "options.md"
RECORD = "MIXLAUNCH_RECORD"
HEAD = """# Every option of every job

This page is made of the fields in `megatron_mixtral/spec/jobs.py`. Don't edit it: change a field, then run
`MIXLAUNCH_RECORD=1 python -m pytest tests/golden`.

*Option* is what the command line takes. *Key* is its name in a job's `config.yaml`, which `mixlaunch` writes into
the run directory. A key that must be given there has a default on the command line if `--help` names one. Both
refuse a value that is out of its range, and an option that contradicts another one.
"""
COLUMNS = "| option | key | values | default | what it does |\n|---|---|---|---|---|\n"


def test_the_page_says_what_the_fields_say():
    page = "\n".join([HEAD, *(section(name, kind) for name, kind in (JOBS | {"layout": Layout}).items())])
    if os.environ.get(RECORD):
        PAGE.write_text(page)
    assert PAGE.read_text() == page, f"{PAGE} is out of date: {RECORD}=1 python -m pytest tests/golden"


def section(name, kind):
    rows = "".join(f"| {' | '.join(cells(option, kind))} |\n" for option in options(kind).values())
    return f"## {name}\n\n{kind.__doc__}\n\n{COLUMNS}{rows}"


def cells(option, job):
    """One row of the table."""
    values = ", ".join(f"`{choice}`" for choice in option.choices) or option.span
    needs = f" It needs `{flag_of(option.needs[0], job)}`." if option.needs else ""
    return f"`{flag(option)}`", f"`{option.name}`", values or kind_of(option), default(option), option.help + needs


def flag(option):
    off = option.kind is bool and option.default and option.own
    return f"{option.flag}`, `--no-{option.flag.removeprefix('--')}" if off else option.flag


def kind_of(option):
    return {bool: "yes or no", str: "text", list: "list"}.get(option.kind, "see [layout](#layout)")


def default(option):
    if option.default is MISSING:
        return "must be given"
    if option.default in (None, "") or option.kind is Layout:
        return ""
    return {True: "yes", False: "no"}[option.default] if option.kind is bool else f"`{plain(option.default)}`"
