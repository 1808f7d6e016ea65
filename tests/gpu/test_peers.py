"""Sums and choices over ranks in one kernel, through memory that peers write to: as collectives have them."""

import os

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() == 1, reason="fewer than two GPUs"),
    pytest.mark.usefixtures("device"),
]
ROWS, VOCABULARY = 12, 5000


def joined():
    """(rank, device) once all ranks have met."""
    import torch.distributed as dist

    rank = int(os.environ["RANK"])
    device = torch.device("cuda", rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return rank, device


def drawn(*shape, seed, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def sums(width, dtype, calls, flags):
    """Of each call, as `calls` has its tokens and the experts' parts (0: a plain tensor): ours, the exact one."""
    import torch.distributed as dist

    from megatron_mixtral.distributed import peer_memory
    from megatron_mixtral.kernels import peer_sum
    from megatron_mixtral.kernels.small_batch import Rows

    rank, device = joined()
    words = (peer_sum.words_with_flag if flags else peer_sum.words)(width, dtype)
    peers = peer_memory.inboxes(dist.group.WORLD, device, rows=ROWS, words=words)
    weight, found, own = drawn(width, seed=3, dtype=dtype), [], None
    for number, (tokens, parts) in enumerate(calls):
        residual = drawn(tokens, width, seed=number, dtype=dtype)
        exact = residual.double()
        for peer in range(dist.get_world_size()):
            seed = 1000 * peer + number
            if parts:
                made = drawn(parts, 2 * tokens, width, seed=seed)
                place = torch.arange(2 * tokens, dtype=torch.int32).view(tokens, 2)
                place[:, peer % 2] = -1
                summed = made.double().sum(0).view(tokens, 2, width)[:, 1 - peer % 2]
                added = Rows(parts=made.to(device), place=place.to(device))
            else:
                summed = drawn(tokens, width, seed=seed, dtype=dtype).double()
                added = summed.to(device, dtype)
            exact += summed
            if peer == rank:
                own = added
        residual = residual.to(device)
        out = peer_sum.add_and_norm(residual, own, weight.to(device), 1e-5, peers, flags=flags)
        norm = exact * (exact.square().mean(1, keepdim=True) + 1e-5).rsqrt() * weight.double()
        found.append([t.double().cpu() for t in (residual, out)] + [exact, norm])
    dist.destroy_process_group()
    return found


@pytest.mark.parametrize("flags", [False, True])
@pytest.mark.parametrize("count", [2, 3] if torch.cuda.device_count() != 2 else [2])
def test_the_residual_and_its_norm_are_those_of_the_sum(count, flags, dtype):
    from spawn_ranks import ranks

    calls = [(1, 0), (9, 0), (1, 2), (3, 1), (1, 0), (9, 4), (2, 0)]
    results = ranks(count, sums, 192, dtype, calls, flags, timeout=200)
    near = 1e-5 if dtype == torch.float32 else 2e-2
    for call in zip(*results, strict=True):
        for residual, out, exact, norm in call:
            assert torch.equal(residual, call[0][0])
            assert torch.equal(out, call[0][1])
            assert float((residual - exact).norm() / exact.norm()) < near
            assert float((out - norm).norm() / norm.norm()) < near


def choices(dtype):
    import torch.distributed as dist

    from megatron_mixtral.distributed import peer_memory
    from megatron_mixtral.kernels import vocabulary

    rank, device = joined()
    share, found = VOCABULARY // dist.get_world_size(), []
    boxes = peer_memory.inboxes(dist.group.WORLD, device, rows=ROWS, words=2)
    for number, rows in enumerate((1, 9, 4)):
        logits = drawn(rows, VOCABULARY, seed=number, dtype=dtype)
        logits[-1, [17, 17 + share]] = 50.0  # of equals the first
        logits[0, -1] = 100.0  # which is no word
        own = logits[:, rank * share : (rank + 1) * share].contiguous().to(device)
        slots = torch.arange(rows, dtype=torch.int32, device=device).flip(0)
        kept, tokens = (torch.full((ROWS,), -1, dtype=torch.int32, device=device) for _ in range(2))
        vocabulary.likeliest(own, slots, kept, tokens, limit=VOCABULARY - 1, first=rank * share, inboxes=boxes)
        expected = logits[:, :-1].float().cummax(1)[1][:, -1]
        expected[-1] = 17
        found.append((tokens[:rows].tolist(), kept[:rows].flip(0).tolist(), expected.tolist()))
    dist.destroy_process_group()
    return found


def test_the_likeliest_word_is_that_of_all_ranks(dtype):
    from spawn_ranks import ranks

    for found in ranks(2, choices, dtype, timeout=200):
        for number, (tokens, kept, expected) in enumerate(found):
            assert kept == tokens
            if dtype == torch.float32 or number == 0:
                assert tokens == expected


def test_words_are_looked_up_where_they_are(device):
    from megatron_mixtral.kernels import vocabulary

    words = torch.randn(6, 48, device=device)
    columns = torch.tensor([[10, 0], [15, 0], [9, 0], [16, 0], [-2, 0], [-1, 0]], dtype=torch.int32, device=device)
    kept = torch.tensor([3, 12], dtype=torch.int32, device=device)
    out = vocabulary.look_up(columns[:, 0], kept, words, torch.full((6, 48), float("nan"), device=device), 10)
    none = torch.zeros(48, device=device)
    assert torch.equal(out, torch.stack([words[0], words[5], none, none, words[2], none]))
