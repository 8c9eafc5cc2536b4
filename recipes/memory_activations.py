"""
What the forward leaves in memory for the backward, and the peak of both: pure functions of a Llama and a batch.

Derived from the Llama of transformers with scaled dot-product attention. Bytes: r of the residual stream, c of matrix
products, l of logits; h, q and I are the widths of the model, of its queries and of its MLP, T the tokens of a row.
Each token keeps, in each layer:

- both norms: their input in float32 and their normed input, 2 (4 h + r h + 4);
- the inputs of the matrices: c (2 h + q). Autocast makes a copy for each matrix, c (5 h + q);
- attention: queries, and keys and values that a padding mask has repeated for every head, c 3 q; the mask, c T; the
  softmax's normalizer, 4 a head (its output is the input of the next matrix);
- the MLP: gate, its activation, the other half, and their product, c 4 I;

and once: the final norm, the head's input (c h), logits (l V), ids and labels (16), the rotary embedding. Autocast's
bfloat16 copies of matrices add 2 bytes a weight. With gradient checkpointing a layer keeps its input alone, r h.
"""

from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from soul_trainer.log_probs import CHUNK_TOKENS


@dataclass(frozen=True)
class Precision:
    """Bytes of the residual stream, of matrix products, of logits and of the gradients of weights."""

    residual: int
    compute: int
    logits: int
    gradient: int

    @property
    def is_autocast(self) -> bool:
        """Whether matrices are copied to the dtype of products."""
        return self.residual != self.compute


FLOAT32 = Precision(4, 4, 4, 4)
AUTOCAST = Precision(4, 2, 4, 4)  # accelerate turns the logits of autocast to float32
BFLOAT16 = Precision(2, 2, 2, 2)


@dataclass(frozen=True)
class Shape:
    """A decoder of Llama's kind: its numbers of parameters, counted on the meta device."""

    config: PretrainedConfig
    parameters: int
    layer: int
    layer_matrices: int

    @classmethod
    def of(cls, config: PretrainedConfig) -> "Shape":
        """Counts the parameters; a head that is tied to the embeddings counts once."""
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        layer = list(model.model.layers[0].parameters())
        return cls(
            config,
            model.num_parameters(),
            sum(weight.numel() for weight in layer),
            sum(weight.numel() for weight in layer if weight.ndim > 1),
        )

    @property
    def head(self) -> int:
        """Parameters of the head, as many as of the embeddings."""
        return self.config.vocab_size * self.config.hidden_size


@dataclass(frozen=True)
class Batch:
    """A micro-batch of one process: `rows`, forget and retain together, of `tokens`, some of which are padding."""

    rows: int
    tokens: int
    is_checkpointed: bool = True

    @property
    def size(self) -> int:
        """Tokens in all."""
        return self.rows * self.tokens


def layer_bytes(shape: Shape, batch: Batch, precision: Precision) -> int:
    """What one layer keeps for its backward, without gradient checkpointing."""
    config, r, c = shape.config, precision.residual, precision.compute
    hidden, query = config.hidden_size, config.num_attention_heads * _head_width(config)
    norms = 2 * (4 * hidden + r * hidden + 4)
    inputs = c * ((5 if precision.is_autocast else 2) * hidden + query)
    attention = c * (3 * query + batch.tokens) + 4 * config.num_attention_heads
    mlp = c * 4 * config.intermediate_size
    copies = 2 * shape.layer_matrices if precision.is_autocast else 0
    return batch.size * (norms + inputs + attention + mlp) + copies


def saved_bytes(shape: Shape, batch: Batch, precision: Precision) -> int:
    """What the forward keeps for the backward, logits included and parameters not."""
    config, r, c = shape.config, precision.residual, precision.compute
    hidden = config.hidden_size
    a_layer = batch.size * r * hidden if batch.is_checkpointed else layer_bytes(shape, batch, precision)
    ends = (4 + r + c) * hidden + 4 + precision.logits * config.vocab_size + 16
    copy = 2 * shape.head if precision.is_autocast else 0
    rotary = 0 if batch.is_checkpointed else 2 * batch.tokens * _head_width(config) * r
    return config.num_hidden_layers * a_layer + batch.size * ends + rotary + copy


def peak_bytes(shape: Shape, batch: Batch, precision: Precision) -> int:
    """
    The most that forward and backward hold beside weights and their gradients, which are there from an earlier
    micro-batch. One of four moments is the highest:

    - the end of a forward that checkpoints under autocast, whose copies of all matrices live until then;
    - the gradient of the logits, as large as they are, which is made in float32 from chunks (`log_probs.py`);
    - the head's backward, which makes a gradient of the head before it adds it to the one that is there;
    - a layer's backward: what was recomputed, and the gradients of its MLP.
    """
    config, c, g = shape.config, precision.compute, precision.gradient
    saved = saved_bytes(shape, batch, precision)
    logits, inner = batch.size * config.vocab_size, batch.size * config.intermediate_size
    others = saved - precision.logits * logits
    is_recomputed, matrices = batch.is_checkpointed, config.num_hidden_layers * shape.layer_matrices
    copies = 2 * matrices if precision.is_autocast and is_recomputed else 0
    chunk = min(CHUNK_TOKENS, batch.size) * config.vocab_size * (8 if precision.logits == 4 else 10)
    recomputed = layer_bytes(shape, batch, precision) if is_recomputed else 0
    return max(
        others + copies + c * max(logits, 3 * inner),
        saved + precision.logits * logits + chunk,
        others + c * logits + g * shape.head,
        others + recomputed + c * inner + g * config.hidden_size * config.intermediate_size,
    )


def _head_width(config: PretrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
