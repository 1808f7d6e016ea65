"""Which tokens the next step computes, and on which pages of the cache: planned while the last step still runs.

What a step draws may be unknown when the next one is planned; an answer that ends there has one token too many
under way, which is dropped. Nothing here depends on torch. Slots are places of requests that are being answered.
"""

from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_mixtral.serve.messages import Request

Numbers = np.ndarray[Any, Any]


@dataclass(slots=True, eq=False)
class Sequence:
    """One request, and how far it is."""

    request: Request
    tokens: list[int]  # the prompt, and of the answer what is known
    left: int  # tokens that are still to be drawn, without a slot; those under way not among them
    slot: int = -1  # none
    read: int = 0  # tokens that were given to steps as a prompt
    ended: bool = False

    @property
    def missing(self) -> int:
        """Tokens of the answer that aren't known."""
        return max(self.request.max_tokens, 1) + len(self.request.prompt) - len(self.tokens)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A step's rows, one a request, each with its tokens from some position on."""

    sequences: list[Sequence]
    slots: Numbers  # [rows]
    first: Numbers  # [rows] position of the first token
    counts: Numbers  # [rows] tokens
    draws: Numbers  # [rows] whether a token is drawn after the last one
    ids: Numbers  # [tokens]; -1 - slot: what that slot drew last
    table: Numbers  # [rows, pages]
    prompts: bool  # whether some row is more than one token that was drawn

    @property
    def tokens(self) -> int:
        return len(self.ids)


class Scheduler:
    """Requests in the order they came; the youngest gives its pages back where they run out."""

    def __init__(self, *, slots: int, pages: int, page: int, context: int, step_tokens: int) -> None:
        self.page, self.pages, self.step_tokens = page, pages, max(step_tokens, slots)
        self._free_pages = list(range(pages))
        self._free_slots = list(range(slots))[::-1]
        self._table = np.zeros((slots, -(-context // page)), np.int32)
        self._held = np.zeros(slots, np.int64)  # pages of a slot
        self._length = np.zeros(slots, np.int64)  # tokens of a slot that were given to steps
        self._left = np.zeros(slots, np.int64)
        self._decoding = np.zeros(0, np.int64)  # slots, oldest first
        self._at: list[Sequence | None] = [None] * slots
        self._waiting: deque[Sequence] = deque()  # the first one may be half read

    @property
    def busy(self) -> bool:
        return bool(self._waiting) or len(self._decoding) > 0

    @property
    def used(self) -> float:
        """Share of the cache's pages."""
        return 1 - len(self._free_pages) / self.pages

    def add(self, request: Request) -> Sequence:
        sequence = Sequence(request, list(request.prompt), max(request.max_tokens, 1))
        self._waiting.append(sequence)
        return sequence

    def end(self, sequence: Sequence) -> None:
        """No more of it; what is under way is dropped when it comes."""
        if sequence.ended:
            return
        sequence.ended = True
        if sequence in self._waiting:
            self._waiting.remove(sequence)
        if sequence.slot >= 0:
            self._leave(sequence)

    def plan(self) -> Plan | None:
        """The next step; None where there is nothing to compute."""
        self._turn_pages()
        slots = self._decoding
        sequences: list[Any] = [self._at[slot] for slot in slots.tolist()]
        first, counts, ids = [self._length[slots]], [np.ones(len(slots), np.int64)], [-1 - slots]
        draws = [True] * len(slots)
        reads = self._reads(self.step_tokens - len(slots))
        for sequence, count in reads:
            first.append(np.array([sequence.read]))
            counts.append(np.array([count]))
            ids.append(np.array(sequence.tokens[sequence.read : sequence.read + count]))
            draws.append(sequence.read + count == len(sequence.tokens))
            sequences.append(sequence)
        if not sequences:
            return None
        slots = np.concatenate([slots, np.array([sequence.slot for sequence, _ in reads], np.int64)])
        made = Plan(
            sequences=sequences,
            slots=slots,
            first=np.concatenate(first),
            counts=np.concatenate(counts),
            draws=np.array(draws),
            ids=np.concatenate(ids),
            table=self._table[slots],
            prompts=bool(reads),
        )
        self._given(reads)
        return made

    def took(self, sequence: Sequence, token: int) -> bool:
        """A token that was drawn for it; whether that is the last one."""
        sequence.tokens.append(token)
        if not sequence.missing or token in sequence.request.stop_tokens:
            self.end(sequence)
        return sequence.ended

    def _given(self, reads: list[tuple[Sequence, int]]) -> None:
        """A plan was made: those whose last token it draws leave, whose prompts it ends go on with them."""
        slots = self._decoding
        self._length[slots] += 1
        self._left[slots] -= 1
        for sequence, count in reads:
            sequence.read += count
            if sequence.read == len(sequence.tokens):
                self._waiting.remove(sequence)
                self._length[sequence.slot], self._left[sequence.slot] = sequence.read, sequence.left - 1
                self._decoding = np.append(self._decoding, sequence.slot)
        for slot in self._decoding[self._left[self._decoding] == 0]:
            self._leave(self._at[slot])

    def _reads(self, room: int) -> list[tuple[Sequence, int]]:
        """Whose prompts are read, and how much of each: in order, until the room is used up."""
        found = []
        for sequence in self._waiting:
            if room <= 0 or not (sequence.slot >= 0 or self._enter(sequence)):
                break
            count = min(room, len(sequence.tokens) - sequence.read)
            found.append((sequence, count))
            room -= count
        return found

    def _enter(self, sequence: Sequence) -> bool:
        """Gets a slot and the pages of all that it has to read, and of a token more; or waits."""
        pages = -(-(len(sequence.tokens) + 1) // self.page)
        pages = min(pages, self._table.shape[1])
        under_way = sequence.missing > sequence.left
        if under_way or not self._free_slots or pages > len(self._free_pages):
            return False
        sequence.slot, sequence.read = self._free_slots.pop(), 0
        self._at[sequence.slot] = sequence
        self._held[sequence.slot], self._left[sequence.slot] = 0, sequence.left
        for _ in range(pages):
            self._turn_page(sequence.slot)
        return True

    def _turn_pages(self) -> None:
        """A page more for those whose next token begins one."""
        for slot in self._decoding[self._length[self._decoding] == self._held[self._decoding] * self.page]:
            while not self._free_pages and self._at[slot] is not None:
                self._make_room()
            if self._at[slot] is not None:
                self._turn_page(slot)

    def _turn_page(self, slot: int) -> None:
        self._table[slot, self._held[slot]] = self._free_pages.pop()
        self._held[slot] += 1

    def _make_room(self) -> None:
        """The youngest request waits again, to be read anew with what it has answered."""
        if half_read := [sequence for sequence in self._waiting if sequence.slot >= 0]:
            self._leave(half_read[0])
            return
        youngest = self._at[self._decoding[-1]]
        assert youngest is not None
        self._leave(youngest)
        self._waiting.appendleft(youngest)

    def _leave(self, sequence: Any) -> None:
        """Its slot and pages are free: a step under way that still uses them comes before any that could again."""
        slot, sequence.slot, sequence.read = sequence.slot, -1, 0
        sequence.left = int(self._left[slot])
        self._at[slot] = None
        self._free_slots.append(slot)
        self._free_pages += self._table[slot, : self._held[slot]].tolist()
        self._decoding = self._decoding[self._decoding != slot]
