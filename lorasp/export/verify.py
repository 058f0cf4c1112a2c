"""Is the export what was trained? It is loaded by plain transformers and peft, and gives its logits beside ours."""

import gc
from dataclasses import dataclass
from pathlib import Path

import torch
from bitsandbytes.nn import Linear4bit
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from lorasp.adapter import adapted_linears
from lorasp.data.alpaca import format_prompt
from lorasp.data.examples import prompt_ids
from lorasp.finished_run import FinishedRun
from lorasp.models.build import filled_units
from lorasp.models.causal_lm import CausalLM
from lorasp.quantization import ShardedLinear

_PROMPT_TOKENS = 64
_QUESTIONS = ("Name three trees.", "What is 12 times 12?", "Write a line about the sea.")
# Of the largest logit. Sums in another order differ by about 1e-6 of it in fp32, whose bound leaves room for deep
# models; weights that were stored in another dtype differ by a few of its steps.
_LEAST_TOLERANCE = 1e-4
_ROUNDING_STEPS = 8
_SHOWN = 0.25  # of the adapter's effect: a tolerance above it says little of the adapter


@dataclass(frozen=True)
class Difference:
    """Of the logits of all prompts: the largest difference, the largest there may be, the largest logit, and what the
    adapter moves one by at most (0 without an adapter): a difference says little beside an effect that is no larger.
    """

    largest: float
    tolerance: float
    scale: float
    effect: float
    tokens: int
    has_adapter: bool = True

    @property
    def doubt(self) -> str | None:
        """What the comparison leaves open, where the adapter's effect is not well above the tolerance."""
        if self.tolerance <= _SHOWN * self.effect or not self.has_adapter:
            return None
        lost = "one that is lost" if self.effect <= self.tolerance else f"one {self.tolerance / self.effect:.0%} off"
        return (
            f"this verifies the base and proves little of the adapter, which moves logits by {self.effect:.3g} only: "
            f"{lost} would pass as well"
        )

    def __str__(self) -> str:
        return (
            f"largest difference {self.largest:.3g} over {self.tokens} tokens (allowed: {self.tolerance:.3g}), of "
            f"logits up to {self.scale:.3g} that the adapter moves by up to {self.effect:.3g}"
        )


class VerificationError(Exception):
    """The export, loaded back, gives other logits than the run's model."""


def compare(
    run: FinishedRun,
    directory: Path,
    kind: str,
    *,
    dense: bool,
    stored: torch.dtype,
    adapter: Path,
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
) -> Difference:
    """The export's logits against those of the run's model, one model in memory at a time. Raises VerificationError.

    Both compute in fp32 whatever the run did: the rounding of bf16 would hide the adapter of a short run. dense: the
    adapter's base is the original one. stored: the dtype that a merged model's weights were rounded to.
    """
    prompts = _prompts(run, tokenizer, device)
    ours = run.load(device, dense=dense, dtype=torch.float32 if dense else None)
    _compute_in_fp32(ours, run, device)
    expected = [_our_logits(ours, ids) for ids in prompts]
    for linear in adapted_linears(ours):
        linear.scale = 0.0
    without = [_our_logits(ours, ids) for ids in prompts]
    del ours
    gc.collect()
    theirs = _load_export(run, directory, kind, adapter, device)
    found = [_logits(theirs, ids) for ids in prompts]
    scale = max(logits.abs().max().item() for logits in expected)
    rounded = [torch.float32]
    if kind == "merged":
        rounded += [stored] if dense else [stored, run.dtype]  # dequantized in the run's precision
    step = max(torch.finfo(dtype).eps for dtype in rounded)
    difference = Difference(
        largest=_largest_difference(expected, found),
        tolerance=max(_LEAST_TOLERANCE, _ROUNDING_STEPS * step) * scale,
        scale=scale,
        effect=_largest_difference(expected, without),
        tokens=sum(ids.shape[1] for ids in prompts),
        has_adapter=run.saved is not None,
    )
    if not difference.largest <= difference.tolerance:
        raise VerificationError(f"loaded back, the export differs from the run's model: {difference}")
    return difference


def _compute_in_fp32(model: CausalLM, run: FinishedRun, device: torch.device) -> None:
    """The base stays as it was rounded and quantized in the run's precision; the adapter's values are those saved."""
    model.float()
    for module in model.modules():
        if isinstance(module, ShardedLinear):
            module.dtype = torch.float32
    if run.saved is not None:
        run.saved.apply(model)
    model.to(device)


def _largest_difference(some: list[Tensor], others: list[Tensor]) -> float:
    """NaN where either holds one, which Python's max() would lose."""
    return torch.stack([(a - b).abs().max() for a, b in zip(some, others, strict=True)]).max().item()


def _prompts(run: FinishedRun, tokenizer: PreTrainedTokenizerBase, device: torch.device) -> list[Tensor]:
    template = run.recipe.data.template
    samples = [(sample["prompt"], sample.get("layout")) for sample in run.report.get("samples", [])]
    asked = [ids for sample in samples if (ids := prompt_ids(tokenizer, *sample))][:3]
    if not asked:
        texts = [format_prompt({"instruction": question, "input": ""}, template) for question in _QUESTIONS]
        asked = [prompt_ids(tokenizer, text, "alpaca") for text in texts]
    return [torch.tensor([ids[-_PROMPT_TOKENS:]], device=device) for ids in asked]


def _load_export(run: FinishedRun, directory: Path, kind: str, adapter: Path, device: torch.device) -> PreTrainedModel:
    trust = run.recipe.model.trust_remote_code
    common = {"device_map": str(device), "trust_remote_code": trust}
    if kind == "merged":
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, **common)
    else:
        base = directory if kind == "bnb4bit" else run.base
        model = AutoModelForCausalLM.from_pretrained(base, dtype=run.dtype, **common)
        for module in model.modules():
            module._apply(_to_fp32, recurse=False)  # the model's own .float() refuses 4-bit modules
            if isinstance(module, Linear4bit):
                module.compute_dtype = module.weight.quant_state.dtype = torch.float32
                module.compute_type_is_set = True
        if kind == "peft" and run.quantized and not run.base_is_packed:
            _dequantize_into(model, run, device)
    # bitsandbytes repacks 4-bit weights for inference on CPUs with AVX512-BF16: it rounds their scales to bf16, and
    # refuses sizes that 32 does not divide. Not where gradients flow, and what is compared is the file.
    model.enable_input_require_grads()
    if kind != "merged":
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter)
    return model.eval()


def _to_fp32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


@torch.no_grad()
def _dequantize_into(model: PreTrainedModel, run: FinishedRun, device: torch.device) -> None:
    """Gives the stock model the base that the adapter was trained on, whatever the format and block size."""
    for unit in filled_units(run.build_on_meta().model, run.open_base(), device=device):
        for name, module in unit.module.named_modules(prefix=unit.name.removesuffix(".")):
            if isinstance(module, ShardedLinear):
                module.dtype = torch.float32  # no rounding of what the codes, quantized by now, stand for
                model.get_submodule(name).weight.copy_(module.dense_weight())
        unit.module.to("meta")


@torch.no_grad()
def _our_logits(model: CausalLM, ids: Tensor) -> Tensor:
    places = torch.arange(ids.shape[1], device=ids.device)
    return model(ids, places.unsqueeze(0), (len(places),), places).float().cpu()


def _logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    with torch.enable_grad():
        return model(input_ids=ids).logits[0].detach().float().cpu()
