"""S (Eq. 1): exactly half, evenly spread, the same everywhere, and cheap to hold."""

import pytest
import torch

from lorasp.hashing import permutation, random_int64, random_uniform, stream_key
from lorasp.selection import balanced_group, select_entries, select_features, selection_digest

STRATEGIES = ["balanced", "uniform"]
LAYOUTS = ["columns", "rows"]  # of the strategy structured
SHAPES = [(16, 576), (1, 7), (5, 33), (8, 1), (3, 64)]


def draw(rows=16, columns=576, strategy="balanced", fraction=0.5, seed=0, name="model.layers.0.q_proj.A"):
    if strategy in LAYOUTS:
        return select_features(rows, columns, layout=strategy, fraction=fraction, seed=seed, name=name)
    return select_entries(rows, columns, strategy=strategy, fraction=fraction, seed=seed, name=name)


def test_hash_is_splitmix64():
    def reference(key, n):  # SplitMix64 in Python integers
        mask = 2**64 - 1
        x = (key + n * 0x9E3779B97F4A7C15) & mask
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
        return x ^ (x >> 31)

    key = stream_key(0, "a")
    ours = [value & (2**64 - 1) for value in random_int64(key, 100).tolist()]
    assert ours == [reference(key & (2**64 - 1), n) for n in range(1, 101)]


def test_uniform_numbers_fill_their_range_evenly():
    numbers = random_uniform(stream_key(1), 100_000, -2.0, 3.0)
    assert -2 <= numbers.min() and numbers.max() < 3
    # mean 0.5, standard deviation 5/√12 = 1.443; four standard errors of the mean: 4 · 1.443 / √100000 = 0.018
    assert abs(numbers.mean() - 0.5) < 0.018 and abs(numbers.std() - 1.4434) < 0.02


def test_permutation_visits_each_once():
    assert sorted(permutation(stream_key(3), 1000).tolist()) == list(range(1000))


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("shape", SHAPES)
def test_exactly_half_is_selected(strategy, shape):
    selection, bits = draw(*shape, strategy=strategy)
    assert selection.count == shape[0] * shape[1] // 2 == int(selection.mask(bits).sum())


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(("fraction", "expected"), [(0.25, 2304), (0.75, 6912), (1.0, 9216)])
def test_other_fractions_select_their_share(strategy, fraction, expected):
    selection, bits = draw(strategy=strategy, fraction=fraction)  # of 16 · 576 = 9216 entries
    assert selection.count == expected == int(selection.mask(bits).sum())


def test_balanced_takes_one_of_each_pair_by_a_fair_coin():
    selection, bits = draw(64, 4096)
    pairs = selection.mask(bits).view(-1, 2)
    assert torch.equal(pairs.sum(1), torch.ones(len(pairs), dtype=torch.long))
    share = pairs[:, 1].float().mean()  # of 131072 coins; four standard errors: 4 · 0.5 / √131072 = 0.0055
    assert abs(share - 0.5) < 0.0055


def test_balanced_takes_k_of_every_m():
    selection, bits = draw(16, 60, fraction=0.375)  # 3 of 8
    assert torch.equal(selection.mask(bits).view(-1, 8).sum(1), torch.full((120,), 3))
    assert balanced_group(0.375) == (3, 8)
    with pytest.raises(ValueError, match="k/m with m at most 8"):
        balanced_group(0.31)


def test_uniform_selects_every_entry_equally_often():
    hits = sum(
        draw(4, 16, strategy="uniform", seed=seed)[0].mask(draw(4, 16, strategy="uniform", seed=seed)[1]).int()
        for seed in range(400)
    )
    # Each of 64 entries: 200 ± 10 of 400; five standard deviations.
    assert hits.min() > 150 and hits.max() < 250


@pytest.mark.parametrize("strategy", STRATEGIES + LAYOUTS)
@pytest.mark.parametrize("fraction", [0.25, 0.5, 0.75, 1.0])
@pytest.mark.parametrize("shape", [(16, 576), (4, 7), (5, 33)])
def test_expand_and_select_are_masked_indexing(strategy, fraction, shape):
    selection, bits = draw(*shape, strategy=strategy, fraction=fraction)
    S = selection.mask(bits)
    values, dense = torch.randn(selection.count), torch.randn(shape)
    reference = torch.zeros(shape)
    reference[S] = values
    assert torch.equal(selection.expand(values, bits), reference)
    assert torch.equal(selection.select(dense, bits), dense[S])


@pytest.mark.parametrize("strategy", STRATEGIES + LAYOUTS)
@pytest.mark.parametrize("fraction", [0.25, 0.5, 0.75])
@pytest.mark.parametrize("shape", [(16, 576), (4, 7), (5, 33)])
def test_expand_puts_frozen_entries_where_S_is_zero(strategy, fraction, shape):
    selection, bits = draw(*shape, strategy=strategy, fraction=fraction)
    S, dense = selection.mask(bits), torch.randn(shape)
    assert torch.equal(selection.expand(dense[S], bits, dense[~S]), dense)


def test_structured_takes_half_of_the_features_whole():
    A, A_bits = draw(16, 577, "columns", name="model.layers.0.self_attn.inputs")
    S = A.mask(A_bits)
    assert A.count == 16 * 288 and torch.equal(S.sum(0), 16 * S[0]) and int(S[0].sum()) == 288
    assert torch.equal(A.features(A_bits), S[0].nonzero().view(-1))
    B, B_bits = draw(33, 16, "rows", name="model.layers.0.self_attn.q_proj.B")
    S = B.mask(B_bits)
    assert B.count == 16 * 16 and torch.equal(S.sum(1), 16 * S[:, 0]) and int(S[:, 0].sum()) == 16
    assert torch.equal(B.features(B_bits), S[:, 0].nonzero().view(-1))
    assert (A_bits.numel(), B_bits.numel()) == (A.bytes_held, B.bytes_held) == (73, 5)  # a bit a feature


def test_bits_held():
    for (rows, columns), strategy in [((16, 576), "balanced"), ((5, 33), "balanced"), ((16, 576), "uniform")]:
        selection, bits = draw(rows, columns, strategy=strategy)
        assert bits.dtype == torch.uint8 and bits.numel() == selection.bytes_held
        per_entry = 1 / 16 if strategy == "balanced" else 1 / 8  # one bit a pair, one bit an entry
        assert bits.numel() <= rows * columns * per_entry + 1
    assert draw(fraction=1.0)[1].numel() == 0


def test_selection_is_pinned_across_versions_and_machines():
    """A change here changes every user's S: adapters saved by seed alone would no longer be what they were."""
    for strategies, pinned in ((STRATEGIES, PINNED), (LAYOUTS, PINNED_STRUCTURED)):
        masks = [(strategy, *draw(strategy=strategy)) for strategy in strategies]
        assert selection_digest(masks) == pinned
        assert selection_digest(reversed(masks)) == pinned  # not by construction order


PINNED = "7ce2c981d3404797714bfa8856bf7cd31dbcefffffec30fcb5587aec2f09d632"
PINNED_STRUCTURED = "03517d93e6e8fd71d12eb9b1b5705cf584aa18379982c5a5d110e0c016c3bbb6"


def test_selection_depends_on_seed_and_name():
    base = draw()[1]
    assert torch.equal(base, draw()[1])
    for other in (draw(seed=1), draw(name="model.layers.0.q_proj.B"), draw(name="model.layers.1.q_proj.A")):
        agreement = (base == other[1]).float().mean()  # of bytes: 1/256 by chance
        assert agreement < 0.05


def test_a_matrix_too_small_to_halve_is_refused():
    with pytest.raises(ValueError, match="1 entries: too few"):
        draw(1, 1)
    with pytest.raises(ValueError, match="1 features: too few"):
        draw(1, 4, "rows")
