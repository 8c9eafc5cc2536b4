"""Membership inference as suites do it: what is asked of a row, and the figures of rows that were asked it."""

from ..metrics.membership_auc.formula import auc, auc_value, true_positive_rate
from ..metrics.membership_scores.formula import membership_scores, min_k_score
from ..metrics.privleak.formula import privleak
from ..statistics import Figure
from .base import DETAILS, GRADIENT, Part, column


FALSE_POSITIVE_RATES = {"tpr_1": 0.01, "tpr_01": 0.001}
TOKENS = "token_log_probs"
# MUSE's `privleak_auc_key` is "forget_holdout_Min-40%".
PRIVLEAK_SHARE = 0.4


def membership_parts(answer: dict, with_gradient: bool = False) -> list[Part]:
    """
    What the attacks need of a row.

    Args:
        answer (`dict`): The row in a format of `soul_trainer.formats`, whose `answer`, `completion` or `text` counts.
        with_gradient (`bool`, *optional*, defaults to `False`): Whether the norm of the gradient is one of them.

    Returns:
        `list[Part]`: Fields `token_log_probs`, `token_hits`, `token_z_scores`, `lowercase_nll` and `gradient_norm`.
    """
    key = next(name for name in ("answer", "completion", "text") if name in answer)

    def finish(scores: list) -> dict:
        # Papers score the text, of which the end of sequence, or of a turn, is no part.
        own, lowercase = (score.content for score in scores)
        return {**token_fields(own), "lowercase_nll": lowercase.nll}

    parts = [Part("membership", [answer, {**answer, key: answer[key].lower()}], finish, DETAILS)]
    if with_gradient:
        parts.append(gradient_part(answer))
    return parts


def gradient_part(answer: dict) -> Part:
    """The norm of the gradient of a row's loss, which takes a backward: field `gradient_norm`."""
    return Part("gradient", [answer], lambda norm: {"gradient_norm": norm}, GRADIENT)


def token_fields(score) -> dict:
    """The fields of a row from the detailed score of an answer, in as many digits as float32 is good for."""
    return {
        TOKENS: [round(value, 5) for value in score.log_probs],
        "token_hits": [int(hit) for hit in score.hits],
        "token_z_scores": [round(value, 4) for value in score.z_scores],
    }


def row_scores(rows: list[dict], reference_rows: list[dict] | None = None, k: float = 0.2) -> dict:
    """
    The score of each attack on rows, higher where a row is more likely a member.

    Args:
        rows (`list[dict]`): With the fields of [`membership_parts`].
        reference_rows (`list[dict]`, *optional*): Of a model that never saw them, in the same order.
        k (`float`, *optional*, defaults to 0.2): Share of tokens of Min-K%.

    Returns:
        `dict[str, np.ndarray]`: By name of the attack.
    """
    tokens = column(rows, TOKENS)
    if not tokens:
        return {}
    reference = column(reference_rows or [], TOKENS) if reference_rows else None
    texts = [next((row[key] for key in ("answer", "completion", "text") if row.get(key)), None) for row in rows]
    return membership_scores(
        tokens,
        column(rows, "token_z_scores"),
        None if None in texts else texts,
        [-sum(row) / len(row) for row in reference] if reference else None,
        column(rows, "lowercase_nll"),
        column(rows, "gradient_norm"),
        k,
    )


def membership_figures(
    members: list[dict], non_members: list[dict], reference_rows: list[dict] | None = None
) -> dict[str, Figure]:
    """
    AUC and true positive rates of every attack: `mia_<attack>_auc`, `mia_<attack>_tpr_1` (at a false positive rate of
    1%) and `mia_<attack>_tpr_01` (of 0.1%).

    Args:
        members (`list[dict]`): The forget rows.
        non_members (`list[dict]`): Rows that no model has seen.
        reference_rows (`list[dict]`, *optional*): Of a gold model, whose losses calibrate the attack `reference`.
    """
    if not members or not non_members:
        return {}
    references = [_same_rows(rows, reference_rows) for rows in (members, non_members)]
    if None in references:
        references = [None, None]
    of_members, of_others = (
        row_scores(rows, reference) for rows, reference in zip((members, non_members), references)
    )
    figures = {}
    for name in of_members.keys() & of_others:
        pair = (of_members[name], of_others[name])
        figures[f"mia_{name}_auc"] = auc(*pair, sample="mia")
        for key, rate in FALSE_POSITIVE_RATES.items():
            figures[f"mia_{name}_{key}"] = true_positive_rate(*pair, rate)
    return dict(sorted(figures.items()))


def privacy_figures(
    rows: tuple[list[dict], list[dict]], reference_rows: tuple[list[dict], list[dict]] | None = None
) -> dict[str, Figure]:
    """
    The attack that MUSE's PrivLeak is made of, Min-K% with k = 0.4, and what it is to that on a gold model.

    Args:
        rows (`tuple[list[dict], list[dict]]`): The forget rows, and rows that no model has seen.
        reference_rows (`tuple[list[dict], list[dict]]`, *optional*): The same of a gold model.

    Returns:
        `dict[str, Figure]`: `mia_min_40_auc` and, with a gold model whose own AUC is below 1, `privleak`.
    """
    own = [_min_40(part) for part in rows]
    if None in own:
        return {}
    figures = {"mia_min_40_auc": auc(*own, sample="mia")}
    golds = [_min_40(part) for part in reference_rows or ([], [])]
    if None not in golds and auc_value(*golds) < 1:
        figures["privleak"] = privleak(*own, *golds, sample="mia")
    return figures


def _min_40(rows: list[dict]) -> list[float] | None:
    tokens = column(rows, TOKENS)
    return min_k_score(tokens, PRIVLEAK_SHARE).tolist() if tokens else None


def _same_rows(rows: list[dict], reference_rows: list[dict] | None) -> list[dict] | None:
    """The reference's rows in the order of `rows`, if it has them all with their tokens."""
    found = {(row["split"], row["index"]): row for row in reference_rows or [] if row.get(TOKENS)}
    matched = [found.get((row["split"], row["index"])) for row in rows]
    return None if None in matched else matched
