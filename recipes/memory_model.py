"""
What a step of `UnlearnTrainer` with SOUL needs on each GPU: a pure function of model, batch, engine and rule.

Bytes a parameter under `--bf16`, on P processes; besides these, activations (`memory_activations.py`):

| engine | weights | gradients | masters | states | buffers | in the backward | in the step |
|---|---|---|---|---|---|---|---|
| single | 4 | 4 | | S | | | T of a bucket |
| ddp | 4 | 4 | | S | 4 | | T of a bucket |
| fsdp2 | 4/P | 4/P | | S/P | | gathered units | T/P of a bucket |
| zero1 | 2 | 2/P | 4/P | S/P | 1e9 bytes | 2 - 2/P | (T + 4)/P |
| zero2 | 2 | 2/P | 4/P | S/P | 1e9 bytes | | (T + 4)/P |
| zero3 | 2/P | 2/P | 4/P | S/P | 1e9 bytes | gathered weights | (T + 4)/P, at most of 1e9 weights |

- S, the states, and T, the temporaries of a step, depend on the rule. Two directions without curvature have two
  momenta: S = 8, T = 8. With the diagonal, SOUL's default above some 20 million parameters, S = 12, T = 12. Sophia's
  published rule has a momentum and a Hessian: S = 8, T = 8. A refresh of the Hessian holds no more than T.
- A bucket has 2^26 parameters, or the largest tensor's if those are more. DeepSpeed hands its part over as one tensor.

- single, ddp: weights, gradients and states in float32, products in bfloat16 by autocast. That goes for weights that
  were loaded in bfloat16, too. With `float32_weights=False` they stay so: 2 and 2 bytes, but updates below their
  spacing are rounded away.
- fsdp2: float32 shards, gathered, computed and reduced in bfloat16. accelerate makes units of each layer, of the
  embeddings and of norm and head, which stay gathered from the forward to their backward.
- zero: bfloat16 weights and gradients, float32 masters and states; buffers, gathered weights and the part that a step
  of stage 3 takes at once are of DeepSpeed's default sizes.
- Under DeepSpeed, a step also copies the bfloat16 gradient to float32: 4 bytes.
- Offload: masters, states, a float32 gradient (4/P) and a bfloat16 buffer (2/P) are in CPU memory, where the step is;
  weights too in stage 3 (2/P), and accumulated gradients in stage 2 (2/P).

Left out: a frozen reference model, which the `kl` losses keep; CUDA's context, about 1 GiB; fragmentation and rounding
of allocations; 12 bytes a tensor of the optimizer's counters; Kronecker curvature; loading and saving.
"""

from dataclasses import dataclass

from transformers import LlamaConfig

from soul_recipes.memory_activations import AUTOCAST, BFLOAT16, Batch, Shape, peak_bytes
from soul_trainer.optim.rules import LARGEST_BUCKET


# DeepSpeed's defaults, in elements: reduce_bucket_size, stage3_max_live_parameters, sub_group_size.
BUCKET, LIVE, SUB_GROUP = 500_000_000, 1_000_000_000, 1_000_000_000
# Bytes a parameter of each rule: its states, and the temporaries of its step.
STATES = {"none": 8, "diagonal": 12, "sophia": 8}
TEMPORARIES = {"none": 8, "diagonal": 12, "sophia": 8}


def llama(hidden: int, inner: int, layers: int, heads: int, is_tied: bool = False, **settings) -> LlamaConfig:
    """The configuration of a Llama 3."""
    widths = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers}
    published = {"vocab_size": 128256, "num_attention_heads": heads, "num_key_value_heads": 8}
    return LlamaConfig(**{**widths, **published, "tie_word_embeddings": is_tied, **settings})


LLAMAS = {
    "Llama-3.2-1B": llama(2048, 8192, 16, 32, is_tied=True),
    "Llama-3.1-8B": llama(4096, 14336, 32, 32),
    "Llama-3.1-70B": llama(8192, 28672, 80, 64),
    "Llama-3.1-405B": llama(16384, 53248, 126, 128),
}


@dataclass(frozen=True)
class Engine:
    """ZeRO's stage (0 shards nothing, 3 everything), whether DeepSpeed runs it, and whether it offloads to the CPU."""

    stage: int = 0
    is_deepspeed: bool = False
    is_offloaded: bool = False


ENGINES = {
    "single": Engine(),
    "ddp": Engine(),
    "fsdp2": Engine(3),
    "zero1": Engine(1, is_deepspeed=True),
    "zero2": Engine(2, is_deepspeed=True),
    "zero3": Engine(3, is_deepspeed=True),
    "zero2_offload": Engine(2, is_deepspeed=True, is_offloaded=True),
    "zero3_offload": Engine(3, is_deepspeed=True, is_offloaded=True),
}


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU, and those in CPU memory for it. `backward` and `step` are not there at the same time."""

    weights: int
    gradients: int
    masters: int
    states: int
    buffers: int
    backward: int
    step: int
    cpu: int = 0

    @property
    def gpu(self) -> int:
        """The peak, with gradients of an earlier micro-batch there in the backward."""
        fixed = self.weights + self.gradients + self.masters + self.states + self.buffers
        return fixed + max(self.backward, self.step)


def plan(
    shape: Shape,
    batch: Batch,
    engine: str,
    processes: int,
    rule: str = "diagonal",
    bucket_size: int = LARGEST_BUCKET["others"],
) -> Memory:
    """
    Memory of the fullest process.

    Args:
        shape ([`Shape`]): The model's.
        batch ([`Batch`]): A micro-batch of one process.
        engine (`str`): A name of `ENGINES`.
        processes (`int`): GPUs that share the work.
        rule (`str`, *optional*, defaults to `"diagonal"`): One of `STATES`.
        bucket_size (`int`, *optional*): Parameters of a bucket, by default a GPU's.
    """
    kind, whole = ENGINES[engine], shape.parameters
    states, temporaries = STATES[rule], TEMPORARIES[rule]
    part = -(-whole // processes) if kind.stage else whole
    if not kind.is_deepspeed:
        backward = peak_bytes(shape, batch, BFLOAT16 if kind.stage else AUTOCAST)
        backward += _fsdp2_bytes(shape, processes) if kind.stage else 0
        buckets = 4 * whole if engine == "ddp" else 0
        stepped = min(whole, max(bucket_size, shape.head))
        step = temporaries * (-(-stepped // processes) if kind.stage else stepped)
        return Memory(4 * part, 4 * part, 0, states * part, buckets, backward, step)
    weights = 2 * (part if kind.stage == 3 else whole)
    bucket = 2 * BUCKET
    gathered = 2 * min(whole, max(LIVE, shape.head)) if kind.stage == 3 else 0
    backward = peak_bytes(shape, batch, BFLOAT16) + gathered
    stepped = min(part, SUB_GROUP) if kind.stage == 3 else part
    if not kind.is_offloaded:
        backward += 2 * (whole - part) if kind.stage == 1 else 0
        return Memory(weights, 2 * part, 4 * part, states * part, bucket, backward, (temporaries + 4) * stepped)
    # Masters, states, the float32 gradient, a bfloat16 buffer, and weights or accumulated gradients; then the step.
    cpu = (4 + states + 4 + 2 + 2) * part + temporaries * stepped
    if kind.stage == 3:
        return Memory(0, 0, 0, 0, bucket, backward, 0, cpu)
    # Each side has a buffer for the gradient of the largest parameter.
    return Memory(weights, 0, 0, 0, bucket + 2 * shape.head, backward, 0, cpu + 2 * shape.head)


def _fsdp2_bytes(shape: Shape, processes: int) -> int:
    """The largest unit, gathered, its gradient's copy for the reduction and the reduced part; the next layer twice."""
    norm = shape.config.hidden_size
    unit = max(shape.head + norm, shape.layer)
    return 2 * (2 * unit + -(-unit // processes) + 2 * shape.layer)
