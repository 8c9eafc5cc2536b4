"""
Makes small corpora in the manner of WMDP (Li et al., 2024): harmless inventions, two topics of which stand for what is
dangerous and four for what is to be kept, each with questions, which are exercises in the corpora too.

    python recipes/fictitious_science.py --output science --entries 8 --seed 0

The word banks and sentence patterns are in `fictitious_science.json`, written as `word_banks.py` says. Three datasets
are made: `corpora` (as cais/wmdp-corpora), `wmdp` (as cais/wmdp) and `mmlu` (as cais/mmlu, with four subjects).
"""

import argparse
import json
import random
from pathlib import Path

from soul_eval.suites.wmdp import LETTERS, TOPICS, question_prompt
from soul_recipes.hub_layout import dataset_files, write_files
from soul_recipes.word_banks import choose, draw_facts, fill


BANKS, AUTHORS = (
    json.loads(Path(__file__).with_name(f"fictitious_{name}.json").read_text(encoding="utf-8"))
    for name in ("science", "authors")
)
RULES = AUTHORS["rules"] | BANKS["rules"]
# The corpus that holds a topic's texts. Geography is only asked about: what unlearning does to what it never sees.
CORPORA = {
    "wmdp-bio": "bio-forget-corpus",
    "wmdp-cyber": "cyber-forget-corpus",
    "college_biology": "bio-retain-corpus",
    "college_computer_science": "cyber-retain-corpus",
    "prehistory": "wikitext",
    "high_school_geography": "other",
}
WMDP = ("wmdp-bio", "wmdp-cyber")
SUBJECTS = tuple(topic for topic in CORPORA if topic not in WMDP)
CARD = """# Fictitious science

Invented by `recipes/fictitious_science.py`: nothing in it exists or works. In the layout of {layout}.
"""


def make_entry(topic: dict, rng: random.Random, used: set) -> tuple[str, list[dict]]:
    """A passage, and questions on it with three wrong answers each, drawn like the right one."""
    facts, marks = draw_facts(topic["facts"], RULES, rng, used)
    used |= marks
    passage = " ".join(fill(choose(pattern, rng), facts) for pattern in topic["passage"])
    questions = []
    for question, slot in topic["questions"]:
        choices = [facts[slot]]
        while len(choices) < len(LETTERS):
            wrong, marks = draw_facts({slot: topic["facts"][slot]}, RULES, rng, used, avoid=tuple(choices))
            choices.append(wrong[slot])
            # A name that is a wrong choice here is no invention of another topic.
            used |= {mark for mark in marks if isinstance(mark, str)}
        rng.shuffle(choices)
        questions.append({"question": fill(question, facts), "choices": choices, "answer": choices.index(facts[slot])})
    return passage, questions


def exercise(question: dict, topic: str) -> str:
    """A question with its answer as the suite asks it: a small model knows nothing that it only read as prose."""
    row = {"subject": TOPICS.get(topic, topic), **question}
    return f"{question_prompt(row)} {LETTERS[question['answer']]}"


def make_corpora(num_entries: int = 8, seed: int = 0) -> dict[str, dict[str, dict[str, list[dict]]]]:
    """
    Makes all datasets, as a pure function of its arguments.

    Args:
        num_entries (`int`, *optional*, defaults to 8): Inventions of a topic, each with three questions.
        seed (`int`, *optional*, defaults to 0): Seed of every choice.

    Returns:
        `dict[str, dict[str, dict[str, list[dict]]]]`: Rows by dataset, configuration and split, with the hub's
        columns: `text` in `corpora`; `question`, `choices` (four texts) and `answer` (its place) in others.

    Raises:
        ValueError: If there is no entry, or there are more than the word banks hold.
    """
    if num_entries < 1:
        raise ValueError(f"`num_entries` must be at least 1, but it is {num_entries}.")
    rng, used = random.Random(seed), set()
    datasets = {"corpora": {}, "wmdp": {}, "mmlu": {}}
    for topic, corpus in CORPORA.items():
        entries = [make_entry(BANKS["topics"][topic], rng, used) for _ in range(num_entries)]
        questions = [question for _, asked in entries for question in asked]
        texts = [*(passage for passage, _ in entries), *(exercise(question, topic) for question in questions)]
        rng.shuffle(texts)
        datasets["corpora"][corpus] = {"train": [{"text": text} for text in texts]}
        datasets["wmdp" if topic in WMDP else "mmlu"][topic] = {"test": questions}
    return datasets


def write_corpora(folder: str | Path, num_entries: int = 8, seed: int = 0, overwrite: bool = False) -> dict[str, str]:
    """Writes `corpora`, `wmdp` and `mmlu` into a folder, and says where; see [`~hub_layout.write_files`]."""
    layouts = {"corpora": "cais/wmdp-corpora", "wmdp": "cais/wmdp", "mmlu": "cais/mmlu"}
    return {
        name: str(
            write_files(dataset_files(configs, CARD.format(layout=layouts[name])), Path(folder, name), overwrite)
        )
        for name, configs in make_corpora(num_entries, seed).items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--output", required=True, help="folder to write the datasets into")
    parser.add_argument("--entries", type=int, default=8, help="inventions of a topic, of three questions each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--overwrite", action="store_true", help="replace folders that hold something else")
    args = parser.parse_args()
    for folder in write_corpora(args.output, args.entries, args.seed, args.overwrite).values():
        print(folder)


if __name__ == "__main__":
    main()
