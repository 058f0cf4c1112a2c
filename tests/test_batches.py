import pytest
import torch

from lorasp.data.batches import (
    collate,
    evaluation_batches,
    spread,
    training_batches,
)
from lorasp.data.examples import Example
from lorasp.data.order import SampleOrder

# 50 examples of 3 to 39 tokens; token values tell the example and the position apart.
EXAMPLES = [
    Example(tuple(1000 * row + position for position in range(3 + row * 7 % 37)), 1 + row % 3) for row in range(50)
]


def order(examples: list[Example] = EXAMPLES, **settings) -> SampleOrder:
    settings = {"seed": 0, "epochs": 1.5, "global_batch_size": 16, **settings}
    return SampleOrder([len(example.input_ids) for example in examples], **settings)


def steps(rank: int, world_size: int, start_step: int = 0, **settings):
    batches = training_batches(
        EXAMPLES, order(**settings), micro_batch_size=2, rank=rank, world_size=world_size, start_step=start_step
    )
    return list(batches)


def test_positions_restart_and_labels_are_predicted_from_the_position_before():
    examples = [Example((10, 11, 12, 13), 2), Example((20, 21, 22), 1), Example((30, 31), 2)]
    batch = collate(examples, [2, 0, 1])
    assert batch.input_ids.tolist() == [[30, 31, 10, 11, 12, 13, 20, 21, 22]]
    assert batch.position_ids.tolist() == [[0, 1, 0, 1, 2, 3, 0, 1, 2]]
    assert batch.labels.tolist() == [12, 13, 21, 22]
    assert batch.label_positions.tolist() == [3, 4, 6, 7]
    assert batch.input_ids[0, batch.label_positions].tolist() == [11, 12, 20, 21]
    assert (batch.lengths, batch.label_counts, batch.rows) == ((2, 4, 3), (0, 2, 2), (2, 0, 1))


def test_several_label_spans_are_each_predicted_from_the_position_before():
    examples = [Example((20, 21), 1), Example((10, 11, 12, 13, 14, 15, 16), 2, ((3, 5),))]
    batch = collate(examples, [0, 1])
    assert batch.labels.tolist() == [21, 12, 15, 16]
    assert batch.input_ids[0, batch.label_positions].tolist() == [20, 11, 14, 15]
    assert batch.label_counts == (1, 3)


def test_a_batch_of_no_examples_is_one_token_without_label():
    batch = collate(EXAMPLES, [])
    assert batch.input_ids.shape == batch.position_ids.shape == (1, 1)
    assert batch.labels.shape == batch.label_positions.shape == (0,)
    assert batch.lengths == batch.label_counts == batch.rows == ()
    tensors = (batch.input_ids, batch.position_ids, batch.labels, batch.label_positions)
    assert {tensor.dtype for tensor in tensors} == {torch.int64}


def test_model_inputs_are_the_tensors_on_the_device_and_the_lengths():
    batch = collate(EXAMPLES, [3, 1])
    inputs = batch.model_inputs("meta")
    assert inputs.pop("example_lengths") == batch.lengths and inputs.pop("example_keys") == ()
    assert {name: tensor.shape for name, tensor in inputs.items()} == {
        "input_ids": batch.input_ids.shape,
        "position_ids": batch.position_ids.shape,
        "positions": batch.label_positions.shape,
        "labels": batch.labels.shape,
    }
    assert all(tensor.is_meta for tensor in inputs.values())


def test_an_example_without_a_position_before_its_first_label_is_refused():
    with pytest.raises(ValueError, match="a prompt of 0 tokens"):
        Example((1, 2), 0)


def test_spread_by_hand():
    # Row 5 (9 tokens) to slot 0, row 4 (7) to slot 1, row 7 (6) to slot 1 as 7 < 9; that is full: row 6 (2) to slot 0.
    assert spread([4, 5, 6, 7], [7, 9, 2, 6], slots=2, micro_batch_size=2) == [[5, 6], [4, 7]]
    assert spread([8], [5], slots=3, micro_batch_size=1) == [[8], [], []]
    with pytest.raises(ValueError, match="3 rows for 2 micro batches of 1"):
        spread([0, 1, 2], [1, 1, 1], slots=2, micro_batch_size=1)


def test_spread_balances_tokens():
    rows = list(range(48))
    lengths = [len(EXAMPLES[row].input_ids) for row in rows]
    slots = spread(rows, lengths, 12, 4)
    assert sorted(row for slot in slots for row in slot) == rows
    assert {len(slot) for slot in slots} == {4}
    tokens = [sum(lengths[row] for row in slot) for slot in slots]
    in_order = [sum(lengths[start : start + 4]) for start in range(0, 48, 4)]
    assert max(tokens) - min(tokens) <= 3 < max(in_order) - min(in_order)


@pytest.mark.parametrize("settings", [{}, {"pack_to": 60}, {"sources": [(20, 1.5), (30, 0.5)]}])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_share_the_global_batch_and_know_its_counts(world_size, settings):
    ranks = [steps(rank, world_size, **settings) for rank in range(world_size)]
    assert {len(rank) for rank in ranks} == {order(**settings).total_steps}
    for number, shares in enumerate(zip(*ranks, strict=True)):
        assert {share.step for share in shares} == {number}
        assert {len(share.micro_batches) for share in shares} == {16 // (2 * world_size)}
        batches = [batch for share in shares for batch in share.micro_batches]
        rows = [row for batch in batches for row in batch.rows]
        units = order(**settings).global_batch(number)
        assert sorted(rows) == sorted(row for unit in units for row in unit)
        # No unit is torn: a micro batch is at most two of them, one behind the other.
        whole = {unit for unit in units} | {first + second for first in units for second in units} | {()}
        assert all(batch.rows in whole for batch in batches)
        assert {share.label_count for share in shares} == {sum(batch.labels.numel() for batch in batches)}
        assert {share.token_count for share in shares} == {sum(sum(batch.lengths) for batch in batches)}


def test_a_run_resumes_at_any_step():
    for whole, resumed in zip(steps(1, 2)[3:], steps(1, 2, start_step=3), strict=True):
        assert whole.step == resumed.step and whole.label_count == resumed.label_count
        for before, after in zip(whole.micro_batches, resumed.micro_batches, strict=True):
            assert before.rows == after.rows and torch.equal(before.input_ids, after.input_ids)


def test_a_short_global_batch_fills_the_first_forward_of_every_rank():
    # 18 rows in steps of 16: two are left for 2 ranks with 4 forwards each.
    for rank in (0, 1):
        last = list(
            training_batches(
                EXAMPLES[:18], order(EXAMPLES[:18], epochs=1), micro_batch_size=2, rank=rank, world_size=2
            )
        )[-1]
        assert [len(batch.rows) for batch in last.micro_batches] == [1, 0, 0, 0]


def test_a_batch_size_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="16 is no multiple of 2 x 3"):
        steps(0, 3)


@pytest.mark.parametrize("world_size", [1, 2, 4, 7])
def test_evaluation_sees_each_row_once_with_as_many_forwards_on_every_rank(world_size):
    ranks = [evaluation_batches(EXAMPLES, 4, rank, world_size) for rank in range(world_size)]
    assert len({len(batches) for batches in ranks}) == 1
    rows = [row for batches in ranks for batch in batches for row in batch.rows]
    assert sorted(rows) == list(range(50))
    tokens = [sum(sum(batch.lengths) for batch in batches) for batches in ranks]
    assert max(tokens) - min(tokens) <= 39  # the longest example


def test_more_ranks_than_rows_get_empty_batches():
    ranks = [evaluation_batches(EXAMPLES[:3], 8, rank, 4) for rank in range(4)]
    assert [[len(batch.rows) for batch in batches] for batches in ranks] == [[1], [1], [1], [0]]
