"""Attention over pages equals attention over whole sequences, whatever lies in the unused part of a page."""

from spawn_ranks import ranks

LENGTHS = [(3, 3), (1, 9), (5, 21), (16, 16), (1, 1), (0, 0)]  # queries, keys; the last row only pads the batch
PAGE, HEADS, GROUPS, SIZE = 8, 4, 2, 16


def test_pages_of_mixed_requests_equal_whole_sequences():
    assert ranks(1, differences) == [[]]


def differences():
    """What differs, by window and kind of batch; runs where megatron-core may be imported."""
    import torch

    from megatron_mixtral.serve.engine.attention import paged_attention

    torch.manual_seed(0)
    wrong = []
    for window in (None, 6):
        for decoding in (False, True):
            rows = [(1, keys) if decoding and keys else (queries, keys) for queries, keys in LENGTHS]
            if not one_batch(paged_attention, rows, window, decoding):
                wrong.append((window, decoding))
    return wrong


def one_batch(attention, rows, window, decoding):
    from types import SimpleNamespace

    import torch

    sequences = [(torch.randn(keys, GROUPS, SIZE), torch.randn(keys, GROUPS, SIZE)) for _, keys in rows]
    k, v, table = paged(sequences)
    queries = [torch.randn(1 if decoding else count, HEADS, SIZE) for count, _ in rows]
    starts = torch.tensor([0, *(len(q) for q in queries)]).cumsum(0).int()
    lengths = torch.tensor([keys for _, keys in rows]).int()
    config = SimpleNamespace(window_size=(window - 1, 0) if window else None, softmax_scale=None)
    flat = torch.cat(queries).unsqueeze(1)
    found = attention(SimpleNamespace(config=config), flat, k, v, 0, 0, starts, None, lengths, table, decoding)
    for row, (query, (key, value)) in enumerate(zip(queries, sequences, strict=True)):
        got = found[starts[row] : starts[row + 1], 0]
        if len(key) and not torch.allclose(got, whole(query, key, value, window), atol=1e-5):
            return False
    return bool(found.isfinite().all())


def paged(sequences):
    """Keys, values and the table of pages, shuffled; NaN wherever no sequence lies."""
    import torch

    needed = [-(-len(key) // PAGE) for key, _ in sequences]
    pages = iter(torch.randperm(sum(needed) + 3).tolist())
    k = torch.full((sum(needed) + 3, PAGE, GROUPS, SIZE), float("nan"))
    v, table = k.clone(), torch.full((len(sequences), max(needed)), -1, dtype=torch.int32)
    for row, (key, value) in enumerate(sequences):
        for place in range(needed[row]):
            page = table[row, place] = next(pages)
            part = slice(place * PAGE, (place + 1) * PAGE)
            k[page, : len(key[part])], v[page, : len(key[part])] = key[part], value[part]
    return k, v, table


def whole(query, key, value, window):
    """Softmax written out: the last queries of a sequence, each looking back as far as it may."""
    import torch

    key, value = (x.repeat_interleave(HEADS // GROUPS, dim=1) for x in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, key) / SIZE**0.5
    position = torch.arange(len(key) - len(query), len(key)).unsqueeze(1)
    other = torch.arange(len(key))
    seen = (other <= position) & (other > position - (window or len(key)))
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, value)
