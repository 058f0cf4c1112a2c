"""What our trainer should compute, written the plain way: one process, dense masked adapters, padding, full logits.

Nothing of `lorasp` takes part but S and A's start, which are given to it.
"""

import math

import torch
from bitsandbytes import functional as bnb
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from lorasp.adapter import AdaptedLinear
from lorasp.recipe import Recipe


class DenseMaskedLinear(nn.Module):
    """W (frozen) plus scale · (B⊙S_B)(A⊙S_A), with dense trainable A and B whose gradients are masked by autograd."""

    def __init__(self, weight, bias, compact: AdaptedLinear) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.bias, self.scale = bias, compact.scale
        self.register_buffer("S_A", compact.A_selection.mask(compact.A_bits))
        self.register_buffer("S_B", compact.B_selection.mask(compact.B_bits))
        start = compact.dense_A().detach().clone()
        self.register_buffer("frozen_A", start * ~self.S_A)
        self.A = nn.Parameter(start * self.S_A)
        self.B = nn.Parameter(torch.zeros(self.S_B.shape))

    def forward(self, x):
        A, B = self.A * self.S_A + self.frozen_A, self.B * self.S_B
        return F.linear(x, self.weight, self.bias) + self.scale * (x @ A.t()) @ B.t()


def reference_run(directory, recipe: Recipe, examples, steps: list[list[int]], gradients_of: int = 0) -> dict:
    """Losses, gradient norms and trained values of AdamW on the given global batches (lists of rows).

    gradients_of: the step whose gradients are given.
    """
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="sdpa")
    head = model.get_output_embeddings()
    if recipe.method != "full":
        model.requires_grad_(False)
    targets = recipe.adapter.target_modules
    for name, linear in list(model.named_modules()):
        if not isinstance(linear, nn.Linear) or linear is head or recipe.method == "full":
            continue
        compact = AdaptedLinear(
            name,
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            quantization=recipe.quantization,
            dtype=torch.float32,
            adapter=recipe.adapter,
            strategy=recipe.selection.strategy,
            fraction=recipe.effective_fraction,
            seed=recipe.seed,
        )
        weight = linear.weight.detach()
        if recipe.quantization.format != "none":
            codes, state = bnb.quantize_4bit(
                weight,
                blocksize=recipe.quantization.block_size,
                quant_type=recipe.quantization.format,
                compress_statistics=recipe.quantization.double_quant,
            )
            weight = bnb.dequantize_4bit(codes, state)
        parent, _, last = name.rpartition(".")
        if targets == "all-linear" or last in targets:
            setattr(model.get_submodule(parent), last, DenseMaskedLinear(weight, linear.bias, compact))
        else:
            linear.weight.data = weight
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    training = recipe.training
    optimizer = torch.optim.AdamW(
        trained.values(),
        lr=training.learning_rate,
        betas=training.betas,
        eps=training.eps,
        weight_decay=training.weight_decay,
    )
    warmup = math.ceil(training.warmup_ratio * len(steps))
    found = {"losses": [], "norms": [], "gradients": None}
    model.train()
    for step, rows in enumerate(steps):
        batch = [examples[row] for row in rows]
        width = max(len(ids) for ids, _ in batch)
        ids = torch.tensor([[*ids, *[0] * (width - len(ids))] for ids, _ in batch])
        mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in batch])
        labels = torch.tensor([[-100] * p + list(ids[p:]) + [-100] * (width - len(ids)) for ids, p in batch])
        logits = model(input_ids=ids, attention_mask=mask).logits
        count = max(1, int((labels != -100).sum()))
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum") / count
        optimizer.zero_grad()
        loss.backward()
        if step == gradients_of:
            found["gradients"] = {name: p.grad.detach().clone() for name, p in trained.items()}
        norm = nn.utils.clip_grad_norm_(trained.values(), training.max_grad_norm)
        progress = (step - warmup) / max(1, len(steps) - warmup)
        factor = (step + 1) / warmup if step < warmup else (1 + math.cos(math.pi * progress)) / 2
        for group in optimizer.param_groups:
            group["lr"] = training.learning_rate * factor
        optimizer.step()
        found["losses"].append(loss.item())
        found["norms"].append(norm.item())
    found["values"] = {name: p.detach() for name, p in trained.items()}
    found["masks"] = {
        f"{name}.{part}": getattr(module, f"S_{part}")
        for name, module in model.named_modules()
        if isinstance(module, DenseMaskedLinear)
        for part in "AB"
    }
    return found
