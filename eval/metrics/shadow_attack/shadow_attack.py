"""`evaluate` module of the shadow attack."""

import datasets
import evaluate

from .formula import shadow_attack


_DESCRIPTION = """\
A support vector classifier learns to tell rows that the model has kept from rows that it never saw, by one score or by
several features, and is then asked about the rows to forget. Its efficacy is the share of those that it takes for rows
never seen.
Range: [0, 1]. After unlearning, what a gold model has is the goal; the original model's is the other end. A
shadow accuracy near 0.5 means that the classifier has learnt nothing and its efficacy says nothing.
"""
_CITATION = """\
@inproceedings{jia2023model,
    title = {Model Sparsity Can Simplify Machine Unlearning},
    author = {Jia, Jinghan and Liu, Jiancheng and Ram, Parikshit and Yao, Yuguang and Liu, Gaowen and Liu, Yang and
        Sharma, Pranay and Liu, Sijia},
    booktitle = {NeurIPS},
    year = {2023},
}
@inproceedings{jia2024soul,
    title = {{SOUL}: Unlocking the Power of Second-Order Optimization for {LLM} Unlearning},
    author = {Jia, Jinghan and Zhang, Yihua and Zhang, Yimeng and Liu, Jiancheng and Runwal, Bharat and Diffenderfer,
        James and Kailkhura, Bhavya and Liu, Sijia},
    booktitle = {EMNLP},
    year = {2024},
}
"""

_INPUTS_DESCRIPTION = """\
Args:
    predictions (`list[list[float]]`): Features of each row, as many for each; one score is a list of one.
    references (`list[int]`): 1 for a row that the model has kept, 0 for one that it never saw, -1 for one to forget.
    standardise (`bool`, *optional*, defaults to `False`): Whether to bring features to mean 0 and deviation 1.
    sample (`str`, *optional*): Name of the rows; the draws of the bootstrap depend on it.
Returns:
    `mia_efficacy` (`float`): And `mia_efficacy_low`, `mia_efficacy_high`, its 95% interval over rows to forget.
    `shadow_accuracy` (`float`): Share of kept and never seen rows that the classifier tells.
Examples:
    >>> metric = evaluate.load("eval/metrics/shadow_attack")
    >>> results = metric.compute(predictions=[[0.0], [0.1], [3.0], [3.1], [3.2]], references=[1, 1, 0, 0, -1])
    >>> results["mia_efficacy"], results["shadow_accuracy"]
    (1.0, 1.0)
"""


class ShadowAttackModule(evaluate.Metric):
    """`evaluate` module of the shadow attack. See the card in README.md."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS_DESCRIPTION,
            features=datasets.Features(
                {"predictions": datasets.List(datasets.Value("float64")), "references": datasets.Value("int64")}
            ),
            reference_urls=[
                "https://github.com/OPTML-Group/SOUL",
                "https://arxiv.org/abs/2404.18239",
                "https://arxiv.org/abs/2304.04934",
            ],
        )

    def _compute(
        self, predictions: list[list[float]], references: list[int], standardise: bool = False, sample: str = ""
    ) -> dict[str, float | None]:
        if not set(references) <= {1, 0, -1}:
            raise ValueError(f"`references` must be 1, 0 or -1, but it has {sorted(set(references))}.")
        rows = {
            wanted: [features for features, label in zip(predictions, references) if label == wanted]
            for wanted in (1, 0, -1)
        }
        attack = shadow_attack(rows[1], rows[0], rows[-1], sample, standardise)
        return {
            "mia_efficacy": attack.efficacy.value,
            "mia_efficacy_low": attack.efficacy.low,
            "mia_efficacy_high": attack.efficacy.high,
            "shadow_accuracy": attack.shadow_accuracy,
        }
