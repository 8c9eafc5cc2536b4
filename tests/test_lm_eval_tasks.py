"""The task files for lm-eval: the same model must have the same figures there as in our suites."""

import json
import zlib
from pathlib import Path

import pytest
import torch
from datasets import load_dataset
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from rouge_score.rouge_scorer import RougeScorer
from subprocesses import python, succeeded
from test_eval_scoring import byte_tokenizer, small_llama
from tokenizers.processors import TemplateProcessing

from soul_eval.suites import tofu
from soul_eval.tasks import TASKS_PATH
from soul_trainer.batch import IGNORE_INDEX
from soul_trainer.formats import encode, render


lm_eval = pytest.importorskip("lm_eval", reason="the tasks are lm-eval's")


REAL_TOFU = Path(__file__).parents[2] / "shared" / "tofu"
# What the issue promises. Both sides compute in float32, over other padded widths.
SAME = 1e-4
SPLITS = {"forget": "forget10", "retain": "retain", "real_authors": "real_authors", "world_facts": "world_facts"}
CHAT = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n\n{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n\n{% endif %}"
)


def tofu_rows(split, num_perturbed=5):
    """Rows whose answers differ in length, first token and last word."""
    works = (
        "river",
        "old\n\nlighthouse",
        "map of the northern islands",
        "boat",
        "portrait of her two sisters",
        "hill",
    )
    rows = [
        {
            "question": f"What did {split} {index} paint in {1900 + index}?",
            "answer": f"{split} painted a {work}",
            "paraphrased_answer": f"It was a {work} that {split} painted",
            "perturbed_answer": [f"It was a {word} {work}" for word in "red blue green black big".split()],
        }
        for index, work in enumerate(works)
    ]
    return [{**row, "perturbed_answer": row["perturbed_answer"][:num_perturbed]} for row in rows]


def write_configs(folder, configs):
    """A dataset in the hub's layout: rows by split by configuration."""
    # The cache of `datasets` knows a folder by its name and its configurations, not by its rows.
    folder = folder.with_name(f"{folder.name}-{zlib.crc32(json.dumps(configs).encode())}")
    folder.mkdir()
    entries = ""
    for config, splits in configs.items():
        entries += f"- config_name: {config}\n  data_files:\n"
        for split, rows in splits.items():
            (folder / f"{config}_{split}.json").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
            entries += f"  - split: {split}\n    path: {config}_{split}.json\n"
    (folder / "README.md").write_text(f"---\nconfigs:\n{entries}---\n", encoding="utf-8")
    return str(folder)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    configs = {f"{name}_perturbed": tofu_rows(split) for split, name in SPLITS.items()}
    for name in ("real_authors", "world_facts"):
        columns = ("question", "answer", "perturbed_answer")
        configs[f"{name}_perturbed"] = [{key: row[key] for key in columns} for row in tofu_rows(name, 3)]
    folder = tmp_path_factory.mktemp("data") / "tofu"
    return write_configs(folder, {config: {"train": rows} for config, rows in configs.items()})


def make_tokenizer(kind, texts):
    """A byte-level tokenizer; with `"bos"` it begins each text with a token, with `"chat"` it has a chat template."""
    tokenizer = byte_tokenizer(texts)
    tokenizer.model_max_length = 160
    if kind in ("bos", "ended"):
        tokenizer.add_special_tokens({"bos_token": "<|start|>"})
        marks = [("<|start|>", tokenizer.bos_token_id), ("<|end|>", tokenizer.eos_token_id)]
        single = "<|start|> $A" if kind == "bos" else "$A <|end|>"
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=marks)
    if kind == "chat":
        tokenizer.chat_template = CHAT
    return tokenizer


def trained_llama(tokenizer, rows, steps=30):
    """A model that half knows its answers, so that likelihoods and generations differ between rows."""
    encoded = [encode(tokenizer, render(row, tokenizer)) for row in rows]
    ids, labels = (
        torch.nn.utils.rnn.pad_sequence([torch.tensor(row[key]) for row in encoded], True, padding_value=pad)
        for key, pad in (("input_ids", tokenizer.pad_token_id), ("labels", IGNORE_INDEX))
    )
    model = small_llama(vocab_size=len(tokenizer), max_position_embeddings=160, eos_token_id=tokenizer.eos_token_id)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(steps):
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def suite_rows(model, tokenizer, dataset, limit=None, **settings):
    """The suite's rows of a model."""
    splits = tofu.load_splits(dataset, "forget10", limit=limit)
    return tofu.evaluate_model(model, tokenizer, splits, progress=False, **settings)


def suite_figures(rows):
    """The suite's figures, by the task and the metric that lm-eval should have them under."""
    summary, figures = tofu.summarise(rows), {}
    for split, name in SPLITS.items():
        words = [row["rouge1_recall"] for row in rows if row["split"] == split]
        figures |= {
            (f"tofu_{name}_probability", "probability"): summary[f"{split}_probability"].value,
            (f"tofu_{name}_truth_ratio", "truth_ratio"): summary[f"{split}_truth_ratio"].value,
            (f"tofu_{name}_generation", "rougeL_recall"): summary[f"{split}_rougeL_recall"].value,
            (f"tofu_{name}_generation", "rouge1_recall"): sum(words) / len(words),
        }
    return figures


def task_manager(metadata):
    return TaskManager(include_path=TASKS_PATH, include_defaults=False, metadata=metadata)


def through_lm_eval(model, tokenizer, tasks, metadata, lm_settings=None, **settings):
    """lm-eval's results, from Python, on a model in memory."""
    manager = task_manager({"tokenizer": tokenizer, **metadata})
    model = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4, **(lm_settings or {}))
    return lm_eval.simple_evaluate(
        model=model,
        tasks=tasks,
        task_manager=manager,
        gen_kwargs={"max_gen_toks": 24},
        bootstrap_iters=0,
        **settings,
    )


def values_of(results):
    """lm-eval's values by task and metric."""
    return {
        (task, key.partition(",")[0]): value
        for task, entry in results["results"].items()
        for key, value in entry.items()
        if key.endswith(",none") and "_stderr" not in key
    }


@pytest.mark.parametrize("kind", ["plain", "bos", "chat"])
def test_tofu_figures_are_those_of_the_suite(dataset, kind):
    """
    Catches an answer without its end, a mean over bytes, a prompt with other white space, a start token too many, the
    white space before a chat's answer counted as answer, options taken for paraphrases, a generation cut at a line.
    """
    tokenizer = make_tokenizer(kind, [row["answer"] for split in SPLITS for row in tofu_rows(split)])
    model = trained_llama(tokenizer, [row for split in SPLITS for row in tofu_rows(split)])
    rows = suite_rows(model, tokenizer, dataset, max_new_tokens=24)
    expected = suite_figures(rows)
    tasks = [f"tofu_{name}" for name in SPLITS.values()]
    results = through_lm_eval(model, tokenizer, tasks, metadata={"tofu_path": dataset})
    values = values_of(results)
    assert {key: values[key] for key in expected} == pytest.approx(expected, abs=SAME)
    # A probability of 0 or 1, or words that are all or none right, would agree by chance.
    assert all(0.01 < value < 0.99 for value in expected.values()), expected
    for split, name in SPLITS.items():
        right = [row["paraphrased_nll"] < min(row["perturbed_nll"]) for row in rows if row["split"] == split]
        assert values[f"tofu_{name}_truth_ratio", "acc"] == sum(right) / len(right)
        assert results["n-samples"][f"tofu_{name}_generation"] == {"original": 6, "effective": 6}
    better = results["higher_is_better"]
    assert better["tofu_forget10_probability"] == {"probability": False}
    assert better["tofu_forget10_truth_ratio"] == {"truth_ratio": True, "acc": False}
    assert better["tofu_retain_generation"] == {"rougeL_recall": True, "rouge1_recall": True}


def test_tasks_follow_the_suites_template(dataset):
    """Catches a template of the user's that only one side knows, and a chat template used in spite of it."""
    tokenizer = make_tokenizer("chat", ["a river"])
    model = small_llama(max_position_embeddings=160)
    template = "Q: {question}\n\nA: {answer}"
    rows = suite_rows(model, tokenizer, dataset, prompt_template=template, generate=False)
    losses = torch.tensor([row["answer_nll"] for row in rows if row["split"] == "forget"])
    settings = {"tofu_path": dataset, "prompt_template": template}
    results = through_lm_eval(model, tokenizer, ["tofu_forget10_probability"], metadata=settings)
    expected = (-losses).exp().mean().item()
    assert values_of(results)["tofu_forget10_probability", "probability"] == pytest.approx(expected, abs=SAME)
    with pytest.raises(ValueError, match="`prompt_template` in the metadata exclude each other"):
        through_lm_eval(model, tokenizer, ["tofu_forget10_probability"], metadata=settings, apply_chat_template=True)


@pytest.mark.parametrize("kind, add_bos_token", [("ended", None), ("bos", False)])
@pytest.mark.parametrize("part", ["probability", "generation"])
def test_other_tokens_than_ours_are_refused(dataset, kind, add_bos_token, part):
    """Catches figures of a prompt that ends with the end of sequence, or that lacks the token that begins a text."""
    tokenizer = make_tokenizer(kind, ["a river"])
    model = small_llama(vocab_size=len(tokenizer), max_position_embeddings=160)
    settings = {"tofu_path": dataset, "add_bos_token": add_bos_token}
    with pytest.raises(ValueError, match="lm-eval makes other tokens than training does"):
        through_lm_eval(
            model,
            tokenizer,
            [f"tofu_forget10_{part}"],
            metadata=settings,
            lm_settings={"add_bos_token": add_bos_token},
        )


def test_tokenizer_is_asked_for(dataset):
    """Catches a crash far from its cause where no argument names the tokenizer."""
    manager = task_manager({"tofu_path": dataset})
    task = manager.load(["tofu_forget10_probability"])["tasks"]["tofu_forget10_probability"]
    with pytest.raises(ValueError, match=r"needs the model's `tokenizer`.*--metadata '{\"tokenizer\": \"NAME\"}'"):
        task.build_all_requests(limit=1)


def test_rows_of_a_folder_are_read_anew(tmp_path):
    """Catches figures of the rows that a folder of this name had the last time."""
    folder = write_configs(tmp_path / "rows", {"forget10_perturbed": {"train": tofu_rows("first")}})
    for split in ("first", "second"):
        rows = tofu_rows(split)
        (Path(folder) / "forget10_perturbed_train.json").write_text("\n".join(map(json.dumps, rows)))
        [task] = task_manager({"tofu_path": folder}).load(["tofu_forget10_generation"])["tasks"].values()
        assert [row["answer"] for row in task.eval_docs] == [row["answer"] for row in rows]


@pytest.mark.skipif(not REAL_TOFU.is_dir(), reason="needs TOFU's own files in ../shared/tofu")
def test_real_tofu_has_the_figures_of_the_suite():
    """Catches columns and texts that only the real files have: quotes, names with accents, long answers."""
    rows = [*load_dataset(str(REAL_TOFU), "forget10")["train"].select(range(6))]
    tokenizer = make_tokenizer("bos", [row["question"] + " " + row["answer"] for row in rows])
    tokenizer.model_max_length = 1024
    model = small_llama(vocab_size=len(tokenizer), max_position_embeddings=1024, seed=3)
    expected = suite_figures(suite_rows(model, tokenizer, str(REAL_TOFU), limit=4, max_new_tokens=24))
    tasks = [f"tofu_{name}" for name in SPLITS.values()]
    results = through_lm_eval(model, tokenizer, tasks, metadata={"tofu_path": str(REAL_TOFU)}, limit=4)
    values = values_of(results)
    assert {key: values[key] for key in expected} == pytest.approx(expected, abs=SAME)


def test_command_line_runs_the_tasks(dataset, tmp_path):
    """Catches tasks that only Python can run: a tokenizer that no argument names, settings that JSON cannot hold."""
    tokenizer = make_tokenizer("bos", [row["answer"] for row in tofu_rows("forget")])
    model = trained_llama(tokenizer, tofu_rows("forget"))
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    expected = suite_figures(suite_rows(model, tokenizer, dataset, limit=5, max_new_tokens=24))
    arguments = ["-m", "lm_eval", "--model", "hf", "--model_args", f"pretrained={tmp_path / 'model'}"]
    arguments += ["--include_path", TASKS_PATH, "--tasks", "tofu_forget10", "--device", "cpu", "--batch_size", "4"]
    arguments += ["--metadata", json.dumps({"tofu_path": dataset}), "--gen_kwargs", "max_gen_toks=24", "--limit", "5"]
    arguments += ["--log_samples", "--output_path", str(tmp_path / "out")]
    table = succeeded(python(*arguments, folder=tmp_path))
    assert "rougeL_recall" in table and "truth_ratio" in table
    [path] = (tmp_path / "out").rglob("results_*.json")
    values = values_of(json.loads(path.read_text()))
    expected = {key: value for key, value in expected.items() if key[0].startswith("tofu_forget10_")}
    assert {key: values[key] for key in expected} == pytest.approx(expected, abs=SAME)


@pytest.fixture(scope="module")
def muse_rows():
    def pairs(kind, count):
        return [
            {"question": f"Who {kind} the {thing}?", "answer": f"{name} the {kind}er"}
            for thing, name in zip(("map", "boat", "hill"), ("Ada", "Bo", "Cy"))
        ][:count]

    prompts = ["Once a boat", "The old map of", "Ada the painter"]
    return {
        "knowmem": {
            "forget_qa": pairs("paint", 3),
            "forget_qa_icl": pairs("draw", 3),
            "retain_qa": pairs("sail", 3),
            "retain_qa_icl": pairs("build", 2),
        },
        "verbmem": {"forget": [{"prompt": prompt, "gt": " was lost on a hill " * 12} for prompt in prompts]},
    }


def greedy(model, tokenizer, prompt, max_new_tokens):
    """MUSE's generation, without a batch, a cache or `generate`."""
    ids = tokenizer(prompt)["input_ids"]
    new = []
    with torch.no_grad():
        while len(new) < max_new_tokens and tokenizer.eos_token_id not in new:
            new.append(model(torch.tensor([ids + new])).logits[0, -1].argmax().item())
    return tokenizer.decode(new, skip_special_tokens=True)


def test_muse_asks_and_measures_as_published(muse_rows, tmp_path):
    """
    Catches pairs in context that are left out, shuffled or of the other split, a missing space after "Answer:", text
    after the answer that is scored, a reference that is not cut, stems, and recall for F1.
    """
    knowmem, verbmem = muse_rows["knowmem"], muse_rows["verbmem"]["forget"]
    texts = [f"Question: {row['question']}\nAnswer: {row['answer']}\n\n" for rows in knowmem.values() for row in rows]
    tokenizer = make_tokenizer("bos", texts)
    tokenizer.model_max_length = 1024
    # Trained to go on with another question, so that there is something to cut off.
    rows = [{"prompt": text[:-30], "completion": text[-30:] + texts[0]} for text in texts]
    rows += [{"prompt": row["prompt"], "completion": row["gt"][:60]} for row in verbmem]
    encoded = [encode(tokenizer, render(row, tokenizer)) for row in rows]
    model = small_llama(vocab_size=len(tokenizer), max_position_embeddings=1024, eos_token_id=tokenizer.eos_token_id)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(30):
        for row in encoded[::2]:
            model(input_ids=torch.tensor([row["input_ids"]]), labels=torch.tensor([row["input_ids"]])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()

    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    expected, num_cut = {}, 0
    for side in ("forget", "retain"):
        shown = "".join(f"Question: {r['question']}\nAnswer: {r['answer']}\n\n" for r in knowmem[f"{side}_qa_icl"])
        scores = []
        for row in knowmem[f"{side}_qa"]:
            whole = said = greedy(model, tokenizer, f"{shown}Question: {row['question']}\nAnswer: ", 32)
            for word in ("\n\n", "\nQuestion", "Question:"):
                said = said.split(word)[0]
            num_cut += said != whole
            scores.append(scorer.score(row["answer"], said)["rougeL"])
        expected[f"muse_news_knowmem_{side}", "rougeL_f1"] = sum(score.fmeasure for score in scores) / 3
        expected[f"muse_news_knowmem_{side}", "rougeL_recall"] = sum(score.recall for score in scores) / 3
    scores = []
    for row in verbmem:
        reference = tokenizer.decode(tokenizer(row["gt"])["input_ids"][:128], skip_special_tokens=True)
        assert reference != row["gt"]
        scores.append(scorer.score(reference, greedy(model, tokenizer, row["prompt"], 128))["rougeL"].fmeasure)
    expected["muse_news_verbmem", "rougeL_f1"] = sum(scores) / 3
    assert num_cut and len(set(expected.values())) == len(expected) and min(expected.values()) > 0, expected

    metadata = {"muse_news_path": write_configs(tmp_path / "muse", muse_rows), "tokenizer": tokenizer}
    results = lm_eval.simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2),
        tasks=["muse_news_knowmem", "muse_news_verbmem"],
        task_manager=task_manager(metadata),
        bootstrap_iters=0,
    )
    values = values_of(results)
    assert {key: values[key] for key in expected} == pytest.approx(expected, abs=1e-12)
    assert results["n-shot"]["muse_news_knowmem_retain"] == 2


@pytest.mark.parametrize(
    "name, reference, key, expected",
    [
        ("tofu_retain_generation", "answer", "rougeL_recall", 1 / 2),
        ("muse_news_knowmem_forget", "answer", "rougeL_f1", 0),
        ("muse_news_verbmem", "gt", "rougeL_f1", 0),
    ],
)
def test_words_are_compared_as_published(dataset, muse_rows, tmp_path, name, reference, key, expected):
    """Catches TOFU's words without the stemmer, and MUSE's with it."""
    paths = {"tofu_path": dataset, "muse_news_path": write_configs(tmp_path / "muse", muse_rows)}
    task = task_manager({**paths, "tokenizer": make_tokenizer("plain", ["a"])}).load([name])["tasks"][name]
    assert task.process_results({reference: "paintings drowned"}, ["the painting, sunk"])[key] == expected


def test_every_file_is_a_task_or_a_group_of_them():
    """Catches a file that lm-eval skips in silence, a group of tasks that do not exist, two files of one name."""
    manager = task_manager({})
    files = {path.stem for path in Path(TASKS_PATH).glob("*.yaml")}
    assert set(manager.all_tasks) == files
    tofu_sets = ("forget01", "forget05", "forget10", "retain", "real_authors", "world_facts")
    groups = {f"tofu_{name}" for name in tofu_sets} | {f"muse_{corpus}_knowmem" for corpus in ("news", "books")}
    assert set(manager.all_groups) == groups
    members = [member for group in groups for member in manager.task_index[group].cfg["task"]]
    alone = {"muse_news_verbmem", "muse_books_verbmem"}
    assert sorted(members) == sorted(set(manager.all_subtasks) - alone)
    for name in manager.all_subtasks:
        cfg = manager.task_index[name].cfg
        expected = {"tofu": "locuslab/TOFU", "muse_n": "muse-bench/MUSE-News", "muse_b": "muse-bench/MUSE-Books"}
        assert cfg["dataset_path"] == next(path for start, path in expected.items() if name.startswith(start))
        if name.startswith("tofu_"):
            assert name == f"tofu_{cfg['dataset_name'].removesuffix('_perturbed')}_{name.rpartition('_')[2]}" or (
                name.endswith("_truth_ratio")
            )
            assert cfg["metadata"]["side"] == ("forget" if "_forget" in name else "retain")
            assert ("options" in cfg["metadata"]) == (cfg["dataset_name"][:4] in ("real", "worl"))
