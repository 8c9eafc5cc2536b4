"""
Prints what unlearning with SOUL needs in memory, per GPU, for each engine; computed, without loading a model.

    python recipes/memory_plan.py                                  # Llamas of 1B to 405B parameters
    python recipes/memory_plan.py --model HUB_ID --gpus 8 --parts  # what it is made of, for any Llama-like model
    python recipes/memory_plan.py --check                          # the plan against a small model, measured here

What is counted is in `memory_model.py` and `memory_activations.py`.
"""

import json
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, HfArgumentParser, LlamaConfig, LlamaForCausalLM

from soul_recipes.memory_activations import (
    AUTOCAST,
    BFLOAT16,
    FLOAT32,
    Batch,
    Precision,
    Shape,
    peak_bytes,
    saved_bytes,
)
from soul_recipes.memory_model import ENGINES, LLAMAS, STATES, Memory, llama, plan
from soul_trainer.log_probs import shift_labels, token_log_probs
from soul_trainer.optim import Soul
from soul_trainer.optim.rules import LARGEST_BUCKET


GIB, MIB = 2**30, 2**20


@dataclass
class MemoryArguments:
    """For which model, how many GPUs and which batch."""

    model: str | None = field(default=None, metadata={"help": "Hub id or folder; by default four Llamas."})
    gpus: str = field(default="1,8,16,64,128", metadata={"help": "Numbers of GPUs, separated by commas."})
    card: float = field(
        default=80, metadata={"help": "Memory of a GPU in GiB; what takes under nine tenths of it is bold."}
    )
    batch_size: int = field(default=1, metadata={"help": "Pairs of a forget and a retain row, on each GPU."})
    sequence_length: int = field(default=512, metadata={"help": "Tokens of the longest row."})
    gradient_checkpointing: bool = field(default=True, metadata={"help": "Whether layers are computed twice."})
    rule: str = field(
        default="diagonal",
        metadata={
            "help": "What the optimizer keeps: two momenta, with a diagonal or none, or Sophia's.",
            "choices": [*STATES],
        },
    )
    parts: bool = field(default=False, metadata={"help": "Whether to print what each number is made of."})
    check: bool = field(default=False, metadata={"help": "Whether to measure a small model instead."})


SMALL = llama(384, 1024, 6, 6, vocab_size=16384, num_key_value_heads=2)


def cell(memory: Memory, card: float) -> str:
    """GPU memory in GiB, bold if it fits, and CPU memory after a plus."""
    text = f"{memory.gpu / GIB:.1f}"
    text = f"**{text}**" if memory.gpu < 0.9 * card * GIB else text
    return text + (f" + {memory.cpu / GIB:.1f}" if memory.cpu else "")


def tables(args: MemoryArguments) -> list[list[str]]:
    """Rows of the table, the first of which is its head."""
    configs = {args.model: AutoConfig.from_pretrained(args.model)} if args.model else LLAMAS
    batch = Batch(2 * args.batch_size, args.sequence_length, args.gradient_checkpointing)
    gpus = [int(number) for number in args.gpus.split(",")]
    parts = [*Memory.__dataclass_fields__, "gpu"]
    rows = [["model", "engine", *(["GPUs", *parts] if args.parts else map(str, gpus))]]
    for name, config in configs.items():
        shape = Shape.of(config)
        for engine, kind in ENGINES.items():
            # One GPU shares with nobody, and several do not run one process.
            plans = {
                n: plan(shape, batch, engine, n, args.rule)
                for n in gpus
                if (n == 1) == (engine == "single") or kind.is_offloaded
            }
            if args.parts:
                sizes = {n: {**asdict(memory), "gpu": memory.gpu} for n, memory in plans.items()}
                rows += [[name, engine, str(n), *(f"{size[p] / GIB:.1f}" for p in parts)] for n, size in sizes.items()]
            elif plans:
                rows.append([name, engine, *(cell(plans[n], args.card) if n in plans else "" for n in gpus)])
    return rows


def allocated_peak(action: Callable[[], object]) -> int:
    """The most bytes that an action holds at a time, by the CPU allocator."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        action()
    with tempfile.TemporaryDirectory() as folder:
        profiler.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads(Path(f"{folder}/trace.json").read_text(encoding="utf-8"))["traceEvents"]
    totals = [event["args"] for event in events if event.get("name") == "[memory]"]
    return max(total["Total Allocated"] for total in totals) - (totals[0]["Total Allocated"] - totals[0]["Bytes"])


def measure(config: LlamaConfig, batch: Batch, precision: Precision, rule: str = "diagonal") -> dict[str, int]:
    """True bytes of a model on this machine: of the parts that [`Memory`] has, and `saved` and `peak` in a batch."""
    model = LlamaForCausalLM(config).to(torch.bfloat16 if precision is BFLOAT16 else torch.float32).train()
    if batch.is_checkpointed:
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    ids = torch.randint(config.vocab_size, (batch.rows, batch.tokens))
    mask = torch.ones_like(ids).index_fill_(1, torch.tensor([batch.tokens - 1]), 0)
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    def forward() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision is AUTOCAST):
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        logits = logits.float() if precision is AUTOCAST else logits
        return token_log_probs(logits, shift_labels(ids)).sum()

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = forward()
    sizes = {"saved": sum(storage.nbytes() for place, storage in saved.items() if place not in own)}
    saved.clear()
    loss.backward()
    del loss
    sizes["peak"] = allocated_peak(lambda: forward().backward())
    has_directions = rule != "sophia"
    scaling = "tensor" if has_directions else "none"
    optimizer = Soul(model.parameters(), rule=rule, scaling=scaling, two_directions=has_directions)
    optimizer.step()
    sizes["step"] = allocated_peak(optimizer.step)
    names = ("exp_avg", "exp_avg_forget", "hessian")
    states = [state[name] for state in optimizer.state.values() for name in names if name in state]
    tensors = {"weights": model.parameters(), "gradients": [p.grad for p in model.parameters()], "states": states}
    return sizes | {part: sum(tensor.nbytes for tensor in group) for part, group in tensors.items()}


def check(batch_size: int, tokens: int) -> list[list[str]]:
    """The plan against [`measure`], as rows of a table."""
    shape = Shape.of(SMALL)
    rows = [["what", "products", "checkpointed", "planned MiB", "measured MiB", "difference"]]
    for name, precision in {"float32": FLOAT32, "autocast": AUTOCAST, "bfloat16": BFLOAT16}.items():
        for is_checkpointed in (False, True):
            batch = Batch(2 * batch_size, tokens, is_checkpointed)
            planned = {"saved": saved_bytes(shape, batch, precision), "peak": peak_bytes(shape, batch, precision)}
            if precision is AUTOCAST and not is_checkpointed:
                planned = asdict(plan(shape, batch, "single", 1, bucket_size=LARGEST_BUCKET["cpu"])) | planned
            for what, true in measure(SMALL, batch, precision).items():
                if what in planned:
                    sizes = [f"{planned[what] / MIB:.2f}", f"{true / MIB:.2f}", f"{planned[what] / true - 1:+.2%}"]
                    rows.append([what, name, "yes" if is_checkpointed else "no", *sizes])
    return rows


if __name__ == "__main__":
    (args,) = HfArgumentParser(MemoryArguments).parse_args_into_dataclasses()
    head, *rows = check(args.batch_size, args.sequence_length) if args.check else tables(args)
    print("\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)))
