from collections import Counter

import pytest

from lorasp.data.batches import spread
from lorasp.data.examples import Example
from lorasp.data.order import SampleOrder
from lorasp.data.packing import pack

LENGTHS = [3 + row * 7 % 37 for row in range(50)]


def make(lengths=LENGTHS, **settings) -> SampleOrder:
    return SampleOrder(lengths, **{"seed": 0, "epochs": 1, "global_batch_size": 16, **settings})


def stream(order: SampleOrder) -> list[tuple[int, ...]]:
    return [unit for step in range(order.total_steps) for unit in order.global_batch(step)]


def rows(order: SampleOrder) -> list[int]:
    return [row for unit in stream(order) for row in unit]


def test_the_order_is_pinned():
    order = make([1] * 10, epochs=2)
    assert order.examples_of(0) == [6, 2, 8, 1, 9, 3, 7, 4, 5, 0]
    assert order.examples_of(1) == [7, 8, 1, 5, 3, 2, 4, 9, 6, 0]
    assert make([1] * 10, seed=1).examples_of(0) not in (order.examples_of(0), order.examples_of(1))


@pytest.mark.parametrize(
    ("epochs", "max_steps", "expected"),
    [(1, None, 4), (1.5, None, 5), (2, None, 7), (0.001, None, 1), (1, 3, 3), (1, 99, 4)],  # 50, 75, 100, 1 rows by 16
)
def test_total_steps(epochs, max_steps, expected):
    assert make(epochs=epochs, max_steps=max_steps).total_steps == expected


def test_every_row_comes_once_an_epoch_and_only_the_last_batch_is_short():
    order = make(seed=3, epochs=2.5)
    visited = rows(order)
    assert sorted(visited[:50]) == sorted(visited[50:100]) == list(range(50))
    assert len(visited) == 125 and len(set(visited[100:])) == 25
    assert [len(order.global_batch(step)) for step in range(8)] == [16] * 7 + [13]


def test_a_batch_larger_than_the_data_set_takes_several_epochs():
    units = make([1] * 5, epochs=3).global_batch(0)
    assert Counter(units) == {(row,): 3 for row in range(5)}
    assert sorted(unit for slot in spread(units, [1] * 15, 4, 4) for unit in slot) == sorted(units)


def test_a_weight_is_how_many_times_an_epoch_sees_each_row():
    """20 rows twice, 30 rows by a third, so 10 an epoch: three epochs see each of those once."""
    order = make(sources=[(20, 2.0), (30, 1 / 3)], epochs=3)
    epochs = [Counter(order.examples_of(epoch)) for epoch in range(3)]
    for seen in epochs:
        assert sum(seen.values()) == 50
        assert all(seen[row] == 2 for row in range(20))
        assert sum(seen[row] for row in range(20, 50)) == 10
    total = sum(epochs, Counter())
    assert all(total[row] == 1 for row in range(20, 50))
    assert order.total_steps == 10  # 150 by 16
    other = make(sources=[(20, 2.0), (30, 1 / 3)], epochs=3, seed=1)
    assert set(other.examples_of(0)) != set(order.examples_of(0))


def test_a_weight_between_one_and_two_repeats_other_rows_in_the_next_epoch():
    order = make(sources=[(50, 1.5)], epochs=2)
    first, second = Counter(order.examples_of(0)), Counter(order.examples_of(1))
    assert set(first.values()) == set(second.values()) == {1, 2}
    assert all(count == 3 for count in (first + second).values())


def test_first_fit_by_hand():
    # 9, 6 and 5 open a pack each; the other 5 fits the third, 3 the second, and 1 the first.
    assert pack([6, 3, 5, 1, 5, 9], 10) == [[5, 3], [0, 1], [2, 4]]
    with pytest.raises(ValueError, match="11 tokens for packs of 10"):
        pack([11], 10)


def test_packs_hold_every_example_of_the_epoch_once_and_none_is_over_full():
    order = make(pack_to=60, epochs=2)
    units = stream(order)
    assert all(sum(LENGTHS[row] for row in unit) <= 60 for unit in units)
    assert Counter(rows(order)) == {row: 2 for row in range(50)}
    in_epoch = units[: len(make(pack_to=60)._epoch(0))]
    assert sorted(row for unit in in_epoch for row in unit) == list(range(50))
    # No fewer than the tokens need; with 21 tokens a row on the average, first fit wastes less than a tenth.
    assert sum(LENGTHS) / 60 <= len(in_epoch) <= sum(LENGTHS) / 60 / 0.9


def test_half_an_epoch_packs_half_of_the_rows():
    order = make(pack_to=60, epochs=1.5)
    assert len(rows(order)) == 75


def test_like_lengths_share_a_global_batch_and_every_row_still_comes_once_an_epoch():
    plain, grouped = make(epochs=3, global_batch_size=8), make(epochs=3, global_batch_size=8, group_by_length=True)
    visited = rows(grouped)
    for epoch in range(3):
        assert sorted(visited[50 * epoch : 50 * (epoch + 1)]) == list(range(50))
    assert visited != rows(plain) and visited == rows(make(epochs=3, global_batch_size=8, group_by_length=True))

    def unlikeness(order):
        batches = [[LENGTHS[row] for (row,) in order.global_batch(step)] for step in range(order.total_steps)]
        return sorted(max(batch) - min(batch) for batch in batches)

    # 150 rows make 19 batches; the three that hold an epoch's end mix two epochs.
    assert max(unlikeness(grouped)[:15]) <= 8 < min(unlikeness(plain))
    means = [sum(LENGTHS[row] for (row,) in grouped.global_batch(step)) for step in range(6)]
    assert means != sorted(means) and means != sorted(means, reverse=True)


def test_no_step_has_larger_units_than_the_largest():
    examples = [Example(tuple(range(length)), 1 + row % 3) for row, length in enumerate(LENGTHS)]
    for settings in ({}, {"pack_to": 60}, {"sources": [(20, 0.5), (30, 1.0)]}):
        order = make(epochs=2, **settings)
        largest = order.largest_units(examples, 3)
        steps = [order.global_batch(step) for step in range(order.total_steps)]

        def most(size, steps=steps):
            return max(sum(sorted(map(size, units))[-3:]) for units in steps)

        tokens = sorted(len(unit.input_ids) for unit in largest)[-3:]
        labels = sorted(unit.label_count for unit in largest)[-3:]
        assert sum(tokens) >= most(lambda unit: sum(LENGTHS[row] for row in unit))
        assert sum(labels) >= most(lambda unit: sum(examples[row].label_count for row in unit))
        assert 3 <= len(largest) <= 6  # and they are no more than those of two steps


def test_no_epoch_is_packed_that_max_steps_ends_before(monkeypatch):
    whole, packed = make(pack_to=60, epochs=20), []
    monkeypatch.setattr(
        "lorasp.data.order.pack", lambda lengths, capacity: packed.append(1) or pack(lengths, capacity)
    )
    short = make(pack_to=60, epochs=20, max_steps=2)
    assert (short.total_steps, len(packed)) == (2, -(-2 * short.global_batch_size // len(whole._epoch(0))))
    assert stream(short) == [unit for step in range(2) for unit in whole.global_batch(step)]
