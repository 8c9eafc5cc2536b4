"""
What the task files of this folder name: TOFU's answers by likelihood and by generation, MUSE's by generation.

lm-eval hands a model texts and gets sums of log-probabilities back. Our suites measure means per token, the end of
sequence included, after exactly the prompt of training. So these tasks hold the model's tokenizer, which they find by
the arguments of the model, and stop where lm-eval would make other tokens of a text than our suites do.
"""

import os
from functools import cached_property, lru_cache

from datasets import load_dataset
from lm_eval.api.instance import Instance
from lm_eval.api.metrics import mean
from lm_eval.api.task import ConfigurableTask
from transformers import AutoTokenizer, PreTrainedTokenizerBase


try:
    from soul_eval.metrics.answer_probability.formula import answer_probability, normalised_answer_probability
    from soul_eval.metrics.rouge_overlap.formula import rouge_scores
    from soul_eval.metrics.truth_ratio.formula import log_truth_ratios, truth_ratio_score
    from soul_trainer.batch import IGNORE_INDEX
    from soul_trainer.formats import Example, encode, render
    from soul_trainer.scratch import scratch_folder
except ImportError as error:
    raise ImportError(
        "These tasks need this project in lm-eval's environment: pip install soul-trainer[eval]"
    ) from error


class SuiteTask(ConfigurableTask):
    """
    A task that knows the model's tokenizer and whose data may lie in a folder.

    Its metadata are those of the task file, the arguments of the model (`--model_args`) and `--metadata`, the latter
    first: `tokenizer` (a name or, from Python, the object) or else `pretrained` says whose tokenizer it is, and the
    name under `path_key` (`tofu_path`, `muse_news_path`, `muse_books_path`) another place of the dataset.

    Args:
        config (`dict`): What the task file says.
    """

    metrics: dict[str, bool] = {}

    def __init__(self, config: dict):
        config = {key: value for key, value in config.items() if key != "class"}
        metadata = dict(config.get("metadata") or {})
        if isinstance(metadata.get("tokenizer"), PreTrainedTokenizerBase):
            # Metadata are copied and printed as JSON.
            self.tokenizer = metadata["tokenizer"]
            metadata["tokenizer"] = self.tokenizer.name_or_path
        path = metadata.get(metadata["path_key"])
        super().__init__(config={**config, "metadata": metadata, **({"dataset_path": path} if path else {})})

    def download(self, dataset_kwargs: dict | None = None, **kwargs) -> None:
        """The dataset; from a folder it is read anew, since the cache of `datasets` does not see that rows changed."""
        if not os.path.isdir(self.DATASET_PATH):
            return super().download(dataset_kwargs, **kwargs)
        with scratch_folder() as cache:
            self.dataset = load_dataset(self.DATASET_PATH, self.DATASET_NAME, cache_dir=cache, keep_in_memory=True)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer."""
        metadata = self.config.metadata
        name = metadata.get("tokenizer") or metadata.get("pretrained")
        if not isinstance(name, str):
            raise ValueError(
                f"`{self.config.task}` counts tokens and needs the model's `tokenizer`, but no metadata name it: add "
                '--metadata \'{"tokenizer": "NAME"}\' or, in Python, TaskManager(metadata={"tokenizer": tokenizer}).'
            )
        settings = {"revision": metadata.get("revision", "main"), "use_fast": metadata.get("use_fast_tokenizer", True)}
        for key in ("trust_remote_code", "subfolder", "add_bos_token"):
            if metadata.get(key) is not None:
                settings[key] = metadata[key]
        return _load_tokenizer(name, tuple(sorted(settings.items())))

    def aggregation(self) -> dict:
        """Every metric is a mean over rows."""
        return dict.fromkeys(self.metrics, mean)

    def higher_is_better(self) -> dict:
        """By metric."""
        return dict(self.metrics)


class TofuTask(SuiteTask):
    """
    A question of TOFU, put to the model as in training: through `prompt_template` of the metadata or by default the
    tokenizer's chat template, else `soul_trainer.formats.DEFAULT_PROMPT_TEMPLATE`.

    The metadata of the task file say of which `side` the rows are, `"forget"` or `"retain"`, and by `options` whether
    their wrong answers are options to choose from, as where answers are names and have no paraphrase.
    """

    def fewshot_context(
        self,
        doc: dict,
        num_fewshot: int = 0,
        system_instruction: str | None = None,
        apply_chat_template: bool = False,
        **kwargs,
    ) -> str:
        """The prompt of training, whatever the chat template that lm-eval was told to use."""
        example = self.example(doc, doc["answer"])
        for name, value in (("num_fewshot", num_fewshot), ("system_instruction", system_instruction)):
            if value:
                raise ValueError(f"`{self.config.task}` asks as in training, without `{name}`, but it is {value!r}.")
        if apply_chat_template and not example.is_chat:
            raise ValueError("`apply_chat_template` and a `prompt_template` in the metadata exclude each other.")
        return example.prompt

    def example(self, doc: dict, answer: str) -> Example:
        """The question of a row with an answer."""
        row = {"question": doc["question"], "answer": answer}
        return render(row, self.tokenizer, self.config.metadata.get("prompt_template"))

    def as_lm_eval(self, text: str) -> list[int]:
        """The tokens that lm-eval's `hf` model makes of a text."""
        add_bos = self.config.metadata.get("add_bos_token")
        first = self.tokenizer.eos_token if self.tokenizer.bos_token is None else self.tokenizer.bos_token
        if first and text.startswith(first):
            add_bos = False
        return self.tokenizer.encode(text, **({} if add_bos is None else {"add_special_tokens": add_bos}))

    def check_prompt(self, example: Example) -> tuple[list[int], int]:
        """
        Returns:
            `tuple[list[int], int]`: The tokens of prompt and answer in our suites, and how many are the prompt's.

        Raises:
            ValueError: If lm-eval makes other tokens of the prompt.
        """
        encoded = encode(self.tokenizer, example)
        num_prompt = encoded["labels"].count(IGNORE_INDEX)
        if self.as_lm_eval(example.prompt) != encoded["input_ids"][:num_prompt]:
            raise self.other_tokens(example)
        return encoded["input_ids"], num_prompt

    def other_tokens(self, example: Example) -> ValueError:
        """The error where lm-eval and our suites differ."""
        return ValueError(
            f"`{self.config.task}`: lm-eval makes other tokens than training does of {example.prompt[-60:]!r} and the "
            f"answer {example.answer[:60]!r}, so its figures would not be those of our suites. A tokenizer that ends "
            "every text with its own end, or that joins prompt and answer in one token, cannot be used here; where a "
            "chat template begins with no special token though the tokenizer adds one, add_bos_token=False in "
            "`--model_args` helps; elsewhere leave that argument out."
        )


class TofuLikelihood(TofuTask):
    """What the likelihoods of a row's answers have in common."""

    def answers(self, doc: dict) -> list[str]:
        """The answers whose likelihood counts, the true one first."""
        raise NotImplementedError

    def construct_requests(self, doc: dict, ctx: str, **kwargs) -> list[Instance]:
        """One request an answer and, where it is needed, one for the white space that ends the prompt."""
        metadata = kwargs["metadata"]
        examples = [self.example(doc, answer) for answer in self.answers(doc)]
        pairs = [(example.prompt, self.continuation(example)[0]) for example in examples]
        blank = self.blank(examples[0])
        if blank:
            pairs.insert(0, blank)
        return [
            Instance(request_type="loglikelihood", doc=doc, arguments=pair, idx=index, metadata=metadata)
            for index, pair in enumerate(pairs)
        ]

    def losses(self, doc: dict, results: list[tuple[float, bool]]) -> list[float]:
        """The mean negative log-likelihood per token of each of [`TofuLikelihood.answers`], in nats."""
        sums = [log_prob for log_prob, _ in results]
        examples = [self.example(doc, answer) for answer in self.answers(doc)]
        before = sums.pop(0) if self.blank(examples[0]) else 0.0
        return [
            -(log_prob - before) / self.continuation(example)[1]
            for log_prob, example in zip(sums, examples, strict=True)
        ]

    def blank(self, example: Example) -> tuple[str, str] | None:
        """
        White space at the end of a prompt, as in chats: lm-eval counts it to the answer, so that its own likelihood
        must be asked for and taken off.
        """
        context = example.prompt.rstrip()
        if len(self.as_lm_eval(context)) == len(self.as_lm_eval(example.prompt)):
            return None
        return context, example.prompt[len(context) :]

    def continuation(self, example: Example) -> tuple[str, int]:
        """
        Returns:
            `tuple[str, int]`: The answer with the end of sequence, and how many tokens that is.

        Raises:
            ValueError: If lm-eval would measure other tokens than our suites.
        """
        ids, num_prompt = self.check_prompt(example)
        answer = example.answer
        if self.as_lm_eval(example.prompt + answer) != ids and self.tokenizer.eos_token:
            answer += self.tokenizer.eos_token
        context = self.as_lm_eval(example.prompt.rstrip())
        if self.as_lm_eval(example.prompt + answer) != ids or context != ids[: len(context)]:
            raise self.other_tokens(example)
        return answer, len(ids) - num_prompt


class TofuProbability(TofuLikelihood):
    """The probability per token of the true answer or, among options, its share."""

    metrics = {"probability": True}

    def answers(self, doc: dict) -> list[str]:
        """The true answer and, where they are options, the wrong ones."""
        return [doc["answer"], *(_perturbed(doc) if self.config.metadata.get("options") else [])]

    def process_results(self, doc: dict, results: list) -> dict:
        """The figure of one row."""
        answer, *options = self.losses(doc, results)
        if options:
            return {"probability": normalised_answer_probability([answer], [options])}
        return {"probability": answer_probability([answer])}

    def higher_is_better(self) -> dict:
        """A model that has forgotten finds the answer improbable."""
        return {"probability": self.config.metadata["side"] != "forget"}


class TofuTruthRatio(TofuLikelihood):
    """The true answer in other words against false answers in those words, as a choice and as TOFU's truth ratio."""

    metrics = {"truth_ratio": True, "acc": True}

    def answers(self, doc: dict) -> list[str]:
        """The paraphrased answer, or the answer where it has none, and the wrong ones."""
        true = "answer" if self.config.metadata.get("options") else "paraphrased_answer"
        return [doc[true], *_perturbed(doc)]

    def process_results(self, doc: dict, results: list) -> dict:
        """The figures of one row: `acc` is 1 where the true answer is more probable per token than every other."""
        true, *false = self.losses(doc, results)
        score = truth_ratio_score(log_truth_ratios([true], [false]), self.config.metadata["side"])
        return {"truth_ratio": score, "acc": float(all(true < other for other in false))}

    def higher_is_better(self) -> dict:
        """A model that has forgotten finds true and false answers as probable, which `truth_ratio` has at 1."""
        return {"truth_ratio": True, "acc": self.config.metadata["side"] != "forget"}


class TofuGeneration(TofuTask):
    """The share of the true answer's words in the model's own, with the stemmer, as TOFU measures it."""

    metrics = {"rougeL_recall": True, "rouge1_recall": True}

    def construct_requests(self, doc: dict, ctx: str, **kwargs) -> Instance:
        """The prompt, checked."""
        self.check_prompt(self.example(doc, doc["answer"]))
        return super().construct_requests(doc, ctx, **kwargs)

    def process_results(self, doc: dict, results: list) -> dict:
        """The figures of one row."""
        scores = rouge_scores(doc["answer"], results[0])
        return {name: scores[name] for name in self.metrics}

    def higher_is_better(self) -> dict:
        """A model that has forgotten says other words."""
        return dict.fromkeys(self.metrics, self.config.metadata["side"] != "forget")


class MuseKnowmem(SuiteTask):
    """
    MUSE's knowledge memorization (Shi et al., 2024), as its `metrics/knowmem.py` has it: all pairs of the `_icl` split
    before each question, greedy, 32 tokens, cut at an empty line or another question; ROUGE without the stemmer.
    """

    metrics = {"rougeL_f1": True, "rougeL_recall": True}

    def __init__(self, config: dict):
        super().__init__(config)
        if self.config.num_fewshot is None:
            self.config.num_fewshot = len(self.dataset[self.config.fewshot_split])

    def process_results(self, doc: dict, results: list) -> dict:
        """The figures of one row; MUSE reports 100 times `rougeL_f1`."""
        return _muse_scores(self.metrics, doc["answer"], results[0])

    def higher_is_better(self) -> dict:
        """Unlearning should lower what is known of the forget set."""
        return dict.fromkeys(self.metrics, self.config.metadata["side"] != "forget")


class MuseVerbmem(SuiteTask):
    """
    MUSE's verbatim memorization, as its `metrics/verbmem.py` has it: the model continues `prompt` greedily for 128
    tokens, which are compared with the first 128 tokens of `gt`, special tokens at its start among them.
    """

    metrics = {"rougeL_f1": False, "rougeL_recall": False}

    def process_results(self, doc: dict, results: list) -> dict:
        """The figures of one row; MUSE reports 100 times `rougeL_f1`."""
        ids = self.tokenizer(doc["gt"])["input_ids"][: self.config.generation_kwargs["max_gen_toks"]]
        return _muse_scores(self.metrics, self.tokenizer.decode(ids, skip_special_tokens=True), results[0])


@lru_cache(maxsize=2)
def _load_tokenizer(name: str, settings: tuple) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(name, **dict(settings))


def _perturbed(doc: dict) -> list[str]:
    perturbed = doc["perturbed_answer"]
    return [perturbed] if isinstance(perturbed, str) else list(perturbed)


def _muse_scores(metrics: dict, reference: str, generation: str) -> dict:
    scores = rouge_scores(reference, generation, use_stemmer=False)
    return {name: scores[name] for name in metrics}
