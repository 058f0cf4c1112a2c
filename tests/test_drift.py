from lorasp.reporting.drift import drift

MIB = 2**20


def test_the_most_of_each_rank_after_the_fifth_step_is_set_against_what_it_held_then():
    steps = [2, 4, 6, 8, 10]
    held = [(900, 900), (500, 500), (1000, 1000), (1100, 990), (1020, 1000)]
    first, second = drift(steps, [tuple(MIB * value for value in ranks) for ranks in held])
    assert (first.rank, first.from_step, first.most_at_step) == (0, 6, 8)
    assert (first.held_bytes, first.most_bytes) == (1000 * MIB, 1100 * MIB)
    assert round(first.share, 6) == 0.1 and first.is_growing
    assert (second.most_at_step, second.share, second.is_growing) == (10, 0.0, False)


def test_some_mebibytes_are_no_drift():
    [its] = drift([5, 6], [(100 * MIB,), (110 * MIB,)])
    assert its.share > 0.03 and not its.is_growing


def test_a_rank_that_held_nothing_has_grown_by_no_share():
    [its] = drift([5, 6], [(0,), (3 * MIB,)])
    assert its.share == 0.0 and not its.is_growing


def test_a_run_too_short_to_settle_has_none():
    assert drift([], []) == drift([1, 2, 3, 4], [(1,)] * 4) == drift([4, 5], [(1,), (2,)]) == []


def test_a_resumed_run_settles_anew():
    """Its first steps fill what the processes before it had held."""
    steps, held = [101, 103, 105, 107], [(100 * MIB,), (200 * MIB,), (200 * MIB,), (201 * MIB,)]
    [its] = drift(steps, held, resumed_at=100)
    assert (its.from_step, its.most_at_step) == (105, 107) and not its.is_growing
    assert drift(steps, held, resumed_at=102) == []


def test_a_profilers_memory_is_not_the_runs():
    """From the step on that it records; a run that was profiled before it settled has no drift to tell."""
    steps, held = [5, 6, 7, 8], [(100 * MIB,), (101 * MIB,), (300 * MIB,), (300 * MIB,)]
    [its] = drift(steps, held, profiled_from=7)
    assert (its.most_at_step, its.most_bytes) == (6, 101 * MIB) and not its.is_growing
    assert drift(steps, held)[0].is_growing
    assert drift(steps, held, profiled_from=6) == drift(steps, held, profiled_from=3) == []
