"""Which rows an epoch reads: the shares of the curriculum, the same everywhere and after a restart, packed or not."""

import pytest
from accelerate import skip_first_batches
from accelerate.data_loader import BatchSamplerShard, DataLoaderShard
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import BatchSampler, DataLoader

from multiverse_hf.data.curriculum import PAPER_SHARES, Choice, CurriculumSampler, pack_rows, paper_shares
from multiverse_hf.training.trainer import Packs

lengths = st.lists(st.integers(1, 40), min_size=1, max_size=60)


def choices_of(sizes: list[int], num_fixed: int = 0) -> list[Choice]:
    """Records whose parallel form stands at 2i and their sequential one, two tokens shorter, at 2i + 1."""
    free = [Choice(2 * i, 2 * i + 1, size + 2, size) for i, size in enumerate(sizes)]
    fixed = [Choice(1000 + i, 1000 + i, 5, 5) for i in range(num_fixed)]
    return free + fixed


@pytest.mark.parametrize("max_length", [None, 64])
def test_the_papers_eight_epochs_read_its_shares_and_every_record_once(max_length):
    choices = choices_of([10 + i % 30 for i in range(200)], num_fixed=7)
    sampler = CurriculumSampler(choices, PAPER_SHARES, seed=3, max_length=max_length, num_epochs=8)
    orders = []
    for epoch, share in enumerate(PAPER_SHARES):
        sampler.set_epoch(epoch)
        packs = list(sampler)
        assert len(packs) == len(sampler)
        rows = [row for pack in packs for row in pack]
        free = [row for row in rows if row < 1000]
        assert sorted(row // 2 for row in free) == list(range(200))
        assert sorted(row for row in rows if row >= 1000) == list(range(1000, 1007))
        assert sum(row % 2 == 0 for row in free) == round(200 * share)
        assert sampler.parallel_share(epoch) == share
        orders.append(rows)
    assert orders[6] != orders[7]


def test_the_papers_way_over_another_number_of_epochs_still_goes_from_sequential_to_parallel():
    assert tuple(paper_shares(8)) == PAPER_SHARES
    assert paper_shares(1) == [1]
    assert paper_shares(2) == [0, 1]
    assert paper_shares(3) == [0, 0.5, 1]
    assert paper_shares(15)[::2] == list(PAPER_SHARES)
    for epochs in range(2, 30):
        shares = paper_shares(epochs)
        assert len(shares) == epochs
        assert shares == sorted(shares)
        assert (shares[0], shares[-1]) == (0, 1)
    with pytest.raises(ValueError, match="at least one epoch, got 0"):
        paper_shares(0)


@given(sizes=lengths, max_length=st.integers(1, 60), seed=st.integers(0, 9))
def test_packed_rows_hold_every_row_once_and_no_more_than_they_may(sizes, max_length, seed):
    shares = (0.0, 0.5, 1.0)
    sampler = CurriculumSampler(choices_of(sizes), shares, seed, max_length=max_length, num_epochs=3)
    for epoch in range(3):
        packs = sampler.plan(epoch)
        assert len(packs) == len(sampler)
        assert all(packs)
        assert sorted(row // 2 for pack in packs for row in pack) == list(range(len(sizes)))
        for pack in packs:
            size = sum(sizes[row // 2] + 2 * (row % 2 == 0) for row in pack)
            assert size <= max_length or len(pack) == 1


@given(sizes=lengths, max_length=st.integers(1, 60))
def test_packing_leaves_no_two_rows_that_would_fit_together(sizes, max_length):
    packs = pack_rows(list(enumerate(sizes)), max_length)
    filled = sorted(sum(sizes[row] for row in pack) for pack in packs)
    assert len(filled) < 2 or filled[0] + filled[1] > max_length


@given(sizes=lengths, seed=st.integers(0, 9), group=st.sampled_from([0, 2]), max_length=st.sampled_from([None, 50]))
def test_an_epoch_follows_from_seed_and_number_alone(sizes, seed, group, max_length):
    def make() -> CurriculumSampler:
        return CurriculumSampler(
            choices_of(sizes), (0.3, 0.7), seed, max_length=max_length, group=group, batch_size=3, num_epochs=2
        )

    first, second = make(), make()
    list(first)
    second.set_epoch(1)
    assert list(second) == first.plan(1)


def test_without_shuffling_rows_keep_their_order_and_grouping_moves_them_within_its_batches():
    choices = choices_of([i % 7 + 1 for i in range(40)])
    in_order = CurriculumSampler(choices, shuffle=False)
    assert [row for (row,) in in_order] == [2 * i for i in range(40)]
    grouped = [row // 2 for (row,) in CurriculumSampler(choices, shuffle=False, group=5, batch_size=2)]
    for begin in range(0, 40, 10):
        assert sorted(grouped[begin : begin + 10]) == list(range(begin, begin + 10))
        sizes = [[grouped[at] % 7, grouped[at + 1] % 7] for at in range(begin, begin + 10, 2)]
        assert sum(abs(a - b) for a, b in sizes) <= 7


def test_accelerate_tells_the_sampler_its_epoch_and_shares_batches_out():
    from accelerate.data_loader import prepare_data_loader

    sampler = CurriculumSampler(choices_of(list(range(1, 17))), (0.0, 1.0), seed=1)
    loader = DataLoader(Packs(range(32), sampler), batch_size=2, sampler=sampler, collate_fn=list)
    seen: dict[int, list[int]] = {0: [], 1: []}
    for rank in range(2):
        shard = prepare_data_loader(loader, num_processes=2, process_index=rank, put_on_device=False)
        for epoch in range(2):
            shard.set_epoch(epoch)
            seen[epoch] += [row for batch in shard for (row,) in batch]
    assert sorted(seen[0]) == [2 * i + 1 for i in range(16)]
    assert sorted(seen[1]) == [2 * i for i in range(16)]


@pytest.mark.parametrize(("choices", "shares"), [([], (1.0,)), ([1], ()), ([1], (1.5,)), ([1], (-0.1, 1))])
def test_what_cannot_be_sampled_is_refused(choices, shares):
    with pytest.raises(ValueError, match=r"no row to train on|share from 0 to 1"):
        CurriculumSampler(choices_of(choices), shares)


# Several processes


def steps(sampler: CurriculumSampler, batch: int, processes: int, accumulated: int = 1) -> list[list[tuple]]:
    """Give the rows of each update, read by accelerate's own shards."""
    ranks = [
        list(BatchSamplerShard(BatchSampler(sampler, batch, False), processes, rank)) for rank in range(processes)
    ]
    turns = [[row for part in turn for row in part] for turn in zip(*ranks, strict=True)]
    return [[row for turn in turns[at : at + accumulated] for row in turn] for at in range(0, len(turns), accumulated)]


@pytest.mark.parametrize("processes", [2, 3])
@pytest.mark.parametrize("grouped", [False, True], ids=["packed", "grouped"])
def test_an_update_reads_the_same_rows_however_many_processes_read_it(grouped: bool, processes: int) -> None:
    step = 2 * processes
    how = {"group": 4} if grouped else {"max_length": 60, "num_epochs": 3}
    rows = choices_of([10 + at % 13 for at in range(24 if grouped else 23)])
    sampler = CurriculumSampler(rows, [0.0, 0.5, 1.0], seed=1, batch_size=2, step=step, **how)
    for epoch in range(3):
        sampler.set_epoch(epoch)
        together = steps(sampler, 2, processes)
        assert together == steps(sampler, 2, 1, accumulated=processes)
        assert [len(each) for each in together] == [step] * (len(sampler) // step)
        if not grouped:
            assert together == steps(sampler, step, 1)
        read = [index for each in together for pack in each for index in pack]
        assert sorted(index // 2 for index in read) == list(range(len(rows))), "and none twice to fill the last up"


def test_fewer_documents_than_an_update_reads_are_each_read_alone() -> None:
    sampler = CurriculumSampler(choices_of([5, 6, 7]), max_length=1000, step=8)
    assert sorted(map(len, sampler.plan(0))) == [1, 1, 1]
    assert len(sampler) == 3


def test_processes_that_go_on_in_the_middle_of_an_epoch_read_what_is_left_of_it():
    sampler = CurriculumSampler(choices_of([10 + at % 13 for at in range(24)]), [0.0, 1.0], seed=1)
    packs = Packs(list(range(1000)), sampler)
    for rank in range(2):
        shard = BatchSamplerShard(BatchSampler(sampler, 2, False), 2, rank)
        loader = skip_first_batches(DataLoaderShard(packs, batch_sampler=shard, collate_fn=list), 4)
        sampler.set_epoch(1)
        expected = [[[row] for (row,) in batch] for batch in list(shard)[4:]]
        sampler.set_epoch(0)
        loader.set_epoch(1)
        assert list(loader) == expected
        assert all(row % 2 == 0 for batch in expected for (row,) in batch), "all are parallel in the second epoch"
