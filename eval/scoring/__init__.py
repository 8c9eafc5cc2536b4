"""
What a model says: the losses of given answers, and the answers that it gives itself.

| file | what |
|---|---|
| `batches.py` | batches of a token budget, the longest rows first; what processes of a sharded model do together |
| `likelihood.py` | log-probabilities of answers; a prompt that several answers share is computed once |
| `generation.py` | greedy answers; a row leaves its batch when it is done |

The result of a row does not depend on the rows that it shares a batch with, nor on the number of processes.
"""

from .batches import AUTO, check_batch_size, longest_input
from .generation import generate_answers, greedy_answers
from .likelihood import AnswerScore, answer_losses, score_answers


__all__ = [
    "AUTO",
    "AnswerScore",
    "answer_losses",
    "check_batch_size",
    "generate_answers",
    "greedy_answers",
    "longest_input",
    "score_answers",
]
