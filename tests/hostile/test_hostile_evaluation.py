"""What an evaluation counts that it should not, or leaves out."""

import pytest

from soul_eval.scoring.likelihood import AnswerScore
from soul_eval.suites import tofu
from soul_eval.suites.membership import membership_parts, privacy_figures


END = 1


def score_of(log_probs):
    """The score of an answer, whose last token ends the sequence and is nearly certain."""
    log_probs = [*log_probs, -1e-4]
    return AnswerScore(log_probs, [True] * len(log_probs), [value + 1 for value in log_probs], END)


@pytest.mark.parametrize("row", [{"question": "Who?", "answer": "Mara"}, {"text": "Mara"}], ids=["answer", "text"])
def test_membership_is_of_the_text_without_its_end(row):
    """Would catch Min-K% of short answers, a tenth of whose tokens is an end that every model is certain of."""
    (part,) = membership_parts(row)
    found = part.finish([score_of([-1.0, -3.0]), score_of([-2.0])])
    assert found["token_log_probs"] == [-1.0, -3.0] and found["token_hits"] == [1, 1]
    assert found["token_z_scores"] == [0.0, -2.0] and found["lowercase_nll"] == 2.0


def membership_rows(split, values):
    """Rows with the tokens of membership inference, of one value each."""
    return [
        {"split": split, "index": index, "question": f"q{index}", "token_log_probs": [value] * 5}
        for index, value in enumerate(values)
    ]


def test_tofu_has_the_attack_of_muse():
    """Would catch figures of OpenUnlearning that nobody can make again: Min-K% with k = 0.4 and PrivLeak on TOFU."""
    members, others = [-1.0, -2.0, -6.0], [-3.0, -4.0, -5.0]
    gold_members, gold_others = [-3.0, -5.0, -6.0], [-3.5, -4.0, -5.5]
    rows = membership_rows("forget", members) + membership_rows(tofu.NON_MEMBERS, others)
    gold = membership_rows("forget", gold_members) + membership_rows(tofu.NON_MEMBERS, gold_others)
    expected = privacy_figures((rows[:3], rows[3:]), (gold[:3], gold[3:]))
    # 6 of 9 pairs have the member ahead, 4 of the gold model's.
    assert expected["mia_min_40_auc"].value == pytest.approx(6 / 9)
    assert set(expected) == {"mia_min_40_auc", "privleak"}
    found = tofu.summarise(rows)
    assert found["mia_min_40_auc"] == expected["mia_min_40_auc"] and "privleak" not in found
