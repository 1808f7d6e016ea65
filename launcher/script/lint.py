"""Checks a rendered script before it is submitted: valid bash, and directives where Slurm reads them.

`check(text)` raises one `LintError` with every finding; it runs on each submission and, in tests, on every job.
"""

import re
import subprocess
import unicodedata
from collections.abc import Iterator

from launcher.errors import UsageError
from launcher.slurm.sbatch_options import NEWEST, known_options

HEREDOC = re.compile(r"<<'(\w+)'")
CODE = ("END_OF_RANK", "END_OF_HEALTH")  # heredocs whose body is again a script


class LintError(UsageError):
    """A script that mustn't be submitted; the message has one line a finding."""


def check(text: str, slurm_version: str = NEWEST) -> None:
    """Raise `LintError` unless `text` is a script that can be submitted to a Slurm of this version."""
    if found := list(findings(text, slurm_version)):
        raise LintError("the script can't be run:\n" + "\n".join(f"  {line}" for line in found))


def findings(text: str, slurm_version: str = NEWEST) -> Iterator[str]:
    """Every finding, each beginning with the line it is on."""
    if not text.startswith("#!"):
        yield "line 1: sbatch needs a script that begins with `#!`"
    yield from _control_characters(text)
    yield from _directives(text, slurm_version)
    yield from _frozen_variables(text)
    yield from _syntax(text)


def _control_characters(text: str) -> Iterator[str]:
    for number, line in enumerate(text.split("\n"), 1):
        for character in line:
            if unicodedata.category(character) in ("Cc", "Zl", "Zp"):
                yield f"line {number}: control character {character!a}"


def _directives(text: str, slurm_version: str) -> Iterator[str]:
    """Slurm silently stops reading directives at the first line of code, and refuses unknown ones."""
    code = False
    known = known_options(slurm_version)
    for number, line in enumerate(text.split("\n"), 1):
        if not line.startswith("#SBATCH"):
            code = code or (bool(line.strip()) and not line.startswith("#"))
            continue
        match = re.fullmatch(r"#SBATCH --([a-z0-9-]+)(=.+)?", line)
        if code:
            yield f"line {number}: {line[:60]!r} comes after code, where Slurm ignores it"
        elif not match:
            yield f"line {number}: {line[:60]!r} isn't `#SBATCH --option=value`"
        elif match[1] not in known:
            yield f"line {number}: sbatch of Slurm {slurm_version} has no --{match[1]}"


def _syntax(text: str) -> Iterator[str]:
    for script in (text, *_bodies(text)):
        done = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True, check=False)
        yield from (line.removeprefix("bash: ") for line in done.stderr.splitlines())


def _frozen_variables(text: str) -> Iterator[str]:
    """`'$NAME'` isn't expanded. Nearly always that is a mistake."""
    for script in (text, *_bodies(text)):
        for word in _single_quoted(_without_heredocs(script)):
            for name in re.findall(r"\$\{?[A-Za-z_]\w*", word):
                number = text[: max(text.find(word), 0)].count("\n") + 1
                yield f"line {number}: {name} inside single quotes is never expanded"


def _split(text: str) -> Iterator[tuple[str, str, list[str]]]:
    """(line, delimiter or "", heredoc body) for every line outside heredocs."""
    lines = iter(text.split("\n"))
    for line in lines:
        match = HEREDOC.search(line)
        body: list[str] = []
        if match:
            for inner in lines:
                if inner == match[1]:
                    break
                body.append(inner)
        yield line, match[1] if match else "", body


def _without_heredocs(text: str) -> str:
    return "\n".join(HEREDOC.sub("", line) for line, _, _ in _split(text))


def _bodies(text: str) -> list[str]:
    return ["\n".join(body) for _, delimiter, body in _split(text) if delimiter in CODE]


def _single_quoted(script: str) -> Iterator[str]:
    """The text between single quotes wherever they quote: not in comments, nor inside double quotes."""
    stack, position = ["code"], 0
    while position < len(script):
        character, rest = script[position], script[position:]
        position += 1
        if character == "\\":
            position += 1
        elif rest.startswith("$("):
            stack.append("code")
            position += 1
        elif character == '"':
            stack.pop() if stack[-1] == "quotes" else stack.append("quotes")
        elif stack[-1] == "quotes":
            continue
        elif character == "(":
            stack.append("code")
        elif character == ")" and len(stack) > 1:
            stack.pop()
        elif character == "#" and (position == 1 or script[position - 2] in " \t\n;"):
            position += len(rest.split("\n", 1)[0]) - 1
        elif character == "'":
            word = rest[1:].split("'", 1)[0]
            position += len(word) + 1
            yield word
