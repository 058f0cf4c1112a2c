"""Tiny encoders with random weights, as pretraining leaves them, and tasks of GLUE made up for them."""

import json
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
)

WORDS = 'ash birch cedar elm fir hazel larch oak pine rowan is a tree not "'.split()
_SIZES = {"hidden_size": 36, "intermediate_size": 50, "num_attention_heads": 3, "num_hidden_layers": 3}
_SIZES |= {"max_position_embeddings": 66, "vocab_size": len(WORDS) + 5}


def save_encoder(kind: str, directory: Path, **changes) -> Path:
    """A seeded `bert` (an encoder alone, as sentence-transformers saves one) or `roberta` (with the head that it was
    pretrained with), without dropout, and a tokenizer of whole words.
    """
    torch.manual_seed(0)
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    if kind == "bert":
        model = BertModel(BertConfig(**_SIZES | dropout | changes))
    else:
        model = RobertaForMaskedLM(RobertaConfig(type_vocab_size=1, pad_token_id=1, **_SIZES | dropout | changes))
    for name, parameter in model.named_parameters():  # else at 0 and 1, which would hide a lost one
        if "bias" in name or "LayerNorm" in name:
            torch.nn.init.normal_(parameter, mean=float("LayerNorm.weight" in name), std=0.1)
    with torch.no_grad():
        for parameter in model.parameters():  # so that the first token's state depends on the others
            parameter.mul_(5 if parameter.dim() == 2 and parameter.shape[0] != _SIZES["vocab_size"] else 1)
    model.save_pretrained(directory)
    word_tokenizer(kind).save_pretrained(directory)
    return directory


def word_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    names = (
        ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"] if kind == "bert" else ["<s>", "<pad>", "</s>", "<u>", "<m>"]
    )
    vocabulary = {word: index for index, word in enumerate([*names, *WORDS])}
    unknown = names[1] if kind == "bert" else names[3]
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=unknown))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    if kind == "bert":
        backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
        return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]")
    backend.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", unk_token="<u>")


def sentences(count: int, seed: int = 0) -> list[str]:
    numbers = random.Random(seed)
    return [" ".join(numbers.choices(WORDS, k=numbers.randint(1, 9))) for _ in range(count)]


def write_rte(root: Path, train: int = 40, dev: int = 17) -> Path:
    """RTE's files in GLUE's layout, of our own sentences: entailed where both name the same tree first."""
    directory = root / "RTE"
    directory.mkdir(parents=True)
    for name, count, seed in (("train", train, 1), ("dev", dev, 2)):
        pairs = zip(sentences(count, seed), sentences(count, seed + 10), strict=True)
        lines = ["index\tsentence1\tsentence2\tlabel"]
        for index, (first, second) in enumerate(pairs):
            label = "entailment" if first.split()[0] < second.split()[0] else "not_entailment"
            lines.append(f"{index}\t{first}\t{second}\t{label}")
        (directory / f"{name}.tsv").write_text("\n".join(lines) + "\n")
    return root


def recipe_tree(model: Path, glue: Path, **sections) -> dict:
    """A recipe's sections; `sections` change them, key by key."""
    tree = {
        "task": "rte",
        "model": {"path": str(model)},
        "adapter": {"rank": 4},
        "data": {"train": str(glue), "max_length": 64},
        "training": {
            "epochs": 1.0,
            "max_steps": 4,
            "global_batch_size": 8,
            "micro_batch_size": 4,
            "learning_rate": 1e-2,
            "eps": 1e-5,
            "log_every": 1,
            "activation_checkpointing": "none",
        },
    }
    for section, values in sections.items():
        tree[section] = {**tree.get(section, {}), **values} if isinstance(values, dict) else values
    if tree.get("method") == "full":
        del tree["adapter"]
    return json.loads(json.dumps(tree))
