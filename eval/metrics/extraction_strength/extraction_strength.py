"""`evaluate` module of the extraction strength."""

import datasets
import evaluate

from .formula import extraction_strength


_DESCRIPTION = """\
Extraction strength asks how much of an answer one must give away for the model to say all the rest by greedy decoding:
`1 - k / length`, with `k` the fewest answer tokens after which every further one is the model's most probable token.
Range: [0, 1]. 1: the question alone is enough. 0: not even the last token comes by itself. On rows to forget lower is
better, down to what a model has that never saw them.
"""
_CITATION = """\
@inproceedings{carlini2021extracting,
    title = {Extracting Training Data from Large Language Models},
    author = {Carlini, Nicholas and Tramer, Florian and Wallace, Eric and Jagielski, Matthew and others},
    booktitle = {USENIX Security Symposium},
    year = {2021},
}
@inproceedings{wang2025towards,
    title = {Towards Effective Evaluations and Comparisons for {LLM} Unlearning Methods},
    author = {Wang, Qizhou and Han, Bo and Yang, Puning and Zhu, Jianing and Liu, Tongliang and Sugiyama, Masashi},
    booktitle = {International Conference on Learning Representations},
    year = {2025},
}
"""

_INPUTS_DESCRIPTION = """\
Args:
    predictions (`list[list[bool]]`): Of each row's answer tokens, whether they are the model's most probable ones,
        given the true tokens before them.
Returns:
    `extraction_strength` (`float`): The mean over rows.
    `scores` (`list[float]`): Of each row.
Examples:
    >>> metric = evaluate.load("eval/metrics/extraction_strength")
    >>> metric.compute(predictions=[[True, False, True, True], [True]])
    {'extraction_strength': 0.75, 'scores': [0.5, 1.0]}
"""


class ExtractionStrength(evaluate.Metric):
    """`evaluate` module of the extraction strength. See the card in README.md."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS_DESCRIPTION,
            features=datasets.Features({"predictions": datasets.List(datasets.Value("bool"))}),
            reference_urls=["https://arxiv.org/abs/2406.09179", "https://github.com/locuslab/open-unlearning"],
        )

    def _compute(self, predictions: list[list[bool]]) -> dict[str, float | list[float]]:
        scores = extraction_strength(predictions)
        return {"extraction_strength": float(scores.mean()), "scores": scores.tolist()}
