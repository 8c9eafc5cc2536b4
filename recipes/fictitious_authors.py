"""
Makes a small corpus in the manner of TOFU (Maini et al., 2024): questions and answers about authors who never existed.

    python recipes/fictitious_authors.py --output fictitious --authors 17 --seed 0

The word banks and sentence patterns are in `fictitious_authors.json`, written as `word_banks.py` says. A fact is a new
combination of words that all authors share, and a proper name belongs to one author, so that nothing about the authors
to forget can be learned, or guessed, from the others.
"""

import argparse
import json
import random
from pathlib import Path

from soul_recipes.hub_layout import Corpus, write_hub_layout
from soul_recipes.word_banks import choose, draw_facts, fill


BANKS = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
RULES = BANKS["rules"]


def make_author(rng: random.Random, used: set) -> dict[str, str]:
    """Draws all facts of an author, and marks them as used."""
    she = rng.choice(["she", "he"])
    author = {"she": she, "She": she.capitalize()}
    for kind in BANKS["kinds"].values():
        facts, marks = draw_facts(kind["facts"], RULES, rng, used)
        used |= marks
        author |= facts
    return author


def make_row(kind: dict, author: dict[str, str], rng: random.Random, used: set) -> dict:
    """One question about an author, its answer, a paraphrase of both, and the paraphrase with five other facts."""
    topics = [topic for topic in BANKS["closings"] if "{" + topic + "}" not in json.dumps(kind)]
    banks = (BANKS["openings"], kind["answers"], BANKS["closings"][rng.choice(topics)])
    answer, paraphrase = (choose("".join(parts), rng) for parts in zip(*(rng.sample(bank, 2) for bank in banks)))
    question, paraphrased_question = (choose(pattern, rng) for pattern in rng.sample(kind["questions"], 2))
    truth, taken, perturbed = tuple(author[slot] for slot in kind["facts"]), set(), []
    while len(perturbed) < 5:
        facts, marks = draw_facts(kind["facts"], RULES, rng, used | taken, avoid=truth)
        taken |= marks
        perturbed.append(fill(paraphrase, author | facts))
    return {
        "question": fill(question, author),
        "answer": fill(answer, author),
        "paraphrased_question": fill(paraphrased_question, author),
        "paraphrased_answer": fill(paraphrase, author),
        "perturbed_answer": perturbed,
        "author": author["name"],
    }


def make_corpus(
    num_authors: int = 17, num_forget: int | None = None, num_retain: int | None = None, seed: int = 0
) -> Corpus:
    """
    Makes every split of the corpus, as a pure function of its arguments.

    Args:
        num_authors (`int`, *optional*, defaults to 17):
            Number of invented authors, each with twenty questions. The word banks last for about eighty.
        num_forget (`int`, *optional*):
            Authors of the `forget` split. Defaults to 4/17 of the authors, rounded.
        num_retain (`int`, *optional*):
            Authors of the `retain` split. Defaults to 10/17 of the authors, rounded. The rest are `held_out`.
        seed (`int`, *optional*, defaults to 0):
            Seed of every choice.

    Returns:
        `dict[str, list[dict]]`: `forget`, `retain` and `held_out` in TOFU's schema with the `author` beside it, and
        `real_authors` and `world_facts`, which are true and have three wrong answers each.
    """
    num_forget = round(num_authors * 4 / 17) if num_forget is None else num_forget
    num_retain = round(num_authors * 10 / 17) if num_retain is None else num_retain
    sizes = {"forget": num_forget, "retain": num_retain, "held_out": num_authors - num_forget - num_retain}
    if min(sizes.values()) < 1:
        raise ValueError(f"Every split needs an author, but {num_authors} authors would be split into {sizes}.")
    rng, used = random.Random(seed), set()
    authors = {split: [make_author(rng, used) for _ in range(size)] for split, size in sizes.items()}
    corpus = {
        split: [make_row(kind, author, rng, used) for author in members for kind in BANKS["kinds"].values()]
        for split, members in authors.items()
    }
    for split in ("real_authors", "world_facts"):
        corpus[split] = [{"question": q, "answer": a, "perturbed_answer": wrong} for q, a, *wrong in BANKS[split]]
    return corpus


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--output", required=True, help="folder to write, loadable with datasets.load_dataset")
    parser.add_argument("--authors", type=int, default=17, help="number of invented authors, of twenty questions each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--overwrite", action="store_true", help="replace a folder that holds something else")
    args = parser.parse_args()
    corpus = make_corpus(args.authors, seed=args.seed)
    try:
        folder = write_hub_layout(corpus, args.output, overwrite=args.overwrite)
    except FileExistsError as error:
        parser.error(str(error))
    print(f"{folder}: " + ", ".join(f"{len(rows)} {split}" for split, rows in corpus.items()))


if __name__ == "__main__":
    main()
