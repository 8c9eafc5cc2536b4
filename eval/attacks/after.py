"""Attacks on a model that has just been unlearned, on the rows that its run asked."""

import dataclasses
from pathlib import Path

from transformers import AutoConfig

from ..suites import SUITES
from .command import Found, attack_models
from .relearning import RelearningArguments
from .running import QUANTIZATION, RELEARNING, AttackArguments, Attacker, Questions


# Attacks that need no more than the rows to forget.
ATTACKS = (RELEARNING, *QUANTIZATION)
# Suites whose rows to forget are questions or texts with an answer each.
ATTACKED_SUITES = ("tofu", "own")
# A little relearning. The rate is the published 1e-5 at a width of 2880, in inverse proportion to the width.
_STEPS, _ROWS, _RATE_BY_WIDTH = 20, 20, 0.0288


def check_attacks(names: list[str]) -> None:
    """
    Args:
        names (`list[str]`): Attacks.

    Raises:
        ValueError: If one of them is unknown, or needs more than the rows to forget.
    """
    if unknown := [name for name in names if name not in ATTACKS]:
        raise ValueError(
            f"`attacks` has {unknown[0]!r}: choose some of {', '.join(ATTACKS)}. The command `attack` has more."
        )


def attack_run(
    model: str,
    target: str,
    gold: str | None,
    suite: str,
    asked: dict,
    rows: list[dict],
    names: list[str],
    output: Path,
    **settings: object,
) -> Found:
    """
    Attacks an unlearned model, and writes rows and `attacks.json`. What is there already is read.

    Args:
        model (`str`): Folder of the unlearned model.
        target (`str`): Folder or hub id of the model before unlearning.
        gold (`str`, *optional*): Folder or hub id of the model that never learnt the rows; attacked alike.
        suite (`str`): Name of the suite, `"tofu"` or `"own"`.
        asked (`dict`): Fields of the suite's arguments.
        rows (`list[dict]`): The suite's rows, unscored; those to forget are asked.
        names (`list[str]`): Some of [`ATTACKS`].
        output (`Path`): Folder of the results. Those of target and gold, which every run of a comparison reads, are
            in `references.attacks` beside it.
        **settings: Further fields of [`~running.AttackArguments`]: `device`, `dtype`, `overwrite`, ...

    Returns:
        `dict[str, dict[str, dict[str, Recovery]]]`: As [`~command.attack_models`]. Relearning needs two rows to
        forget, and is left out where there is one.
    """
    forget = [row for row in rows if row["split"] == "forget"]
    own = dataclasses.replace(SUITES[suite].arguments(**asked), generate=False)
    names = [name for name in names if name != RELEARNING or len(forget) > 1]
    if not names:
        return {}
    args = AttackArguments(model, target, str(output), gold, attacks=",".join(names), **settings)
    width = getattr(
        AutoConfig.from_pretrained(target, **args.pretrained_options(target)).get_text_config(), "hidden_size", 2880
    )
    relearning = RelearningArguments(
        relearn_rows=max(1, min(_ROWS, len(forget) // 2)),
        relearn_steps=_STEPS,
        relearn_learning_rate=_RATE_BY_WIDTH / width,
        relearn_seed=args.seed,
    )
    attacker = Attacker(Questions(SUITES[suite], own, forget, [], []), args, relearning)
    return attack_models(attacker, output.with_name("references.attacks"))
