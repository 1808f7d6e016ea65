"""Searches the layouts nearest to one that doesn't fit: fewest changes first, then in the order of docs/memory.md
(pure).

A change is a command-line option. Each suggestion is a request that `fit.study` accepts.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from launcher.errors import LayoutError
from launcher.planning import fit
from launcher.planning import layout as layouts
from launcher.planning.fit import Outlook, Request
from launcher.planning.memory import GIB, ServingWork, TrainingWork
from megatron_mixtral.spec import checks
from megatron_mixtral.spec.jobs import flag_of
from megatron_mixtral.spec.options import LayoutSpecError

SHOWN = 4
ENOUGH = 3  # suggestions that need no further change beside them
MOST_CHANGES = 3
MOST_WORK = 40_000  # of a search, in combinations that are refused at once: less than a second
AN_OUTLOOK = 10  # as much work as so many of them, and one more for each stage whose memory is reckoned
MOST_CHUNKS = 128  # of layers to suggest; no Mixtral has as many
MOST_NODES, MOST_PARTS = 512, 64  # to suggest; parts are those of any axis
SHORTEST = 256  # tokens of an answer worth serving
Changes = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Suggestion:
    """What to change, and the result."""

    changes: Changes
    outlook: Outlook

    @property
    def options(self) -> str:
        """As typed: `--nodes 8 --pp 8`."""
        return " ".join(f"{flag_of(name)} {value}" for name, value in self.changes.items())

    @property
    def effect(self) -> str:
        """`64 ranks = TP1 x PP8 x ...; bubble 18.0%; 51.2 of 80 GiB`."""
        layout = self.outlook.request.layout
        if self.outlook.request.work is None:
            return f"TP{layout.tensor} x PP{layout.pipeline} x EP{layout.expert} x ETP{layout.expert_tensor}"
        parts = [layout.describe(self.outlook.world)]
        if layout.pipeline > 1 and self.outlook.tokens_a_step:
            parts.append(f"bubble {self.outlook.bubble:.1%}")
        if fullest := self.outlook.fullest:
            gpu = fit.gpu_bytes(self.outlook.request)
            parts.append(f"{fullest.total / GIB:.1f}{f' of {gpu / GIB:g}' if gpu else ''} GiB")
        if (room := self.outlook.cache_room) is not None:
            parts.append(f"cache for {room:,} tokens")
        return "; ".join(parts)


class Refused(LayoutError):
    """A refused request with its reason and the nearest possible layouts; `more` is printed below them."""

    def __init__(self, reason: str, suggestions: list[Suggestion], *more: str) -> None:
        super().__init__("\n".join([reason, *_lines(suggestions), *more]))
        self.reason = reason
        self.suggestions = suggestions


def outlook(request: Request) -> Outlook:
    """The outlook of `request`; an impossible layout is refused with the nearest possible ones."""
    try:
        return fit.study(request)
    except LayoutError as error:
        raise explained(error, request) from None


def explained(error: LayoutError, request: Request) -> Refused:
    """`error` with the layouts nearest to `request` that fit."""
    return Refused(str(error), find(request))


def _lines(suggestions: list[Suggestion]) -> Iterator[str]:
    """For people; nothing when there are none."""
    if suggestions:
        yield "Nearest that fit:"
        width = max(len(s.options) for s in suggestions)
        yield from (f"  {s.options:<{width}}  {s.effect}" for s in suggestions)


def find(request: Request) -> list[Suggestion]:
    """The nearest layouts that fit, best first."""
    values, found, left = _alternatives(request), list[Suggestion](), MOST_WORK
    for count in range(1, MOST_CHANGES + 1):
        more, enough = list[Suggestion](), [suggestion.changes.items() for suggestion in found]
        for changes in _combinations(values, count) if len(found) < ENOUGH else ():
            outlook = None if any(less <= changes.items() for less in enough) else _study(apply(request, changes))
            left -= AN_OUTLOOK + len(outlook.usage) if outlook else 1
            if left < 0:
                break
            if outlook and _fits(outlook):
                more.append(Suggestion(changes=changes, outlook=outlook))
        found += sorted(more, key=lambda s: _rank(request, s))[: SHOWN - len(found)]
    return found


def _combinations(values: dict[str, list[Any]], count: int) -> Iterator[Changes]:
    """So many changes at once, in every way."""
    for names in itertools.combinations(values, count):
        for chosen in itertools.product(*(values[name] for name in names)):
            yield dict(zip(names, chosen, strict=True))


def apply(request: Request, changes: Changes) -> Request:
    """`request` with `changes` made."""
    parts: dict[str, Any] = {"nodes": changes["nodes"]} if "nodes" in changes else {}
    for name, part in (("layout", request.layout), ("work", request.work)):
        if part and (mine := {key: value for key, value in changes.items() if key in vars(part)}):
            parts[name] = replace(part, **mine)
    return replace(request, **parts)


def _study(request: Request) -> Outlook | None:
    """The outlook of a request whose arithmetic comes out."""
    try:
        return fit.attempt(request)
    except (LayoutError, LayoutSpecError):
        return None


def _fits(outlook: Outlook) -> bool:
    """In memory, and with tensor parallelism inside an NVLink domain."""
    return not outlook.shortage and not any(e.axis == "TP" and e.islands > 1 for e in outlook.exchanges)


def _rank(asked: Request, suggestion: Suggestion) -> tuple[float, ...]:
    outlook = suggestion.outlook
    memory = outlook.fullest.total if outlook.fullest else 0
    over_fabric = sum(e.islands > 1 for e in outlook.exchanges)
    distance, held = _distance(asked, suggestion), round(memory / GIB, 1)
    if isinstance(asked.work, TrainingWork):
        return len(suggestion.changes), over_fabric, round(outlook.bubble, 3), held, distance
    return len(suggestion.changes), float(outlook.world), distance, held


def _distance(asked: Request, suggestion: Suggestion) -> float:
    """How far the numbers changed, in powers of two."""
    before = _values(asked)
    moved = 0.0
    for name, value in suggestion.changes.items():
        old = before[name]
        counted = isinstance(old, int) and isinstance(value, int) and old and value
        moved += abs(math.log2(value / old)) if counted else 1.0
    return moved


def _values(request: Request) -> dict[str, Any]:
    """Everything that was asked for, by name."""
    return {**vars(request.layout), **(vars(request.work) if request.work else {}), "nodes": request.nodes}


def _alternatives(request: Request) -> dict[str, list[Any]]:
    """Other values for everything that may be changed, without the one that was asked for."""
    asked = _values(request)
    values = {"nodes": _nodes(request), **_of_layout(request), **_of_work(request)}
    kept = {name: [v for v in options if v != asked[name]] for name, options in values.items()}
    return {name: options for name, options in kept.items() if options}


def _nodes(request: Request) -> list[int]:
    """Up to four times as many as were asked for or are needed, then doublings."""
    gpus = request.cluster.node.gpus
    if not gpus or request.work is None:
        return []
    asked = request.nodes or math.ceil(request.layout.unit / gpus)
    further = (asked * 2**i for i in range(10))
    return sorted({*range(1, min(4 * asked, 64) + 1), *(n for n in further if n <= MOST_NODES)})


def _of_layout(request: Request) -> dict[str, list[int]]:
    """Sizes that divide the model; for an unknown model, divisors of the sizes that were asked for."""
    layout, shape = request.layout, request.shape
    if shape is None:
        return {name: _divisors(size) for name, size in vars(layout).items()}
    return {
        "tensor": _divisors(math.gcd(shape.num_key_value_heads, shape.num_attention_heads)),
        "pipeline": list(range(1, min(shape.num_hidden_layers, MOST_PARTS) + 1)),
        "expert": _divisors(shape.num_local_experts),
        "expert_tensor": [1],
        "context": [1],
    }


def _of_work(request: Request) -> dict[str, list[Any]]:
    work = request.work
    if isinstance(work, TrainingWork):
        micro = min(work.micro_batch, work.global_batch + 1)
        return {
            "micro_batch": sorted({*_halves(micro), *_powers_below(micro)}),
            "global_batch": _multiples(
                work.global_batch, work.micro_batch * _data(request) * checks.rounds(request.layout, work)
            ),
            "sequence_length": _multiples(work.sequence_length, checks.sequence_parts(request.layout)),
            "recompute": ["full"],
            "virtual_pipeline": list(range(1, min(work.virtual_pipeline, MOST_CHUNKS))),
            "first_stage_layers": [0],
            "last_stage_layers": [0],
        }
    if isinstance(work, ServingWork):
        context = request.shape.max_position_embeddings if request.shape else work.max_tokens
        longest = min(work.max_tokens, context)
        return {"max_tokens": [longest, *(n for n in _halves(longest) if n >= SHORTEST)]}
    return {}


def _data(request: Request) -> int:
    """DP as it would be; 1 where the ranks don't fit anyway."""
    try:
        world = layouts.place(request.layout, nodes=request.nodes, gpus=request.cluster.node.gpus).world
        return request.layout.data_parallel(world)
    except LayoutError:
        return 1


def _multiples(value: int, unit: int) -> list[int]:
    """The multiples of `unit` next to `value`; none where it is one."""
    if value % unit == 0:
        return []
    below = value - value % unit
    return [n for n in (below, below + unit) if n]


def _powers_below(value: int) -> list[int]:
    return [2**i for i in range((value - 1).bit_length())]


def _divisors(whole: int) -> list[int]:
    return [part for part in range(1, min(whole, MOST_PARTS) + 1) if whole % part == 0]


def _halves(value: int) -> list[int]:
    """Half of it, a quarter and so on, as long as they are whole."""
    found = []
    while value % 2 == 0:
        value //= 2
        found.append(value)
    return found
