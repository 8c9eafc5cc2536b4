"""How a report shows a figure: its name, which way is better, how to read it. Imports no torch."""

from collections.abc import Callable
from dataclasses import dataclass


ARROWS = {"higher": "↑", "lower": "↓"}
# Of labels, which stand above narrow columns.
ABBREVIATIONS = {
    "prob.": "probability",
    "truth r.": "truth ratio",
    "memor.": "memorization",
    "emb.": "embedding",
    "acc.": "accuracy",
    "norm.": "(normalised)",
    "tok.": "tokens",
    "exact mem.": "exact memorization",
}
GROUPS = (
    "Forgetting",
    "What is kept",
    "MUSE",
    "WMDP",
    "Copyright",
    "Detoxification",
    "Membership inference",
    "Attacks",
    "General ability",
    "Cost",
    "Other figures",
)


@dataclass(frozen=True)
class Column:
    """
    A figure as reports show it.

    Attributes:
        key (`str`):
            Its key in a summary. A `*` in it stands for any text, which goes where a `*` is in the label.
        label (`tuple[str, str]`): In two lines.
        better (`str`, *optional*): `"higher"`, `"lower"`, or `"near"` where `goal` is a number; `None` for none.
        reading (`str`): How to read it.
        group (`str`): One of `GROUPS`.
        goal (`str` or `float`, *optional*):
            What a perfectly unlearned model has: the `"gold"` model's value, beyond which nothing is gained, the
            `"target"`'s, or a number. `None` is the end of the scale.
        phrase (`str`): What goes between a model's name and the next word, with `{}` for the value.
        goal_words (`str`): What `goal` is called where it is a number that has a name.
        is_main (`bool`): Whether it is among those that the terminal and a model card show.
    """

    key: str
    label: tuple[str, str]
    better: str | None
    reading: str
    group: str
    goal: str | float | None = None
    phrase: str = "has {}"
    goal_words: str = ""
    is_main: bool = False

    @property
    def arrow(self) -> str:
        """`↑` or `↓`, or the number to be near to; empty where nothing is better."""
        return f"→ {self.goal:g}" if self.better == "near" else ARROWS.get(self.better, "")

    @property
    def name(self) -> str:
        """The label in one line, in whole words."""
        words = " ".join(self.label)
        for short, whole in ABBREVIATIONS.items():
            words = words.replace(short, whole)
        return words.strip()

    @property
    def title(self) -> str:
        """Name and arrow."""
        return f"{self.name} {self.arrow}".strip()

    @property
    def is_gold_best(self) -> bool:
        """Whether the gold model's value is the goal, beyond which nothing is gained."""
        return self.goal == "gold"

    @property
    def is_p_value(self) -> bool:
        """Whether it is a probability of a test, of which the magnitude matters."""
        return self.key.endswith(("forget_quality", "p_value"))

    def text(self, value: float | None) -> str:
        """A value as the table shows it."""
        if value is None:
            return "-"
        if (self.is_p_value and value < 0.001) or abs(value) >= 1e5:
            return f"{value:.1e}" if value else "0"
        return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"


def family(group: str, **common) -> Callable[..., Column]:
    """
    A shorthand for the [`Column`]s of a group: `(key, first line, second line, better, reading, phrase, ...)`.

    Args:
        group (`str`): One of `GROUPS`.
        common (`dict`): Attributes that its columns have unless they say otherwise.
    """
    if group not in GROUPS:
        raise ValueError(f"`group` must be one of {GROUPS}, but it is {group!r}.")

    def column(key: str, first: str, second: str, better: str | None, reading: str, phrase: str = "has {}", **more):
        return Column(key, (first, second), better, reading, group, phrase=phrase, **{**common, **more})

    return column
