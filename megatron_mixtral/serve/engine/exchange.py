"""What ranks tell each other within a step: parts of sums, of logits, and tokens where replicas share experts.

Sums of few tokens go through peers' memory, in one kernel with what follows; else and where no peer's memory can be
reached, through the group's collectives. Shapes: T tokens, H hidden, R requests, V vocabulary.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_mixtral.distributed import collectives, peer_memory
from megatron_mixtral.kernels import peer_sum, small_batch, vocabulary
from megatron_mixtral.kernels.peer_words import Inboxes
from megatron_mixtral.mcore import ranks

from megatron.core import parallel_state

# Tokens, times ranks to send to, up to which sums go through peers' memory: as words, and as they are with flags.
MOST_WORDS, MOST = 64, 2048


class Sum:
    """Adds to the residual what all ranks of a group have for it."""

    def __init__(self, group: dist.ProcessGroup, *, tokens: int, width: int, dtype: torch.dtype) -> None:
        self.group, self.ranks = group, group.size()
        self._ways: list[tuple[Inboxes, bool]] = []  # and whether by flags; the fastest for few tokens first
        if self.ranks > 1:
            few, many = (max(1, min(tokens, most // (self.ranks - 1))) for most in (MOST_WORDS, MOST))
            many = -(-many // 4) * 4  # so that tokens lie at multiples of 16 bytes behind the flags
            for rows, words in ((few, peer_sum.words), (many, peer_sum.words_with_flag)):
                made = peer_memory.inboxes(group, ranks.device(), rows=rows, words=words(width, dtype))
                if made is not None:
                    self._ways.append((made, words is peer_sum.words_with_flag))

    def add_and_norm(
        self, residual: Tensor, added: Tensor | small_batch.Rows, weight: Tensor | None, eps: float
    ) -> Tensor:
        """As `small_batch.add_and_norm` with the sum of `added` over all ranks."""
        if self.ranks == 1:
            return small_batch.add_and_norm(residual, added, weight, eps)
        for inboxes, flags in self._ways:
            if len(residual) <= inboxes.rows:
                return peer_sum.add_and_norm(residual, added, weight, eps, inboxes, flags=flags)
        return small_batch.add_and_norm(residual, self.whole(added, residual), weight, eps)

    def whole(self, added: Tensor | small_batch.Rows, like: Tensor) -> Tensor:
        """The sum [T, H] by the group's collective."""
        if isinstance(added, small_batch.Rows):
            rows, added = added, torch.zeros_like(like)
            small_batch.add_and_norm(added, rows, None, 0.0)
        if self.ranks > 1:
            dist.all_reduce(added, group=self.group)
        return added


class Replicas:
    """Tokens of all replicas that share experts, one replica's behind the other's."""

    def __init__(self, experts: dist.ProcessGroup) -> None:
        state = parallel_state
        self.group, self.tensor = experts, state.get_tensor_model_parallel_world_size()
        self.count = max(1, experts.size() // self.tensor)
        self.own = experts.rank() // self.tensor
        self._speaks = state.get_tensor_model_parallel_rank() == 0
        self._host_group = _on_host(experts) if self.count > 1 else None

    def agree(self, *numbers: int) -> list[int]:
        """The largest of each over all replicas, by way of the host."""
        if self._host_group is None:
            return list(numbers)
        told = torch.tensor(numbers)
        dist.all_reduce(told, op=dist.ReduceOp.MAX, group=self._host_group)
        return told.tolist()

    def gather(self, x: Tensor) -> Tensor:
        """x [T, ...], of as many tokens on all replicas -> [count T, ...]."""
        if self.count == 1:
            return x
        if self.tensor == 1:
            gathered = x.new_empty(self.count * len(x), *x.shape[1:])
            dist.all_gather_into_tensor(gathered, x, group=self.group)
            return gathered
        whole = x.new_zeros(self.count, *x.shape)
        if self._speaks:
            whole[self.own] = x
        dist.all_reduce(whole, group=self.group)
        return whole.flatten(0, 1)

    def summed(self, x: Tensor) -> Tensor:
        """x [count T, H], parts of a sum over the group -> this replica's [T, H]."""
        if x.is_cuda and self.tensor == 1:  # gloo has no such thing
            own = x.new_empty(len(x) // self.count, *x.shape[1:])
            dist.reduce_scatter_tensor(own, x, group=self.group)
            return own
        dist.all_reduce(x, group=self.group)
        return x.unflatten(0, (self.count, -1))[self.own]


def _on_host(group: dist.ProcessGroup) -> dist.ProcessGroup:
    """A group of the same ranks that needs no GPU; all ranks of the world call it."""
    mine = dist.get_process_group_ranks(group)
    made: Any = None
    for theirs in sorted(set(map(tuple, collectives.gathered(mine)))):
        other = dist.new_group(list(theirs), backend="gloo")
        made = other if list(theirs) == mine else made
    return made


class Stage:
    """This rank's place in the pipeline that every batch passes through; without one, first and last at once."""

    def __init__(self) -> None:
        state = parallel_state
        self.group = state.get_pipeline_model_parallel_group()
        self.first, self.last = state.is_pipeline_first_stage(), state.is_pipeline_last_stage()
        self.before, self.behind, self.end = (
            state.get_pipeline_model_parallel_prev_rank(),
            state.get_pipeline_model_parallel_next_rank(),
            state.get_pipeline_model_parallel_last_rank(),
        )

    @property
    def alone(self) -> bool:
        return self.first and self.last

    def receive(self, residual: Tensor) -> None:
        if not self.first:
            dist.recv(residual, self.before, group=self.group)

    def send(self, residual: Tensor) -> None:
        if not self.last:
            dist.send(residual, self.behind, group=self.group)

    def share(self, made: Tensor) -> None:
        """What the last stage has made goes to all."""
        if not self.alone:
            dist.broadcast(made, self.end, group=self.group)


class Vocabulary:
    """This rank's words, and what only all of them tell."""

    def __init__(self, words: int, real_words: int, *, requests: int) -> None:
        state = parallel_state
        self.group = state.get_tensor_model_parallel_group()
        self.ranks, rank = self.group.size(), self.group.rank()
        self.count, self.real_words = words // self.ranks, real_words
        self.first = rank * self.count
        self._inboxes: Inboxes | None = None
        if self.ranks > 1:
            self._inboxes = peer_memory.inboxes(self.group, ranks.device(), rows=requests, words=2)

    def likeliest(self, logits: Tensor, slots: Tensor, drawn: Tensor, tokens: Tensor) -> None:
        """logits [R, V of this rank] -> tokens [R], and to their slots of `drawn`: the likeliest of all words."""
        if self.ranks > 1 and self._inboxes is None:
            tokens.copy_(self.whole(logits).argmax(-1))
            drawn.index_copy_(0, slots.long(), tokens)
            return
        vocabulary.likeliest(
            logits, slots, drawn, tokens, limit=self.real_words, first=self.first, inboxes=self._inboxes
        )

    def whole(self, logits: Tensor) -> Tensor:
        """logits [R, V of this rank] -> [R, all that are words]."""
        if self.ranks > 1:
            gathered = logits.new_empty(self.ranks * len(logits), logits.shape[1])
            dist.all_gather_into_tensor(gathered, logits.contiguous(), group=self.group)
            logits = torch.cat(gathered.chunk(self.ranks), 1)
        return logits[:, : self.real_words]
