"""
Makes a small corpus in the manner of MUSE's news (Shi et al., 2024): articles on events that never happened.

    python recipes/fictitious_news.py --output news --articles 10 --seed 0

The word banks and sentence patterns are in `fictitious_news.json`, written as `word_banks.py` says. A corpus is its
articles and a quiz on them: pairs in the form in which MUSE asks, since a small model cannot answer about what it has
only read as prose. As in MUSE, the first of four folds of articles is what must be forgotten.
"""

import argparse
import json
import random
from pathlib import Path

from soul_recipes.hub_layout import dataset_files, write_files
from soul_recipes.word_banks import choose, draw_facts, fill


BANKS, AUTHORS = (
    json.loads(Path(__file__).with_name(f"fictitious_{name}.json").read_text(encoding="utf-8"))
    for name in ("news", "authors")
)
RULES = AUTHORS["rules"] | BANKS["rules"]
FOLDS = ("forget_1", "forget_2", "forget_3", "forget_4")
RETAIN, HOLDOUT = ("retain1", "retain2"), "holdout"
# Questions of an article that are asked; the last is kept for the examples in context.
NUM_ASKED = 3
NUM_EXAMPLES = 1
CARD = """# Fictitious news

Invented by `recipes/fictitious_news.py`, in the layout of MUSE-News (Shi et al., 2024, arXiv 2407.06460).
"""


def make_article(kind: dict, rng: random.Random, used: set) -> dict:
    """An article with questions on it: `sentences`, and `pairs` of question and answer."""
    facts, marks = draw_facts(kind["facts"], RULES, rng, used)
    used |= marks
    return {
        "sentences": [fill(choose(pattern, rng), facts) for pattern in kind["story"]],
        "pairs": [
            {"question": fill(question, facts), "answer": fill(answer, facts)}
            for question, answer in kind["questions"]
        ],
    }


def make_articles(num_articles: int, rng: random.Random, used: set) -> list[dict]:
    """Articles of all kinds in turn."""
    kinds = list(BANKS["kinds"].values())
    return [make_article(kinds[index % len(kinds)], rng, used) for index in range(num_articles)]


def texts(articles: list[dict], rng: random.Random) -> list[dict]:
    """What is printed: the articles, and quizzes on them, in which each question comes last after two others."""
    found = [" ".join(article["sentences"]) for article in articles]
    pairs = [pair for article in articles for pair in article["pairs"]]
    rng.shuffle(pairs)
    for distance in (1, 2):
        found += map(quiz, pairs, pairs[distance:] + pairs[:distance])
    return [{"text": text} for text in found]


def quiz(example: dict, asked: dict) -> str:
    """
    Two pairs as the suite puts them. Its prompts end with a space, a token of its own to the model: before the last
    answer there is one more, so that the answer still begins with a whole word.
    """
    return (
        f"Question: {example['question']}\nAnswer: {example['answer']}\n\n"
        f"Question: {asked['question']}\nAnswer:  {asked['answer']}"
    )


def questions(articles: list[dict]) -> tuple[list[dict], list[dict]]:
    """The pairs that are asked, and those that stand before them as examples."""
    asked = [pair for article in articles for pair in article["pairs"][:NUM_ASKED]]
    return asked, [article["pairs"][NUM_ASKED] for article in articles[:NUM_EXAMPLES]]


def make_corpus(num_articles: int = 10, seed: int = 0) -> dict[str, dict[str, list[dict]]]:
    """
    Makes every configuration and split of the corpus, as a pure function of its arguments.

    Args:
        num_articles (`int`, *optional*, defaults to 10):
            Articles of a split; a fold of those to forget is a split.
        seed (`int`, *optional*, defaults to 0): Seed of every choice.

    Returns:
        `dict[str, dict[str, list[dict]]]`: Rows by configuration and split, with the names and columns of MUSE-News.
        `raw`'s `forget` is the first fold of `sust` and of `scal`, whose folds grow.

    Raises:
        ValueError: If there is no article, or more than the word banks hold.
    """
    if num_articles < 1:
        raise ValueError(f"`num_articles` must be at least 1, but it is {num_articles}.")
    rng, used = random.Random(seed), set()
    articles = {split: make_articles(num_articles, rng, used) for split in (*FOLDS, *RETAIN, HOLDOUT)}
    printed = {split: texts(members, rng) for split, members in articles.items()}
    forget = articles[FOLDS[0]]
    knowmem = {}
    for side, members in (("forget", forget), ("retain", articles["retain2"])):
        knowmem[f"{side}_qa"], knowmem[f"{side}_qa_icl"] = questions(members)
    stories = {
        side: [{"text": " ".join(article["sentences"])} for article in articles[split]]
        for side, split in (("forget", FOLDS[0]), ("retain", "retain2"), ("holdout", HOLDOUT))
    }
    grown = {fold: [row for each in FOLDS[: place + 1] for row in printed[each]] for place, fold in enumerate(FOLDS)}
    kept = {split: printed[split] for split in RETAIN}
    return {
        "knowmem": knowmem,
        "verbmem": {
            "forget": [{"prompt": each["sentences"][0], "gt": " ".join(each["sentences"][1:])} for each in forget]
        },
        "privleak": stories,
        "raw": {"forget": printed[FOLDS[0]], **kept, HOLDOUT: printed[HOLDOUT]},
        "scal": grown,
        "sust": {fold: printed[fold] for fold in FOLDS},
        "train": {"forget": grown[FOLDS[-1]], **kept},
    }


def write_corpus(folder: str | Path, num_articles: int = 10, seed: int = 0, overwrite: bool = False) -> Path:
    """Writes the corpus as a folder in the hub's layout; see [`~hub_layout.write_files`]."""
    return write_files(dataset_files(make_corpus(num_articles, seed), CARD), folder, overwrite)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--output", required=True, help="folder to write, in the layout of MUSE-News")
    parser.add_argument("--articles", type=int, default=10, help="articles of a split")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--overwrite", action="store_true", help="replace a folder that holds something else")
    args = parser.parse_args()
    print(write_corpus(args.output, args.articles, args.seed, args.overwrite))


if __name__ == "__main__":
    main()
