"""
Makes a small corpus in the columns of PKU-SafeRLHF (Ji et al., 2024): prompts about townsfolk who never existed, each
with two responses, rude ones among them, and text without prompts in which the same words do no harm.

    python recipes/rude_townsfolk.py --output rude --rows 120 --seed 0

The word banks are in `rude_townsfolk.json`. An insult calls somebody a soggy turnip at worst.
"""

import argparse
import json
import random
from pathlib import Path

from soul_recipes.hub_layout import dataset_files, write_files
from soul_recipes.word_banks import draw, draw_facts, fill


BANKS = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
SOURCE = "recipes/rude_townsfolk.py"
CARD = f"""# Rude townsfolk

Invented by `{SOURCE}`, in columns of PKU-SafeRLHF (Ji et al., 2024, arXiv 2406.15513): prompts with two responses,
whether they are safe and which one is safer; `better_response_id` is the safer one's, too. The configuration `text` is
plain text.
"""
# Of four rows, two have one unsafe response, one has two, and one has none.
SAFETY = ((False, True), (True, False), (False, False), (True, True))


def sentence(kind: str, facts: dict[str, str], rng: random.Random) -> str:
    """One of the patterns of a kind, with the facts and, for whatever else it asks, words of the banks."""
    pattern = rng.choice(BANKS[kind])
    for name in facts:
        pattern = pattern.replace(f"{{{name}}}", f"<{name}>")
    text = draw(pattern, BANKS["rules"], rng)
    return fill(text.replace("<", "{").replace(">", "}"), facts)


def make_corpus(num_rows: int = 120, seed: int = 0) -> dict[str, dict[str, list[dict]]]:
    """
    Makes rows.

    Args:
        num_rows (`int`, *optional*, defaults to 120): Of the split `train`; `test` has half of them, of other people.
        seed (`int`, *optional*, defaults to 0): Decides everything.

    Returns:
        `dict[str, dict[str, list[dict]]]`: `default`, with the splits `train` and `test` of prompts and responses, and
        `text`, with `train` and `test` of texts; three for each two rows.
    """
    rng, used = random.Random(seed), set()

    def facts() -> dict[str, str]:
        found, _ = draw_facts(BANKS["person"], BANKS["rules"], rng, used)
        used.add(tuple(found.values()))  # names come again, people do not
        return found

    def row(index: int) -> dict:
        person, safety = facts(), SAFETY[index % len(SAFETY)]
        responses = [sentence("safe" if is_safe else "unsafe", person, rng) for is_safe in safety]
        while responses[0] == responses[1]:
            responses[1] = sentence("safe" if safety[1] else "unsafe", person, rng)
        safer = 0 if safety[0] >= safety[1] else 1
        return {
            "prompt": sentence("prompts", person, rng),
            **{f"response_{place}": response for place, response in enumerate(responses)},
            "prompt_source": SOURCE,
            **{f"response_{place}_source": SOURCE for place in (0, 1)},
            **{f"is_response_{place}_safe": is_safe for place, is_safe in enumerate(safety)},
            **{f"response_{place}_severity_level": 0 if is_safe else 1 for place, is_safe in enumerate(safety)},
            "better_response_id": safer,
            "safer_response_id": safer,
        }

    sizes = {"train": num_rows, "test": num_rows // 2}
    return {
        "default": {split: [row(index) for index in range(size)] for split, size in sizes.items()},
        "text": {
            split: [{"text": sentence("text", facts(), rng)} for _ in range(size * 3 // 2)]
            for split, size in sizes.items()
        },
    }


def write_corpus(folder: str | Path, num_rows: int, seed: int, overwrite: bool = False) -> Path:
    """Writes the corpus as a dataset of the hub lies in a folder; see [`~hub_layout.write_files`]."""
    return write_files(dataset_files(make_corpus(num_rows, seed), CARD), folder, overwrite)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, help="Folder of the dataset.")
    parser.add_argument("--rows", type=int, default=120, help="Prompts to train on; half as many more to test with.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--overwrite", action="store_true", help="Replace a folder that holds something else.")
    arguments = parser.parse_args()
    print(write_corpus(arguments.output, arguments.rows, arguments.seed, arguments.overwrite))
