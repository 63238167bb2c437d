"""The layout contract, against a slow oracle that follows DESIGN's rules token by token."""

from dataclasses import dataclass, field
from unittest.mock import patch

import pytest
import torch
from helpers import COLON, DIGITS, EOS, FIRST_TEXT, NEWLINE, TAGS, make_tags
from hypothesis import given
from hypothesis import strategies as st

from multiverse_hf.modeling import masks
from multiverse_hf.modeling.families import FAMILIES
from multiverse_hf.modeling.layout import build_layout
from multiverse_hf.modeling.masks import block_mask, dense_mask, pad_layouts, to_additive
from multiverse_hf.modeling.tags import TagSet

TEXT = FIRST_TEXT
FAMILY_TAGS = [make_tags(family) for family in FAMILIES.values()]


@dataclass(frozen=True)
class Block:
    """A block of a document tree: a document a path."""

    paths: tuple


# A document tree is a tuple of items: an int (that many text tokens) or a Block.
trees = st.recursive(
    st.lists(st.integers(0, 4), max_size=2).map(tuple),
    lambda inner: st.lists(
        st.one_of(st.integers(0, 4), st.lists(inner, min_size=1, max_size=4).map(lambda paths: Block(tuple(paths)))),
        max_size=3,
    ).map(tuple),
    max_leaves=12,
)


@dataclass
class Oracle:
    """Writes a tree and, beside every token, its position and the path of each block it is in, by definition."""

    tags: TagSet
    ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    inside: list[dict[int, int]] = field(default_factory=list)  # block -> path
    num_blocks: int = 0

    def document(self, tree: tuple, position: int, inside: dict[int, int]) -> int:
        """Write a document from ``position`` on; give the position that follows it."""
        for item in tree:
            if isinstance(item, int):
                position = self.tokens([TEXT] * item, position, inside)
            else:
                position = self.block(item, position, inside)
        return position

    def block(self, block: Block, position: int, inside: dict[int, int]) -> int:
        tags, number = self.tags, self.num_blocks
        self.num_blocks += 1
        outline = [tags.open("outline"), TEXT, tags.close("outline")]
        head = [tags.open("parallel"), tags.open("goal"), *outline * len(block.paths), tags.close("goal")]
        tail = [NEWLINE, tags.open("conclusion"), TEXT, tags.close("conclusion"), tags.close("parallel")]
        paths = block.paths
        if tags.open("outline") is None:  # two paths, and the conclusion after the block
            head, paths = [tags.open("parallel")], (*paths, ())[:2]
            tail = [tags.close("parallel"), NEWLINE, tags.open("conclusion"), TEXT, tags.close("conclusion")]
        fork = self.tokens([token for token in head if token is not None], position, inside)  # one past </Goal>
        after = fork
        for path, tree in enumerate(paths):
            own = {**inside, number: path}
            end = self.tokens([NEWLINE, tags.open("path")], fork, own)
            end = self.tokens([tags.close("path")], self.document(tree, end, own), own)
            after = max(after, end)
        return self.tokens([token for token in tail if token is not None], after, inside)

    def tokens(self, ids: list[int], position: int, inside: dict[int, int]) -> int:
        for token in ids:
            self.ids.append(token)
            self.positions.append(position)
            self.inside.append(inside)
            position += 1
        return position

    def sees(self, query: int, key: int) -> bool:
        """Every earlier token but those of sibling paths, of a block whose path the query is in."""
        own, other = self.inside[query], self.inside[key]
        return key <= query and all(other.get(block, path) == path for block, path in own.items())


def written(tree: tuple, tags: TagSet = TAGS) -> Oracle:
    oracle = Oracle(tags)
    oracle.document((1, *tree), 0, {})
    return oracle


def test_designs_worked_example_is_laid_out_verbatim():
    t, o = TAGS, [TAGS.open("outline"), TEXT, TAGS.close("outline")]
    ids = [TEXT, t.open("parallel"), t.open("goal"), *o, *o, t.close("goal")]
    ids += [NEWLINE, t.open("path"), TEXT, TEXT, t.close("path")]
    ids += [NEWLINE, t.open("path"), TEXT, t.close("path"), NEWLINE, t.open("conclusion")]
    layout = build_layout(ids, TAGS)
    assert layout.position_ids.tolist() == [*range(10), 10, 11, 12, 13, 14, 10, 11, 12, 13, 15, 16]
    path1, path2, everything = (
        [[*range(q + 1)] for q in range(15)],
        [[*range(10), *range(15, q + 1)] for q in range(15, 19)],
        [[*range(20)], [*range(21)]],
    )
    sees = [row.nonzero().flatten().tolist() for row in layout.mask()]
    assert sees == path1 + path2 + everything
    # four segments: before the fork, two paths, after the merge
    assert layout.segment_ids.tolist() == [0] * 10 + [1] * 5 + [2] * 4 + [3] * 2
    assert layout.visible.tolist() == [
        [True, False, False, False],
        [True, True, False, False],
        [True, False, True, False],
        [True, True, True, True],
    ]
    assert layout.length == 17


@pytest.mark.parametrize("tags", FAMILY_TAGS, ids=FAMILIES)
@given(tree=trees)
def test_layout_agrees_with_the_rules_followed_token_by_token(tags: TagSet, tree: tuple):
    oracle = written(tree, tags)
    layout = build_layout(oracle.ids, tags)
    assert layout.position_ids.tolist() == oracle.positions
    everywhere = range(len(oracle.ids))
    assert layout.mask().tolist() == [[oracle.sees(q, k) for k in everywhere] for q in everywhere]


@given(tree=trees)
def test_siblings_never_see_each_other_and_after_the_reduce_all_is_visible(tree: tuple):
    oracle = written(tree)
    mask = build_layout(oracle.ids, TAGS).mask()
    for query, own in enumerate(oracle.inside):
        if not own:  # outside every block, or after one
            assert mask[query, : query + 1].all()
        for key in range(query):
            other = oracle.inside[key]
            if any(other.get(block, path) != path for block, path in own.items()):
                assert not mask[query, key]


soup = st.lists(
    st.one_of(
        st.sampled_from(TAGS.control_ids),
        # what makes blocks more often than chance would
        st.sampled_from([TAGS.open("goal"), TAGS.open("outline"), TAGS.close("goal"), TAGS.close("path")]),
        st.sampled_from([TEXT, NEWLINE, COLON, EOS, DIGITS["1"]]),
    ),
    max_size=60,
)


@given(ids=soup, cut=st.integers(0, 60))
def test_any_ids_have_a_layout_and_a_cut_document_has_the_prefix_of_it(ids: list[int], cut: int):
    layout, length = build_layout(ids, TAGS), len(ids)
    size = len(layout.visible)
    assert layout.position_ids.shape == layout.segment_ids.shape == (length,)
    assert layout.position_ids.dtype == layout.segment_ids.dtype == torch.int64
    assert layout.visible.shape == (size, size)
    assert layout.visible.diagonal().all()
    assert not layout.visible.triu(1).any(), "no segment sees a later one"
    assert (layout.segment_ids < size).all()
    mask = layout.mask()
    assert mask.diagonal().all()
    # what a token sees stands before it, and right before it stands one token it sees (the first token has none)
    for query in range(length):
        seen = layout.position_ids[:query][mask[query, :query]]
        assert (seen < layout.position_ids[query]).all()
        assert query == 0 or int(seen.max()) == int(layout.position_ids[query]) - 1
    first = build_layout(ids[:cut], TAGS)
    assert first.position_ids.tolist() == layout.position_ids[:cut].tolist()
    assert torch.equal(first.mask(), mask[:cut, :cut])


@given(ids=soup)
def test_text_around_a_document_does_not_change_what_its_tags_do(ids: list[int]):
    layout, shifted = build_layout(ids, TAGS), build_layout([TEXT] * 3 + ids, TAGS)
    assert (shifted.position_ids[3:] - 3).tolist() == layout.position_ids.tolist()
    assert torch.equal(shifted.mask()[3:, 3:], layout.mask())


def test_no_ids_have_an_empty_layout():
    layout = build_layout([], TAGS)
    assert layout.length == 0
    assert layout.mask().shape == (0, 0)


@pytest.mark.parametrize(
    "ids",
    [
        [TAGS.close("path")] * 3,
        [TAGS.open("parallel"), TAGS.open("goal"), TAGS.close("goal"), TEXT, TAGS.close("path"), TEXT],  # no outline
        [TAGS.open("goal"), TAGS.open("outline"), TAGS.close("outline"), TAGS.close("goal"), TEXT],  # not in a block
        [TAGS.open("parallel"), TAGS.open("goal"), TAGS.open("outline"), TAGS.close("path"), TEXT],  # cut short
    ],
    ids=["stray path ends", "a goal without outlines", "a goal outside a block", "a goal that is not closed"],
)
def test_a_tag_that_fits_no_rule_is_a_plain_token(ids: list[int]):
    layout = build_layout(ids, TAGS)
    assert layout.position_ids.tolist() == list(range(len(ids)))
    assert len(layout.visible) == 1


def test_a_layout_of_a_long_document_takes_memory_by_its_segments_not_by_its_length():
    oracle = written((5000, Block(((5000,), (5000,))), 5000))
    layout = build_layout(oracle.ids, TAGS)
    assert layout.segment_ids.shape == (len(oracle.ids),)
    assert layout.visible.shape == (4, 4)


@given(rows=st.lists(trees, min_size=1, max_size=3), left=st.booleans())
def test_masks_of_a_padded_batch_are_those_of_its_rows_alone(rows: list[tuple], left: bool):
    documents = [written(tree).ids for tree in rows]
    width = max(map(len, documents))
    ids, real = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    for row, document in enumerate(documents):
        where = slice(width - len(document), width) if left else slice(0, len(document))
        ids[row, where], real[row, where] = torch.tensor(document), 1
    position_ids, segment_ids, visible = pad_layouts(ids, real, TAGS)
    masks = dense_mask(position_ids, segment_ids, visible, real)
    additive = to_additive(masks, torch.float32)
    assert torch.equal(additive == 0, masks)
    for row, document in enumerate(documents):
        layout, keep = build_layout(document, TAGS), real[row] == 1
        assert position_ids[row, keep].tolist() == layout.position_ids.tolist()
        assert torch.equal(masks[row, 0][keep][:, keep], layout.mask())
        assert not masks[row, 0][keep][:, ~keep].any(), "no real token sees padding"
        assert masks[row, 0].any(-1).all(), "no row is empty: its softmax would not be a number"


def expanded(mask) -> torch.Tensor:
    """What flex_attention reads from a BlockMask: all pairs of a full tile; of a partial one, what mask_mod says."""
    from torch.nn.attention.flex_attention import create_mask

    batch, size, (length, _) = mask.kv_indices.shape[0], mask.BLOCK_SIZE[0], mask.seq_lengths
    pairs = create_mask(mask.mask_mod, batch, None, length, length, device="cpu")
    seen = torch.zeros_like(pairs)
    for row in range(batch):
        for tile in range(mask.kv_indices.shape[2]):
            here = slice(tile * size, (tile + 1) * size)
            for keys in mask.kv_indices[row, 0, tile, : mask.kv_num_blocks[row, 0, tile]].tolist():
                there = slice(keys * size, (keys + 1) * size)
                seen[row, 0, here, there] = pairs[row, 0, here, there]
            for keys in mask.full_kv_indices[row, 0, tile, : mask.full_kv_num_blocks[row, 0, tile]].tolist():
                seen[row, 0, here, keys * size : (keys + 1) * size] = True
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("window", [None, 5])
@given(rows=st.lists(trees, min_size=1, max_size=3), left=st.booleans(), tile=st.sampled_from([2, 4, 128]))
def test_the_block_mask_of_flex_attention_is_the_dense_mask(window: int | None, rows, left, tile):
    documents = [written(tree).ids for tree in rows]
    width = max(map(len, documents))
    ids, real = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    for row, document in enumerate(documents):
        where = slice(width - len(document), width) if left else slice(0, len(document))
        ids[row, where], real[row, where] = torch.tensor(document), 1
    arguments = (*pad_layouts(ids, real, TAGS), real, window)
    with patch.object(masks, "_TILE", tile):
        mask = block_mask(*arguments)
    assert (tile, tile) == mask.BLOCK_SIZE
    queries = (real[:, None, :, None] != 0) | torch.eye(width, dtype=torch.bool)  # what padding sees is of no account
    assert torch.equal(expanded(mask) & queries, dense_mask(*arguments) & queries)


def test_tiles_that_are_seen_whole_are_not_asked_about_each_pair():
    ids = torch.tensor([written((600, Block(((600,), (600,))), 600)).ids])
    mask = block_mask(*pad_layouts(ids, None, TAGS))
    full, partial = int(mask.full_kv_num_blocks.sum()), int(mask.kv_num_blocks.sum())
    tiles = mask.kv_indices.shape[-1]
    assert full + partial < tiles * (tiles + 1) / 2  # siblings' tiles are skipped
    assert full > partial


def test_the_tables_of_a_block_mask_stay_small_however_long_the_row():
    for length in (1 << 10, 1 << 15, 1 << 17):
        segment_ids = torch.zeros(1, length, dtype=torch.long)
        mask = block_mask(torch.arange(length)[None], segment_ids, torch.ones(1, 1, 1, dtype=torch.bool))
        tables = [mask.kv_indices, mask.full_kv_indices, mask.q_indices, mask.full_q_indices]
        assert sum(table.numel() * table.element_size() for table in tables) <= 1 << 20
