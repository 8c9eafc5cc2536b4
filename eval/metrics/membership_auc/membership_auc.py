"""`evaluate` module of the AUC of a membership inference attack."""

import datasets
import evaluate

from .formula import auc, true_positive_rate


_DESCRIPTION = """\
How well an attack tells rows that a model was trained on from rows that it never saw. AUC is the probability that a
member scores above a non-member, a tie counting half; the true positive rate at a false positive rate of 1% or 0.1% is
the share of members that an attacker finds who is wrong about so few non-members.
Range: [0, 1]. An AUC of 0.5, and a true positive rate as low as the false one, mean that the attack learns nothing;
after unlearning the goal is what a gold model has, not less.
"""
_CITATION = """\
@inproceedings{carlini2022membership,
    title = {Membership Inference Attacks From First Principles},
    author = {Carlini, Nicholas and Chien, Steve and Nasr, Milad and Song, Shuang and Terzis, Andreas and Tram{\\`e}r,
        Florian},
    booktitle = {IEEE Symposium on Security and Privacy},
    year = {2022},
}
"""

_INPUTS_DESCRIPTION = """\
Args:
    predictions (`list[float]`): Scores, higher for rows more likely to be members.
    references (`list[int]`): 1 for a member, 0 for a non-member.
    false_positive_rates (`list[float]`, *optional*, defaults to `[0.01, 0.001]`): Where to give the true one.
    sample (`str`, *optional*): Name of the rows; the draws of the bootstrap depend on it.
Returns:
    `auc` (`float`): And `auc_low`, `auc_high`, its 95% interval.
    `tpr_at_fpr_0.01`, `tpr_at_fpr_0.001` (`float`): And `_low`, `_high`.
Examples:
    >>> metric = evaluate.load("eval/metrics/membership_auc")
    >>> metric.compute(predictions=[-1.0, -2.0, -2.0, -3.0], references=[1, 1, 0, 0])["auc"]
    0.875
"""


class MembershipAUC(evaluate.Metric):
    """`evaluate` module of the AUC of a membership inference attack. See the card in README.md."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS_DESCRIPTION,
            features=datasets.Features(
                {"predictions": datasets.Value("float64"), "references": datasets.Value("int64")}
            ),
            reference_urls=["https://arxiv.org/abs/2112.03570"],
        )

    def _compute(
        self,
        predictions: list[float],
        references: list[int],
        false_positive_rates: tuple[float, ...] = (0.01, 0.001),
        sample: str = "",
    ) -> dict[str, float | None]:
        if not set(references) <= {0, 1}:
            raise ValueError(
                f"`references` must be 1 for members and 0 for others, but it has {sorted(set(references))}."
            )
        members = [score for score, label in zip(predictions, references) if label]
        non_members = [score for score, label in zip(predictions, references) if not label]
        figures = {"auc": auc(members, non_members, sample)}
        for rate in false_positive_rates:
            figures[f"tpr_at_fpr_{rate:g}"] = true_positive_rate(members, non_members, rate, sample)
        results = {}
        for name, figure in figures.items():
            results |= {name: figure.value, f"{name}_low": figure.low, f"{name}_high": figure.high}
        return results
