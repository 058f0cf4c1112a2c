"""Log-likelihoods planned over ranks: every row once, as many forwards on each, and transformers' own numbers."""

import random
from array import array

import pytest
import torch
from transformers import AutoModelForCausalLM

from lorasp.evaluation.scoring import (
    Forward,
    ScoredRow,
    heaviest,
    kept_parts,
    plan_forwards,
    score_forward,
    standing_alone,
)
from lorasp.live_tensors import LiveTensors
from lorasp.models.kept_states import KeptStates, Link
from lorasp.models.recompute import set_recomputation
from lorasp.models.weights import load_config
from lorasp.tracing import Traces, trace_scoring
from tests.test_evaluation import Unsharded
from tests.test_models import build, recipe
from tests.tiny_models import save_model

CPU = torch.device("cpu")


def rows_of(families: dict[str | None, tuple[int, int]], seed: int = 0, choices: int = 4) -> list[ScoredRow]:
    """families: name -> (tokens that its rows begin with, number of rows), in a mixed order."""
    numbers = random.Random(seed)
    rows = []
    for family, (shared, count) in families.items():
        beginning = [numbers.randrange(256) for _ in range(shared)]
        for index in range(count):
            # Differing at once, so that no more than the beginning is shared.
            rest = [index % 256, *(numbers.randrange(256) for _ in range(numbers.randint(1, 30)))]
            last = tuple((numbers.randrange(256),) for _ in range(choices))
            rows.append(ScoredRow(array("i", beginning + rest), last, family))
    numbers.shuffle(rows)
    return rows


FAMILIES = {"law": (200, 40), "anatomy": (120, 9), "one": (50, 1), None: (0, 5)}


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("reuse", [True, False])
@pytest.mark.parametrize("families", [FAMILIES, {"law": (30, 2)}, {None: (0, 1)}], ids=["many", "two", "one"])
def test_every_row_is_computed_once_in_as_many_forwards_on_each_rank(families, reuse, world_size):
    rows = rows_of(families)
    plan = plan_forwards(rows, world_size=world_size, tokens=400, reuse=reuse)
    assert len(plan) == world_size and len({len(forwards) for forwards in plan}) == 1
    assert sorted(row for forwards in plan for forward in forwards for row in forward.rows) == list(range(len(rows)))
    for forwards in plan:
        kept: dict[int, list[int]] = {}
        for forward in forwards:
            assert forward.token_count <= 400
            for part in forward.parts:
                if part.row is None:
                    kept[part.link.key] = list(part.tokens)
                else:  # what it goes on from and its own tokens are the row
                    assert kept.get(part.link.key, []) + list(part.tokens) == list(rows[part.row].tokens)
                    assert len(part.tokens) >= rows[part.row].scored
            for key in forward.done:
                del kept[key]
        assert not kept


def test_what_rows_share_is_computed_once_a_rank_and_only_where_families_are_cut():
    """40 · 200 + 9 · 120 tokens of beginnings become 200 + 120 on one rank; two more at most for each cut."""
    rows = rows_of(FAMILIES)
    own = sum(len(row.tokens) for row in rows) - 40 * 200 - 9 * 120
    counts = {}
    for world_size in (1, 4):
        plan = plan_forwards(rows, world_size=world_size, tokens=400)
        counts[world_size] = sum(forward.token_count for forwards in plan for forward in forwards)
    assert counts[1] == own + 200 + 120
    assert counts[4] <= counts[1] + 3 * 200


def test_ranks_have_about_as_much_to_do_in_each_forward():
    rows = rows_of({"law": (100, 300), "anatomy": (150, 150), "history": (400, 200)})
    plan = plan_forwards(rows, world_size=4, tokens=2000)
    together = sum(max(forward.token_count for forward in step) for step in zip(*plan, strict=True))
    assert together <= 1.15 * sum(f.token_count for forwards in plan for f in forwards) / 4


def test_a_row_longer_than_a_forward_has_one_of_its_own():
    rows = rows_of({None: (900, 1), "law": (20, 3)})
    [forwards] = plan_forwards(rows, world_size=1, tokens=100)
    assert max(forward.token_count for forward in forwards) > 900 and sum(len(f.rows) for f in forwards) == 4


def test_equal_rows_keep_a_token_of_their_own():
    row = ScoredRow(array("i", range(20)), ((1, 2), (1, 3)), "twice")
    [[forward]] = plan_forwards([row, row], world_size=1, tokens=100)
    assert [len(part.tokens) for part in forward.parts] == [18, 2, 2]


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {kind: save_model(kind, root / kind) for kind in ("llama", "qwen2", "mistral")}


def score(model, rows, world_size=1, tokens=300, reuse=True):
    found = {}
    for forwards in plan_forwards(rows, world_size=world_size, tokens=tokens, reuse=reuse):
        states = KeptStates()
        for forward in forwards:
            found |= dict(score_forward(Unsharded(model), forward, rows, states, CPU))
        assert states.nbytes() == 0  # what is done with is freed
    return [found[row] for row in range(len(rows))]


def reference(directory, rows):
    """(log-likelihood, greedy) of each row's continuations, row by row, from transformers' logits."""
    model, found = AutoModelForCausalLM.from_pretrained(directory).eval(), []
    for row in rows:
        with torch.no_grad():
            logits = model(torch.tensor([list(row.tokens)])).logits[0, -row.scored :].log_softmax(-1)
        greedy = logits.argmax(-1).tolist()
        found.append(
            [
                (sum(logits[i, token].item() for i, token in enumerate(its)), list(its) == greedy)
                for its in row.continuations
            ]
        )
    return found


@pytest.mark.parametrize("policy", ["selective", "none"])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "mistral"])
def test_log_likelihoods_are_those_of_transformers_with_and_without_reuse(kind, policy, directories):
    """By our layers and by transformers' own; also with Mistral's window, within a beginning and across its end."""
    rows = rows_of({"law": (60, 6), "anatomy": (5, 3), "one": (20, 1), None: (0, 3)})
    rows.append(ScoredRow(array("i", [*rows[0].tokens, 7, 8]), ((7, 8, 1), (7, 8, 2)), rows[0].family))  # three scored
    model = build(directories[kind]).eval()
    assert set_recomputation(model.model, policy)[0] == policy
    expected = reference(directories[kind], rows)
    for how in ({}, {"reuse": False}, {"tokens": 80}, {"world_size": 3}):
        for ours, theirs in zip(score(model, rows, **how), expected, strict=True):
            assert [value for value, _ in ours] == pytest.approx([value for value, _ in theirs], abs=1e-4)
            assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]


def test_an_empty_forward_computes_a_token_and_tells_nothing(directories):
    model = build(directories["llama"]).eval()
    assert list(score_forward(Unsharded(model), Forward(), [], KeptStates(), CPU)) == []


def test_a_forward_can_stand_alone(directories):
    """Any of a rank's, with what its rows go on from before them: the rehearsal's."""
    rows = rows_of({"law": (60, 12)})
    [forwards] = plan_forwards(rows, world_size=1, tokens=100)
    assert len(forwards) > 2 and not any(part.link.keeps for part in forwards[-1].parts)
    model = build(directories["llama"]).eval()
    alone = standing_alone(forwards[-1], kept_parts(forwards))
    assert alone.token_count == forwards[-1].token_count + 60
    whole = score(model, rows)
    for row, found in score_forward(Unsharded(model), alone, rows, KeptStates(), CPU):
        assert [value for value, _ in found] == pytest.approx([value for value, _ in whole[row]], abs=1e-4)


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_what_a_forward_takes_is_told_without_running_it(kind, directories):
    rows = rows_of({"law": (60, 12), "anatomy": (50, 4)})
    forward = heaviest(plan_forwards(rows, world_size=1, tokens=300))
    assert len({part.link.key for part in forward.parts}) == 2
    model, states = build(directories[kind]).eval(), KeptStates()
    settings = recipe(directories[kind])
    set_recomputation(model.model, settings.training.activation_checkpointing)
    with LiveTensors() as live:
        list(score_forward(Unsharded(model), forward, rows, states, CPU))
    of_it = (settings, load_config(directories[kind], settings.model), torch.float32)
    layers = [f"model.layers.{layer}" for layer in range(model.model.config.num_hidden_layers)]
    untold = Traces().model(*of_it, layers)
    told = trace_scoring(untold, forward, rows)
    rooms = sum(part.link.room for part in forward.parts)
    config = model.model.config
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    assert told["kept_in_scoring"] == 4 * 2 * len(layers) * config.num_key_value_heads * head * rooms
    assert sum(told.values()) == pytest.approx(live.peak_bytes, rel=0.01)


def test_a_text_written_token_by_token_has_the_logits_of_the_whole(directories):
    """Kept states grow, for a text that is generated."""
    model, text = build(directories["llama"]).eval(), torch.randint(0, 256, (1, 20))
    whole = model(text, torch.arange(20)[None], (20,), torch.arange(20))
    states, found = KeptStates(), []
    for start, stop in [(0, 8), *((n, n + 1) for n in range(8, 20))]:
        starts = states.begin([Link(1, keeps=True, room=20)], [stop - start])
        assert starts == (start,)
        positions = torch.arange(start, stop)[None]
        with torch.no_grad():
            found.append(
                model(
                    text[:, start:stop],
                    positions,
                    (stop - start,),
                    torch.arange(stop - start),
                    kept_states=states,
                )
            )
    torch.testing.assert_close(torch.cat(found), whole, rtol=1e-4, atol=1e-5)
