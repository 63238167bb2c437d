"""Copies of what long branches see: all of it is met once, and attention is that under a mask."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from multiverse_hf.modeling.attention_copies import ROUND, Pages, attend_paged, choose_pages
from multiverse_hf.modeling.masks import to_additive

CPU = torch.device("cpu")
BASE = 5  # where the log begins in the pool


@st.composite
def visibilities(draw: st.DrawFn) -> np.ndarray:
    """(views, entries) bool: runs of entries, each seen by some of the branches, in any order."""
    views = draw(st.integers(1, 4))
    some = st.integers(0, 2**views - 1)
    one = st.integers(0, views - 1).map(lambda view: 1 << view)
    seen_by = st.one_of(some, one, one, st.just(2**views - 1))
    runs = draw(st.lists(st.tuples(seen_by, st.integers(1, 12)), min_size=1, max_size=12))
    entries = [who for who, length in runs for _ in range(length)]
    return np.array([[bool(who >> view & 1) for who in entries] for view in range(views)])


def forked(prefix: int, lengths: list[int], hidden: int = 0) -> np.ndarray:
    """Paths that are written at the same time, after a prefix and after what none of them sees."""
    columns = [[True] * len(lengths)] * prefix + [[False] * len(lengths)] * hidden
    for step in range(max(lengths)):
        for view, length in enumerate(lengths):
            if step < length:
                columns.append([other == view for other in range(len(lengths))])
    return np.array(columns).T


def queries_of(sees: np.ndarray) -> list[tuple[int, np.ndarray]]:
    """Let every view write one more entry."""
    views, end = sees.shape
    more = np.concatenate([sees, np.eye(views, dtype=bool)], axis=1)
    return [(end + view, more[view]) for view in range(views)]


@given(visibilities(), st.integers(0, 200), st.sampled_from([1, 4]))
def test_every_key_is_met_once(sees: np.ndarray, room: int, least: int):
    pages = choose_pages(sees, room, least)
    if pages is None:
        return
    assert pages.num_entries <= room
    assert pages.entries.shape[1] % least == len(pages.common) % least == 0
    entries = queries_of(sees)
    owners = pages.owners([each for _, each in entries])
    assert owners is not None
    assert max(owners) >= 0
    paged = pages.meet(entries, BASE, CPU)
    assume(paged is not None)  # with more in its tails than was copied
    tails = paged.tail.view(len(entries), -1).numpy() - BASE
    for query, (entry, seen) in enumerate(entries):
        met = [*pages.common, *tails[query][paged.is_tail[query]]]
        if query in owners:
            met += pages.entries[owners.index(query)].tolist()
        assert sorted(met) == np.flatnonzero(seen).tolist()
        assert entry in met


def test_paths_that_forked_together_leave_nothing_but_their_last_tokens_in_the_log():
    pages = choose_pages(forked(10, [100] * 3), 1000)
    assert pages.entries.shape == (3, 96), "10 of the prefix and 86 of each path: a multiple of 32"
    assert len(pages.common) == len(pages.left) == 0
    assert pages.end == 10 + 3 * 86


def test_a_long_prefix_is_copied_once_and_not_for_every_path():
    pages = choose_pages(forked(600, [100] * 3), 1000)
    assert pages.entries.shape == (3, 96)
    assert len(pages.common) == 576, "a multiple of 32"
    assert pages.left.tolist() == list(range(576, 600))


def test_a_lone_path_among_closed_ones_is_copied_without_them():
    pages = choose_pages(forked(0, [100], hidden=500), 1000)
    assert pages.entries.tolist() == [list(range(500, 596))]


@pytest.mark.parametrize("sees", [np.ones((3, 100), bool), np.ones((1, 100), bool), forked(100, [20, 20])], ids=len)
def test_nothing_is_copied_where_nothing_is_hidden_or_paths_are_short(sees: np.ndarray):
    assert choose_pages(sees, 1000) is None


def test_nothing_is_copied_that_leaves_more_to_gather_than_it_spares():
    parents = np.repeat(np.kron(np.eye(2, dtype=bool), np.ones((4, 1), dtype=bool)), 400, axis=1)
    sees = np.concatenate([parents, forked(0, [50] * 8)], axis=1)
    assert choose_pages(sees, 10_000) is None, "two long paths with four paths each: 400 of 450 tokens would be left"
    assert choose_pages(forked(0, [9000] * 8), 300) is None, "72,000 entries are too many to gather"
    assert choose_pages(forked(0, [100] * 2), 70) is None, "so are 68 of 100 for each of two"


def test_a_long_path_that_forks_leaves_the_others_their_pages():
    sees = np.concatenate([forked(0, [400] * 8), np.zeros((1, 3200), bool)])
    sees[8] = sees[7]
    pages = choose_pages(np.concatenate([sees, forked(0, [0] * 7 + [5, 5])], axis=1), 10_000)
    assert pages.entries.shape == (7, 384)
    assert pages.left.tolist() == list(range(7, pages.end, 8)), "what the two have in common"


def test_tails_that_outgrow_their_pages_are_read_under_a_mask():
    pages = choose_pages(forked(10, [40] * 3), 1000, 1)
    grown = forked(10, [200] * 3)
    assert pages.meet(queries_of(grown[:, : pages.end + 30]), BASE, CPU) is not None
    assert pages.meet(queries_of(grown), BASE, CPU) is None


def test_pages_do_not_serve_who_sees_something_else():
    sees = forked(10, [40, 40, 40])
    pages = choose_pages(sees, 1000, 1)
    views = list(sees)
    assert pages.owners(views) == [0, 1, 2]
    assert pages.owners([views[2], views[0]]) == [1, -1, 0], "a path closed"
    assert pages.owners([views[0], views[0]]) is None, "a path forked"
    assert pages.owners([views[0] | views[1]]) is None, "they were merged"
    assert pages.owners([np.arange(130) < 10]) is None, "what is common is on pages of others"


def attention_of(
    sees: np.ndarray, pages: Pages, dtype: torch.dtype, kv_heads: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Attention by pages, under a mask in the same dtype, and under a mask in float64."""
    entries = queries_of(sees)
    slots, queries = BASE + entries[-1][0] + 1, len(entries)
    generator = torch.Generator().manual_seed(0)
    query, key, value = (  # values are narrower than keys, as in DeepSeek's models
        torch.randn(1, heads, length, width, generator=generator, dtype=torch.float64).to(dtype)
        for heads, length, width in ((3 * kv_heads, queries, 16), (kv_heads, slots, 16), (kv_heads, slots, 8))
    )
    paged = pages.meet(entries, BASE, CPU)
    assert paged is not None
    mask = to_additive(torch.from_numpy(paged.is_tail)[None, None], dtype)
    output = attend_paged(paged, torch.nn.Identity(), query, key, value, mask, None)
    hidden = torch.zeros(queries, slots, dtype=torch.bool)
    for row, (entry, seen) in enumerate(entries):
        hidden[row, BASE : BASE + entry + 1] = torch.from_numpy(seen[: entry + 1])

    def under_mask(dtype: torch.dtype) -> torch.Tensor:
        keys, values = (states.to(dtype).repeat_interleave(3, dim=1) for states in (key, value))
        scores = (query.to(dtype) @ keys.mT * 16**-0.5).masked_fill(~hidden, -torch.inf)
        return (scores.softmax(dim=-1) @ values).transpose(1, 2)

    return output, under_mask(dtype), under_mask(torch.float64)


@given(visibilities(), st.integers(20, 200), st.sampled_from([1, 3]))
def test_attention_by_pages_is_that_under_a_mask(sees: np.ndarray, room: int, kv_heads: int):
    pages = choose_pages(sees, room, 1)
    if pages is not None and pages.meet(queries_of(sees), BASE, CPU) is not None:
        output, _, expected = attention_of(sees, pages, torch.float64, kv_heads)
        torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("lengths", [[100] * 4, [100, 70, 100, 90], [130]], ids=str)
@pytest.mark.parametrize("prefix", [0, 10, 600])
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_products_in_the_order_of_the_processor_are_as_exact(lengths: list[int], prefix: int, kv_heads: int):
    sees = forked(prefix, lengths, hidden=40)
    pages = choose_pages(sees, 1000)
    assert pages.entries.shape[1] >= ROUND
    output, masked, exact = attention_of(sees, pages, torch.bfloat16, kv_heads)
    assert (output - exact).norm() <= 2 * (masked - exact).norm()


def test_a_page_whose_path_closed_and_a_path_without_a_page():
    sees = forked(10, [40, 40, 40])
    pages = choose_pages(sees, 1000, 1)
    left = np.stack([sees[2], sees[0]])
    output, _, expected = attention_of(left, pages, torch.float64, 2)
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
    sees = forked(40, [50, 50, 5])
    pages = choose_pages(sees, 1000, 1)
    assert (len(pages.entries), len(pages.common)) == (2, 40)
    output, _, expected = attention_of(sees, pages, torch.float64, 2)
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
