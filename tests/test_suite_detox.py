import json

import pytest
import torch
from test_classification import TOXIC_LABELS, saved, slow_logits, word_pieces
from test_eval_scoring import byte_tokenizer, small_llama

from soul_eval.__main__ import main
from soul_eval.evaluation import ask
from soul_eval.metrics.fluency.formula import fluency
from soul_eval.metrics.toxicity.formula import mean_toxicity, toxicity_rate
from soul_eval.rows import read_rows
from soul_eval.scoring import greedy_answers
from soul_eval.statistics import Figure
from soul_eval.suites.detox import DetoxArguments, judge, load, match_reference, parts, summarise
from soul_trainer.formats import render


FLUENT_LABELS = ["clean", "mild gibberish", "noise", "word salad"]
# Another padded width sums float32 numbers in another order.
ROUNDING = 1e-6
SAID = ["you are awful", "", "the sea is wide", "so so so awful", "kind", "you are kind and very awful"]


def pku_rows(num_rows=7):
    """Rows in the columns of PKU-SafeRLHF; the last prompt is the first one again."""
    return [
        {
            "prompt": f"How is the {('sea', 'lamp')[index % 2]} number {index % (num_rows - 1)} put out?",
            "prompt_source": "test",
            "response_0": "Kindly.",
            "response_1": "Not at all.",
            "is_response_0_safe": index % 3 != 0,
            "is_response_1_safe": index % 4 != 1,
            "better_response_id": 0,
            "safer_response_id": 1,
        }
        for index in range(num_rows)
    ]


def real_toxicity_rows(num_rows=4):
    """Rows in the columns of Real Toxicity Prompts."""
    return [
        {
            "filename": "x.txt",
            "begin": 0,
            "end": 9,
            "challenging": index % 2 == 1,
            "prompt": {"text": f"The keeper of lamp {index} was", "toxicity": 0.1 * index},
            "continuation": {"text": " kind", "toxicity": 0.0},
        }
        for index in range(num_rows)
    ]


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def write_dataset(folder, splits):
    """A folder in the hub's layout with a split a file."""
    folder.mkdir()
    for split, rows in splits.items():
        write_lines(folder / f"{split}.jsonl", rows)
    return str(folder)


@pytest.fixture(scope="module")
def toxic(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toxic")
    return saved(folder, TOXIC_LABELS, problem_type="multi_label_classification")


@pytest.fixture(scope="module")
def gibberish(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("gibberish"), FLUENT_LABELS)


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer([row["prompt"] for row in pku_rows()])


def small(dataset, toxic, **settings):
    return DetoxArguments(**{"dataset": dataset, "classifier": toxic[1], "max_new_tokens": 6, **settings})


def test_prompts_of_pku_safe_rlhf(toxic, tmp_path):
    """Catches another split's rows, rows chosen by one of the two responses alone, and prompts asked twice."""
    prompts = [row["prompt"] for row in pku_rows()]
    dataset = write_dataset(tmp_path / "pku", {"train": pku_rows()[:1], "test": pku_rows()})

    def found(**settings):
        rows = load(small(dataset, toxic, **settings))
        assert [(row["split"], row["index"]) for row in rows] == [("prompts", index) for index in range(len(rows))]
        return [row["question"] for row in rows]

    assert found() == prompts[:6] and prompts[6] == prompts[0]
    assert found(keep_duplicates=True) == prompts
    assert found(split="train") == prompts[:1]
    # Unsafe are the first responses of 0, 3, 6 and the second ones of 1 and 5.
    assert found(prompts="unsafe", keep_duplicates=True) == [prompts[index] for index in (0, 1, 3, 5, 6)]
    assert found(num_prompts=3) == [prompts[index] for index in (0, 2, 4)] and found(num_prompts=99) == found()
    assert load(small(write_lines(tmp_path / "x.jsonl", pku_rows()), toxic)) == load(small(dataset, toxic))


def test_real_toxicity_prompts_are_gone_on_with(toxic, tmp_path, tokenizer):
    """Catches a beginning of a sentence put as a question, or only the challenging ones asked for and all taken."""
    path = write_lines(tmp_path / "rtp.jsonl", real_toxicity_rows())
    arguments = small(path, toxic, split="train")
    rows = load(arguments)
    assert rows[3] == {"split": "prompts", "index": 3, "prompt": "The keeper of lamp 3 was"} and len(rows) == 4
    model = small_llama(seed=1).eval()
    asked = ask(model, tokenizer, rows, lambda row: parts(row, arguments), progress=False)
    ids = tokenizer("The keeper of lamp 3 was")["input_ids"]
    with torch.no_grad():
        for _ in range(6):
            token = model(torch.tensor([ids])).logits[0, -1].argmax().item()
            if token == tokenizer.eos_token_id:
                break
            ids.append(token)
    whole = tokenizer.decode(ids)
    assert asked[3]["generation"] == whole.removeprefix("The keeper of lamp 3 was").strip()
    assert [row["index"] for row in load(small(path, toxic, prompts="challenging"))] == [0, 1]
    assert load(small(path, toxic, prompts="challenging"))[1]["prompt"] == rows[3]["prompt"]


def test_questions_go_through_the_template(toxic, tmp_path, tokenizer):
    """Catches a prompt that is put bare where the model was trained with a template, and the placeholder answer, or
    the data's own, within a prompt."""
    arguments = small(write_lines(tmp_path / "x.jsonl", pku_rows()), toxic)
    model = small_llama(seed=1).eval()
    rows = load(arguments)
    for template in (None, "Q: {question} A: {answer}", "{question} {answer}"):
        asked = ask(model, tokenizer, rows, lambda row: parts(row, arguments), "auto", template, progress=False)
        others = [render({"question": row["question"], "answer": "Something"}, tokenizer, template) for row in rows]
        assert [row["generation"] for row in asked] == greedy_answers(
            model, tokenizer, others, "auto", 6, progress=False
        )


def test_figures_are_those_of_a_slow_loop(toxic, gibberish):
    """Catches scores of another row or label, an empty generation that a classifier has judged, a threshold that is
    reached and not passed, and a rate of what is fluent."""
    rows = [
        {"split": "prompts", "index": index, "question": "?", "generation": text} for index, text in enumerate(SAID)
    ]
    with_text = [index for index, text in enumerate(SAID) if text]
    toxicity, fluent = [0.0] * len(SAID), [0.0] * len(SAID)
    for index in with_text:
        toxicity[index] = slow_logits(toxic[0], word_pieces(), [SAID[index]]).sigmoid()[0, 1].item()
        fluent[index] = slow_logits(gibberish[0], word_pieces(), [SAID[index]]).softmax(-1)[0, 0].item()
    threshold = sorted(toxicity)[3]
    arguments = small("x", toxic, threshold=threshold, fluency_classifier=gibberish[1])
    judge(rows, arguments)
    assert [row["toxicity"] for row in rows] == pytest.approx(toxicity, abs=ROUNDING)
    assert [row["fluency"] for row in rows] == pytest.approx(fluent, abs=ROUNDING)
    figures = summarise(rows)
    found = [row["toxicity"] for row in rows]
    assert figures["toxicity_mean"].value == pytest.approx(sum(toxicity) / 6, abs=ROUNDING)
    assert figures["toxicity_mean"].value == pytest.approx(mean_toxicity(found), abs=1e-15)
    assert figures["toxicity_rate"].value == toxicity_rate(found, threshold)
    assert figures["fluency"].value == pytest.approx(fluency([row["fluency"] for row in rows]), abs=1e-15)
    assert figures["empty_rate"].value == 1 / 6
    for figure in figures.values():
        assert figure.num_rows == 6 and figure.low <= figure.value <= figure.high
    assert 0 < figures["toxicity_rate"].value < 1 and len({round(value, 3) for value in toxicity}) == 6
    # What equals the threshold does not count.
    at = [{**rows[0]} for _ in range(2)]
    judge(at, small("x", toxic, threshold=found[0]))
    assert summarise(at)["toxicity_rate"].value == 0 and "fluency" in at[0]


def test_generations_that_are_all_empty(toxic, gibberish):
    """Catches a crash where the model says nothing at all, and a model that does so taken for fluent."""
    rows = [{"split": "prompts", "index": index, "question": "?", "generation": ""} for index in range(2)]
    judge(rows, small("x", toxic, fluency_classifier=gibberish[1]))
    assert {name: figure.value for name, figure in summarise(rows).items()} == {
        "toxicity_mean": 0.0,
        "toxicity_rate": 0.0,
        "fluency": 0.0,
        "empty_rate": 1.0,
    }


def test_rows_without_columns_or_of_other_prompts():
    """Catches figures of columns that are not there, and a reference that was asked something else."""
    rows = [{"split": "prompts", "index": index, "question": f"q{index}", "toxicity": index / 4} for index in range(3)]
    assert summarise(rows).keys() == {"toxicity_mean"} and summarise(rows)["toxicity_mean"].value == 0.25
    with pytest.raises(ValueError, match="Row 1 of `prompts` lacks `toxicity`"):
        summarise([rows[0], {**rows[1], "toxicity": None}])
    assert match_reference(rows, rows[::-1]) == rows
    with pytest.raises(ValueError, match="another question in prompts row 1"):
        match_reference(rows, [rows[0], {**rows[1], "question": "q"}, rows[2]])
    begun = [{"split": "prompts", "index": 0, "prompt": "a"}]
    with pytest.raises(ValueError, match="another prompt in prompts row 0"):
        match_reference(begun, [{**begun[0], "prompt": "b"}])


def test_a_text_to_keep_is_asked_for_its_likelihood_alone(toxic, tmp_path, tokenizer):
    """Catches a text that a classifier judges, a loss summed and not a mean over tokens, and figures of prompts that
    texts have a share in."""
    texts = ["The sea is put out by a lamp.", "", "How is the lamp number 4?", "The sea number 3."]
    kept = write_lines(tmp_path / "kept.jsonl", [{"text": text} for text in texts])
    dataset = write_lines(tmp_path / "x.jsonl", pku_rows())
    arguments = small(dataset, toxic, retain_text=kept, num_texts=2)
    rows = load(arguments)
    assert [row["text"] for row in rows if row["split"] == "retain"] == [texts[0], texts[2]]
    model = small_llama(seed=1).eval()
    rows = ask(model, tokenizer, rows, lambda row: parts(row, arguments), "auto", progress=False)
    judge(rows, arguments)
    losses = []
    for text in (texts[0], texts[2]):
        ids = torch.tensor([tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]])
        with torch.no_grad():
            losses.append(model(ids, labels=ids).loss.item())
    found = [row for row in rows if row["split"] == "retain"]
    # The row keeps five decimals of each log-probability.
    assert [row["answer_nll"] for row in found] == pytest.approx(losses, abs=1e-5)
    assert not any("toxicity" in row or "generation" in row for row in found)
    figures = summarise(rows)
    assert figures["retain_nll"].value == pytest.approx(sum(losses) / 2, abs=1e-5)
    assert figures["retain_nll"].num_rows == 2 and figures["toxicity_mean"].num_rows == len(rows) - 2
    assert summarise(found).keys() == {"retain_nll"}
    assert match_reference(rows, rows[::-1]) == rows
    other = [{**row, "text": "Another."} if row["split"] == "retain" else row for row in rows]
    with pytest.raises(ValueError, match="another text in retain row 0"):
        match_reference(rows, other)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"num_texts": 0}, "`num_texts` must be at least 1"),
        ({"retain_text": "./gone.txt"}, "`retain_text`='./gone.txt': no such file"),
        ({"toxic_label": "toxicity"}, "`toxic_label`='toxicity' is none of the labels.*insult, toxic, threat"),
        ({"fluency_classifier": "own"}, "`fluent_label`='clean' is none of the labels"),
        ({"prompts": "safe"}, "`prompts` must be one of all, unsafe, challenging"),
        ({"prompts": "challenging"}, r"lacks the columns \['challenging'\]"),
        ({"num_prompts": 0}, "`num_prompts` must be at least 1"),
        ({"max_new_tokens": 0}, "`max_new_tokens` must be at least 1"),
        ({"threshold": 1.0}, r"`threshold` must be in \[0, 1\)"),
        ({"dataset": "./gone.jsonl"}, "`dataset`='./gone.jsonl': no such file"),
    ],
)
def test_bad_settings_are_named_before_the_model_runs(toxic, tmp_path, settings, message):
    """Catches a wrong label that is found out after hours of generations."""
    dataset = write_lines(tmp_path / "x.jsonl", pku_rows())
    if "fluency_classifier" in settings:
        settings = {"fluency_classifier": toxic[1]}
    with pytest.raises(ValueError, match=message):
        load(small(**{"dataset": dataset, "toxic": toxic, **settings}))


def test_bad_rows_are_named(toxic, tmp_path):
    """Catches a KeyError for a missing column or split, and a prompt without text that is asked all the same."""
    for rows, message in (
        ([{"question": "x"}], r"lacks the columns \['prompt'\]; it has \['question'\]"),
        ([{"prompt": "x"}, {"prompt": " "}], "Row 1 of `dataset`: `prompt` must be a text"),
        ([{"prompt": {"toxicity": 0.5}}], "Row 0 of `dataset`: `prompt` must be a text, or hold a `text`"),
    ):
        with pytest.raises(ValueError, match=message):
            load(small(write_lines(tmp_path / f"{len(message)}.jsonl", rows), toxic))
    safe = [{**row, "is_response_0_safe": True, "is_response_1_safe": True} for row in pku_rows()]
    with pytest.raises(ValueError, match="holds no prompt for `prompts`='unsafe'"):
        load(small(write_lines(tmp_path / "safe.jsonl", safe), toxic, prompts="unsafe"))
    dataset = write_dataset(tmp_path / "only", {"train": pku_rows()})
    with pytest.raises(ValueError, match="has no split 'test'; it has train"):
        load(small(dataset, toxic))


def test_command_line(toxic, gibberish, tokenizer, tmp_path, capsys):
    """Catches a suite that the command line cannot run, rows that no classifier has judged, and figures that rows
    alone do not give."""
    small_llama(seed=1).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    arguments = ["detox", "--model", str(tmp_path / "model"), "--device", "cpu", "--max_new_tokens", "4"]
    arguments += ["--dataset", write_lines(tmp_path / "x.jsonl", pku_rows()), "--classifier", toxic[1]]
    arguments += ["--output", str(tmp_path / "out")]
    own = ["--fluency_classifier", gibberish[1], "--keep_duplicates", "--limit", "5"]
    assert main([*arguments, *own]) == 0, capsys.readouterr().err
    header, rows = read_rows(tmp_path / "out" / "rows.jsonl")
    assert header["suite"] == "detox" and header["settings"]["classifier"] == toxic[1] and len(rows) == 5
    figures = {
        name: Figure.from_json(entry)
        for name, entry in json.loads((tmp_path / "out" / "summary.json").read_text()).items()
    }
    assert figures == summarise(rows) and {"toxicity_mean", "toxicity_rate", "fluency"} <= figures.keys()
    capsys.readouterr()
    assert main([*arguments, "--toxic_label", "hate", "--overwrite"]) == 1
    assert "`toxic_label`='hate' is none of the labels" in capsys.readouterr().err
    assert read_rows(tmp_path / "out" / "rows.jsonl")[1] == rows
