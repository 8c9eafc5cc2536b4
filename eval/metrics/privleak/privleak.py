"""`evaluate` module of PrivLeak."""

import datasets
import evaluate

from .formula import privleak


_DESCRIPTION = """\
PrivLeak compares how well a membership inference attack works on an unlearned model and on a gold model that never saw
the forget rows: `(auc - gold_auc) / gold_auc * 100`, in the direction of MUSE's code, where an AUC is high if members
look unseen.
Range: [-100, infinity), in percent. 0 is the goal. Below, the model still knows its forget rows; above, it treats them
as less likely than rows that it never saw, which gives them away as well.
"""
_CITATION = """\
@article{shi2024muse,
    title = {{MUSE}: Machine Unlearning Six-Way Evaluation for Language Models},
    author = {Shi, Weijia and Lee, Jaechan and Huang, Yangsibo and Malladi, Sadhika and Zhao, Jieyu and Holtzman, Ari
        and Liu, Daogao and Zettlemoyer, Luke and Smith, Noah A. and Zhang, Chiyuan},
    journal = {arXiv:2407.06460},
    year = {2024},
}
"""

_INPUTS_DESCRIPTION = """\
Args:
    predictions (`list[float]`): Scores of the unlearned model, higher for rows more likely to be members.
    references (`list[int]`): 1 for a row to forget, 0 for a held-out row.
    gold_predictions (`list[float]`, *optional*): Scores of the gold model on the same rows. Without, its AUC is 0.5.
    sample (`str`, *optional*): Name of the rows; the draws of the bootstrap depend on it.
Returns:
    `privleak` (`float`): In percent. And `privleak_low`, `privleak_high`, its 95% interval.
Examples:
    >>> metric = evaluate.load("eval/metrics/privleak")
    >>> metric.compute(predictions=[-1.0, -2.0, -3.0, -4.0], references=[1, 1, 0, 0])["privleak"]
    -100.0
"""


class PrivLeak(evaluate.Metric):
    """`evaluate` module of PrivLeak. See the card in README.md."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS_DESCRIPTION,
            features=datasets.Features(
                {"predictions": datasets.Value("float64"), "references": datasets.Value("int64")}
            ),
            reference_urls=["https://arxiv.org/abs/2407.06460", "https://github.com/swj0419/muse_bench"],
        )

    def _compute(
        self,
        predictions: list[float],
        references: list[int],
        gold_predictions: list[float] | None = None,
        sample: str = "",
    ) -> dict[str, float | None]:
        if not set(references) <= {0, 1}:
            raise ValueError(
                f"`references` must be 1 for members and 0 for others, but it has {sorted(set(references))}."
            )
        if gold_predictions is not None and len(gold_predictions) != len(predictions):
            raise ValueError(f"`gold_predictions` has {len(gold_predictions)} rows, `predictions` {len(predictions)}.")
        split = [
            None if scores is None else [score for score, label in zip(scores, references) if label == wanted]
            for scores in (predictions, gold_predictions)
            for wanted in (1, 0)
        ]
        figure = privleak(*split, sample)
        return {"privleak": figure.value, "privleak_low": figure.low, "privleak_high": figure.high}
