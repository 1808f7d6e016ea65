"""How a value becomes text in a script: the text means exactly that value, or the value is refused by its field's
name.

Every value in a rendered script passes one of these functions. Quoting can't protect an #SBATCH line from a
newline, so control characters are refused at once.
"""

import re
import shlex
import unicodedata

from launcher.common import printable
from launcher.errors import UsageError

LONGEST = 16_384  # bytes; a longer value is a mistake, and Slurm copies every directive into its state file
LONGEST_DIRECTIVE = 1_024
LONGEST_PATH = 4_095

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_LIKE_A_VARIABLE = re.compile(r"\$\{?[A-Za-z_]")
_PLAIN_IN_DIRECTIVE = re.compile(r"[A-Za-z0-9_./:,@%+=-]")


class Quoted(str):
    """Text that is safe where the template puts it; templates may print nothing else (see `render`)."""


def checked(value: str, field: str) -> str:
    """`value` itself; `UsageError` naming `field` for control characters and excess length."""
    for character in value:
        if unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") or printable.clean(character) != character:
            raise UsageError(f"{field}: the character {character!a} can't be part of a script; remove it")
    return short(value, field)


def short(value: str, field: str) -> str:
    """`value` itself, unless it is longer than any real value."""
    size = len(value.encode(errors="surrogateescape"))
    if size > LONGEST:
        raise UsageError(f"{field}: {size} bytes long; at most {LONGEST}")
    return value


def name(value: str, field: str) -> str:
    """`value` if it can name a job and a folder: letters, digits, dot, underscore and dash, at most 64."""
    if not NAME.fullmatch(value):
        raise UsageError(
            f"{field}: {shown(value)} isn't a name; use letters, digits, '.', '_' and '-', at most 64, "
            "a letter or digit first"
        )
    return value


def path(value: str, field: str) -> str:
    """`value` if a file system can hold it; `UsageError` naming `field` where every call would fail with it."""
    if len(value.encode()) > LONGEST_PATH or any(len(part.encode()) > 255 for part in value.split("/")):
        raise UsageError(f"{field}: longer than a path can be, {LONGEST_PATH} bytes in all and 255 a name")
    return value


def variable(value: str, field: str) -> str:
    """`value` if it can name an environment variable."""
    if not VARIABLE.fullmatch(value):
        raise UsageError(f"{field}: {shown(value)} isn't the name of an environment variable")
    return value


def sh(value: object, field: str = "value") -> Quoted:
    """One word of bash that means `value`, whatever is in it.

    What looks like a variable goes between double quotes: between single ones `lint` takes it for a slip.
    """
    text = checked(str(value), field)
    if not _LIKE_A_VARIABLE.search(text):
        return Quoted(shlex.quote(text))
    escaped = re.sub(r'([\\"$`])', r"\\\1", text)
    return Quoted(f'"{escaped}"')


def directive(value: object, field: str = "value") -> Quoted:
    """The right-hand side of an `#SBATCH --option=`; sbatch knows double quotes, and backslashes only in them."""
    text = checked(str(value), field)
    if not text:
        raise UsageError(f"{field}: empty; leave it out instead")
    if len(text.encode()) > LONGEST_DIRECTIVE:
        raise UsageError(f"{field}: {len(text.encode())} bytes on an #SBATCH line; at most {LONGEST_DIRECTIVE}")
    if all(c.isalnum() or _PLAIN_IN_DIRECTIVE.match(c) for c in text):
        return Quoted(text)
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return Quoted(f'"{escaped}"')


def heredoc(text: str, delimiter: str) -> Quoted:
    """`text` in a heredoc whose delimiter is quoted: nothing expands, and only that line could end it."""
    if delimiter in text.splitlines():
        raise UsageError(f"a line of the configuration is {delimiter!r}, which ends the text it stands in")
    return Quoted(text.rstrip("\n"))


def shown(value: str) -> str:
    return repr(value if len(value) <= 80 else value[:77] + "...")
