"""
python -m soul_eval attack --model UNLEARNED --target TARGET [--reference GOLD] --output DIR [--attacks A,B]

Attacks an unlearned model on TOFU, or on a dataset of its form. Writes `ATTACK/rows.jsonl` for each attack and for
`plain`, with `target/` and `gold/` in it for the other models, and `attacks.json`; prints a table.
"""

import json
import os
from pathlib import Path

from soul_trainer.command_line import CommandParser
from soul_trainer.held_folder import hold_folder

from ..rows import write_whole
from ..statistics import Figure
from ..suites.tofu import SPLITS, SUITE, TofuArguments, load_splits, unscored_rows
from .prompting import draw_shots, scored_on_rest
from .recovered import Recovery, recoveries
from .relearning import RelearningArguments
from .running import (
    PLAIN,
    PREFIX,
    PROMPT_ATTACKS,
    RELEARNING,
    RELEARNING_UNRELATED,
    RELEARNT,
    AttackArguments,
    Attacker,
    Questions,
)


UNLEARNED, TARGET, GOLD = "unlearned", "target", "gold"
# By attack, then by model under the attack (the unlearned one and, as a control, the gold model), then by figure.
Found = dict[str, dict[str, dict[str, Recovery]]]
# Rows that the attacker trained on are an attack of their own: their return says little.
USED = "_used"


def main(arguments: list[str]) -> None:
    """Parses the command line, attacks, and prints the table."""
    parser = CommandParser((AttackArguments, RelearningArguments, TofuArguments), __doc__)
    print(recovery_table(run(*parser.parse_args_into_dataclasses(arguments))))


def run(args: AttackArguments, relearning: RelearningArguments, own: TofuArguments) -> Found:
    """
    Attacks a model, and writes rows and `attacks.json`.

    Args:
        args ([`~running.AttackArguments`]): The models and the attacks.
        relearning ([`~relearning.RelearningArguments`]): How relearning trains.
        own ([`~suites.tofu.TofuArguments`]): The rows.

    Returns:
        `dict[str, dict[str, dict[str, Recovery]]]`: By attack, then `"unlearned"` and, as a control, `"gold"`, then
        figure.

    Raises:
        ValueError: If several processes run it, a split is missing, or the output folder holds other results.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("`attack` runs in one process: start it without `accelerate launch`.")
    if args.reference and Path(args.reference).is_file():
        raise ValueError(f"--reference {args.reference} is a file: the gold model itself is needed, to attack it too.")
    with hold_folder(args.output):
        return attack_models(Attacker(_questions(args, own), args, relearning))


def attack_models(attacker: Attacker, references: Path | None = None) -> Found:
    """
    Attacks the models that an attacker names, and writes rows and `attacks.json`.

    Args:
        attacker ([`~running.Attacker`]): Its arguments name the models, the attacks and the output folder.
        references (`Path`, *optional*):
            Folder for the rows of target and gold, where attacks on other models that forget the same find them; by
            default they lie beside the unlearned model's.

    Returns:
        `dict[str, dict[str, dict[str, Recovery]]]`: As [`run`].

    Raises:
        ValueError: If the output folder holds other results.
    """
    args = attacker.args
    prompted = [name for name in args.names if name in PROMPT_ATTACKS]
    # The target's own answers to an altered question are the most that the attack could bring back.
    plans = {UNLEARNED: [PLAIN, *args.names], TARGET: [PLAIN, *prompted], GOLD: args.names}
    models = {UNLEARNED: args.model, TARGET: args.target, GOLD: args.reference}
    rows = {}
    for role, name in models.items():
        if name:
            is_shared = role != UNLEARNED and references is not None
            folder, place = references if is_shared else Path(args.output), "" if role == UNLEARNED else role
            rows[role] = attacker.ask(
                name, plans[role], lambda attack, at=folder, in_it=place: at / attack / in_it, role, is_shared
            )
    found = {}
    for attack in args.names:
        found |= attack_recoveries(attack, rows)
    write_whole(Path(args.output) / "attacks.json", json.dumps(_entries(found), indent=2, allow_nan=False) + "\n")
    return found


def attack_recoveries(attack: str, rows: dict[str, dict[str, list[dict]]]) -> Found:
    """
    What an attack has brought back; see docs/attacks.md for what is compared with what.

    Args:
        attack (`str`): Its name.
        rows (`dict[str, dict[str, list[dict]]]`):
            By model (`"unlearned"`, `"target"` and perhaps `"gold"`), then by attack and `"plain"`.

    Returns:
        `dict[str, dict[str, dict[str, Recovery]]]`: By attack, model under the attack and figure. Relearning is two:
        the rows that were not trained on, and under `relearning_used` those that were.
    """
    unlearned, target = rows[UNLEARNED][PLAIN], rows[TARGET][PLAIN]
    asked = "question"
    if attack in PROMPT_ATTACKS:
        target = rows[TARGET][attack]
    if attack == PREFIX:
        # The rest is a part of the question here: models whose tokenizers differ are given other prefixes.
        unlearned, asked = scored_on_rest(unlearned, rows[UNLEARNED][PREFIX]), "rest"
    subsets = {attack: lambda row: not row.get(RELEARNT)}
    if attack == RELEARNING:
        subsets[attack + USED] = lambda row: bool(row.get(RELEARNT))
    found: Found = {}
    for name, belongs in subsets.items():
        attacked = {role: rows[role][attack] for role in (UNLEARNED, GOLD) if role in rows}
        found[name] = {
            role: recoveries([row for row in own if belongs(row)], unlearned, target, asked=asked)
            for role, own in attacked.items()
        }
    return found


def recovered_figures(found: Found) -> dict[str, Figure]:
    """`recovered_<attack>_<figure>` of the unlearned model, where there is a share; a report takes them so."""
    return {
        f"recovered_{attack}_{name}": recovery.share
        for attack, roles in found.items()
        for name, recovery in roles[UNLEARNED].items()
        if recovery.share
    }


def recovery_table(found: Found) -> str:
    """
    A line an attack and figure: before, under the attack, the target, the share with its interval, the gold model's.

    Args:
        found (`dict`): From [`run`].
    """
    has_gold = any(GOLD in roles for roles in found.values())
    lines = [["attack", "figure", "before", "after", "target", "recovered", *(["gold model"] if has_gold else [])]]
    notes: dict[str, None] = {}
    for attack, roles in found.items():
        for name, recovery in roles[UNLEARNED].items():
            numbers = [f"{each.value:.3f}" for each in (recovery.unlearned, recovery.attacked, recovery.target)]
            gold = [_share_text(roles[GOLD][name])] if GOLD in roles else []
            lines.append([attack, name, *numbers, _share_text(recovery), *gold])
            if recovery.reason:
                notes[f"{attack}, {name}: no share, because {recovery.reason}."] = None
    widths = [max(map(len, cells)) for cells in zip(*lines)]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines]
    text.append("recovered: 0 is nothing and 1 all; brackets hold 95% intervals.")
    return "\n".join([*text, *notes])


def _questions(args: AttackArguments, own: TofuArguments) -> Questions:
    if own.non_members or own.embedding_model:
        raise ValueError("`attack` asks questions alone: leave --non_members and --embedding_model to the tofu suite.")
    splits = load_splits(own.dataset, own.forget_split, held_out_rows=own.held_out_rows, revision=own.dataset_revision)
    wanted = args.splits.split(",")
    if missing := [split for split in wanted if split not in splits]:
        raise ValueError(f"--splits {args.splits}: {missing[0]!r} is none of {[s for s in SPLITS if s in splits]}.")
    rows = unscored_rows({split: splits[split] for split in wanted})
    rows = [row for row in rows if args.limit is None or row["index"] < args.limit]
    shots = []
    if any(name.endswith("few_shot") for name in args.names):
        retain = splits["retain"].select_columns(["question", "answer"]).to_list()
        shots = draw_shots(retain, args.num_shots, args.seed)
    unrelated = []
    if RELEARNING_UNRELATED in args.names:
        unrelated = splits["world_facts"].select_columns(["question", "answer"]).to_list()
        if args.unrelated_text:
            passages = Path(args.unrelated_text).read_text(encoding="utf-8").split("\n\n")
            unrelated = [{"text": passage.strip()} for passage in passages if passage.strip()]
        if not unrelated:
            raise ValueError(f"--unrelated_text {args.unrelated_text} holds no text.")
    return Questions(SUITE, own, rows, shots, unrelated)


def _entries(found: Found) -> dict:
    attacks = {
        attack: {role: {name: each.to_json() for name, each in figures.items()} for role, figures in roles.items()}
        for attack, roles in found.items()
    }
    return {"figures": {name: share.to_json() for name, share in recovered_figures(found).items()}, "attacks": attacks}


def _share_text(recovery: Recovery) -> str:
    share = recovery.share
    if share is None:
        return "-"
    return f"{share.value:.2f}" + (f" [{share.low:.2f}, {share.high:.2f}]" if share.low is not None else "")
