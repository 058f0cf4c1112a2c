"""Held-out scores and greedy answers, against plain transformers."""

import pytest
import torch
from torch import distributed as dist
from transformers import AutoModelForCausalLM

from lorasp.data.examples import Example
from lorasp.evaluation.answers import greedy_answers
from lorasp.evaluation.held_out import score_held_out
from tests.test_models import build
from tests.tiny_models import EOS, save_model

CPU = torch.device("cpu")


class Unsharded:
    """What the scorers ask of an engine, without the shards."""

    def __init__(self, model):
        self.model = model

    def __call__(self, **inputs):
        return self.model(**inputs)

    def train_mode(self, training):
        self.model.train(training)


@pytest.fixture(scope="module")
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    directory = save_model("llama", tmp_path_factory.mktemp("model") / "llama")
    return Unsharded(build(directory)), AutoModelForCausalLM.from_pretrained(directory)


def prompts(count=6):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 256, (3 + 2 * i,), generator=generator).tolist() for i in range(count)]


def decode(reference, prompt, limit):
    """Greedy decoding by transformers' own generate, without EOS."""
    ids = torch.tensor([prompt])
    out = reference.generate(ids, max_new_tokens=limit, do_sample=False, eos_token_id=EOS, pad_token_id=EOS)
    return [token for token in out[0, len(prompt) :].tolist() if token != EOS]


def test_answers_are_those_of_transformers_generate(models, one_process):
    ours, reference = models
    answers = greedy_answers(ours, prompts(), eos=EOS, max_new_tokens=8, device=CPU)
    assert answers == [decode(reference, prompt, 8) for prompt in prompts()]


def test_exact_match_counts_what_greedy_decoding_would_write(models, one_process):
    """Half of the responses are what the model writes, half differ in one token."""
    ours, reference = models
    examples = []
    for index, prompt in enumerate(prompts()):
        response = decode(reference, prompt, 5)
        if index % 2:
            response[3] = (response[3] + 1) % 256
        examples.append(Example((*prompt, *response), len(prompt)))
    score = score_held_out(ours, examples, 4, rank=0, world_size=1, device=CPU)
    assert score.exact_match == 0.5 and score.examples == 6


def test_a_response_that_was_cut_is_no_match(models, one_process):
    """Though each token that is left of it is right."""
    ours, reference = models
    examples = [
        Example((*prompt, *decode(reference, prompt, 5)), len(prompt), cut=index in (0, 4))
        for index, prompt in enumerate(prompts())
    ]
    score = score_held_out(ours, examples, 4, rank=0, world_size=1, device=CPU)
    assert score.exact_match == 4 / 6 and score.examples == 6


def test_held_out_loss_is_the_mean_over_response_tokens(models, one_process):
    ours, reference = models
    examples = [Example((*prompt, 7, 8, EOS), len(prompt)) for prompt in prompts()]
    losses = []
    for example in examples:
        ids = torch.tensor([example.input_ids])
        log_probabilities = reference(ids).logits[0].log_softmax(-1)
        for place in range(example.prompt_length, len(example.input_ids)):
            losses.append(-log_probabilities[place - 1, example.input_ids[place]].item())
    score = score_held_out(ours, examples, 4, rank=0, world_size=1, device=CPU)
    assert score.tokens == 18 and score.loss == pytest.approx(sum(losses) / 18, rel=1e-5)
