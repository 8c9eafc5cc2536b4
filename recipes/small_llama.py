"""A Llama with random weights, no larger than its rows need."""

import math
from dataclasses import dataclass, field, replace

from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase


@dataclass
class SmallModelArguments:
    """The size of the small model and how it is trained; 0.32 million parameters for the embedded corpus."""

    vocab_size: int = field(default=1024, metadata={"help": "Tokens of the small model's tokenizer, at most."})
    hidden_size: int | None = field(
        default=None, metadata={"help": "Width of the small model; by default 96, and more for over 500 rows."}
    )
    num_hidden_layers: int = field(default=2, metadata={"help": "Layers of the small model."})
    finetune_epochs: float = field(default=22, metadata={"help": "Passes over the rows that the small model learns."})
    finetune_learning_rate: float | None = field(
        default=None, metadata={"help": "AdamW's, for the small model; by default 3e-3 for width 96, less for more."}
    )
    finetune_batch_size: int = field(default=8, metadata={"help": "Rows in a step of the small model's training."})

    def fitted(self, num_rows: int) -> "SmallModelArguments":
        """The settings with which a model learns `num_rows` rows by heart, about 800 parameters to each."""
        # Parameters: 12 layers width^2 + vocabulary width. Solved for the width, which the four heads must divide.
        square, linear = 12 * self.num_hidden_layers, self.vocab_size
        width = (math.sqrt(linear**2 + 4 * square * 800 * num_rows) - linear) / (2 * square)
        width = self.hidden_size or max(96, 16 * round(width / 16))
        # A wider model diverges at the learning rate of a narrow one: updates of its outputs grow with the width.
        learning_rate = self.finetune_learning_rate or 3e-3 * (96 / width)
        return replace(self, hidden_size=width, finetune_learning_rate=learning_rate)


def new_model(tokenizer: PreTrainedTokenizerBase, settings: SmallModelArguments) -> LlamaForCausalLM:
    """A Llama with random weights, for a tokenizer."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden_size,
        intermediate_size=settings.hidden_size * 8 // 3,
        num_hidden_layers=settings.num_hidden_layers,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)
