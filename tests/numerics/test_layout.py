"""Splitting and exchanging, against brute force on a grid of integers."""

from fractions import Fraction
from itertools import pairwise

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridpar.planning.layout import Layout, Piece, chunks, exchange, intersect, length, split

shares = st.lists(st.sampled_from((0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 7.0)), min_size=1, max_size=5).map(tuple)
settled = settings(deadline=None, derandomize=True, max_examples=150)


def assert_tiles(intervals, start, stop):
    """Consecutive intervals, some perhaps empty, that cover start..stop exactly."""
    assert intervals[0][0] == start
    assert intervals[-1][1] == stop
    assert all(a <= b for a, b in intervals)
    assert all(a[1] == b[0] for a, b in pairwise(intervals))


@settled
@given(st.integers(0, 200), shares)
def test_split_tiles_in_proportion(total, weights):
    pieces = split(total, weights)
    assert_tiles(pieces, 0, total)
    for piece, weight in zip(pieces, weights, strict=True):
        exact = total * Fraction(weight) / sum(map(Fraction, weights))
        assert abs(length(piece) - exact) < 1


@settled
@given(st.integers(0, 200), st.integers(1, 9))
def test_equal_shares_differ_by_one_and_the_first_are_larger(total, count):
    sizes = [length(p) for p in split(total, (1.0,) * count)]
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True)


@settled
@given(st.integers(1, 60), st.integers(1, 12), shares)
def test_chunks_tile_the_samples_within_the_micro_batch(samples, micro_batch, weights):
    result = chunks(samples, micro_batch, weights)
    assert_tiles([interval for chunk in result for interval in chunk], 0, samples)
    assert all(length(i) <= micro_batch for chunk in result for i in chunk)
    sizes = [chunk[-1][1] - chunk[0][0] for chunk in result]
    assert len(set(sizes[:-1])) <= 1, "only the last chunk is ragged"
    assert 0 < sizes[-1] <= sizes[0]


@settled
@given(st.integers(1, 60), st.integers(1, 12), st.integers(1, 5))
def test_full_chunks_of_equal_shares_are_whole_micro_batches(samples, micro_batch, count):
    for chunk in chunks(samples, micro_batch, (1.0,) * count)[:-1]:
        assert [length(i) for i in chunk] == [micro_batch] * count


@settled
@given(*[st.integers(0, 20)] * 4)
def test_intersection_is_that_of_sets(a, b, c, d):
    common = intersect((a, a + b), (c, c + d))
    assert max(length(common), 0) == len(set(range(a, a + b)) & set(range(c, c + d)))


SAMPLES, FEATURES = 9, 6


@st.composite
def layouts(draw, *, partial=False):
    """Chunks over ranks; within a chunk every rank has a share of samples (replicas), or of features, or all."""
    ranks = draw(st.permutations(range(4)))[: draw(st.integers(1, 4))]
    weights = draw(st.lists(st.sampled_from((1.0, 2.0, 3.0)), min_size=len(ranks), max_size=len(ranks)).map(tuple))
    way = "copies" if partial else draw(st.sampled_from(("samples", "features", "copies")))
    micro_batch = draw(st.integers(1, SAMPLES))
    pieces = []
    for m, chunk in enumerate(chunks(SAMPLES, micro_batch, weights if way == "samples" else (1.0,))):
        for i, rank in enumerate(ranks):
            own = chunk[i] if way == "samples" else chunk[0]
            features = split(FEATURES, weights)[i] if way == "features" else (0, FEATURES)
            if length(own) and length(features):
                pieces.append(Piece(rank, m, own, features))
    return Layout(tuple(pieces), partial)


def values_of(layout, generator):
    """A random whole value, and what every piece holds of it: slices, or summands of slices."""
    pieces = layout.pieces
    if not layout.partial:
        whole = generator.integers(-99, 99, (SAMPLES, FEATURES))
        return whole, {p: whole[slice(*p.samples), slice(*p.features)] for p in pieces}
    whole, held = np.zeros((SAMPLES, FEATURES), int), {}
    for p in pieces:
        held[p] = generator.integers(-99, 99, (length(p.samples), length(p.features)))
        whole[slice(*p.samples), slice(*p.features)] += held[p]
    return whole, held


def apply(transfers, source, target, held):
    """Do what the transfers say; NaN stands in every element that nothing was written to."""
    by_call = {(p.rank, p.micro_batch): p for p in source.pieces}
    wanted = {(p.rank, p.micro_batch): p for p in target.pieces}
    built = {p: np.full((length(p.samples), length(p.features)), np.nan) for p in target.pieces}
    for t in transfers:
        a, b = by_call[t.source, t.source_micro_batch], wanted[t.target, t.target_micro_batch]
        assert length(t.samples) > 0, "empty parts need no transfer"
        assert length(t.features) > 0
        value = held[a][within(t.samples, a.samples), within(t.features, a.features)]
        place = built[b][within(t.samples, b.samples), within(t.features, b.features)]
        assert value.shape == place.shape
        if t.add:
            place += value
        else:
            assert np.isnan(place).all(), "nothing is written twice"
            place[:] = value
    return built


def within(part, whole):
    assert whole[0] <= part[0]
    assert part[1] <= whole[1]
    return slice(part[0] - whole[0], part[1] - whole[0])


@settled
@given(layouts(), layouts(), st.integers(0, 10**6))
def test_exchange_builds_every_target_piece_and_writes_each_element_once(source, target, seed):
    whole, held = values_of(source, np.random.default_rng(seed))
    transfers = exchange(source, target)
    assert not any(t.add for t in transfers)
    for piece, value in apply(transfers, source, target, held).items():
        assert np.array_equal(value, whole[slice(*piece.samples), slice(*piece.features)])


@settled
@given(layouts(partial=True), layouts(), st.integers(0, 10**6))
def test_a_partial_source_is_summed_exactly_once(source, target, seed):
    whole, held = values_of(source, np.random.default_rng(seed))
    for piece, value in apply(exchange(source, target), source, target, held).items():
        assert np.array_equal(value, whole[slice(*piece.samples), slice(*piece.features)])


@settled
@given(layouts(), layouts())
def test_who_has_a_part_takes_it_from_itself(source, target):
    for t in exchange(source, target):
        holders = {
            p.rank
            for p in source.pieces
            if intersect(p.samples, t.samples) == t.samples and intersect(p.features, t.features) == t.features
        }
        assert t.source in holders
        assert t.source == t.target or t.target not in holders


@settled
@given(layouts(partial=True), layouts())
def test_an_own_summand_comes_first(source, target):
    seen = set()
    for t in exchange(source, target):
        place = t.target, t.target_micro_batch, t.samples, t.features
        assert t.add == (place in seen), "the first summand is written, the others are added"
        if t.source == t.target:
            assert not t.add
        seen.add(place)


@settled
@given(layouts(), layouts())
def test_whole_transfers_are_those_between_equal_pieces(source, target):
    by_call = {(p.rank, p.micro_batch): p for p in source.pieces}
    wanted = {(p.rank, p.micro_batch): p for p in target.pieces}
    for t in exchange(source, target):
        a, b = by_call[t.source, t.source_micro_batch], wanted[t.target, t.target_micro_batch]
        assert t.whole == ((a.samples, a.features) == (b.samples, b.features))


def test_holders_of_copies_take_turns():
    """Four copies serve four targets: each sends once."""
    source = Layout(tuple(Piece(r, 0, (0, 8), (0, 2)) for r in range(4)))
    target = Layout(tuple(Piece(4 + i, 0, (2 * i, 2 * i + 2), (0, 2)) for i in range(4)))
    assert sorted(t.source for t in exchange(source, target)) == [0, 1, 2, 3]


def test_a_layout_exchanges_with_itself_without_the_wire():
    layout = Layout(
        tuple(Piece(r, m, (4 * m + 2 * r, 4 * m + 2 * r + 2), (0, 3)) for m in range(3) for r in (0, 1))
    )
    assert all(t.source == t.target and t.whole for t in exchange(layout, layout))
