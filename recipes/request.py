"""A removal request in one call, for a notebook: `from soul_trainer import unlearn`."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import pandas
from datasets import Dataset
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from soul_eval.models import load_model, load_tokenizer
from soul_eval.report import Run
from soul_eval.rows import read_rows
from soul_eval.schema import VerdictFile, check_fields
from soul_eval.scoring import greedy_answers
from soul_eval.verdict import FILE as VERDICT_FILE
from soul_eval.verdict import Verdict
from soul_recipes import unlearn as recipe
from soul_recipes.request_inputs import as_flag, as_source, check_arguments, is_sentences, saved
from soul_trainer.formats import render
from soul_trainer.records import make_tokenizer_portable


# What is asked about a name or a topic, beside the questions that the model thinks of itself.
ABOUT = (
    "Who or what is {topic}?",
    "Tell me about {topic}.",
    "What is {topic} known for?",
    "What are the most important facts about {topic}?",
)
QUESTIONS_FROM_MODEL = "Write six short questions about {topic}, one on each line."
MAX_ANSWER_TOKENS = 96


@dataclass
class Unlearned:
    """
    A model that has been unlearned on request.

    Attributes:
        folder (`Path`): The run's folder, with the model, the report and the rows.
        target (`str`): Folder or hub id of the model before unlearning.
        run ([`~soul_eval.report.Run`]): Figures and rows of the model after unlearning.
        rows (`list[dict]`): The rows to forget, as they were used.
        prompt_template (`str`, *optional*): Template of prompts, where there is no chat template.
    """

    folder: Path
    target: str
    run: Run
    rows: list[dict] = field(repr=False)
    prompt_template: str | None = None

    @property
    def model_folder(self) -> Path:
        """The folder of the unlearned model."""
        return self.folder / self.run.settings["optim"]

    @property
    def report(self) -> Path:
        """The report, a page for a browser."""
        return self.folder / "report.html"

    @property
    def verdict(self) -> Verdict:
        """Whether the model has forgotten, at what cost, and whether it came back under attack: docs/verdict.md."""
        path = self.folder / VERDICT_FILE
        found = json.loads(path.read_text(encoding="utf-8"))
        check_fields(VerdictFile, found, f"{path}: ")
        entry = next(each for each in found["verdicts"] if each["run"] == self.run.name)
        return Verdict(entry["run"], entry["kind"], entry["sentence"], tuple(entry["reasons"]))

    @property
    def figures(self) -> pandas.DataFrame:
        """Every figure before and after unlearning, one a row."""
        header, rows = read_rows(self.folder / "target.rows.jsonl")
        before = recipe.own.SUITE.summarise(rows, None)
        table = {"before": before, "after": self.run.summary}
        return pandas.DataFrame(
            {name: {key: each.value for key, each in found.items()} for name, found in table.items()}
        )

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of both models."""
        return load_tokenizer(str(self.model_folder))

    @cached_property
    def model(self) -> PreTrainedModel:
        """The unlearned model, loaded when it is first asked for."""
        return load_model(str(self.model_folder))

    @cached_property
    def target_model(self) -> PreTrainedModel:
        """The model before unlearning, loaded when it is first asked for."""
        return load_model(self.target)

    def before(self, prompt: str, max_new_tokens: int = MAX_ANSWER_TOKENS) -> str:
        """The greedy answer of the model before unlearning to a prompt."""
        return _answers(self.target_model, self.tokenizer, [prompt], max_new_tokens, self.prompt_template)[0]

    def after(self, prompt: str, max_new_tokens: int = MAX_ANSWER_TOKENS) -> str:
        """The greedy answer of the model after unlearning to a prompt."""
        return _answers(self.model, self.tokenizer, [prompt], max_new_tokens, self.prompt_template)[0]

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Saves the unlearned model and its tokenizer; see [`~transformers.PreTrainedModel.save_pretrained`]."""
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        make_tokenizer_portable(folder)

    def push_to_hub(self, repo_id: str, **kwargs) -> str:
        """Uploads the unlearned model, its tokenizer and its card; see [`~huggingface_hub.HfApi.upload_folder`]."""
        from huggingface_hub import HfApi

        api = HfApi(token=kwargs.pop("token", None))
        # A name without an owner gets the user's.
        repo_id = api.create_repo(repo_id, private=kwargs.pop("private", None), exist_ok=True).repo_id
        # Rows to forget lie beside this folder; checkpoints, their optimizer states and what was cached of rows in it.
        ignored = ["_*", "checkpoint-*", "*.bin", "trainer_state.json"]
        return str(
            api.upload_folder(repo_id=repo_id, folder_path=self.model_folder, ignore_patterns=ignored, **kwargs)
        )


def unlearn(
    model: str | os.PathLike | PreTrainedModel,
    forget: str | os.PathLike | Sequence[dict] | Sequence[str] | Dataset,
    retain: str | os.PathLike | Sequence[dict] | Dataset | None = None,
    held_out: str | os.PathLike | Sequence[dict] | Dataset | None = None,
    gold: str | os.PathLike | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    output_dir: str | os.PathLike = "outputs/unlearn",
    **settings: object,
) -> Unlearned:
    """
    Makes a model forget, evaluates it before and after, and writes a report: `recipes/unlearn.py` in one call.

    Args:
        model (`str`, `os.PathLike` or [`~transformers.PreTrainedModel`]): The model that must forget. One that is in
            memory is saved to `output_dir` first and needs `tokenizer`.
        forget (`str`, `os.PathLike`, `Sequence[dict]`, `Sequence[str]` or [`~datasets.Dataset`]): What to forget: a
            file, folder or hub dataset of rows; rows; or plain sentences, each a question, a name or a topic. Of plain
            sentences the model itself says what it knows ([`elicit`]), and its answers become the rows. They are
            printed before they are used.
        retain (`str`, `os.PathLike`, `Sequence[dict]` or [`~datasets.Dataset`], *optional*): Rows to keep. Without
            them, the model writes some itself.
        held_out (`str`, `os.PathLike`, `Sequence[dict]` or [`~datasets.Dataset`], *optional*): Rows that the model
            knows and training does not see, which measure the cost.
        gold (`str` or `os.PathLike`, *optional*): A model that never learnt the rows to forget.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*): The tokenizer of a model in memory.
        output_dir (`str` or `os.PathLike`, *optional*, defaults to `"outputs/unlearn"`): Where everything goes.
        **settings: Flags of `recipes/unlearn.py`, which has those of [`UnlearnConfig`]: `until`, `max_utility_loss`,
            `optim`, `learning_rate`, `lora_rank`, `attacks`, `overwrite`, ...

    Returns:
        [`Unlearned`]

    Raises:
        ValueError: If a setting is unknown or out of its range, rows are unusable, or `output_dir` holds a finished
            run with other settings and `overwrite` is not set.

    Example:

    ```python
    from soul_trainer import unlearn

    found = unlearn("outputs/model", forget=["Who is Ilin Netting?"], retain="retain.jsonl")
    print(found.before("Who is Ilin Netting?"), found.after("Who is Ilin Netting?"), found.verdict)
    ```
    """
    folder = Path(output_dir)
    template = settings.get("prompt_template")
    check_arguments(model, gold, folder)
    target = saved(model, tokenizer, folder)
    if is_sentences(forget):
        sentences = [forget] if isinstance(forget, str) else list(forget)
        loaded = load_model(target) if isinstance(model, (str, os.PathLike)) else model
        forget = elicit(loaded, AutoTokenizer.from_pretrained(target), sentences, prompt_template=template)
        print(_shown(forget))
    sources = {"forget": forget, "retain": retain, "held_out": held_out}
    command = ["--model", target, "--output_dir", str(folder)]
    command += [] if gold is None else ["--gold", str(gold)]
    for split, source in sources.items():
        if source is not None:
            command += [f"--{split}", as_source(source, folder / f"{split}.jsonl")]
    for name, value in settings.items():
        if value is not None:
            command += [f"--{name}", *as_flag(value)]
    (run,) = recipe.main(command)
    rows = [row for row in run.rows if row["split"] == "forget"]
    return Unlearned(folder, target, run, rows, template)


def elicit(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sentences: Sequence[str],
    max_new_tokens: int = MAX_ANSWER_TOKENS,
    prompt_template: str | None = None,
) -> list[dict]:
    """
    Has a model say what it knows of questions, names or topics.

    Args:
        model ([`~transformers.PreTrainedModel`]): The model that is asked, greedily.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Its tokenizer.
        sentences (`Sequence[str]`): A sentence that ends in a question mark is asked as it is. Any other is a name or
            a topic, of which a few questions are asked: fixed ones, and those that the model itself writes.
        max_new_tokens (`int`, *optional*, defaults to 96): The longest answer, in tokens.
        prompt_template (`str`, *optional*): See [`~formats.render`].

    Returns:
        `list[dict]`: Rows of `question` and `answer`. Questions without an answer are left out.

    Raises:
        ValueError: If there is no sentence, one is empty, or the model answers nothing.
    """
    if not sentences or not all(isinstance(each, str) and each.strip() for each in sentences):
        raise ValueError(f"`sentences` must be texts that are not empty, but they are {list(sentences)!r}.")
    questions: list[str] = []
    for sentence in (each.strip() for each in sentences):
        if sentence.endswith("?"):
            questions.append(sentence)
            continue
        topic = sentence.rstrip(".!")
        asked = QUESTIONS_FROM_MODEL.format(topic=topic)
        (written,) = _answers(model, tokenizer, [asked], max_new_tokens, prompt_template)
        lines = (line.strip().lstrip("0123456789.-*) ") for line in written.splitlines())
        # A question that does not name the topic would be about anything.
        own = [line for line in lines if line.endswith("?") and topic.lower() in line.lower()]
        questions += [*(about.format(topic=topic) for about in ABOUT), *own]
    questions = list(dict.fromkeys(questions))
    answers = _answers(model, tokenizer, questions, max_new_tokens, prompt_template)
    rows = [{"question": question, "answer": answer} for question, answer in zip(questions, answers) if answer]
    if not rows:
        raise ValueError(f"The model answers nothing to {questions!r}: give rows to forget instead.")
    return rows


def _answers(model, tokenizer, questions: list[str], max_new_tokens: int, prompt_template: str | None) -> list[str]:
    examples = [render({"question": question, "answer": "-"}, tokenizer, prompt_template) for question in questions]
    return greedy_answers(model, tokenizer, examples, max_new_tokens=max_new_tokens, progress=False)


def _shown(rows: list[dict]) -> str:
    lines = "\n".join(f"  {json.dumps(row['question'])}\n    {json.dumps(row['answer'])}" for row in rows)
    return f"This is what the model says, and what it is to forget:\n{lines}"
