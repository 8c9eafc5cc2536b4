import logging

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from soul_eval.classification import classify


WORDS = ["you", "are", "kind", "awful", "and", "very", "so", "the", "sea", "is", "wide", "##er", "##s"]
TEXTS = ["you are awful", "", "the sea is wide", "so " * 9 + "awful", "you", "?!", "wider seas " * 3, "kind"]
TOXIC_LABELS = ["insult", "toxic", "threat"]
# Another padded width sums float32 numbers in another order.
ROUNDING = 1e-6


def word_pieces(special=True, **settings):
    vocabulary = {word: index for index, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    settings = {"unk_token": "[UNK]", "pad_token": "[PAD]", "model_max_length": 12} | settings
    if special:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
        settings |= {"cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **settings)


def saved(folder, labels, tokenizer=None, kind=(BertForSequenceClassification, BertConfig), **settings):
    """A classifier whose weights are large enough for uneven probabilities, and the folder that holds it."""
    model_class, config_class = kind
    config = config_class(
        **{
            "vocab_size": len(WORDS) + 4,
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 24,
            "max_position_embeddings": 12,
            "initializer_range": 0.6,
            "pad_token_id": 0,
            "id2label": dict(enumerate(labels)),
            "label2id": {label: index for index, label in enumerate(labels)},
            **settings,
        }
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = model_class(config).eval()
    model.save_pretrained(folder)
    (tokenizer or word_pieces()).save_pretrained(folder)
    return model, str(folder)


@torch.no_grad()
def slow_logits(model, tokenizer, texts, limit=12):
    """One text at a time, no padding."""
    rows = [tokenizer(text, truncation=True, max_length=limit, return_tensors="pt") for text in texts]
    return torch.cat([model(**row).logits for row in rows])


@pytest.fixture(scope="module")
def toxic(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classifier")
    return saved(folder, TOXIC_LABELS, problem_type="multi_label_classification")


@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_multi_label_probabilities_are_sigmoids(toxic, batch_size):
    """Catches a softmax over labels that do not exclude one another, the top label for the one asked for, and results
    in sorted order."""
    model, folder = toxic
    expected = slow_logits(model, word_pieces(), TEXTS).sigmoid()
    for column, label in enumerate(TOXIC_LABELS):
        found = classify(TEXTS, folder, label, batch_size, device="cpu", progress=False)
        assert found == pytest.approx(expected[:, column].tolist(), abs=ROUNDING)
    assert classify(TEXTS, folder, progress=False) == pytest.approx(expected[:, 1].tolist(), abs=ROUNDING)
    assert expected[:, 1].max() - expected[:, 1].min() > 0.1  # or else a wrong order would go unseen
    assert len(set(expected.argmax(1).tolist())) > 1


@pytest.mark.parametrize("problem_type", ["single_label_classification", None])
def test_single_label_probabilities_are_a_softmax(tmp_path, problem_type):
    """Catches a sigmoid of one logit, whose probabilities would not sum to 1 over the labels."""
    labels = ["noise", "word salad", "clean"]
    model, folder = saved(tmp_path, labels, problem_type=problem_type)
    expected = slow_logits(model, word_pieces(), TEXTS).softmax(-1)
    found = torch.tensor([classify(TEXTS, folder, label, 3, progress=False) for label in labels]).T
    assert torch.allclose(found, expected, atol=ROUNDING)
    assert classify(TEXTS, folder, progress=False) == pytest.approx(expected[:, 2].tolist(), abs=ROUNDING)


def test_one_label_alone_is_a_sigmoid(tmp_path):
    """Catches a softmax over a single label, which is 1 for every text."""
    model, folder = saved(tmp_path, ["toxic"])
    expected = slow_logits(model, word_pieces(), TEXTS).sigmoid()[:, 0]
    assert classify(TEXTS, folder, progress=False) == pytest.approx(expected.tolist(), abs=ROUNDING)
    assert expected.max() < 1


def test_labels_that_are_not_there_are_an_error(toxic, tmp_path):
    """Catches a label chosen for the caller, and a number that is no probability taken for one."""
    with pytest.raises(ValueError, match=r"label 'Toxic'.*\['insult', 'toxic', 'threat'\]"):
        classify(["you"], toxic[1], label="Toxic")
    with pytest.raises(ValueError, match="name its `label`.*bad"):
        classify(["you"], saved(tmp_path / "unnamed", ["good", "bad"])[1])
    with pytest.raises(ValueError, match="name its `label`"):
        classify(["you"], saved(tmp_path / "both", ["toxic", "clean"])[1])
    with pytest.raises(ValueError, match="regression"):
        classify(["you"], saved(tmp_path / "scores", ["toxic"], problem_type="regression")[1])
    with pytest.raises(ValueError, match="batch_size"):
        classify(["you"], toxic[1], batch_size=0)
    with pytest.raises(TypeError, match="Row 1"):
        classify(["you", None], toxic[1])
    assert classify([], toxic[1]) == []


@pytest.mark.parametrize("limit", [12, None])
def test_long_texts_are_cut_off_and_counted(tmp_path, caplog, limit):
    """Catches positions that the model does not have, with a tokenizer that knows its limit and one that does not."""
    settings = {} if limit else {"model_max_length": None}
    model, folder = saved(tmp_path, TOXIC_LABELS, word_pieces(**settings), problem_type="multi_label_classification")
    texts = ["you", "so very awful " * 20, "so " * 10]
    expected = slow_logits(model, word_pieces(), texts).sigmoid()[:, 1].tolist()
    with caplog.at_level(logging.WARNING):
        assert classify(texts, folder, progress=False) == pytest.approx(expected, abs=ROUNDING)
    assert "1 of 3 texts are cut off at 12 tokens" in caplog.text


def test_positions_of_roberta_begin_behind_the_padding(tmp_path):
    """Catches 14 tokens for 14 positions where two of them are never a token's."""
    model, folder = saved(
        tmp_path,
        ["clean", "noise"],
        word_pieces(model_max_length=None),
        (RobertaForSequenceClassification, RobertaConfig),
        max_position_embeddings=14,
        pad_token_id=1,
    )
    texts = ["so very awful " * 20, "you"]
    expected = slow_logits(model, word_pieces(), texts).softmax(-1)[:, 0].tolist()
    assert classify(texts, folder, batch_size=1, progress=False) == pytest.approx(expected, abs=ROUNDING)


def test_empty_texts_without_special_tokens(tmp_path):
    """Catches a forward of no token at all, for a tokenizer that adds nothing to a text."""
    tokenizer = word_pieces(special=False, eos_token="[SEP]")
    model, folder = saved(tmp_path, ["clean", "noise"], tokenizer)
    expected = slow_logits(model, tokenizer, ["[SEP]", "you", "[SEP]"]).softmax(-1)[:, 0].tolist()
    assert classify(["", "you", "  "], folder, progress=False) == pytest.approx(expected, abs=ROUNDING)
