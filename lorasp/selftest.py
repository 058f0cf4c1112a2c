"""Is what a run relies on right on this machine? Each check compares with a reference that shares no code with it.

Only the standard library is imported at the top: `check_libraries` must be able to say what is missing.
"""

import os
import re
import socket
import time
import tomllib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from lorasp.recipe import Recipe
    from lorasp.zero.launch import Ranks

    Results = tuple[dict[str, Tensor], float]  # on the CPU, by name; the greatest difference from the reference

_MIB = 2**20
_PYPROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"
_NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")

_RANK = 8  # of the adapters here

# The values that a 4-bit code stands for, as shares of its block's largest magnitude. NF4: QLoRA (arXiv 2305.14314),
# appendix E. FP4: sign, two exponent bits and one of mantissa, in bitsandbytes' order of codes.
_NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
_FP4 = tuple(sign * size / 12 for sign in (1, -1) for size in (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0))
TABLES = {"nf4": _NF4, "fp4": _FP4}


class CheckFailed(Exception):
    """What is wrong, and (where it is not the check's usual advice) what to do."""

    def __init__(self, wrong: str, advice: str = "") -> None:
        super().__init__(wrong)
        self.advice = advice


@dataclass(frozen=True)
class Outcome:
    """One check on one rank. found: what was seen, or what is wrong; advice: what to do about it, if it failed."""

    name: str
    passed: bool
    found: str
    advice: str
    seconds: float


def run_check(name: str, check: Callable[[], str], advice: str) -> Outcome:
    """Runs one check; whatever it raises becomes its outcome, with `advice` unless it brings its own."""
    started = time.perf_counter()
    try:
        passed, found, advice = True, check(), ""
    except CheckFailed as failed:
        passed, found, advice = False, str(failed), failed.advice or advice
    except Exception as error:
        passed, found = False, f"{type(error).__name__}: {str(error).strip()}"
    return Outcome(name, passed, found, advice, round(time.perf_counter() - started, 3))


def check_libraries() -> str:
    """Every package that pyproject.toml asks for is there, in a version at least as new."""
    found, wrong, install = [], [], []
    for package, minimum in _requirements():
        try:
            version = metadata.version(package)
        except metadata.PackageNotFoundError:
            version = None
        if version is None or _numbers(version) < _numbers(minimum):
            wrong.append(f"{package} is {version or 'not installed'}, {minimum} or newer is needed")
            install.append(f"'{package}>={minimum}'")
        found.append(f"{package} {version}")
    if wrong:
        raise CheckFailed("; ".join(wrong), f"pip install {' '.join(install)}")
    return ", ".join(found)


def checks_on_ranks(ranks: "Ranks", recipe: "Recipe") -> list[tuple[str, Callable[[], str], str]]:
    """Name, check and advice of all that need ranks, in the order in which a fault of one explains those after it."""
    import torch

    # References are only as good as this: some containers turn TF32 on, which keeps 10 bits.
    torch.set_float32_matmul_precision("highest")
    device = ranks.device
    a_rank_a_gpu = "see that nvidia-smi lists the GPUs, and start one rank a GPU"
    network = "NCCL_DEBUG=INFO (GPU) or GLOO_SOCKET_IFNAME=… (CPU) tells, and chooses, what the ranks talk through"
    counters = "the peaks in this machine's reports are not to be trusted"
    reinstall = "install bitsandbytes anew for this device: pip install --force-reinstall --no-deps bitsandbytes"
    ours = "please report this, with what --json FILE writes"
    versions = "compare the versions of torch, deepspeed and accelerate with those that pyproject.toml names"
    return [
        ("device", lambda: check_device(ranks), a_rank_a_gpu),
        ("collectives", lambda: check_collectives(ranks), network),
        ("memory counters", lambda: check_memory_counters(device), counters),
        ("nf4 kernels", lambda: check_4bit("nf4", device), reinstall),
        ("fp4 kernels", lambda: check_4bit("fp4", device), reinstall),
        ("adapter", lambda: check_adapter(device), ours),
        ("loss", lambda: check_loss(device), ours),
        ("ZeRO-3 shards", lambda: check_shards(ranks, recipe), versions),
    ]


def over_ranks(outcomes: Sequence[Outcome]) -> Outcome:
    """A check's outcome from those of all ranks: passed if on every rank; the first that failed speaks for all."""
    failed = [(rank, outcome) for rank, outcome in enumerate(outcomes) if not outcome.passed]
    seconds = max(outcome.seconds for outcome in outcomes)
    spoken, found = outcomes[0], outcomes[0].found
    if failed:
        rank, spoken = failed[0]
        others = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
        found = f"rank {rank}{others}: {spoken.found}" if len(outcomes) > 1 else spoken.found
    return Outcome(spoken.name, not failed, found, spoken.advice, seconds)


def check_device(ranks: "Ranks") -> str:
    """Each rank computes on a device of its own; a GPU that there is, is used."""
    import psutil
    import torch
    from torch import distributed as dist

    places: list[Any] = [None] * ranks.world_size
    dist.all_gather_object(places, (socket.gethostname(), str(ranks.device)))
    backend = dist.get_backend()
    if ranks.device.type == "cpu":
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
        if _NVIDIA_DRIVER.exists() and not hidden:
            raise CheckFailed(
                f"there is an NVIDIA driver, but torch {torch.__version__} sees no GPU",
                "install torch's CUDA build (without -c .ci/constraints.txt), or check nvidia-smi",
            )
        memory = psutil.virtual_memory().total / 2**30
        threads = f"{torch.get_num_threads()} thread(s) a rank"
        return f"no GPU: {os.cpu_count()} cores, {memory:.0f} GiB, {threads}, {backend}"
    if len(set(places)) < len(places):
        shared = next(place for place in places if places.count(place) > 1)
        raise CheckFailed(f"{places.count(shared)} ranks share {shared[1]} of {shared[0]}", "start one rank a GPU")
    properties = torch.cuda.get_device_properties(ranks.device)
    bf16 = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no bf16 (model.dtype float32)"
    return (
        f"{ranks.device}: {properties.name}, {properties.total_memory / 2**30:.0f} GiB, capability "
        f"{properties.major}.{properties.minor}, {bf16}, {backend}"
    )


def check_collectives(ranks: "Ranks") -> str:
    """all_gather of uint8 (4-bit codes travel so), broadcast and all_reduce bring the right values."""
    import torch
    from torch import distributed as dist

    rank, world, device = ranks.rank, ranks.world_size, ranks.device
    count = 4 * _MIB
    mine = _bytes_of_rank(rank, count).to(device)
    whole = torch.empty(world * count, dtype=torch.uint8, device=device)
    dist.barrier()
    started = time.perf_counter()
    dist.all_gather_into_tensor(whole, mine)
    whole = whole.cpu()  # waits for the device
    seconds = time.perf_counter() - started
    sent = torch.full((1000,), float(rank), device=device)
    dist.broadcast(sent, world - 1)
    summed = torch.arange(1000, dtype=torch.float32, device=device) * (rank + 1)
    dist.all_reduce(summed)

    expected = torch.arange(1000, dtype=torch.float32) * (world * (world + 1) // 2)
    for what, right in (
        ("all_gather of uint8", torch.equal(whole, torch.cat([_bytes_of_rank(r, count) for r in range(world)]))),
        ("broadcast", bool((sent == world - 1).all())),
        ("all_reduce", torch.equal(summed.cpu(), expected)),
    ):
        if not right:
            raise CheckFailed(f"{what} over {world} ranks brought wrong values")
    return f"{world} rank(s): all_gather of uint8 ({world * count / _MIB / seconds:,.0f} MiB/s), broadcast, all_reduce"


def _bytes_of_rank(rank: int, count: int) -> "Tensor":
    import torch

    return (torch.arange(count) * (2 * rank + 1) + rank).to(torch.uint8)


def check_memory_counters(device: "torch.device") -> str:
    """64 MiB that a phase allocates and frees are in its peak, and no longer in the next phase's."""
    import torch

    from lorasp.memory import MemoryMeter

    meter = MemoryMeter(device)
    with meter.phase("with"):
        block = torch.ones(64 * _MIB, dtype=torch.uint8, device=device)
        del block
    with meter.phase("without"):
        torch.ones(_MIB, dtype=torch.uint8, device=device)
    seen, after = (meter.peaks[phase].peak_bytes / _MIB for phase in ("with", "without"))
    # Pages that the C library and torch's threads touch on the way; and the kernel counts a thread's pages in batches,
    # of more pages the more cores there are: 16 cores left 2 MiB out.
    slack = 16
    if not 64 - slack <= seen <= 64 + slack:
        raise CheckFailed(f"64 MiB were allocated and {seen:.1f} MiB were seen by {meter.source}")
    if after > slack:
        raise CheckFailed(f"64 MiB were freed, but the next phase's peak is still {after:.1f} MiB by {meter.source}")
    return f"64 MiB seen as {seen:.1f}, {after:.1f} after the reset, by {meter.source}"


def check_4bit(format: str, device: "torch.device") -> str:
    """Codes and round trip against the published table in plain torch; the device's against the CPU's."""
    return _on_cpu_and_device(lambda device: _quantize(format, device), device, tolerance=1e-6, ties=5e-3)


def _quantize(format: str, device: "torch.device") -> "Results":
    import torch

    from lorasp.quantization import ShardedLinear
    from lorasp.recipe import Quantization

    out_features, in_features = 320, 384
    weight = _normal(out_features, in_features, seed=1)
    linears = {}
    for double_quant in (False, True):
        quantization = Quantization(format=format, double_quant=double_quant)
        linear = ShardedLinear(in_features, out_features, bias=False, quantization=quantization, dtype=torch.float32)
        linear.load(weight.to(device), None)
        linears[double_quant] = linear

    # The reference: the first of two neighbours is the byte's upper half.
    table = torch.tensor(TABLES[format])
    blocks = weight.view(-1, Quantization().block_size)
    scales = blocks.abs().amax(dim=1, keepdim=True)
    nearest = (blocks / scales).unsqueeze(-1).sub(table).abs().argmin(dim=-1)
    codes = linears[False].codes.data.cpu()
    taken = torch.stack([codes >> 4, codes & 15], dim=1).view(blocks.shape).long()
    # Kernels compare with rounded midpoints: a weight at one may go to either side. ±0 are one value in FP4.
    elsewhere = (table[taken] != table[nearest]).float().mean().item()
    if elsewhere > 1e-3:
        raise CheckFailed(f"{elsewhere:.2%} of the {format} codes on {device} are not the nearest value of the table")
    expected = (table[taken] * scales).view_as(weight)
    dense = linears[False].dense_weight().cpu()
    worst = _equal(dense, expected, 1e-6, f"{format} dequantized on {device}, against the table")
    double = linears[True].dense_weight().cpu()
    # 8-bit scales: a step of their code is below 1 % of the largest scale.
    _equal(double, expected, 2e-2, f"{format} with double quantization on {device}, against single")
    return {"dequantized": dense, "doubly quantized": double}, worst


def check_adapter(device: "torch.device") -> str:
    """The compact adapter against a dense masked LoRA with autograd: output and all gradients."""
    return _on_cpu_and_device(_adapter, device, tolerance=1e-4)


def _adapter(device: "torch.device") -> "Results":
    import torch

    results, worst = {}, 0.0
    x, grad = _normal(37, 96, seed=2), _normal(37, 64, seed=3)
    for strategy in ("balanced", "uniform", "structured"):
        linear = _adapted_linear(strategy, double_quant=True).to(device)
        with torch.no_grad():
            linear.B.copy_(_normal(linear.B.numel(), seed=4))
        # Two leaves: `x.to` of a CPU would be x itself, and its gradient be compared with itself.
        ours, plain = (x.to(device, copy=True).requires_grad_() for _ in range(2))
        y = linear(ours)
        y.backward(grad.to(device))

        masks = [
            linear.A_selection.mask(linear.A_bits),
            linear.B_selection.mask(linear.B_bits),
        ]
        A, B = (
            torch.zeros(mask.shape, device=device).masked_scatter(mask, values).requires_grad_()
            for mask, values in zip(masks, (linear.A.data, linear.B.data), strict=True)
        )
        update = (plain @ (A * masks[0]).t()) @ (B * masks[1]).t()
        reference = plain @ linear.dense_weight().t() + linear.bias + linear.scale * update
        reference.backward(grad.to(device))
        for name, mine, theirs in (
            ("output", y, reference),
            ("gradient of x", ours.grad, plain.grad),
            ("gradient of A", linear.A.grad, A.grad[masks[0]]),
            ("gradient of B", linear.B.grad, B.grad[masks[1]]),
        ):
            what = f"{strategy} adapter on {device}, {name}, against dense masked LoRA"
            worst = max(worst, _equal(mine, theirs, 1e-4, what))
            results[f"{strategy} {name}"] = mine.detach().cpu()
    return results, worst


def check_loss(device: "torch.device") -> str:
    """The chunked loss against cross entropy on whole logits: sum, gradient, and the scores of evaluation."""
    return _on_cpu_and_device(_loss, device, tolerance=1e-4)


def _loss(device: "torch.device") -> "Results":
    import torch
    import torch.nn.functional as F

    from lorasp.models.causal_lm import Head

    rows, hidden_size, vocabulary = 300, 64, 1021  # several chunks, the last one short
    head = Head(torch.nn.Parameter(_normal(vocabulary, hidden_size, seed=5).to(device), requires_grad=False), None)
    hidden = _normal(rows, hidden_size, seed=6).to(device)
    labels = (torch.arange(rows) * 7919 % vocabulary).to(device)
    ours, plain = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    loss = head(ours, labels)
    loss.backward()
    each = F.cross_entropy(plain @ head.weight.t(), labels, reduction="none")
    each.sum().backward()
    scores, _ = head(hidden, labels, score=True)
    results = {"sum": loss.detach(), "gradient": ours.grad, "scores": scores}
    references = {"sum": each.sum(), "gradient": plain.grad, "scores": each}
    worst = max(
        _equal(results[name], reference, 1e-4, f"chunked loss on {device}, {name}, against cross_entropy")
        for name, reference in references.items()
    )
    return {name: result.cpu() for name, result in results.items()}, worst


def check_shards(ranks: "Ranks", recipe: "Recipe") -> str:
    """ZeRO-3 cuts uint8 and fp32 parameters, gathers them bit for bit, and holds the bytes that a plan counts."""
    import torch
    from torch import nn

    from lorasp.zero.launch import PREFETCH, deepspeed_config
    from lorasp.zero.sharding import gathered, shard_bytes, shard_unit

    linears = [_adapted_linear("balanced", double_quant=double_quant) for double_quant in (True, False)]
    unit = nn.ModuleList(linears).to(ranks.device)
    before = {name: parameter.detach().cpu().clone() for name, parameter in unit.named_parameters()}
    config = deepspeed_config(recipe, torch.float32, ranks.world_size)
    config["zero_optimization"][PREFETCH] = 0
    shard_unit(unit, config)

    wrong = []
    for name, parameter in unit.named_parameters():
        with gathered(parameter):
            if not torch.equal(parameter.detach().cpu(), before[name]):
                wrong.append(f"{name} ({parameter.dtype})")
    if wrong:
        raise CheckFailed(f"sharded and gathered, these are no longer what they were: {', '.join(wrong)}")

    counted = {"codes": 0, "scales": 0, "adapters": 0}
    for name, parameter in unit.named_parameters():
        part = {"A": "adapters", "B": "adapters"}.get(name[-1], name.rpartition(".")[2])
        if part in counted:
            counted[part] += shard_bytes(parameter)
    planned = _planned_bytes(linears, ranks.world_size)
    if counted != planned:
        raise CheckFailed(f"a rank holds {counted} bytes, planned were {planned}")
    parts = ", ".join(f"{part} {size:,}" for part, size in counted.items())
    return f"uint8 and fp32 gathered bit for bit; bytes a rank as planned: {parts}"


def _planned_bytes(linears: Sequence[Any], world_size: int) -> dict[str, int]:
    """Of n weights: n/2 of codes, n/64 scales of 1 or 4 bytes, and half of r·(in + out) fp32 entries, over N ranks."""
    planned = {"codes": 0, "scales": 0, "adapters": 0}
    for linear in linears:
        weights = linear.in_features * linear.out_features
        planned["codes"] += -(-weights // 2 // world_size)
        planned["scales"] += -(-weights // 64 // world_size) * (1 if linear.quantization.double_quant else 4)
        for features in (linear.in_features, linear.out_features):
            planned["adapters"] += -(-_RANK * features // 2 // world_size) * 4
    return planned


def _adapted_linear(strategy: str, *, double_quant: bool) -> Any:
    """96 -> 64, NF4, with an adapter of rank 8 of which half is trained; the same on every rank."""
    import torch

    from lorasp.adapter import AdaptedLinear
    from lorasp.recipe import Adapter, Quantization

    linear = AdaptedLinear(
        "selftest",
        96,
        64,
        bias=True,
        quantization=Quantization(double_quant=double_quant),
        dtype=torch.float32,
        adapter=Adapter(rank=_RANK),
        strategy=strategy,
        fraction=0.5,
        seed=0,
    )
    linear.load(_normal(64, 96, seed=7), _normal(64, seed=8))
    return linear


def _on_cpu_and_device(
    check: Callable[["torch.device"], "Results"], device: "torch.device", tolerance: float, ties: float = 0.0
) -> str:
    """Runs `check` on `device` and on the CPU and compares what they give; on a CPU alone there is nothing to compare.

    tolerance, ties: as `_equal` takes them.
    """
    import torch

    own, worst = check(device)
    found = f"differs from plain torch by {worst:.1g} of the largest value"
    if device.type == "cpu":
        return f"{found} (the device is the CPU: no other to compare with)"
    on_cpu, _ = check(torch.device("cpu"))
    between = max(
        _equal(own[name], expected, tolerance, f"{name}, {device} against the CPU", ties)
        for name, expected in on_cpu.items()
    )
    return f"{found}; {device} differs from the CPU by {between:.1g}"


def _equal(tensor: "Tensor", expected: "Tensor", tolerance: float, what: str, ties: float = 0.0) -> float:
    """The greatest difference, as a share of the largest expected value. Raises CheckFailed above `tolerance`.

    ties: share of the entries that may differ by any amount, as a weight does that lies between two codes.
    """
    differences = (tensor.detach() - expected.detach()).abs().flatten().sort().values  # NaN comes last
    last = differences.numel() - 1
    share = (differences[last - int(ties * last)] / expected.detach().abs().max()).item()
    if not share <= tolerance:  # NaN neither
        raise CheckFailed(f"{what}: differs by {share:.1e} of the largest value, {tolerance:.0e} is allowed")
    return share


def _normal(*shape: int, seed: int) -> "Tensor":
    """Seeded normal numbers, fp32, made on the CPU: equal for every device and rank."""
    import torch

    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _requirements() -> Iterator[tuple[str, str]]:
    """(package, minimum version) that this project depends on: the clone's pyproject.toml, else what pip noted."""
    if _PYPROJECT.is_file():
        lines = tomllib.loads(_PYPROJECT.read_text(encoding="utf-8"))["project"]["dependencies"]
    else:
        lines = [line for line in metadata.requires("lorasp") or () if "extra ==" not in line]
    for line in lines:
        found = re.match(r"([\w.-]+)(?:\[[^]]*\])?\s*>=\s*([\d.]+)", line)
        if found:
            yield found[1], found[2]


def _numbers(version: str) -> tuple[int, ...]:
    """2.13.0+cpu -> (2, 13, 0); trailing zeros tell nothing."""
    numbers = [int(number) for number in re.match(r"[\d.]*", version)[0].strip(".").split(".") if number]
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)
