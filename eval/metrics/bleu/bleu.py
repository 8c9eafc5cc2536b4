"""`evaluate` module of BLEU between generations and answers."""

import datasets
import evaluate

from .formula import corpus_bleu, sentence_bleu


_DESCRIPTION = """\
BLEU is the geometric mean of how many of a generation's runs of one, two, three and four words the true answer has,
times a penalty for generations that are shorter than it. It rewards verbatim copying more than ROUGE does.
Range: [0, 1]. On texts to forget lower is better, down to what a model has that never saw them; on texts to retain,
higher.
"""
_CITATION = """\
@inproceedings{papineni2002bleu,
    title = {{BLEU}: a Method for Automatic Evaluation of Machine Translation},
    author = {Papineni, Kishore and Roukos, Salim and Ward, Todd and Zhu, Wei-Jing},
    booktitle = {Proceedings of ACL},
    year = {2002},
}
@inproceedings{post2018call,
    title = {A Call for Clarity in Reporting {BLEU} Scores},
    author = {Post, Matt},
    booktitle = {Proceedings of WMT},
    year = {2018},
}
"""

_INPUTS_DESCRIPTION = """\
Args:
    predictions (`list[str]`): What the model said, without the prompt.
    references (`list[str]`): The true answers, or the text's own continuations.
Returns:
    `bleu` (`float`): The mean of the rows' BLEU.
    `corpus_bleu` (`float`): BLEU of all rows together.
    `scores` (`list[float]`): Of each row.
Examples:
    >>> metric = evaluate.load("eval/metrics/bleu")
    >>> metric.compute(predictions=["he lives under the stairs"], references=["he lives under the stairs"])
    {'bleu': 1.0, 'corpus_bleu': 1.0, 'scores': [1.0]}
"""


class Bleu(evaluate.Metric):
    """`evaluate` module of BLEU. See the card in README.md."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS_DESCRIPTION,
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
            reference_urls=["https://aclanthology.org/P02-1040", "https://github.com/mjpost/sacrebleu"],
        )

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, float | list[float]]:
        scores = [sentence_bleu(reference, generation) for reference, generation in zip(references, predictions)]
        return {
            "bleu": sum(scores) / len(scores),
            "corpus_bleu": corpus_bleu(references, predictions),
            "scores": scores,
        }
