"""Tiny models with random weights and a byte tokenizer, saved as a user's checkpoint would be."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

BOS, EOS, PAD = 256, 257, 258
VOCABULARY = 261  # bytes, BOS, EOS, and three that only T5 uses one of: no multiple of a rank count

_COMMON = {
    "vocab_size": VOCABULARY,
    "num_hidden_layers": 3,
    "max_position_embeddings": 512,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
}
_T5 = {
    "vocab_size": VOCABULARY,
    "d_model": 45,
    "d_kv": 14,
    "d_ff": 91,
    "num_heads": 3,
    "num_layers": 2,
    "num_decoder_layers": 3,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 20,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
    "decoder_start_token_id": PAD,
}
_MODELS = {
    # Grouped queries, and sizes that neither 64 nor 2 divide: 33 · 4 heads, 91 and 45 wide.
    "llama": (
        LlamaForCausalLM,
        LlamaConfig(
            hidden_size=45,
            intermediate_size=91,
            num_attention_heads=3,
            num_key_value_heads=1,
            head_dim=14,
            tie_word_embeddings=False,
            **_COMMON,
        ),
    ),
    "llama_deep": (  # 24 layers: a unit is little beside the whole
        LlamaForCausalLM,
        LlamaConfig(
            hidden_size=64,
            intermediate_size=160,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=False,
            **_COMMON | {"num_hidden_layers": 24},
        ),
    ),
    "llama_tied": (
        LlamaForCausalLM,
        LlamaConfig(
            hidden_size=64,
            intermediate_size=160,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=True,
            **_COMMON,
        ),
    ),
    "qwen2": (  # biases on q, k and v
        Qwen2ForCausalLM,
        Qwen2Config(
            hidden_size=64,
            intermediate_size=160,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=True,
            **_COMMON,
        ),
    ),
    "mistral": (  # a window shorter than the examples
        MistralForCausalLM,
        MistralConfig(
            hidden_size=64,
            intermediate_size=160,
            num_attention_heads=4,
            num_key_value_heads=2,
            sliding_window=12,
            tie_word_embeddings=False,
            **_COMMON,
        ),
    ),
    # Other layers in the decoder than in the encoder, and distances beyond the last bucket.
    "t5": (T5ForConditionalGeneration, T5Config(feed_forward_proj="relu", dropout_rate=0.0, **_T5)),
    "t5_dropout": (T5ForConditionalGeneration, T5Config(feed_forward_proj="relu", dropout_rate=0.1, **_T5)),
    # As version 1.1 and FLAN: gated, and with a head of its own.
    "t5_gated": (
        T5ForConditionalGeneration,
        T5Config(feed_forward_proj="gated-gelu", dropout_rate=0.0, tie_word_embeddings=False, **_T5),
    ),
}


def save_model(kind: str, directory: Path) -> Path:
    """A seeded model of `kind` and its tokenizer in `directory`."""
    torch.manual_seed(0)
    build, config = _MODELS[kind]
    model = build(config)
    if kind == "t5_gated":
        model.lm_head.weight = torch.nn.Parameter(torch.randn(VOCABULARY, config.d_model))
    for name, parameter in model.named_parameters():
        if "bias" in name or "norm" in name:  # transformers starts them at 0 and 1, which would hide a lost one
            torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.1)
    model.save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return directory


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token a byte, BOS before each text, EOS; no padding token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = {character: index for index, character in enumerate(alphabet)} | {"<s>": BOS, "</s>": EOS}
    backend = Tokenizer(models.BPE(vocab=tokens, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return tokenizer
