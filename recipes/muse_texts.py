"""The texts of MUSE: what is trained on of them, and rows about requests that MUSE does not ask about."""

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from soul_eval.suites import muse
from soul_eval.suites.sources import load_rows
from soul_trainer.chunks import chunk_texts


# What MUSE joins texts with before it cuts them.
SEPARATOR = "\n\n"


class MuseTexts:
    """
    A dataset of MUSE's form.

    Args:
        dataset (`str`): Hub id, a folder in the hub's layout, or MUSE's own `data/news`.
        revision (`str`, *optional*): Of a dataset on the hub.
    """

    def __init__(self, dataset: str, revision: str | None = None):
        self.dataset, self.revision = dataset, revision

    def load(self, config: str, split: str) -> list[str]:
        """The texts of a split of `raw`, `scal`, `sust` or `train`; a `ValueError` if there is no such split."""
        return [row["text"] for row in load_rows(self.dataset, config, split, ("text",), self.revision)]

    def chunks(self, config: str, split: str, tokenizer: PreTrainedTokenizerBase, max_length: int | None) -> Dataset:
        """The texts of a split as MUSE cuts them, into chunks of `max_length` or as many tokens as the model takes."""
        length = max_length or tokenizer.model_max_length
        return chunk_texts(self.load(config, split), tokenizer, length, separator=SEPARATOR)

    def learnt(self, retain_split: str) -> dict[str, Dataset]:
        """What small models learn: `forget`, `retain`, and in `general` what no single run touches."""
        forget = self.load("raw", "forget")
        others = {"retain1", "retain2"} - {retain_split}
        parts = {
            "forget": forget,
            "retain": self.load("raw", retain_split),
            # The forget set is the first of the folds.
            "general": self.load("train", "forget")[len(forget) :]
            + [text for split in sorted(others) for text in self.load("raw", split)],
        }
        return {split: Dataset.from_dict({"text": texts}) for split, texts in parts.items()}

    def continuations(
        self, fold: int, num_rows: int, tokenizer: PreTrainedTokenizerBase, prompt_tokens: int, answer_tokens: int
    ) -> list[dict]:
        """
        Rows of verbatim memorization about a later request, in the form of the suite's: MUSE has them for the first.

        Args:
            fold (`int`): The request, from 0.
            num_rows (`int`): Rows that ask about a request: those of its longest texts, if it has as many.
            tokenizer ([`~transformers.PreTrainedTokenizerBase`]): The model's.
            prompt_tokens (`int`): Tokens of a text that are given, but no more than a third of it.
            answer_tokens (`int`): Tokens that are compared after them.

        Returns:
            `list[dict]`: With indices from `fold * num_rows`.
        """
        rows = []
        for text in sorted(self.load("sust", f"forget_{fold + 1}"), key=len)[-num_rows:]:
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            start = min(prompt_tokens, len(ids) // 3)
            prompt, answer = (tokenizer.decode(part) for part in (ids[:start], ids[start : start + answer_tokens]))
            place = {"split": muse.VERBMEM, "index": fold * num_rows + len(rows)}
            rows.append({**place, "prompt": prompt, "answer": answer, "end": tokenizer.eos_token})
        return rows
