"""What a step reads about its rows and tokens, on the device where graphs find it, filled by one copy a step.

Two buffers of the host take turns, so that one is written while the other's copy is still to come. Shapes: R rows,
T tokens; numbers are int32.
"""

import numpy as np
import torch
from torch import Tensor

from megatron_mixtral.serve.engine.scheduler import Plan

ID, POSITION, PAGE, OFFSET = range(4)  # of a token


class Batch:
    """The device's copy; with room for so many `requests`, their `pages` and the `tokens` of a step."""

    def __init__(self, *, requests: int, tokens: int, pages: int, page: int, device: torch.device) -> None:
        self.requests, self.tokens, self.page = requests, tokens, page
        sizes = {
            "real": 1,  # tokens that count
            "lengths": requests,  # of each row's request, this step's tokens among them
            "bounds": requests + 1,  # where each row's tokens begin
            "last": requests,  # each row's last token
            "slots": requests,  # where what a row draws is kept; `requests` is nobody's
            "table": requests * pages,
            "columns": tokens * 4,  # of each token
        }
        self._places, at = {}, 0
        for name, size in sizes.items():
            self._places[name] = slice(at, at + size)
            at += size
        self._device = torch.zeros(at, dtype=torch.int32, device=device)
        pinned = device.type == "cuda"
        self._hosts = [torch.zeros(at, dtype=torch.int32, pin_memory=pinned) for _ in range(2)]
        self.drawn = torch.zeros(requests + 1, dtype=torch.int32, device=device)  # by slot
        self.real, self.lengths, self.bounds, self.last, self.slots = (self._part(name) for name in list(sizes)[:5])
        self.table = self._part("table").view(requests, pages)
        columns = self._part("columns").view(tokens, 4)
        self.ids, self.position, self.page_of, self.offset = (columns[:, i] for i in range(4))

    def _part(self, name: str) -> Tensor:
        return self._device[self._places[name]]

    def fill(self, plan: Plan | None) -> None:
        """Rows and tokens of `plan`; without one, none."""
        host = self._hosts.pop(0)
        self._hosts.append(host)
        numbers, rows = host.numpy(), 0 if plan is None else len(plan.slots)
        numbers[self._places["real"]] = 0 if plan is None else plan.tokens
        numbers[self._places["slots"]][rows:] = self.requests
        end = self._places["columns"].start
        if plan is not None:
            bounds = numbers[self._places["bounds"]]
            bounds[0] = 0
            np.cumsum(plan.counts, out=bounds[1 : rows + 1])
            bounds[rows + 1 :] = plan.tokens
            numbers[self._places["lengths"]][:rows] = plan.first + plan.counts
            numbers[self._places["last"]][:rows] = bounds[1 : rows + 1] - 1
            numbers[self._places["slots"]][:rows] = np.where(plan.draws, plan.slots, self.requests)
            numbers[self._places["table"]].reshape(self.requests, -1)[:rows] = plan.table
            end += self._write(numbers[self._places["columns"]].reshape(-1, 4), plan, bounds)
        self._device[:end].copy_(host[:end], non_blocking=True)

    def _write(self, columns: np.ndarray, plan: Plan, bounds: np.ndarray) -> int:
        """What is to be known of each token; returns how many numbers that is."""
        row = np.repeat(np.arange(len(plan.slots)), plan.counts) if plan.prompts else np.arange(len(plan.slots))
        position = plan.first[row] + np.arange(plan.tokens) - bounds[row]
        columns = columns[: plan.tokens]
        columns[:, ID], columns[:, POSITION] = plan.ids, position
        columns[:, PAGE] = plan.table[row, position // self.page]
        columns[:, OFFSET] = position % self.page
        return columns.size
