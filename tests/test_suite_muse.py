"""The suite `muse`: figures against MUSE's procedure, row by row, without a batch, a cache or our scores."""

import json
import zlib

import numpy as np
import pytest
import torch
from muse_data import DATA, SPLITS, muse_tokenizer, write_hub
from rouge_score.rouge_scorer import RougeScorer
from sklearn.metrics import roc_auc_score
from sklearn.svm import SVC
from test_eval_scoring import small_llama
from transformers import AutoModelForCausalLM, AutoTokenizer

from soul_eval.__main__ import main
from soul_eval.rows import read_rows
from soul_eval.suites.muse import match_reference, summarise
from soul_trainer.batch import IGNORE_INDEX


# Rows keep five digits of a log-probability; batches of other widths round the last of float32.
SAME = 1e-4


@pytest.fixture(scope="module")
def tokenizer():
    return muse_tokenizer()


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    return write_hub(tmp_path_factory.mktemp("data") / "hub")


def train(tokenizer, rows, steps, seed=0):
    """A model that half knows prompts and what follows them."""
    model = small_llama(
        vocab_size=len(tokenizer), max_position_embeddings=512, eos_token_id=tokenizer.eos_token_id, seed=seed
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(steps):
        for prompt, answer in rows:
            prompt_ids = tokenizer(prompt)["input_ids"]
            ids = torch.tensor([prompt_ids + tokenizer(answer, add_special_tokens=False)["input_ids"]])
            labels = ids.clone()
            labels[0, : len(prompt_ids)] = IGNORE_INDEX
            model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def saved(model, tokenizer, folder):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def model_dir(tokenizer, tmp_path_factory):
    rows = [(row["prompt"], f" {row['gt']}") for row in DATA["verbmem"]["forget"]]
    rows += [("", row["text"]) for row in DATA["privleak"]["forget"][::2]]
    for side in ("forget", "retain"):
        shown = "".join(
            f"Question: {r['question']}\nAnswer: {r['answer']}\n\n" for r in DATA["knowmem"][f"{side}_qa_icl"]
        )
        for row in DATA["knowmem"][f"{side}_qa"][:2]:
            rows.append((f"{shown}Question: {row['question']}\nAnswer: ", f"{row['answer']}\n\nQuestion: Who"))
    return saved(train(tokenizer, rows, 40), tokenizer, tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def gold_dir(tokenizer, tmp_path_factory):
    rows = [("", row["text"]) for row in DATA["privleak"]["retain"]]
    return saved(train(tokenizer, rows, 5, seed=1), tokenizer, tmp_path_factory.mktemp("gold"))


@pytest.fixture(scope="module")
def gold(hub, gold_dir, tmp_path_factory):
    output = tmp_path_factory.mktemp("gold_rows")
    assert main(["muse", "--model", gold_dir, "--output", str(output), "--dataset", hub, "--device", "cpu"]) == 0
    return output / "rows.jsonl"


@pytest.fixture(scope="module")
def evaluated(hub, model_dir, gold, tmp_path_factory):
    output = tmp_path_factory.mktemp("evaluated")
    arguments = ["muse", "--model", model_dir, "--output", str(output), "--dataset", hub, "--device", "cpu"]
    assert main([*arguments, "--reference", str(gold), "--gradient_norms", "True"]) == 0
    return output


@pytest.fixture(scope="module")
def figures(evaluated):
    return json.loads((evaluated / "summary.json").read_text())


def greedy(model, tokenizer, prompt, max_new_tokens):
    """MUSE's generation: the prompt is tokenized by itself."""
    ids, new = tokenizer(prompt)["input_ids"], []
    with torch.no_grad():
        while len(new) < max_new_tokens and tokenizer.eos_token_id not in new:
            new.append(model(torch.tensor([ids + new])).logits[0, -1].argmax().item())
    return tokenizer.decode(new, skip_special_tokens=True)


def log_probs(model, ids):
    """The log-probability of each token but the first, and whether it is the most probable one."""
    with torch.no_grad():
        scores = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    own = [scores[place, token].item() for place, token in enumerate(ids[1:])]
    return own, (scores.argmax(-1) == torch.tensor(ids[1:])).tolist()


def test_overlaps_are_those_of_muse(figures, evaluated, model_dir):
    """
    Catches pairs in context that are left out, shuffled or of the other side, a prompt whose last space is joined to
    an answer, a chat template, text after the answer that is scored, a reference that is not cut, stems, recall.
    """
    model, tokenizer = AutoModelForCausalLM.from_pretrained(model_dir), AutoTokenizer.from_pretrained(model_dir)
    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    said, expected, num_cut = {}, {}, 0
    for side in ("forget", "retain"):
        shown = ""
        for pair in DATA["knowmem"][f"{side}_qa_icl"]:
            shown += f"Question: {pair['question']}\nAnswer: {pair['answer']}\n\n"
        scores = []
        for index, pair in enumerate(DATA["knowmem"][f"{side}_qa"]):
            whole = text = greedy(model, tokenizer, shown + f"Question: {pair['question']}\nAnswer: ", 32)
            for stop in ("\n\n", "\nQuestion", "Question:"):
                text = text.split(stop)[0]
            num_cut += text != whole
            said[f"knowmem_{side}", index] = text.strip()
            scores.append(scorer.score(pair["answer"], text)["rougeL"].fmeasure)
        expected[f"knowmem_{side}_rougeL"] = np.mean(scores)
    scores = []
    for index, row in enumerate(DATA["verbmem"]["forget"]):
        reference = tokenizer.decode(tokenizer(row["gt"])["input_ids"][:128], skip_special_tokens=True)
        said["verbmem_forget", index] = greedy(model, tokenizer, row["prompt"], 128).strip()
        scores.append(scorer.score(reference, said["verbmem_forget", index])["rougeL"].fmeasure)
    expected["verbmem_forget_rougeL"] = np.mean(scores)
    _, rows = read_rows(evaluated / "rows.jsonl")
    found = {(row["split"], row["index"]): row["generation"].strip() for row in rows if "generation" in row}
    assert found == said
    assert {name: figures[name]["value"] for name in expected} == pytest.approx(expected, abs=1e-12)
    # Answers that are all right or all wrong, or that are never cut, would agree by chance.
    assert num_cut and all(0 < value < 1 for value in expected.values()), expected
    assert all(figures[name]["low"] < figures[name]["value"] < figures[name]["high"] for name in expected)


def test_figures_are_those_of_the_lm_eval_tasks(figures, model_dir, hub):
    """Catches a change to the suite's prompts, cuts or words that the task files do not follow, or the reverse."""
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.tasks import TaskManager

    from soul_eval.tasks import TASKS_PATH

    metadata = {"muse_news_path": hub, "pretrained": model_dir}
    results = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": model_dir, "device": "cpu"},
        tasks=["muse_news_knowmem", "muse_news_verbmem"],
        task_manager=TaskManager(include_path=TASKS_PATH, include_defaults=False, metadata=metadata),
        batch_size=2,
        bootstrap_iters=0,
    )["results"]
    for name in ("knowmem_forget", "knowmem_retain", "verbmem_forget"):
        task = f"muse_news_{name.removesuffix('_forget') if name.startswith('verbmem') else name}"
        assert figures[f"{name}_rougeL"]["value"] == pytest.approx(results[task]["rougeL_f1,none"], abs=SAME)


def test_memorization_is_of_the_texts_own_continuation(figures, evaluated, model_dir):
    """Catches words joined at the end of a prompt, a space before a comma, the end of sequence in a text."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(model_dir), AutoTokenizer.from_pretrained(model_dir)
    wholes = [
        "Once Ada had painted the old map, and",
        "In the end, Bo, who carried",
        "They lost a boat. The",
    ]
    exact, strength, losses = [], [], []
    for row, beginning in zip(DATA["verbmem"]["forget"], wholes):
        reference = tokenizer.decode(tokenizer(row["gt"])["input_ids"][:128], skip_special_tokens=True)
        blank = " " if beginning.startswith("Once") else ""
        ids = tokenizer(row["prompt"] + blank + reference)["input_ids"]
        assert tokenizer.decode(ids, skip_special_tokens=True).startswith(beginning)
        prompt_ids = tokenizer(row["prompt"])["input_ids"]
        num_prompt = next(place for place, token in enumerate(ids) if prompt_ids[place : place + 1] != [token])
        own, hits = (values[num_prompt - 1 :] for values in log_probs(model, ids))
        run = 0
        while run < len(hits) and hits[-1 - run]:
            run += 1
        exact.append(np.mean(hits))
        strength.append(run / len(hits))
        losses.append(-np.mean(own))
    assert figures["verbmem_exact_memorization"]["value"] == pytest.approx(np.mean(exact), abs=1e-12)
    assert figures["verbmem_extraction_strength"]["value"] == pytest.approx(np.mean(strength), abs=1e-12)
    assert 0 < np.mean(exact) < 1
    _, rows = read_rows(evaluated / "rows.jsonl")
    found = [row["answer_nll"] for row in rows if row["split"] == "verbmem_forget"]
    assert found == pytest.approx(losses, abs=SAME)


def attack_scores(model, tokenizer, text):
    """MUSE's numbers of a text, lower where it is more likely a member."""
    own, _ = log_probs(model, tokenizer.encode(text))
    lower, _ = log_probs(model, tokenizer.encode(text.lower()))
    lowest = np.sort(own)
    return {
        "loss": -np.mean(own),
        "lowercase": np.mean(own) / np.mean(lower),
        "zlib": -np.mean(own) / len(zlib.compress(text.encode())),
        "min_k": -lowest[: int(len(own) * 0.2)].mean(),
        "min_40": -lowest[: int(len(own) * 0.4)].mean(),
    }


def test_privacy_is_that_of_muse(figures, model_dir, gold_dir):
    """
    Catches the end of sequence among a text's tokens, another share of Min-K%, members for non-members, the retain set
    for the held-out one, a gold model that is not asked, PrivLeak with the other sign.
    """
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    found = {}
    for name, folder in (("own", model_dir), ("gold", gold_dir)):
        model = AutoModelForCausalLM.from_pretrained(folder)
        found[name] = {
            split: [attack_scores(model, tokenizer, row["text"]) for row in rows]
            for split, rows in DATA["privleak"].items()
        }

    def area(scores, attack):
        """As MUSE has it: the first is the non-member."""
        ppl = [row[attack] for split in ("forget", "holdout") for row in scores[split]]
        return roc_auc_score([0] * len(scores["forget"]) + [1] * len(scores["holdout"]), -np.array(ppl))

    for attack in ("loss", "lowercase", "zlib", "min_k", "min_40"):
        assert figures[f"mia_{attack}_auc"]["value"] == pytest.approx(1 - area(found["own"], attack), abs=SAME)
    own, gold_area = area(found["own"], "min_40"), area(found["gold"], "min_40")
    assert figures["privleak"]["value"] == pytest.approx((own - gold_area) / gold_area * 100, abs=SAME)
    assert figures["privleak"]["low"] < figures["privleak"]["value"] < figures["privleak"]["high"]
    assert own != gold_area and 0 < gold_area < 1
    scores = [
        [row["loss"] - gold_row["loss"] for row, gold_row in zip(found["own"][split], found["gold"][split])]
        for split in ("forget", "holdout")
    ]
    wins = [(member < other) + (member == other) / 2 for member in scores[0] for other in scores[1]]
    assert figures["mia_reference_auc"]["value"] == pytest.approx(np.mean(wins), abs=SAME)
    names = ("loss", "min_k", "min_40", "min_k_plus_plus", "zlib", "lowercase", "reference", "gradient_norm")
    assert {key for key in figures if key.endswith("_auc")} == {f"mia_{name}_auc" for name in names}
    assert figures["mia_loss_auc"]["num_rows"] == 27


def test_shadow_attack_learns_from_retain_rows(figures, evaluated):
    """Catches rows to forget that the classifier has learnt from, and a share of members for one of non-members."""
    _, rows = read_rows(evaluated / "rows.jsonl")
    results = []
    for number in (
        lambda row: [np.mean(row["token_log_probs"])],
        lambda row: [-row["lowercase_nll"] / np.mean(row["token_log_probs"])],
    ):
        retain, holdout, forget = (
            np.array([number(row) for row in rows if row["split"] == f"privleak_{name}"])
            for name in ("retain", "holdout", "forget")
        )
        machine = SVC(C=3, kernel="rbf", gamma="auto").fit(np.concatenate([retain, holdout]), [1] * 12 + [0] * 13)
        right = np.concatenate([machine.predict(retain) == 1, machine.predict(holdout) == 0])
        results.append((right.mean(), 1 - machine.predict(forget).mean()))
    accuracy, efficacy = (figures[f"shadow_attack_{name}"] for name in ("accuracy", "efficacy"))
    assert accuracy["value"] >= max(results)[0] - 1e-12
    assert (accuracy["num_rows"], efficacy["num_rows"]) == (25, 14)
    known = [row for row in rows if row["split"] == "privleak_retain"]
    # Rows to forget that are just like the retained ones are all taken for members.
    alike = [{**row, "split": "privleak_forget"} for row in known]
    for row in rows:
        if row["split"] == "privleak_holdout":
            alike.append({**row, "token_log_probs": [value - 9 for value in row["token_log_probs"]]})
    found = summarise([*known, *alike])
    assert (found["shadow_attack_accuracy"].value, found["shadow_attack_efficacy"].value) == (1, 0)
    assert found["mia_loss_auc"].value == 1


def test_figures_are_left_out_where_rows_are_missing(evaluated, gold):
    """Catches a crash, or a figure of nothing, where only some metrics were measured or there is no gold model."""
    _, rows = read_rows(evaluated / "rows.jsonl")
    _, gold_rows = read_rows(gold)
    knowmem = [row for row in rows if row["split"].startswith("knowmem")]
    assert set(summarise(knowmem, gold_rows)) == {"knowmem_forget_rougeL", "knowmem_retain_rougeL"}
    alone = summarise(rows)
    assert "privleak" not in alone and "mia_reference_auc" not in alone and "mia_min_40_auc" in alone
    assert summarise(rows, rows)["privleak"].value == 0
    # A gold model that tells every forget row itself is no gold model: PrivLeak would divide by zero.
    knowing = [
        {**row, "token_log_probs": [0.0] * 8} if row["split"] == "privleak_forget" else row for row in gold_rows
    ]
    assert "privleak" not in summarise(rows, knowing)
    with pytest.raises(ValueError, match="`split` must be one of"):
        summarise([{"split": "forget", "index": 0}])
    with pytest.raises(ValueError, match="Row 1 of `knowmem_forget` lacks `rougeL_f1`"):
        summarise(
            [{key: value for key, value in row.items() if row["index"] != 1 or key != "rougeL_f1"} for row in knowmem]
        )


@pytest.mark.parametrize(
    "split, key", [("knowmem_retain", "question"), ("verbmem_forget", "prompt"), ("privleak_holdout", "text")]
)
def test_a_reference_of_other_rows_is_refused(split, key, gold, hub, model_dir, tmp_path, capsys):
    """Catches a gold model that was asked something else, and a model that runs before anyone looks."""
    header, rows = read_rows(gold)
    assert match_reference(rows, rows[::-1]) == rows
    other = tmp_path / "other.jsonl"
    changed = [{**row, key: "another"} if (row["split"], row["index"]) == (split, 1) else row for row in rows]
    other.write_text("".join(json.dumps(row) + "\n" for row in [header, *changed]), encoding="utf-8")
    arguments = ["muse", "--model", model_dir, "--output", str(tmp_path / "out"), "--dataset", hub]
    assert main([*arguments, "--reference", str(other)]) == 1
    assert f"`reference` has another {key} in {split} row 1" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    fewer = [row for row in rows if (row["split"], row["index"]) != (split, 1)]
    with pytest.raises(ValueError, match=f"`reference` has {SPLITS[split] - 1} {split} rows"):
        summarise(rows, fewer)
