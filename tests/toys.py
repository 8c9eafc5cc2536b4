"""Toy parts that tests share: language models small enough for exact curvature, their rows, a tokenizer."""

from types import SimpleNamespace

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from soul_trainer.batch import IGNORE_INDEX, ForgetRetainBatch
from soul_trainer.collator import UnlearnCollator


VOCABULARY = 7


class ToyLM(torch.nn.Module):
    """
    A language model of 63 parameters: the next token from the token and from the mean of those up to it. The tanh
    bends the loss, so that its Hessian differs from its Gauss-Newton matrix.
    """

    def __init__(self, seed: int = 0, spread: float = 0.7):
        super().__init__()
        random = torch.Generator().manual_seed(seed)
        self.embed = torch.nn.Parameter(spread * torch.randn(VOCABULARY, 4, generator=random))
        self.lm_head = torch.nn.Parameter(spread * torch.randn(VOCABULARY, 5, generator=random))

    def forward(self, input_ids, attention_mask=None, use_cache=False, output_hidden_states=False):
        embedded = self.embed[input_ids]
        counts = torch.arange(1, input_ids.shape[1] + 1, device=input_ids.device)[None, :, None]
        hidden = torch.tanh(embedded + 0.5 * embedded.cumsum(1) / counts)
        logits = hidden @ self.lm_head[:, :4].T + self.lm_head[:, 4]
        return SimpleNamespace(logits=logits, hidden_states=(embedded, hidden) if output_hidden_states else None)


def tiny_llama(seed: int = 0, **settings) -> LlamaForCausalLM:
    """A Llama of 200 parameters over the toy vocabulary."""
    config = LlamaConfig(
        **{
            "vocab_size": VOCABULARY,
            "hidden_size": 4,
            "intermediate_size": 6,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "max_position_embeddings": 32,
            "initializer_range": 0.7,
            **settings,
        }
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def toy_rows(num_rows: int, seed: int = 0) -> list[dict]:
    """Tokenized rows of different lengths: a prompt of 1 to 3 tokens, an answer of 1 to 4."""
    random = torch.Generator().manual_seed(seed)
    rows = []
    for row in range(num_rows):
        prompt_length, answer_length = 1 + row % 3, 1 + (row * 3 + 1) % 4
        ids = torch.randint(VOCABULARY, (prompt_length + answer_length,), generator=random).tolist()
        labels = [IGNORE_INDEX] * prompt_length + ids[prompt_length:]
        rows.append({"input_ids": ids, "labels": labels, "row": row})
    return rows


def toy_batch(forget: list[dict], retain: list[dict], preferred: list[dict] = ()) -> ForgetRetainBatch:
    """Forget, retain and preferred rows as one batch."""
    parts = {"forget": forget, "retain": retain, "preferred": preferred}
    return UnlearnCollator(pad_token_id=0)([{part: row} for part, rows in parts.items() for row in rows])


def toy_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A tokenizer of the words of `texts`, without special tokens but the end of sequence, which also pads."""
    words = sorted({word for text in texts for word, _ in pre_tokenizers.Whitespace().pre_tokenize_str(text)})
    vocabulary = {word: index for index, word in enumerate(["</s>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", pad_token="</s>", unk_token="<unk>", model_max_length=64
    )


def toy_batches(sizes=(4,), num_forget=0):
    """Rows of [`toy_rows`] in batches of these sizes, the first `num_forget` of them to forget."""
    rows = toy_rows(sum(sizes))
    batches, start = [], 0
    for size in sizes:
        middle, end = min(max(num_forget, start), start + size), start + size
        batches.append(toy_batch(rows[start:middle], rows[middle:end]))
        start = end
    return batches


def answers_of(batch):
    """Triples of row, position whose logits count, and label."""
    places = (batch["labels"] != IGNORE_INDEX).nonzero().tolist()
    return [(row, place - 1, int(batch["labels"][row, place])) for row, place in places]
