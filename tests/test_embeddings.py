import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer, util
from test_classification import TEXTS, WORDS, word_pieces
from transformers import BertConfig, BertModel

from soul_eval.embeddings import embed, nearest_answers
from soul_eval.metrics.embedding_accuracy.formula import embedding_hits
from soul_eval.suites.embedding import accuracy_figures, judge_embeddings


ROOT = Path(__file__).parents[1]
# Another padded width sums float32 numbers in another order.
ROUNDING = 1e-5


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A BERT of 16 dimensions with mean pooling in sentence-transformers' own layout, its parts and its folder."""
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    base, folder = (tmp_path_factory.mktemp(name) for name in ("base", "sentences"))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = BertModel(
            BertConfig(
                vocab_size=len(WORDS) + 4,
                hidden_size=16,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=24,
                max_position_embeddings=12,
                initializer_range=0.6,
            )
        ).eval()
    model.save_pretrained(base)
    word_pieces().save_pretrained(base)
    transformer = Transformer(str(base))
    SentenceTransformer(modules=[transformer, Pooling(16, pooling_mode="mean")], device="cpu").save(str(folder))
    return model, str(folder)


@torch.no_grad()
def slow_embeddings(model, texts):
    """One text at a time, the mean of its last hidden states."""
    rows = [word_pieces()(text, truncation=True, max_length=12, return_tensors="pt") for text in texts]
    return torch.cat([model(**row).last_hidden_state.mean(1) for row in rows]).numpy()


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_embeddings_are_those_of_one_text_at_a_time(encoder, batch_size):
    """Catches padding in the mean, results in sorted order, and embeddings normalised behind the caller's back."""
    model, folder = encoder
    found = embed(TEXTS, folder, batch_size, device="cpu", progress=False)
    assert found.shape == (len(TEXTS), 16) and found.dtype == np.float32
    assert found == pytest.approx(slow_embeddings(model, TEXTS), abs=ROUNDING)


def test_equal_texts_have_equal_embeddings(encoder):
    """Catches ties decided by the batch that a text happens to be in: rounding differs with the padded width."""
    texts = ["you", *TEXTS, "you are awful", "you"] * 2
    found = embed(texts, encoder[1], batch_size=2, progress=False)
    for text in set(texts):
        same = found[[row for row, each in enumerate(texts) if each == text]]
        assert (same == same[0]).all()
    assert embed([], encoder[1], progress=False).shape == (0, 16)
    with pytest.raises(TypeError, match="Row 1"):
        embed(["you", None], encoder[1])


def soul_hits(encoder, generations, answers, wrong_answers):
    """SOUL's loop: every text by itself, cosine by sentence-transformers, the best must not be above the true one."""
    model = SentenceTransformer(encoder[1], device="cpu")
    hits = []
    for generation, answer, wrong in zip(generations, answers, wrong_answers):
        own = model.encode(generation, convert_to_tensor=True)
        options = [model.encode(option, convert_to_tensor=True) for option in (answer, *wrong)]
        scores = [util.pytorch_cos_sim(own, option).item() for option in options]
        hits.append(max(scores) == scores[0])
    return hits


def test_nearest_answers_are_soul_s(encoder):
    """Catches rows whose options are mixed up, dot products for cosines, and the true answer looked for elsewhere."""
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS[:11], rng.integers(1, 7))) for _ in range(40)]
    generations = [*texts, "", "you are awful"]
    answers = [*texts[1:], texts[0], "kind", "you are awful"]
    wrong_answers = [list(rng.choice(texts, rng.integers(1, 6))) for _ in texts] + [["sea"], ["sea", "you are awful"]]
    found = nearest_answers(generations, answers, wrong_answers, encoder[1], batch_size=5, progress=False)
    assert found == soul_hits(encoder, generations, answers, wrong_answers)
    assert 0.1 < sum(found) / len(found) < 0.9
    assert found[-1]  # a wrong answer that is the true one does no harm
    assert nearest_answers([], [], [], encoder[1]) == []
    with pytest.raises(ValueError, match="2, 1 and 1"):
        nearest_answers(["a", "b"], ["a"], [["c"]], encoder[1])
    with pytest.raises(TypeError, match=r"Row 1 of `wrong_answers`.*'sea'"):
        nearest_answers(["a", "b"], ["a", "b"], [["c"], "sea"], encoder[1])
    with pytest.raises(ValueError, match=r"Row 1 of `options`"):
        nearest_answers(["a", "b"], ["a", "b"], [["c"], []], encoder[1], progress=False)


def test_hits_by_hand():
    """Catches lengths that count, opposite directions taken for near ones, and a tie or a zero on the wrong side."""
    generation = np.array([2.0, 1.0])
    near, far, opposite = np.array([0.1, 0.0]), np.array([0.0, 100.0]), np.array([-9.0, 0.0])
    options = [[near, far], [far, near], [opposite, far], [near, 3 * near / 3, near], [near, far, np.zeros(2)]]
    assert embedding_hits(np.tile(generation, (5, 1)), [np.array(each) for each in options]).tolist() == [
        True,
        False,
        False,
        True,
        True,
    ]
    assert embedding_hits(np.zeros((1, 2)), [np.array([near, far])]).tolist() == [False]
    assert embedding_hits(np.zeros((0, 2)), []).shape == (0,)


def test_equal_options_tie_exactly():
    """Catches a matrix product, whose rounding depends on where in the matrix an option stands."""
    rng = np.random.default_rng(0)
    for num_options in range(2, 12):
        generation, option = rng.normal(size=(2, 384)).astype(np.float32)
        options = np.tile(option, (num_options, 1))
        assert embedding_hits(generation[None], [options]).all()


@pytest.mark.parametrize(
    "generation, options, message",
    [
        ([1.0, 0.0], [[1.0, 0.0]], "at least one wrong"),
        ([1.0, 0.0], [[1.0], [2.0]], r"\(2,\)"),
        ([1.0, float("nan")], [[1.0, 0.0], [0.0, 1.0]], "not finite"),
        ([1.0, 1.0], [[1.0, 0.0], [float("inf"), 1.0]], "not finite"),
    ],
)
def test_a_bad_row_of_embeddings_is_named(generation, options, message):
    """Catches NaN, which is never the greatest and never not, counted as a miss."""
    good = np.eye(2)
    with pytest.raises(ValueError, match=rf"Row 1.*{message}"):
        embedding_hits(np.array([[1.0, 0.0], generation]), [good, np.array(options)])
    with pytest.raises(ValueError, match="2 and 1"):
        embedding_hits(good, [good])


def test_a_missing_library_is_named():
    """Catches an ImportError that leaves the reader to find out which of the extras it is."""
    code = "import sys; sys.modules['sentence_transformers'] = None; import soul_eval.embeddings as e; e.embed(['a'])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert "ImportError: This needs sentence_transformers: pip install soul-trainer[embedding]" in done.stderr


def test_rows_are_judged_by_their_paraphrases(encoder):
    """Catches the plain answer for the paraphrased one, options of another row, and rows that were not asked."""
    true, *wrong = TEXTS[:4]
    row = {"split": "forget", "answer": wrong[0], "paraphrased_answer": true, "perturbed_answer": wrong}
    rows = [{**row, "index": place, "paraphrased_generation": text} for place, text in enumerate((true, wrong[1]))]
    rows.append({"split": "forget", "index": 2, "generation": true, **row})
    judge_embeddings(rows, encoder[1])
    assert [each.get("embedding_hit") for each in rows] == [True, False, None]
    rows.append({"split": "world_facts", "index": 0, "mentions_answer": True})
    figures = accuracy_figures(rows)
    assert figures["forget_embedding_accuracy"].value == 0.5 and figures["forget_embedding_accuracy"].num_rows == 2
    assert figures["world_facts_mention_accuracy"].value == 1
