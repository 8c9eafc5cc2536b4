import json
import math
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import sacrebleu
from rouge_score import rouge_scorer

from soul_eval.metrics.bleu.formula import corpus_bleu, sentence_bleu
from soul_eval.metrics.rouge_overlap.formula import rouge_scores


ROOT = Path(__file__).parents[1]
# Sums and products of a few float64 numbers between 0 and 1.
EXACT = {"rel": 1e-12, "abs": 1e-12}
NAMES = ("rouge1_recall", "rouge1_f1", "rougeL_recall", "rougeL_f1")
# No word of these changes when it is stemmed.
PAIRS = [
    ("the cat sat on the mat", "on the mat the cat sat"),
    ("the cat sat on the mat", "the cat sat on the mat and then on the hat of a man who sat"),
    ("a b c d e f", "f e d c b a"),
    ("the the the the", "the cat"),
    ("one", "one"),
    ("red", "blue"),
]


def common_subsequence(first, second):
    """The longest one's length, by the definition: the best of dropping a word of either."""
    if not first or not second:
        return 0
    if first[-1] == second[-1]:
        return common_subsequence(first[:-1], second[:-1]) + 1
    return max(common_subsequence(first[:-1], second), common_subsequence(first, second[:-1]))


def f1(matches, reference, generation):
    return 2 * matches / (len(reference) + len(generation))


@pytest.mark.parametrize("reference, generation", PAIRS[:1] + PAIRS[2:])
def test_rouge_is_its_definition(reference, generation):
    """Catches recall and precision swapped, F1 under the name of recall, and ROUGE-1 under that of ROUGE-L."""
    words, said = reference.split(), generation.split()
    any_order = sum((Counter(words) & Counter(said)).values())
    in_order = common_subsequence(words, said)
    expected = {
        "rouge1_recall": any_order / len(words),
        "rouge1_f1": f1(any_order, words, said),
        "rougeL_recall": in_order / len(words),
        "rougeL_f1": f1(in_order, words, said),
    }
    assert rouge_scores(reference, generation) == pytest.approx(expected, **EXACT)
    assert tuple(rouge_scores(reference, generation)) == NAMES


def test_a_long_generation_has_full_recall_and_low_f1():
    """Catches the one taken for the other, which equal lengths would hide."""
    scores = rouge_scores(*PAIRS[1])
    assert scores["rougeL_recall"] == scores["rouge1_recall"] == 1
    assert scores["rougeL_f1"] == pytest.approx(2 * 6 / (6 + 16), **EXACT)


def test_stems_are_compared_unless_turned_off():
    """Catches a scorer that is kept from the first call on, whatever the later calls ask for."""
    pair = "She was writing novels", "she writes a novel"
    for _ in range(2):
        assert rouge_scores(*pair)["rouge1_recall"] == pytest.approx(3 / 4)
        assert rouge_scores(*pair, use_stemmer=False)["rouge1_recall"] == pytest.approx(1 / 4)
    official = rouge_scorer.RougeScorer(["rouge1", "rougeL"], use_stemmer=True).score(*pair)
    assert rouge_scores(*pair)["rougeL_f1"] == official["rougeL"].fmeasure


@pytest.mark.parametrize("pair", [("", ""), ("an answer", ""), ("", "a generation"), ("?!", "..."), ("日本", "日本")])
def test_texts_without_words_score_zero(pair):
    """Catches 0 / 0 for a model that says nothing. Only ASCII letters and digits make words here: see the card."""
    assert set(rouge_scores(*pair).values()) == {0}


@pytest.mark.parametrize("function", [rouge_scores, sentence_bleu])
def test_what_is_no_text_is_named(function):
    """Catches a missing generation that would be scored as something, or fail far inside a library."""
    with pytest.raises(TypeError, match="generation.*None"):
        function("an answer", None)
    with pytest.raises(TypeError, match="reference.*3"):
        function(3, "text")


def slow_bleu(reference, generation):
    """BLEU of lower-case words without punctuation, n-grams up to the generation's length, exponential smoothing."""
    words, said = reference.split(), generation.split()
    logs, smoothing = [], 1
    for n in range(1, min(4, len(said)) + 1):
        true, own = (Counter(zip(*(text[i:] for i in range(n)))) for text in (words, said))
        matches = sum((true & own).values())
        if n == 1 and not matches:
            return 0.0
        smoothing *= 1 if matches else 2
        logs.append(math.log((matches or 1 / smoothing) / (len(said) - n + 1)))
    penalty = min(1, math.exp(1 - len(words) / len(said)))
    return penalty * math.exp(sum(logs) / len(logs))


@pytest.mark.parametrize("reference, generation", [*PAIRS, ("a b c d e f", "a b x c d y e"), ("a b c", "a b")])
def test_sentence_bleu_is_its_definition(reference, generation):
    """Catches reference and generation swapped, percents for shares, and a fixed order of four for short answers."""
    assert sentence_bleu(reference, generation) == pytest.approx(slow_bleu(reference, generation), **EXACT)


def test_bleu_at_the_ends_of_its_range():
    """Catches more than 1 from rounding, 0 for an answer of one word that is right, and 0 / 0 for none."""
    long = "In 1984 , the author moved to Kuwait City and wrote her first novel there ."
    for text in ("Paris", "Kuwait City", long):
        assert sentence_bleu(text, text) == 1.0
    assert corpus_bleu([long] * 3, [long] * 3) == 1.0
    assert [sentence_bleu("an answer", ""), sentence_bleu("", "text"), sentence_bleu("", "")] == [0, 0, 0]


def test_corpus_bleu_sums_counts_over_rows():
    """Catches a mean of sentence scores under the name of corpus BLEU, and rows taken for further references."""
    references = ["the cat sat on the mat today", "a dog barked", "she wrote five novels about the sea"]
    generations = ["the cat sat on a mat today", "a dog barked", "nothing is known of her"]
    expected = sacrebleu.corpus_bleu(generations, [references]).score / 100
    assert corpus_bleu(references, generations) == pytest.approx(expected, **EXACT)
    mean = sum(map(sentence_bleu, references, generations)) / 3
    assert abs(mean - expected) > 0.05
    assert corpus_bleu(["Paris"], ["Paris"]) == 0  # why the card prefers the mean for short answers
    with pytest.raises(ValueError, match="2 and 1"):
        corpus_bleu(["a", "b"], ["a"])
    with pytest.raises(ValueError, match="0 and 0"):
        corpus_bleu([], [])


def test_evaluate_loads_the_modules_without_a_network(tmp_path):
    """Catches a module that evaluate cannot copy and import by itself, and keys or values other than promised."""
    calls = {
        "rouge_overlap": {"predictions": ["the cat sat down", "no"], "references": ["the cat", "yes"]},
        "bleu": {"predictions": ["he lives under the stairs", "no"], "references": ["he lives under the stairs", "a"]},
        "exact_memorization": {"predictions": [[True, False, True, True], [True]]},
        "extraction_strength": {"predictions": [[True, False, True, True], [True]]},
        "toxicity": {"predictions": [0.75, 0.25, 0.5, 1.0]},
        "fluency": {"predictions": [1.0, 0.5]},
        "embedding_accuracy": {
            "predictions": [[2.0, 1.0], [1.0, 2.0]],
            "references": [[[1.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]],
        },
    }
    code = """
import doctest, evaluate, json, pathlib, sys
for name, inputs in json.load(sys.stdin).items():
    metric = evaluate.load(f"eval/metrics/{name}")
    print(json.dumps({name: metric.compute(**inputs), "described": bool(metric.description and metric.citation)}))
    card = pathlib.Path(f"eval/metrics/{name}/README.md").read_text().replace("```", "")
    tests = doctest.DocTestParser().get_doctest(card, {}, name, name, 0)
    outcome = doctest.DocTestRunner().run(tests, out=sys.stderr.write)
    print(json.dumps({f"card of {name}": [outcome.failed, outcome.attempted > 1]}))
print(json.dumps({"no stems": evaluate.load("eval/metrics/rouge_overlap").compute(
    predictions=["cats"], references=["cat"], use_stemmer=False)["rouge1_f1"]}))
print(json.dumps({"strict": evaluate.load("eval/metrics/toxicity").compute(
    predictions=[0.75, 0.25, 0.5, 1.0], threshold=0.9)["toxicity_rate"]}))
"""
    settings = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | settings,
        input=json.dumps(calls),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    results = {key: value for line in done.stdout.splitlines() for key, value in json.loads(line).items()}
    assert all(results[f"card of {name}"] == [0, True] for name in calls), done.stderr
    full = dict.fromkeys(NAMES, 1.0) | {"rouge1_f1": pytest.approx(2 / 3), "rougeL_f1": pytest.approx(2 / 3)}
    none = dict.fromkeys(NAMES, 0.0)
    means = {"rouge1_recall": 0.5, "rougeL_recall": 0.5}
    means |= {"rouge1_f1": pytest.approx(1 / 3), "rougeL_f1": pytest.approx(1 / 3)}
    assert results["rouge_overlap"] == {**means, "scores": [full, none]}
    bleu = results["bleu"]
    assert bleu["scores"] == [1.0, 0.0] and bleu["bleu"] == 0.5 and 0.5 < bleu["corpus_bleu"] < 1
    assert results["exact_memorization"] == {"exact_memorization": 0.875, "scores": [0.75, 1.0]}
    assert results["extraction_strength"] == {"extraction_strength": 0.75, "scores": [0.5, 1.0]}
    assert results["toxicity"] == {"toxicity_mean": 0.625, "toxicity_rate": 0.5}
    assert results["fluency"] == {"fluency": 0.75}
    assert results["embedding_accuracy"] == {"embedding_accuracy": 0.5, "hits": [True, False]}
    assert results["described"] and results["no stems"] == 0 and results["strict"] == 0.25
