"""`evaluate` module of ROUGE-1 and ROUGE-L between generations and answers."""

import datasets
import evaluate

from .formula import rouge_scores


_DESCRIPTION = """\
ROUGE counts the words that a generation shares with the true answer: ROUGE-1 in any order, ROUGE-L along their longest
common subsequence. Recall divides by the answer's words, so that more words never hurt; F1 also asks that the
generation has few others. TOFU reports ROUGE-L recall with stems; MUSE ROUGE-L F1 without.
Range: [0, 1]. On rows to retain higher is better; on rows to forget lower, down to what a model has that never saw
them.
"""
_CITATION = """\
@inproceedings{lin2004rouge,
    title = {{ROUGE}: A Package for Automatic Evaluation of Summaries},
    author = {Lin, Chin-Yew},
    booktitle = {Text Summarization Branches Out},
    year = {2004},
}
"""

_INPUTS_DESCRIPTION = """\
Args:
    predictions (`list[str]`): What the model said, without the prompt.
    references (`list[str]`): The true answers.
    use_stemmer (`bool`, *optional*, defaults to `True`): Whether words are compared by their stems.
Returns:
    `rouge1_recall`, `rouge1_f1`, `rougeL_recall`, `rougeL_f1` (`float`): Means over rows.
    `scores` (`list[dict[str, float]]`): The same four of each row.
Examples:
    >>> metric = evaluate.load("eval/metrics/rouge_overlap")
    >>> metric.compute(predictions=["the cat sat down"], references=["the cat"])["rougeL_recall"]
    1.0
"""


class RougeOverlap(evaluate.Metric):
    """`evaluate` module of ROUGE. See the card in README.md."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS_DESCRIPTION,
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
            reference_urls=["https://aclanthology.org/W04-1013", "https://pypi.org/project/rouge-score"],
        )

    def _compute(
        self, predictions: list[str], references: list[str], use_stemmer: bool = True
    ) -> dict[str, float | list[dict[str, float]]]:
        scores = [
            rouge_scores(reference, generation, use_stemmer) for reference, generation in zip(references, predictions)
        ]
        means = {name: sum(row[name] for row in scores) / len(scores) for name in scores[0]}
        return {**means, "scores": scores}
