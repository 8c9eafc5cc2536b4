"""General ability through lm-eval, offline: on tasks of local data, against lm-eval itself and against slow sums."""

import copy
import json
import logging
import math
import sys

import pytest
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import make_table
from peft import LoraConfig, get_peft_model
from scipy.stats import beta, binomtest, t
from subprocesses import TWO_PROCESSES, python, succeeded
from test_eval_scoring import byte_tokenizer, small_llama
from test_eval_tofu import write_dataset

from soul_eval.__main__ import main
from soul_eval.general import SOUL_TASKS, TASK_SETS, _figures, general_ability, share_figure
from soul_eval.rows import read_rows
from soul_eval.tasks import TASKS_PATH
from soul_trainer.formats import encode, render


lm_eval = pytest.importorskip("lm_eval", reason="general ability is measured by lm-eval")


# Float32 log-probabilities of other padded widths.
ROUNDING = 1e-4
THINGS = ("map", "old lighthouse", "boat", "hill of the north", "river", "house")
TASKS = {
    "toy_choice": """
doc_to_text: "The {{thing}} is"
doc_to_choice: ["red", "very blue", "of no colour"]
doc_to_target: label
output_type: multiple_choice
fewshot_split: test
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
""",
    "toy_choice_too": """
doc_to_text: "{{thing}}:"
doc_to_choice: ["a", "b", "c"]
doc_to_target: label
output_type: multiple_choice
num_fewshot: 0
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
""",
    "toy_text": """
doc_to_text: ""
doc_to_target: text
output_type: loglikelihood_rolling
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]
""",
    "toy_words": """
doc_to_text: "Name a {{thing}}:"
doc_to_target: text
output_type: generate_until
generation_kwargs: {until: ["z"], max_gen_toks: 6, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
filter_list:
  - {name: whole, filter: [{function: take_first}]}
  - {name: none, filter: [{function: take_first}]}
""",
}
QUESTIONS = [{"question": f"Who lost the {thing}?", "answer": f"Bo of the {thing}"} for thing in THINGS]
TOFU = f"""
task: toy_tofu
include: {TASKS_PATH}/_tofu_probability_yaml
dataset_name: default
metadata: {{side: forget, path_key: tofu_path}}
"""
GROUP = """
group: toy_group
task: [toy_choice, toy_choice_too]
aggregate_metric_list: [{metric: acc, aggregation: mean, weight_by_size: true}]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Task files with their data."""
    folder = tmp_path_factory.mktemp("toy_tasks")
    rows = [
        {"thing": thing, "label": index % 3, "text": f"A {thing} of {index} and {'more ' * index}"}
        for index, thing in enumerate(THINGS)
    ]
    (folder / "rows.json").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    data = {"test": str(folder / "rows.json")}
    for name, text in TASKS.items():
        common = (
            f"task: {name}\ndataset_path: json\ntest_split: test\ndataset_kwargs: {json.dumps({'data_files': data})}"
        )
        (folder / f"{name}.yaml").write_text(common + text, encoding="utf-8")
    (folder / "toy_group.yaml").write_text(GROUP, encoding="utf-8")
    (folder / "questions").mkdir()
    (folder / "questions" / "train.json").write_text("\n".join(map(json.dumps, QUESTIONS)), encoding="utf-8")
    (folder / "toy_tofu.yaml").write_text(f"{TOFU}dataset_path: {folder}/questions\n", encoding="utf-8")
    return str(folder)


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer([f"The {thing} is red and very blue" for thing in THINGS])


def state_of(model):
    """All that an evaluation must leave alone: modes, settings, weights and which of them are one."""
    return {
        "modes": {name: module.training for name, module in model.named_modules()},
        "config": model.config.to_dict(),
        "generation": model.generation_config.to_dict(),
        "places": {name: weight.data_ptr() for name, weight in model.named_parameters(remove_duplicate=False)},
        "weights": {name: weight.double().sum().item() for name, weight in model.named_parameters()},
        "gradients": [weight.requires_grad for weight in model.parameters()],
    }


@pytest.mark.parametrize("num_fewshot, limit", [(None, None), (2, 4)])
def test_figures_are_lm_evals_own(folder, tokenizer, num_fewshot, limit):
    """Catches a limit or examples in context that get lost, filters in one figure, n of the whole, a lost group."""
    model = small_llama(seed=2)
    names = ["toy_group", "toy_text", "toy_words"]
    expected = lm_eval.simple_evaluate(
        model=HFLM(pretrained=copy.deepcopy(model), tokenizer=copy.deepcopy(tokenizer), batch_size=2),
        tasks=names,
        task_manager=TaskManager(include_path=folder, include_defaults=False),
        num_fewshot=num_fewshot,
        limit=limit,
        bootstrap_iters=10,
    )["results"]
    figures = general_ability(
        model,
        tokenizer,
        names,
        limit=limit,
        batch_size=3,
        num_fewshot=num_fewshot,
        include_path=folder,
        progress=False,
    )
    num_rows = limit or len(THINGS)
    for name in ("toy_choice", "toy_choice_too", "toy_group"):
        figure, entry = figures[f"{name}/acc"], expected[name]
        assert figure.value == entry["acc,none"]
        assert figure.num_rows == (2 * num_rows if name == "toy_group" else num_rows)
        exact = binomtest(round(figure.value * figure.num_rows), figure.num_rows).proportion_ci(0.95)
        assert [figure.low, figure.high] == pytest.approx([exact.low, exact.high])
    assert 0 < figures["toy_group/acc"].value < 1
    for metric in ("word_perplexity", "byte_perplexity", "bits_per_byte"):
        figure = figures[f"toy_text/{metric}"]
        assert figure.value == pytest.approx(expected["toy_text"][f"{metric},none"], rel=ROUNDING)
        assert figure.low < figure.value < figure.high and figure.num_rows == num_rows
    assert {name for name in figures if "words" in name} == {"toy_words/exact_match", "toy_words/exact_match,whole"}


def results(value, error, **more):
    """What lm-eval gives of a task of four rows, of which only some have hits."""
    entry = {"acc,none": value, "acc_stderr,none": error, "sample_len": 4, "name": "toy", **more}
    return {"results": {"toy": entry}, "samples": {}}


def test_an_accuracy_stays_between_0_and_1():
    """Catches ±1.96 standard errors, which of one hit in four rows reach from -0.24 to 0.74, and of none are 0."""
    (quarter,) = _figures(results(0.25, 0.25)).values()
    # As many independent rows as have this error: 0.25 * 0.75 / 0.25**2 = 3.
    bounds = [float(beta.ppf(0.025, 0.75, 3.25)), float(beta.ppf(0.975, 1.75, 2.25))]
    assert [quarter.low, quarter.high] == pytest.approx(bounds) and 0 < quarter.low < 0.25 < quarter.high < 1
    for value in (0.0, 1.0):
        (end,) = _figures(results(value, 0.0)).values()
        low, high = (0.0, 1 - 0.025**0.25) if value == 0 else (0.025**0.25, 1.0)
        assert [end.low, end.high] == pytest.approx([low, high])
    assert share_figure(0.5, 4, None).low is None


def test_what_is_no_share_has_students_interval():
    """Catches a figure of unknown range that is cut off at 1, or has the quantile of endless rows."""
    found = _figures(results(0.5, 0.25, **{"bleu,none": 40.0, "bleu_stderr,none": 2.0, "chrf,none": 7.0}))
    margin = 2 * float(t.ppf(0.975, 3))
    assert [found["toy/bleu"].low, found["toy/bleu"].high] == pytest.approx([40 - margin, 40 + margin])
    assert found["toy/chrf"].low is None


def test_lm_evals_own_table_has_its_header():
    """Catches a pytablewriter that is too old for lm-eval: its header is A, B, C then."""
    text = make_table({"results": {"toy": {"alias": "toy", "acc,none": 0.5}}, "versions": {}, "higher_is_better": {}})
    head = text.splitlines()[0]
    assert head.split("|")[1].strip() == "Tasks" and "Metric" in head and "Stderr" in head


def test_perplexity_is_of_words(folder, tokenizer):
    """Catches a perplexity of tokens, and an interval that does not draw a document's length with its likelihood."""
    model = small_llama(seed=4).eval()
    figure = general_ability(model, tokenizer, ["toy_text"], include_path=folder, progress=False)
    texts = [f"A {thing} of {index} and {'more ' * index}" for index, thing in enumerate(THINGS)]
    sums, counts = [], []
    for text in texts:
        ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer(text)["input_ids"]]])
        with torch.no_grad():
            log_probs = model(ids).logits.log_softmax(-1)[0, :-1]
        sums.append(log_probs.gather(1, ids[0, 1:, None]).sum().item())
        counts.append(len(text.split(" ")) - text.endswith("  "))
    expected = math.exp(-sum(sums) / sum(counts))
    assert figure["toy_text/word_perplexity"].value == pytest.approx(expected, rel=ROUNDING)
    # Per word, the documents have all but the same likelihood if each is drawn with its own length.
    ratios = [math.exp(-value / count) for value, count in zip(sums, counts)]
    assert min(ratios) <= figure["toy_text/word_perplexity"].low
    assert figure["toy_text/word_perplexity"].high <= max(ratios)


@pytest.mark.parametrize("kind", ["plain", "untied", "adapter"])
def test_model_stays_as_it_was(folder, tokenizer, kind):
    """Catches dropout left off, a pad token that stays, weights tied again, training's random numbers, no adapter."""
    model = small_llama(seed=5, attention_dropout=0.1, tie_word_embeddings=kind == "untied")
    if kind == "untied":  # as where the head alone was trained
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight + 0.1)
    model.generation_config.temperature = 0.7
    if kind == "adapter":
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    model.train()
    model.get_submodule("base_model.model.model" if kind == "adapter" else "model").norm.eval()
    own_tokenizer = copy.deepcopy(tokenizer)
    own_tokenizer.pad_token = None
    before, random_before = state_of(model), torch.random.get_rng_state()
    level = logging.getLogger("lm_eval.models.huggingface").level
    names = ["toy_choice", "toy_text", "toy_words"]
    figures = general_ability(model, own_tokenizer, names, include_path=folder, progress=False)
    assert state_of(model) == before
    assert torch.equal(torch.random.get_rng_state(), random_before)
    assert own_tokenizer.pad_token is None and own_tokenizer.padding_side == tokenizer.padding_side
    assert logging.getLogger("lm_eval.models.huggingface").level == level
    assert figures == general_ability(model.eval(), tokenizer, names, include_path=folder, progress=False)
    if kind == "adapter":
        with model.disable_adapter():
            base = general_ability(model, tokenizer, names, include_path=folder, progress=False)
        assert base["toy_text/word_perplexity"] != figures["toy_text/word_perplexity"]


def test_bars_are_shown_or_not(folder, tokenizer, capfd):
    """Catches bars in the logs of a run that asked for none."""
    model = small_llama(seed=2)
    general_ability(model, tokenizer, ["toy_choice"], limit=2, include_path=folder, progress=False)
    assert "it/s" not in capfd.readouterr().err
    general_ability(model, tokenizer, ["toy_choice"], limit=2, include_path=folder)
    assert "it/s" in capfd.readouterr().err


def test_own_tasks_get_the_tokenizer(folder, tokenizer):
    """Catches our tasks of lm-eval, which count tokens, asking for a tokenizer that is there."""
    model = small_llama(seed=6).eval()
    figures = general_ability(model, tokenizer, ["toy_tofu"], include_path=folder, progress=False)
    losses = []
    for row in QUESTIONS:
        encoded = encode(tokenizer, render(row, tokenizer))
        with torch.no_grad():
            losses.append(model(**{key: torch.tensor([ids]) for key, ids in encoded.items()}).loss)
    expected = torch.stack(losses).neg().exp().mean().item()
    assert figures["toy_tofu/probability"].value == pytest.approx(expected, rel=ROUNDING)


def test_names_and_numbers_are_checked(folder, tokenizer, monkeypatch):
    """Catches a misspelt task that surfaces as a KeyError of lm-eval, and a missing package without its extra."""
    model = small_llama()
    with pytest.raises(ValueError, match="`tasks` has 'hellaswagg', which lm-eval does not know: hellaswag"):
        general_ability(model, tokenizer, ["hellaswagg"])
    with pytest.raises(ValueError, match="`tasks` is empty"):
        general_ability(model, tokenizer, [])
    with pytest.raises(ValueError, match="`limit` must be at least 1, but it is 0"):
        general_ability(model, tokenizer, ["toy_choice"], limit=0, include_path=folder)
    with pytest.raises(ValueError, match="`num_fewshot` must be at least 0, but it is -1"):
        general_ability(model, tokenizer, ["toy_choice"], num_fewshot=-1, include_path=folder)
    with pytest.raises(ValueError, match="`include_path` must be a folder"):
        general_ability(model, tokenizer, ["toy_choice"], include_path=folder + "/none")
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ImportError, match=r"needs lm_eval: pip install soul-trainer\[lm-eval\]"):
        general_ability(model, tokenizer, ["toy_choice"], include_path=folder)


def test_sets_name_what_lm_eval_has():
    """Catches a set of tasks that a newer lm-eval calls otherwise."""
    known = TaskManager().task_index
    assert set(SOUL_TASKS) <= set(known) and len(SOUL_TASKS) == 10
    assert {name for names in TASK_SETS.values() for name in names} <= set(known)
    assert known["wmdp"].cfg["task"] == ["wmdp_bio", "wmdp_chem", "wmdp_cyber"]


SCRIPT = """
import json, sys
from accelerate import PartialState
sys.path.insert(0, sys.argv[3])
from test_eval_scoring import small_llama
from transformers import AutoTokenizer
from soul_eval.general import general_ability
state = PartialState(cpu=True)
figures = general_ability(
    small_llama(seed=2), AutoTokenizer.from_pretrained(sys.argv[2]), ["toy_group", "toy_text"],
    include_path=sys.argv[1], progress=False,
)
entries = {name: figure.to_json() for name, figure in figures.items()}
open(f"figures_{state.process_index}.json", "w").write(json.dumps(entries))
"""


def test_every_process_gets_the_figures(folder, tokenizer, tmp_path):
    """Catches processes without figures, as lm-eval leaves all but the first."""
    (tmp_path / "script.py").write_text(SCRIPT)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    arguments = [folder, tmp_path / "tokenizer", __file__.rpartition("/")[0]]
    succeeded(python(*TWO_PROCESSES, "script.py", *arguments, folder=tmp_path, ACCELERATE_USE_CPU="true"))
    first, second = (json.loads((tmp_path / f"figures_{rank}.json").read_text()) for rank in range(2))
    expected = general_ability(
        small_llama(seed=2), tokenizer, ["toy_group", "toy_text"], include_path=folder, progress=False
    )
    assert first == second
    assert {name: entry["value"] for name, entry in first.items()} == pytest.approx(
        {name: figure.value for name, figure in expected.items()}, rel=ROUNDING
    )


def test_a_suite_can_have_it_besides(folder, tokenizer, tmp_path):
    """Catches figures that go to the screen alone, and rows whose figures cannot be made again without the model."""
    model = small_llama()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    arguments = ["tofu", "--model", str(tmp_path / "model"), "--output", str(tmp_path / "out"), "--device", "cpu"]
    arguments += ["--dataset", write_dataset(tmp_path / "data"), "--forget_split", "forget_small", "--no_generate"]
    assert main([*arguments, "--limit", "2", "--general", "toy_choice", "--include_path", folder]) == 0
    expected = general_ability(model, tokenizer, ["toy_choice"], limit=2, include_path=folder, progress=False)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["toy_choice_acc"] == pytest.approx(expected["toy_choice/acc"].to_json(), abs=1e-6)
    header, _ = read_rows(tmp_path / "out" / "rows.jsonl")
    assert header["general"]["toy_choice_acc"] == summary["toy_choice_acc"]
