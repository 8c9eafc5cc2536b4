"""A run, and which of its figures are shown, in which words. Imports no torch."""

from dataclasses import dataclass, field


ROLES = ("unlearned", "target", "gold")
ARROWS = {"higher": "↑", "lower": "↓"}


@dataclass
class Run:
    """
    What a report knows of a model.

    Attributes:
        name (`str`): What the report calls it.
        summary (`dict[str, float]`): From `suites.tofu.summarise`.
        rows (`list[dict]`): What the summary was made of; may be empty.
        trajectory (`list[dict]`, *optional*): From [`~trajectory.TrajectoryCallback`].
        log_history (`list[dict]`, *optional*): The Trainer's `state.log_history`.
        settings (`dict`, *optional*): Settings to show; `seconds_per_step` becomes a column of the table.
        role (`str`, *optional*, defaults to `"unlearned"`):
            `"target"` is the model before unlearning, `"gold"` one that never saw what was to be forgotten.
    """

    name: str
    summary: dict[str, float]
    rows: list[dict] = field(default_factory=list)
    trajectory: list[dict] | None = None
    log_history: list[dict] | None = None
    settings: dict | None = None
    role: str = "unlearned"

    def __post_init__(self):
        if self.role not in ROLES:
            raise ValueError(f"`role` must be one of {ROLES}, but that of {self.name!r} is {self.role!r}.")

    def value(self, key: str) -> float | None:
        """A figure of the summary or, failing that, a number of the settings."""
        return self.summary.get(key, (self.settings or {}).get(key))


@dataclass(frozen=True)
class Column:
    """
    A column of the table: its key in the summary, its label in two lines, which way is better, how to read it, and
    whether the gold model's value is the goal, beyond which nothing is gained.
    """

    key: str
    label: tuple[str, str]
    better: str
    reading: str
    is_gold_best: bool = False

    @property
    def title(self) -> str:
        return f"{' '.join(self.label)} {ARROWS[self.better]}"

    def text(self, value: float | None) -> str:
        """A value as the table shows it."""
        if value is None:
            return "-"
        if self.key == "forget_quality" and value < 0.001:
            return f"{value:.1e}" if value else "0"
        return f"{value:.3f}"


COLUMNS = (
    Column(
        "forget_quality",
        ("forget", "quality"),
        "higher",
        "Can the truth ratios on the forget rows be told from the gold model's? p-value of a two-sample "
        "Kolmogorov-Smirnov test: above 0.05 they cannot; far below, the model still knows or has unlearned too much.",
    ),
    Column(
        "forget_probability",
        ("forget", "prob."),
        "lower",
        "Mean probability of the answers to forget, length taken out. The goal is the gold model's value; less than "
        "that is damage and no better forgetting.",
        is_gold_best=True,
    ),
    Column(
        "forget_rougeL_recall",
        ("forget", "ROUGE-L"),
        "lower",
        "Share of an answer to forget that the model's own answer holds, in order. Some overlap is mere wording: "
        "the gold model shows how much.",
        is_gold_best=True,
    ),
    Column(
        "forget_truth_ratio",
        ("forget", "truth r."),
        "higher",
        "1 where a true answer to forget is as probable as false ones that are worded like it. The goal is the gold "
        "model's value.",
        is_gold_best=True,
    ),
    Column(
        "retain_probability",
        ("retain", "prob."),
        "higher",
        "Mean probability of the answers that unlearning was told to keep. The goal is the target's value.",
    ),
    Column(
        "held_out_probability",
        ("held-out", "prob."),
        "higher",
        "The same for authors that the model had learnt and unlearning never saw: what unlearning costs where nobody "
        "looks.",
    ),
    Column(
        "held_out_rougeL_recall",
        ("held-out", "ROUGE-L"),
        "higher",
        "Share of a held-out author's answer that the model's own answer holds, in order.",
    ),
    Column(
        "real_authors_probability",
        ("real", "authors"),
        "higher",
        "Probability of the true answer among the options of a question on real authors; guessing among four gives "
        "about 0.25.",
    ),
    Column(
        "world_facts_probability",
        ("world", "facts"),
        "higher",
        "The same for facts about the world, further from what was forgotten.",
    ),
    Column(
        "model_utility",
        ("model", "utility"),
        "higher",
        "Harmonic mean of probability, ROUGE-L and truth ratio on retain, real authors and world facts: near the "
        "weakest of the nine. The goal is the target's value.",
    ),
    Column(
        "seconds_per_step",
        ("seconds", "a step"),
        "lower",
        "Time of a training step, curvature included and evaluation not.",
    ),
)


def shown_columns(runs: list[Run]) -> list[Column]:
    """The columns for which at least one run has a value."""
    return [column for column in COLUMNS if any(run.value(column.key) is not None for run in runs)]
