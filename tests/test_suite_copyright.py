import json
import math
import random

import pytest
import torch
from rouge_score import rouge_scorer
from sacrebleu import sentence_bleu
from test_eval_scoring import byte_tokenizer, small_llama
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from soul_eval.__main__ import main
from soul_eval.evaluation import ask
from soul_eval.rows import read_rows
from soul_eval.statistics import Figure
from soul_eval.suites.copyright import CopyrightArguments, load, match_reference, parts, summarise
from soul_trainer.batch import IGNORE_INDEX
from soul_trainer.formats import encode, render


WORDS = "The keeper lit lamps again, because “Ülrike” counted 1204 naïve gulls; the".split()
# The row keeps five decimals of each log-probability; float32 sums over other padded widths differ by less.
ROUNDING = 1e-5


def story(num_words=500, seed=0):
    """A text with runs of white space, digits, quotes and letters beyond ASCII, in no order that repeats."""
    draw = random.Random(seed)
    breaks = [" ", " ", " ", " ", "\n", "\n\n", "  "]
    return "".join(draw.choice(WORDS) + draw.choice(breaks) for _ in range(num_words))


def sentencepiece_like(kind):
    """A tokenizer like Llama 2's: a space is a letter, one goes before every text, and a token before that."""
    special = ["<unk>", "<s>", "</s>"]
    if kind == "unigram":
        letters = dict.fromkeys(sorted(set(story())) + ["▁"], -8.0)
        parts = {part: -3.0 for word in WORDS for part in (f"▁{word[:5]}", word[5:]) if part}
        vocabulary = [*((name, 0.0) for name in special), *(letters | parts).items()]
        tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=0))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    else:
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        trainer = trainers.BpeTrainer(
            vocab_size=90, special_tokens=special, initial_alphabet=["\n"], show_progress=False
        )
        tokenizer.train_from_iterator(WORDS, trainer)
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=96, **names)


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer([story(200)])


@pytest.fixture
def book(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text(story(), encoding="utf-8")
    return str(path)


def small(book, **settings):
    return CopyrightArguments(
        **{"text": book, "prompt_tokens": "9,24", "continuation_tokens": 16, "num_samples": 12, **settings}
    )


def model_ids(tokenizer, row):
    """The tokens that the model gets as prompt, and those of the answer."""
    found = encode(tokenizer, render({"prompt": row["prompt"], "completion": row["answer"]}, tokenizer))
    num_prompt = found["labels"].count(IGNORE_INDEX)
    return found["input_ids"][:num_prompt], found["input_ids"][num_prompt:]


@pytest.mark.parametrize("num_samples", [12, 999])
@pytest.mark.parametrize("kind", ["bytes", "bpe", "unigram"])
def test_passages_are_read_alone_as_in_the_text(kind, num_samples, tokenizer, book):
    """Catches chunks that are decoded and make other tokens when they are read again (a space lost or added, a letter
    cut in two), prompts of another length, and continuations that overlap."""
    tokenizer = tokenizer if kind == "bytes" else sentencepiece_like(kind)
    rows = load(small(book, num_samples=num_samples), tokenizer)
    opening = [] if kind == "bytes" else [tokenizer.bos_token_id]
    whole = tokenizer(story(), add_special_tokens=False)["input_ids"]
    places = {}
    for row in rows:
        prompt, answer = model_ids(tokenizer, row)
        length = row["prompt_tokens"]
        assert row["split"] == f"forget_{length}" and prompt[: len(prompt) - length] == opening
        assert answer[16:] == [tokenizer.eos_token_id] and row["continuation_tokens"] == 16
        assert row["prompt"] + row["answer"] in story() and "\ufffd" not in row["prompt"] + row["answer"]
        own = prompt[len(opening) :] + answer[:16]
        found = [place for place in range(len(whole)) if whole[place : place + len(own)] == own]
        assert found
        if length == 24:
            places[row["index"]] = found[0] + length
    # Few places within 16 tokens will do where both prompts must begin with a word; all will for bytes.
    most = min(num_samples, (len(whole) - 24) // 16)
    assert list(places) == list(range(len(places))) and most / (1 if kind == "bytes" else 2) <= len(places) <= most
    gaps = [after - before for before, after in zip(places.values(), list(places.values())[1:])]
    assert min(gaps) >= 16  # so they are in order, too
    assert max(places.values()) > 0.8 * len(whole)  # they are of the whole text and not of its beginning
    short, long = ([row for row in rows if row["prompt_tokens"] == length] for length in (9, 24))
    for one, other in zip(short, long, strict=True):
        assert one["answer"] == other["answer"] and other["prompt"].endswith(one["prompt"])


def test_passages_depend_on_the_settings_alone(tokenizer, book, tmp_path):
    """Catches passages drawn at random, files in the order of the disk, and texts run together across files."""
    assert load(small(book), tokenizer) == load(small(book, prompt_tokens=" 24, 9,9"), tokenizer)
    folder = tmp_path / "books"
    folder.mkdir()
    for name, seed in (("b", 2), ("a", 1), ("c", 3)):
        (folder / f"{name}.txt").write_text(story(300, seed), encoding="utf-8")
    (folder / "notes.md").write_text("no text of these")
    rows = load(small(str(folder), prompt_tokens="24"), tokenizer)
    of_text = [[seed for seed in (1, 2, 3) if row["prompt"] + row["answer"] in story(300, seed)] for row in rows]
    assert [seeds[0] for seeds in of_text] == sorted(seeds[0] for seeds in of_text) and len(rows) == 12
    assert {seeds[0] for seeds in of_text} == {1, 2, 3}
    lines = tmp_path / "books.jsonl"
    lines.write_text("".join(json.dumps({"text": story(300, seed)}) + "\n" for seed in (1, 2, 3)), encoding="utf-8")
    assert load(small(str(lines), prompt_tokens="24"), tokenizer) == rows


def test_a_short_text_gives_what_it_has(tokenizer, tmp_path):
    """Catches a last passage left out or cut short by one, and the same passage taken again to fill up the number."""
    text = story()
    encoded = tokenizer(text, return_offsets_mapping=True)
    for extra, expected in ((0, 1), (-1, 0), (16, 2), (15, 1)):
        path = tmp_path / f"{extra}.txt"
        # Words of the same letters: every token can be the first.
        path.write_text(
            "go " * 200 if False else text[: encoded["offset_mapping"][24 + 16 + extra - 1][1]], encoding="utf-8"
        )
        arguments = small(str(path), prompt_tokens="24")
        if not expected:
            with pytest.raises(ValueError, match="`text`=.*no text of more than 39 tokens, but a passage takes 40"):
                load(arguments, tokenizer)
            continue
        rows = load(arguments, tokenizer)
        assert len(rows) == expected
        assert model_ids(tokenizer, rows[0])[1][:16] == encoded["input_ids"][24:40]


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"prompt_tokens": "9,x"}, "`prompt_tokens` must be numbers"),
        ({"prompt_tokens": "0"}, "`prompt_tokens` must be numbers"),
        ({"prompt_tokens": ""}, "`prompt_tokens` must be numbers"),
        ({"continuation_tokens": 0}, "`continuation_tokens` must be at least 1"),
        ({"num_samples": 0}, "`num_samples` must be at least 1"),
        ({"continuation_tokens": 90}, "make 114 tokens, over the 96"),
        ({"text": "gone.txt"}, "`text`='gone.txt': no such file"),
        ({"retain_text": "./gone"}, "`retain_text`='./gone': no such file"),
    ],
)
def test_bad_settings_are_named(tokenizer, book, settings, message):
    """Catches a crash far from its cause, and a file that is not there taken for a dataset on the hub."""
    with pytest.raises(ValueError, match=message):
        load(small(**{"book": book, **settings}) if "text" not in settings else small(settings["text"]), tokenizer)


def test_bad_texts_are_named(tokenizer, tmp_path):
    """Catches a KeyError where rows have no text, and a decoding error without the file's name."""
    (tmp_path / "rows.jsonl").write_text('{"content": "x"}\n')
    (tmp_path / "latin.txt").write_bytes("Ülrike".encode("latin-1"))
    for name, message in (
        ("rows.jsonl", r"lacks the columns \['text'\]"),
        ("latin.txt", "latin.txt.*not text in UTF-8"),
    ):
        with pytest.raises(ValueError, match=message):
            load(small(str(tmp_path / name)), tokenizer)


@torch.no_grad()
def slow_row(model, tokenizer, row):
    """Token by token: log-probabilities and hits of the text's continuation, and a greedy one of the same length."""
    prompt, answer = model_ids(tokenizer, row)
    log_probs, hits, ids = [], [], list(prompt)
    for token in answer[: row["continuation_tokens"]]:
        distribution = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        log_probs.append(distribution[token].item())
        hits.append(int(distribution.argmax() == token))
        ids.append(token)
    ids = list(prompt)
    for _ in range(row["continuation_tokens"]):
        token = model(torch.tensor([ids])).logits[0, -1].argmax().item()
        if token == tokenizer.eos_token_id:
            break
        ids.append(token)
    return log_probs, hits, tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True).strip()


def learnt(tokenizer, rows):
    """A model that has learnt some passages by heart, so that figures are neither 0 nor 1."""
    model = small_llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    batch = torch.tensor([sum(model_ids(tokenizer, row), [])[:-1] for row in rows])
    for _ in range(80):
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def test_figures_are_those_of_a_slow_loop(tokenizer, book, tmp_path):
    """Catches the end of sequence counted as a token of the text, a generation of another length, swapped texts in
    ROUGE or BLEU, prompt lengths or texts mixed up."""
    (tmp_path / "kept.txt").write_text(story(300, seed=5), encoding="utf-8")
    arguments = small(book, num_samples=4, retain_text=str(tmp_path / "kept.txt"))
    rows = load(arguments, tokenizer)
    model = learnt(tokenizer, [row for row in rows if row["split"] == "forget_24"][:2])
    asked = ask(model, tokenizer, rows, lambda row: parts(row, arguments), progress=False)
    expected = {}
    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)
    for row in asked:
        log_probs, hits, text = slow_row(model, tokenizer, row)
        assert row["token_log_probs"] == pytest.approx(log_probs, abs=2 * ROUNDING)
        assert (row["token_hits"], row["generation"]) == (hits, text)
        overlap = scorer.score(row["answer"], text)["rougeL"]
        last_miss = max([place + 1 for place, hit in enumerate(hits) if not hit], default=0)
        side, _, length = row["split"].partition("_")
        for name, value in {
            "leak_rougeL": overlap.recall,
            "leak_rougeL_f1": overlap.fmeasure,
            "leak_bleu": sentence_bleu(text, [row["answer"]]).score / 100,
            "exact_memorization": sum(hits) / 16,
            "extraction_strength": 1 - last_miss / 16,
            "continuation_nll": -sum(log_probs) / 16,
        }.items():
            key = f"{'retain_' if side == 'retain' else ''}{name}_{length}"
            expected.setdefault(key, []).append(value)
    figures = summarise(asked)
    assert figures.keys() == expected.keys() and len(figures) == 24
    for name, values in expected.items():
        assert figures[name].value == pytest.approx(math.fsum(values) / 4, abs=ROUNDING), name
        assert figures[name].num_rows == 4 and figures[name].low <= figures[name].value <= figures[name].high
    assert 0.2 < figures["leak_rougeL_24"].value < 1 and figures["retain_leak_rougeL_24"].value < 0.2
    assert 0 < figures["extraction_strength_24"].value < 1


def test_a_passage_beyond_the_model_s_limit_is_named(book):
    """Catches figures of continuations that were cut off without a word."""
    long_tokenizer = byte_tokenizer([story(200)])
    long_tokenizer.model_max_length = 500
    arguments = small(book, prompt_tokens="80", num_samples=2)
    rows = load(arguments, long_tokenizer)
    model = small_llama(max_position_embeddings=96).eval()
    ask(model, long_tokenizer, rows, lambda row: parts(row, arguments)[:1], progress=False)  # all but the end fits
    with pytest.raises(ValueError, match="Row 0 of `forget_80` is longer than the model's limit"):
        model = small_llama(max_position_embeddings=95).eval()
        ask(model, long_tokenizer, rows, lambda row: parts(row, arguments)[:1], progress=False)


def test_rows_without_columns_or_of_other_splits():
    """Catches figures of columns that are not there, a mean over splits, and a reference of other passages."""
    rows = [{"split": "retain_7", "index": index, "bleu": index / 4, "prompt": f"p{index}"} for index in range(3)]
    assert summarise(rows).keys() == {"retain_leak_bleu_7"} and summarise(rows)["retain_leak_bleu_7"].value == 0.25
    assert summarise(rows[:1])["retain_leak_bleu_7"] == Figure(0.0, 1, 0.0, pytest.approx(0.975))
    for split in ("forget", "forget_x", "other_7"):
        with pytest.raises(ValueError, match="`split` must be forget_<k> or retain_<k>"):
            summarise([{**rows[0], "split": split}])
    assert match_reference(rows, rows[::-1]) == rows
    with pytest.raises(ValueError, match="another prompt in retain_7 row 1"):
        match_reference(rows, [rows[0], {**rows[1], "prompt": "q"}, rows[2]])


def test_command_line(tokenizer, book, tmp_path, capsys):
    """Catches a suite that the command line cannot run, settings that do not reach it, and figures that rows alone do
    not give."""
    small_llama(seed=1).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    arguments = ["copyright", "--model", str(tmp_path / "model"), "--text", book, "--device", "cpu", "--limit", "3"]
    arguments += ["--continuation_tokens", "8", "--output", str(tmp_path / "out"), "--prompt_tokens"]
    assert main([*arguments, "10,20"]) == 0, capsys.readouterr().err
    header, rows = read_rows(tmp_path / "out" / "rows.jsonl")
    assert header["suite"] == "copyright" and header["settings"]["prompt_tokens"] == "10,20" and len(rows) == 6
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert {name: Figure.from_json(entry) for name, entry in summary.items()} == summarise(rows)
    assert main([*arguments, "2000", "--overwrite"]) == 1
    assert "make 2008 tokens, over the 96" in capsys.readouterr().err
