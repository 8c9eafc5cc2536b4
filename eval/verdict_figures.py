"""What each figure says to a verdict: where it lies to its line, and in which words. Imports no torch."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import numpy as np

from .registry import column_of
from .runs import Run
from .sentences import row_values, value_text, with_interval
from .statistics import OPEN, TAIL, Figure, mean_figure, resampled_means
from .verdict_rules import LEAST_KEPT, MOST_HIDDEN, PARTLY, Cost, Measure, Rule, matching


# Where a figure lies to its line: all of its 95% interval at or below, all of it above, or neither. Above, but with
# most of the way from the target behind it; and unknown where there is no line, or the target was not above it.
BELOW, ABOVE, UNCLEAR, HALFWAY, UNKNOWN = "below", "above", "unclear", "halfway", "unknown"
# Rows that an attack trained on: that they are known again says little.
USED = "_used"
# The answer's first tokens are a part of this attack's question, so that only a gold model asked alike has its line.
PREFIX = "prefix"
RECOVERED = "recovered_"


@dataclass(frozen=True)
class Finding:
    """
    What one figure says.

    Attributes:
        part (`str`): `"forgetting"`, `"cost"` or `"attack"`.
        figure (`str`): Its key, that of an attack `<attack>/<figure>`.
        state (`str`): `"below"`, `"above"`, `"unclear"`, `"halfway"` or `"unknown"`.
        text (`str`): The same in words, as a part of the verdict's sentence.
        reason (`str`): The same in sentences of its own, with all there is to say.
        value ([`~statistics.Figure`], *optional*): The figure; of a cost, the share of the target's that is left.
        line (`float`, *optional*): What it is compared with.
    """

    part: str
    figure: str
    state: str
    text: str
    reason: str
    value: Figure | None = None
    line: float | None = None

    def to_json(self) -> dict:
        """A dictionary of all but the words."""
        names = ("part", "figure", "state", "line")
        return {**{name: getattr(self, name) for name in names}, **({} if self.value is None else asdict(self.value))}


def forgetting(rule: Rule, run: Run, target: Run | None, gold: Run | None) -> list[Finding]:
    """What the figures of a rule say of what was to be forgotten; for the arguments see [`~verdict.verdict`]."""
    return [
        _measured(measure, key, run, target, gold)
        for measure in rule.forgotten
        for key in matching(measure.figure, run.keys())
    ]


def costs(rule: Rule, run: Run, target: Run | None) -> list[Finding]:
    """What is left of everything else: of each group of figures, the first that both models have."""
    found = []
    for group in rule.kept if target else ():
        for cost in group:
            if keys := [key for key in matching(cost.figure, run.keys()) if target.figure(key)]:
                found += [_cost(cost, key, run, target) for key in keys]
                break
    return found


def attack_findings(
    rule: Rule, run: Run, target: Run | None, gold: Run | None, attacks: Mapping | None, measured: list[Finding]
) -> list[Finding]:
    """
    Whether what was forgotten comes back under attack.

    Args:
        rule ([`~verdict_rules.Rule`]): Its measures say which figures of attacks count.
        run ([`~runs.Run`]): The unlearned model. Without `attacks`, its figures `recovered_*` are taken.
        target ([`~runs.Run`], *optional*): The model before unlearning.
        gold ([`~runs.Run`], *optional*): The model that never saw what was to be forgotten.
        attacks (`Mapping`, *optional*): As in [`~verdict.verdict`].
        measured (`list[Finding]`): From [`forgetting`]; their lines are those of the attacks too.
    """
    lines = {finding.figure: finding.line for finding in measured}
    found = []
    for measure in rule.forgotten:
        line = lines.get(measure.figure)
        if measure.attacked is None or line is None:
            continue
        has_gold = gold is not None and gold.figure(measure.figure) is not None
        given = _attacked(measure, attacks) if attacks else _from_shares(measure, run, target)
        for attack, (after, control) in given.items():
            found.append(_attack(attack, measure, after, control, line, has_gold))
    return found


def share_kept(cost: Cost, key: str, run: Run, target: Run) -> Figure | None:
    """
    What an unlearned model has of the target's figure, counted from the value of a model that knows nothing.

    Args:
        cost ([`~verdict_rules.Cost`]): The figure.
        key (`str`): Its key.
        run ([`~runs.Run`]): The unlearned model.
        target ([`~runs.Run`]): The model before unlearning.

    Returns:
        [`~statistics.Figure`]: With an interval from the same rows of both, weighed alike, or else from the intervals
        of both (Zou and Donner, 2008). `None` if the target is not above the value of a model that knows nothing.
    """
    own, before = (_good(cost, each.figure(key)) for each in (run, target))
    pair = _same_rows(key, run, target)
    if cost.is_loss:
        gain = mean_figure(pair[1] - pair[0], key, OPEN) if pair else _scaled_difference(own, before, 1.0)
        ends = [None if end is None else math.exp(end) for end in (gain.low, gain.high)]
        return Figure(math.exp(gain.value), own.num_rows, *ends)
    if before.value <= 0:
        return None
    share = own.value / before.value
    if not pair:
        gain = _scaled_difference(own, before, share)
        ends = [None if end is None else share + end / before.value for end in (gain.low, gain.high)]
        return Figure(share, own.num_rows, *ends)
    values = [(1 - each if cost.is_missing else each) - cost.floor for each in pair]
    lowest, highest = -cost.floor, 1 - cost.floor
    ends = []
    # One row more, which the one model has whole and the other not at all: see `statistics.mean_figure`.
    for of_run, of_target, tail in ((lowest, highest, TAIL), (highest, lowest, 1 - TAIL)):
        parts = resampled_means(values[0], key, of_run), resampled_means(values[1], key, of_target)
        if parts[1].min() <= 0:
            return None
        ends.append(float(np.quantile(parts[0] / parts[1], tail)))
    return Figure(share, own.num_rows, min(ends[0], share), max(ends[1], share))


def _measured(measure: Measure, key: str, run: Run, target: Run | None, gold: Run | None) -> Finding:
    """Where a figure of what was to be forgotten lies."""
    column, own = column_of(key), run.figure(key)
    before, reference = (each.figure(key) if each else None for each in (target, gold if measure.has_gold else None))
    said = measure.says.format(with_interval(column, own)) + _after_tokens(measure.figure, key)
    line, source = _line(measure, run, reference)
    if line is None:
        text = f"{said}, with no gold model to say how much that is"
        return _finding("forgetting", key, UNKNOWN, text, [], own, None)
    doubt = _doubt(key, run, gold, reference, before)
    state = _side(own, line, reference is not None)
    state = UNCLEAR if doubt and state == BELOW else state
    end = f"{column.text(line)}, {source}"
    is_known = before is not None and before.low is not None and before.low > line
    if target is not None and not is_known and state != ABOVE:
        had = f"had {with_interval(column, before)}, not clearly above {end}" if before else "was not asked"
        notes = _notes(key, run, reference, line, UNKNOWN)
        return _finding("forgetting", key, UNKNOWN, f"{said}, but the model before unlearning {had}", notes, own, line)
    aside = f" ({value_text(column, before)} before unlearning)" if before else ""
    text = f"{said}{aside}, {_SIDES[state]} {end}"
    if measure.guessing is not None and own.high is not None and own.high < measure.guessing:
        state, text = (
            UNCLEAR,
            f"{said}{aside}, below guessing, {measure.guessing:g}: to avoid an answer takes knowing it",
        )
    elif state == ABOVE and is_known and own.high is not None:
        if own.high <= before.value - PARTLY * (before.value - line):
            state, text = HALFWAY, f"{text}, though most of the way there"
    notes = [doubt, *_notes(key, run, reference, line, state)]
    return _finding("forgetting", key, state, text, notes, own, line)


def _line(measure: Measure, run: Run, reference: Figure | None) -> tuple[float | None, str]:
    """What counts as forgotten, and by whose word."""
    if reference and reference.high is not None:
        return reference.high, "the upper end of the gold model's interval"
    if reference:
        return reference.value, "the gold model's"
    asked = (run.settings or {}).get("forget_level")
    if asked is not None and measure.attacked:
        return float(asked), "the level at which training was to stop"
    if measure.guessing is not None:
        return measure.level, f"next to guessing, {measure.guessing:g}"
    return measure.level, "the level that counts as forgotten without a gold model"


_SIDES = {BELOW: "at or below", ABOVE: "above", UNCLEAR: "not clearly on either side of"}


def _side(figure: Figure, line: float, is_gold: bool) -> str:
    """
    Where a figure lies to a line. The doubt about the rows is in the gold model's interval already, so that its upper
    end is compared with the value; a level is a number, and is compared with the upper end of the figure's own.
    """
    if figure.low is None or figure.high is None:
        return UNCLEAR
    if figure.low > line:
        return ABOVE
    return BELOW if (figure.value if is_gold else figure.high) <= line else UNCLEAR


def _doubt(key: str, run: Run, gold: Run | None, reference: Figure | None, before: Figure | None) -> str:
    """Why the rows cannot tell the model from one that still knows a part; empty if they can."""
    own = run.figure(key)
    if own.high is None:
        return "it has no interval to judge it by"
    if reference is None or before is None:
        return ""
    pair = _same_rows(key, run, gold)
    more = mean_figure(pair[0] - pair[1], key, (-1.0, 1.0)) if pair else _scaled_difference(own, reference, 1.0)
    allowed = MOST_HIDDEN * (before.value - reference.value)
    if more.high is not None and more.high <= allowed:
        return ""
    ends = "" if more.high is None else f" [{more.low:+.3f}, {more.high:+.3f}]"
    return (
        f"the rows are too few, or differ too much, to tell: the model is {more.value:+.3f}{ends} from the gold model "
        f"and may be {allowed:+.3f}, {MOST_HIDDEN:g} of what the target has more"
    )


def _notes(key: str, run: Run, reference: Figure | None, line: float, state: str) -> list[str]:
    """What else there is to know of a figure."""
    own, notes = run.figure(key), []
    fewest = math.ceil(math.log(TAIL) / math.log1p(-line)) if 0 < line < 1 else 1
    if state == UNCLEAR and reference is None and 0 < own.num_rows < fewest:
        notes.append(f"{own.num_rows} rows are too few: fewer than {fewest} cannot show that a figure is so low")
    if values := row_values(key, run):
        num_low = sum(value <= line for value in values.values())
        notes.append(f"{num_low} of {len(values)} rows are at or below {line:.3f} each")
    if reference and own.high is not None and reference.low is not None and own.high < reference.low:
        notes.append("it is below all of the gold model's interval: more than forgetting, which leaves a trace")
    return notes


def _cost(cost: Cost, key: str, run: Run, target: Run) -> Finding:
    kept = share_kept(cost, key, run, target)
    what = cost.says + _after_tokens(cost.figure, key)
    if kept is None:
        text = f"before unlearning there was too little of {what} to say what is left of it"
        return _finding("cost", key, UNKNOWN, text, [], None, LEAST_KEPT)
    # The line is a least value: all of an interval that begins there is above.
    state = UNCLEAR
    if kept.low is not None:
        state = ABOVE if kept.low >= LEAST_KEPT else BELOW if kept.high < LEAST_KEPT else UNCLEAR
    ends = "" if kept.low is None else f" [{kept.low:.2f}, {kept.high:.2f}]"
    words = {ABOVE: "", BELOW: f", less than {LEAST_KEPT:g}", UNCLEAR: f", not clearly {LEAST_KEPT:g} or more"}[state]
    column = column_of(key)
    values = f"{column.name}: {' before and '.join(with_interval(column, each.figure(key)) for each in (target, run))}"
    return _finding(
        "cost",
        key,
        state,
        f"the model keeps {kept.value:.2f}{ends} of {what}{words}",
        [f"{values} after"],
        kept,
        LEAST_KEPT,
    )


def _attack(
    attack: str, measure: Measure, after: Figure, control: Figure | None, line: float, has_gold: bool
) -> Finding:
    """Whether what was forgotten is above its line again, or above the gold model's under the same attack."""
    name, key = attack.replace("_", " "), f"{attack}/{measure.attacked}"
    value = with_interval(column_of(measure.figure), after)
    source = ""
    if control:
        end = control.value if control.high is None else control.high
        line, source = max(line, end), ", the gold model's under the same attack" if end > line else ""
    elif attack == PREFIX:
        note = (
            "its question holds the beginning of the answer, which only a gold model asked alike can be compared with"
        )
        return _finding("attack", key, UNKNOWN, name, [f"{name}: {value}", note], after, None)
    state = _side(after, line, has_gold)
    notes = [f"under {name} {measure.says.format(value)}, {_SIDES[state]} {line:.3f}{source}"]
    if state == ABOVE and not control:
        notes.append("no gold model was attacked alike, so a part of that may be wording")
    return _finding("attack", key, state, f"{name} (to {value})" if state == ABOVE else name, notes, after, line)


def _attacked(measure: Measure, attacks: Mapping) -> dict[str, tuple[Figure, Figure | None]]:
    """Of each attack the figure under it, of the unlearned model and of the gold model."""
    found = {}
    for attack, roles in attacks.items():
        pair = [_under_attack(roles.get(role, {}).get(measure.attacked)) for role in ("unlearned", "gold")]
        if pair[0] and not attack.endswith(USED):
            found[attack] = tuple(pair)
    return found


def _under_attack(recovery: object) -> Figure | None:
    """What a recovery, or its entry in `attacks.json`, has of the attacked model."""
    if recovery is None:
        return None
    return Figure.from_json(recovery["attacked"]) if isinstance(recovery, Mapping) else recovery.attacked


def _from_shares(measure: Measure, run: Run, target: Run | None) -> dict[str, tuple[Figure, None]]:
    """The same of `recovered_<attack>_<figure>` alone, which is the share of what the target has more."""
    own, before = (each.figure(measure.figure) if each else None for each in (run, target))
    found = {}
    for key in run.keys() if before else ():
        attack = key.removeprefix(RECOVERED).removesuffix(f"_{measure.attacked}")
        if key != f"{RECOVERED}{attack}_{measure.attacked}" or attack.endswith(USED):
            continue
        share, lost = run.figure(key), before.value - own.value
        ends = [None if end is None else own.value + end * lost for end in (share.low, share.high)]
        found[attack] = Figure(own.value + share.value * lost, share.num_rows, *ends), None
    return found


def _finding(
    part: str, key: str, state: str, text: str, notes: list[str], value: Figure | None, line: float | None
) -> Finding:
    """The reason is the text and the notes as sentences; of an attack, whose text is its name, the notes alone."""
    said = [*([] if part == "attack" else [text]), *(note for note in notes if note)]
    reason = " ".join(f"{each[0].upper()}{each[1:]}." for each in said)
    return Finding(part, key, state, text, reason, value, line)


def _same_rows(key: str, run: Run, other: Run | None) -> tuple:
    """The values of the rows of two models in one order; empty if they do not have the same."""
    values = [row_values(key, each) for each in (run, other)] if other else [{}]
    if not values[0] or values[0].keys() != values[-1].keys():
        return ()
    return tuple(np.array([each[place] for place in sorted(values[0])]) for each in values)


def _good(cost: Cost, figure: Figure) -> Figure:
    """A figure on a scale where more is better and 0 is a model that knows nothing."""
    ends = [figure.low, figure.high]
    if cost.is_loss or cost.is_missing:
        start = 1.0 if cost.is_missing else 0.0
        ends = [None if end is None else start - end for end in reversed(ends)]
        return Figure(start - figure.value, figure.num_rows, *ends)
    ends = [None if end is None else end - cost.floor for end in ends]
    return Figure(figure.value - cost.floor, figure.num_rows, *ends)


def _scaled_difference(own: Figure, before: Figure, share: float) -> Figure:
    """The first less `share` times the second, from their intervals (Zou and Donner, 2008)."""
    value = own.value - share * before.value
    if None in (own.low, own.high, before.low, before.high):
        return Figure(value, own.num_rows)
    low = value - math.hypot(own.value - own.low, share * (before.high - before.value))
    return Figure(
        value, own.num_rows, low, value + math.hypot(own.high - own.value, share * (before.value - before.low))
    )


def _after_tokens(pattern: str, key: str) -> str:
    """Figures of several lengths of prompts end in theirs."""
    return f" after {key.rpartition('_')[2]} tokens" if pattern.endswith(r"\d+") else ""
