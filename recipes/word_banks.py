"""
Invented facts and varied sentences from word banks. In a pattern, `[one|other]` is a choice of wording and `{slot}` a
fact or a rule; a rule is a list of patterns.
"""

import random
import re


def with_articles(text: str) -> str:
    """Turns "a" into "an" before a vowel; the word banks avoid the words that would be exceptions."""
    return re.sub(r"\b([Aa]) (?=[aeiouAEIOU])", r"\1n ", text)


def draw(pattern: str, rules: dict[str, list[str]], rng: random.Random) -> str:
    """Expands each `{rule}` of a fact's pattern, and the rules within it, at random."""
    return with_articles(re.sub(r"\{(\w+)\}", lambda rule: draw(rng.choice(rules[rule[1]]), rules, rng), pattern))


def choose(pattern: str, rng: random.Random) -> str:
    """Settles each `[one|other]` of a sentence's pattern at random and leaves its `{slot}`s open."""
    return re.sub(r"\[([^\]]*)\]", lambda choice: rng.choice(choice[1].split("|")), pattern)


def fill(sentence: str, facts: dict[str, str]) -> str:
    """Puts the facts in a sentence's `{slot}`s and begins it with a capital."""
    text = with_articles(sentence.format_map(facts))
    return text[0].upper() + text[1:]


def draw_facts(
    slots: dict[str, str], rules: dict[str, list[str]], rng: random.Random, used: set, avoid: tuple = ()
) -> tuple[dict[str, str], set]:
    """
    Draws facts that nobody has: a combination that is new as a whole, and proper names that are each new.

    Args:
        slots (`dict[str, str]`): Pattern of each fact.
        rules (`dict[str, list[str]]`): What the patterns' rules stand for.
        rng ([`random.Random`]): Decides.
        used (`set`): Names and combinations that are taken.
        avoid (`tuple`, *optional*): Facts that may not come up, common words or not.

    Returns:
        `tuple[dict[str, str], set]`: The facts, and what they add to `used`.

    Raises:
        ValueError: If the word banks hold no more of them.
    """
    for _ in range(1000):
        facts = {slot: draw(pattern, rules, rng) for slot, pattern in slots.items()}
        values = tuple(facts.values())
        marks = {values} | {value for value in values if value != value.lower()}
        if len(set(values)) == len(values) and not marks & used and not set(values) & set(avoid):
            return facts, marks
    raise ValueError(f"The word banks hold no more combinations for {', '.join(slots)}: ask for fewer.")
