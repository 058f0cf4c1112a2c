"""The stack a user would pick today: PEFT LoRA + bitsandbytes NF4 + Accelerate + DeepSpeed ZeRO-3.

The opponent of launch/benchmark.py, as its reviewers gave it: kept as it is, but that it prints the seconds of every step.

    accelerate launch --use_deepspeed --num_processes 2 stock_qlora_zero3.py MODEL ALPACA_JSON STEPS [BATCH] [SEQ] [RANK] [packed]

`packed` joins examples end to end into full rows, as trainers commonly do (no block-diagonal mask).

Prints one JSON line a rank: seconds per step (median after 2 warm-up steps), tokens, peak memory
(VmHWM on a CPU, max_memory_allocated on a GPU) after load and after training.
"""
import json, statistics, sys, time
import torch
from accelerate import Accelerator, DeepSpeedPlugin, InitProcessGroupKwargs
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, AutoTokenizer, BatchEncoding, BitsAndBytesConfig

path, data, steps = sys.argv[1], sys.argv[2], int(sys.argv[3])
batch, seq, rank = (int(sys.argv[i]) if len(sys.argv) > i and sys.argv[i].isdigit() else d for i, d in ((4, 4), (5, 256), (6, 16)))
cuda = torch.cuda.is_available()
dtype = torch.bfloat16 if cuda else torch.float32


def peak_gb():
    if cuda:
        return torch.cuda.max_memory_allocated() / 2**30
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmHWM")) / 2**20


ds = {"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": batch, "gradient_accumulation_steps": 1,
      "bf16": {"enabled": cuda}, "gradient_clipping": 1.0, "zero_allow_untested_optimizer": True}
acc = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=ds), mixed_precision="bf16" if cuda else "no",
                  kwargs_handlers=[InitProcessGroupKwargs(backend="nccl" if cuda else "gloo")])
tok = AutoTokenizer.from_pretrained(path)
tok.pad_token = tok.pad_token or tok.eos_token
quant = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                           bnb_4bit_compute_dtype=dtype, bnb_4bit_quant_storage=dtype)
t0 = time.time()
model = AutoModelForCausalLM.from_pretrained(path, quantization_config=quant, dtype=dtype)
load_s, load_peak = time.time() - t0, peak_gb()
model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=True,
                                        gradient_checkpointing_kwargs={"use_reentrant": False})
model = get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM"))
opt = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-5)
trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
model, opt = acc.prepare(model, opt)
packed = "packed" in sys.argv
rows = [f"{r['instruction']}\n{r['input']}\n{r['output']}{tok.eos_token}" for r in json.load(open(data))]
times, losses, real = [], [], 0
model.train()
for step in range(steps):
    at = (step * acc.num_processes + acc.process_index) * batch
    if packed:
        stream = stream if step else tok("".join(rows[:4000])).input_ids
        ids = torch.tensor(stream[at * seq:(at + batch) * seq]).view(batch, seq)
        enc = BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids)}).to(acc.device)
    else:
        enc = tok(rows[at:at + batch], padding="max_length", truncation=True, max_length=seq, return_tensors="pt").to(acc.device)
    labels = enc.input_ids.masked_fill(enc.attention_mask == 0, -100)
    real += int(enc.attention_mask.sum())
    t = time.time()
    loss = model(**enc, labels=labels).loss
    acc.backward(loss)
    opt.step()
    opt.zero_grad()
    times.append(time.time() - t)
    losses.append(loss.item())
print(json.dumps(dict(rank=acc.process_index, step_s=statistics.median(times[2:] or times), step_seconds=times, load_s=load_s, load_peak_gb=load_peak,
                      train_peak_gb=peak_gb(), trainable=trainable, padded_tokens=batch * seq, real_tokens=real / steps,
                      loss=losses)), flush=True)
