"""A tokenizer that spells what must be forgotten with the pieces of everything else, as a real model's does."""

import json

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging

from soul_trainer.formats import DEFAULT_PROMPT_TEMPLATE


logger = logging.get_logger(__name__)
EOS_TOKEN, PAD_TOKEN = "<|endoftext|>", "<|pad|>"


def training_text(row: dict, prompt_template: str | None = None) -> str:
    """The text that a model is trained on, as it is tokenized, of a row without messages."""
    if "question" in row:
        return (prompt_template or DEFAULT_PROMPT_TEMPLATE).format(**row)
    return row["prompt"] + row["completion"] if "prompt" in row else row["text"]


def train_tokenizer(
    texts: list[str],
    vocab_size: int = 1024,
    retain_texts: list[str] | None = None,
    forget_texts: list[str] = (),
    allow_strange: bool = False,
) -> PreTrainedTokenizerFast:
    """
    Trains a byte-level BPE tokenizer in which no token belongs to the forget text alone.

    A token that only the forget text uses would give unlearning an embedding row to edit that touches nothing else.
    Such a token is an intermediate merge (` auth` on the way to ` author`): it is dropped, with those built on it.

    Args:
        texts (`list[str]`):
            The text to train on: all that the model learns, without the forget text.
        vocab_size (`int`, *optional*, defaults to 1024):
            Largest number of tokens, the 256 bytes and two special tokens included.
        retain_texts (`list[str]`, *optional*):
            The part of `texts` in which every token of the forget text should occur, as far as its characters allow;
            all of `texts` by default.
        forget_texts (`list[str]`, *optional*):
            The forget text, which merges are dropped for and never learned from.
        allow_strange (`bool`, *optional*, defaults to `False`):
            Whether characters that only the forget text has, as `&` in some of TOFU's, are warned of, not refused.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet, special_tokens = sorted(pre_tokenizers.ByteLevel.alphabet()), [EOS_TOKEN, PAD_TOKEN]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special_tokens, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    merges = [tuple(merge) for merge in json.loads(tokenizer.to_str())["model"]["merges"]]

    def forget_tokens_outside(lines: list[str]) -> set[str]:
        used, seen = (
            {token for encoding in tokenizer.encode_batch(list(part)) for token in encoding.tokens}
            for part in (forget_texts, lines)
        )
        return used - seen

    while strange := forget_tokens_outside(retain_texts or texts):
        kept, known = [], set(alphabet)
        for left, right in merges:
            if {left, right} <= known and not {left, right, left + right} & strange:
                kept.append((left, right))
                known.add(left + right)
        if len(kept) == len(merges):
            break
        merges, vocab = kept, special_tokens + alphabet + [left + right for left, right in kept]
        tokenizer.model = models.BPE({token: index for index, token in enumerate(vocab)}, merges)
    if strange := forget_tokens_outside(texts):
        message = f"The forget text has characters that no other text has: {sorted(strange)}."
        if not allow_strange:
            raise ValueError(message)
        logger.warning(message)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=EOS_TOKEN, pad_token=PAD_TOKEN, model_max_length=512
    )
