"""
One line on an unlearned model: forgotten or not, against what, at what cost, with which certainty, and whether it came
back under attack. It never says more than the figures do. docs/verdict.md explains the rules. Imports no torch.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .rows import write_whole
from .runs import Run
from .verdict_figures import ABOVE, BELOW, HALFWAY, UNCLEAR, UNKNOWN, Finding, attack_findings, costs, forgetting
from .verdict_rules import rule_of


FILE = "verdict.json"
FORGOTTEN, PARTLY_FORGOTTEN, NOT_FORGOTTEN = "forgotten", "partly forgotten", "not forgotten"
DAMAGED, CAME_BACK, CANNOT_TELL = "damaged", "came back", "cannot tell"
KINDS = (FORGOTTEN, PARTLY_FORGOTTEN, NOT_FORGOTTEN, DAMAGED, CAME_BACK, CANNOT_TELL)


@dataclass(frozen=True)
class Verdict:
    """
    What holds for an unlearned model.

    Attributes:
        run (`str`): Name of the model.
        kind (`str`): One of `KINDS`.
        sentence (`str`): In plain English, with figures and, in brackets, their 95% intervals.
        reasons (`tuple[str, ...]`): What each figure says, in sentences.
        findings (`tuple[Finding, ...]`): The same for programs.
    """

    run: str
    kind: str
    sentence: str
    reasons: tuple[str, ...]
    findings: tuple[Finding, ...] = ()

    @property
    def title(self) -> str:
        """The kind as a heading."""
        return self.kind[0].upper() + self.kind[1:]

    def __str__(self) -> str:
        return f"{self.run}: {self.kind}. {self.sentence}"

    def to_json(self) -> dict:
        """As `verdict.json` has it."""
        return {
            "run": self.run,
            "kind": self.kind,
            "sentence": self.sentence,
            "reasons": list(self.reasons),
            "findings": [finding.to_json() for finding in self.findings],
        }


def verdict(run: Run, target: Run | None = None, gold: Run | None = None, attacks: Mapping | None = None) -> Verdict:
    """
    Judges an unlearned model by its figures, and by its rows where the other models have the same.

    Args:
        run ([`~runs.Run`]): The model.
        target ([`~runs.Run`], *optional*):
            The model before unlearning. Without it, nothing better than `"cannot tell"` can be said.
        gold ([`~runs.Run`], *optional*): A model that never saw what was to be forgotten.
        attacks (`Mapping`, *optional*):
            What attacks brought back, by attack, model and figure: [`~attacks.recovered.Recovery`]s, or what
            `attacks.json` holds under `attacks`. By default those of the run.

    Returns:
        [`Verdict`]
    """
    rule = rule_of(run.keys())
    if rule is None:
        text = "No figure says what was to be forgotten."
        return Verdict(run.name, CANNOT_TELL, text, (text,))
    measured, cost = forgetting(rule, run, target, gold), costs(rule, run, target)
    attacked = attack_findings(rule, run, target, gold, run.attacks if attacks is None else attacks, measured)
    states = {finding.state for finding in measured} - {UNKNOWN}
    kind, doubt = _kind(states, cost, attacked, target is not None)
    parts = [doubt, *(" and ".join(each.text for each in findings if each.text) for findings in (measured, cost))]
    if states == {BELOW}:
        parts.append(_attack_text(attacked))
    sentence = _sentence("; ".join(part for part in parts if part))
    findings = (*measured, *cost, *attacked)
    reasons = [*([_sentence(doubt)] if doubt else []), *(finding.reason for finding in findings)]
    return Verdict(run.name, kind, sentence, tuple(dict.fromkeys(reasons)), findings)


def verdicts(runs: Sequence[Run]) -> list[Verdict]:
    """The verdicts on the unlearned models among runs, against the target and the gold model among them."""
    target, gold = (next((run for run in runs if run.role == role), None) for role in ("target", "gold"))
    return [verdict(run, target, gold) for run in runs if run.role == "unlearned"]


def write_verdicts(folder: str | os.PathLike, found: Sequence[Verdict]) -> Path:
    """Writes `verdict.json` into a folder, and returns its path."""
    path = Path(folder) / FILE
    write_whole(path, json.dumps({"verdicts": [each.to_json() for each in found]}, indent=2, allow_nan=False) + "\n")
    return path


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def _kind(states: set[str], cost: list[Finding], attacked: list[Finding], has_target: bool) -> tuple[str, str]:
    """The kind, and what it is in doubt for where no figure says so itself."""
    if ABOVE in states or HALFWAY in states:
        return PARTLY_FORGOTTEN if BELOW in states or ABOVE not in states else NOT_FORGOTTEN, ""
    if not has_target:
        return CANNOT_TELL, "there is no model before unlearning to compare with"
    if states != {BELOW}:
        return CANNOT_TELL, ""
    if any(finding.state == ABOVE for finding in attacked):
        return CAME_BACK, ""
    kept = {finding.state for finding in cost}
    if BELOW in kept:
        return DAMAGED, ""
    if kept == {ABOVE}:
        return FORGOTTEN, ""
    return CANNOT_TELL, "forgotten, but " + ("damage cannot be ruled out" if kept else "no figure says at what cost")


def _attack_text(attacked: list[Finding]) -> str:
    if not attacked:
        return "no attack was tried"
    back = [finding.text for finding in attacked if finding.state == ABOVE]
    if back:
        return f"it comes back under {' and '.join(back)}"
    named = {state: [each.text for each in attacked if each.state == state] for state in (BELOW, UNCLEAR, UNKNOWN)}
    parts = [f"it stays forgotten under {' and '.join(named[BELOW])}" if named[BELOW] else ""]
    open_ones = named[UNCLEAR] + named[UNKNOWN]
    parts.append(f"it cannot be told whether it comes back under {' and '.join(open_ones)}" if open_ones else "")
    return "; ".join(part for part in parts if part)
