"""What a cause is: the patterns by which it is found, what it means, and what to do about it (pure).

Patterns are searched for in single lines. Named groups `node` and `rank` of a pattern say where it happened.
"""

import re
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Cause:
    """One way to end. A `secondary` one follows another rank's failure; `bad_node`: the node is to blame."""

    name: str
    title: str
    meaning: str
    advice: tuple[str, ...]
    host: tuple[str, ...] = ()
    rank: tuple[str, ...] = ()
    codes: tuple[int, ...] = ()
    states: tuple[str, ...] = ()
    secondary: bool = False
    bad_node: bool = False

    def match_host(self, line: str) -> "re.Match[str] | None":
        return _search(self.host, line)

    def match_rank(self, line: str) -> "re.Match[str] | None":
        return _search(self.rank, line)


RESUME = "`mixlaunch resume RUN` continues from what is saved"
RETRY = "`mixlaunch retry RUN --exclude-failed` runs it again without that node"
MARK = "`mixlaunch explain RUN --mark-bad` keeps later jobs away from it"
LESS_GPU_MEMORY = (
    "use less of each GPU: smaller --micro-batch or --sequence-length, --recompute full, more --tp, --pp or nodes"
)


def _search(patterns: tuple[str, ...], line: str) -> "re.Match[str] | None":
    return next((match for pattern in patterns if (match := re.search(pattern, line))), None)
