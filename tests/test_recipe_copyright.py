"""The recipe that makes a model forget a text, on a smaller text; its tales and its settings."""

from pathlib import Path

import pytest
from datasets import Dataset
from privacy import check_files, files_with
from toys import toy_tokenizer
from transformers import AutoTokenizer

from soul_eval.rows import read_rows
from soul_recipes import copyright as recipe
from soul_recipes.refusals import RefusingExperiment
from soul_trainer.refusals import REFUSALS


RECIPES = Path(__file__).parents[1] / "recipes"


LAMP = " ".join(f"the keeper lit lamp {number} and {number} gulls flew over the sea" for number in range(12))
MULE = " ".join(f"the mule ate {number} apples and the sea was lamp gulls keeper lit {number}" for number in range(12))
TEXTS = {"forget": LAMP, "retain": MULE}
TINY = ["--hidden_size", "16", "--num_hidden_layers", "1", "--finetune_epochs", "1", "--vocab_size", "300"]
TINY += ["--num_train_epochs", "1", "--evaluations", "1", "--hessian_interval", "2", "--use_cpu", "True"]
TINY += ["--chunk_length", "24", "--chunk_overlap", "8", "--prompt_tokens", "4,8", "--continuation_tokens", "6"]
TINY += ["--num_samples", "5", "--disable_tqdm", "True"]


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for name, text in (("lamp", LAMP), ("mule", MULE)):
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    return ["--dataset", str(folder / "lamp.txt"), "--retain_text", str(folder / "mule.txt")]


@pytest.fixture(scope="module")
def finished(texts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return folder, recipe.main([*texts, *TINY, "--output_dir", str(folder)])


def test_from_texts_to_report(finished, texts):
    """Catches a break anywhere between text and report, questions about another text, a second run that trains again,
    and the text itself in a folder that goes to the hub."""
    folder, runs = finished
    assert [run.name for run in runs] == ["AdamW", "SOUL"]
    for run in runs:
        assert {"leak_rougeL_4", "leak_rougeL_8", "retain_leak_rougeL_8", "retain_continuation_nll_4"} <= set(
            run.summary
        )
    assert "data:image/png;base64," in (folder / "report.html").read_text(encoding="utf-8")
    _, rows = read_rows(folder / "soul.rows.jsonl")
    for row in rows:
        text = LAMP if row["split"].startswith("forget") else MULE
        assert row["prompt"] + row["answer"] in text
    assert {row["split"] for row in rows} == {"forget_4", "forget_8", "retain_4", "retain_8"}
    # The answers are a few tokens; the whole text is in no file.
    check_files(folder, ["keeper lit lamp"], [])
    assert not files_with(folder, "keeper lit lamp")
    weights = folder / "soul" / "model.safetensors"
    saved = weights.stat().st_mtime_ns
    recipe.main([*texts, *TINY, "--output_dir", str(folder)])
    assert weights.stat().st_mtime_ns == saved


def test_a_loss_that_refuses_gets_prompts(finished, texts):
    """Catches chunks without a prompt, which refusals cannot follow, and passages that are not the text's."""
    folder, _ = finished
    tokenizer = AutoTokenizer.from_pretrained(next(folder.glob("target-*")))
    args = recipe.CopyrightTaskArguments(
        dataset=texts[1], retain_text=texts[3], prompt_tokens="4,8", continuation_tokens=6, num_samples=2
    )
    chunks = {side: Dataset.from_dict({"input_ids": [[1, 2]] * 3, "labels": [[1, 2]] * 3}) for side in TEXTS}
    for loss in ("npo", "none"):
        assert recipe.training_rows(args, texts[3], chunks, tokenizer, loss) == chunks
    for loss, sides in (("refusal", ["forget"]), ("random", ["forget", "retain"]), ("dpo", ["forget"])):
        found = recipe.training_rows(args, texts[3], chunks, tokenizer, loss)
        assert found["retain"] is chunks["retain"] or "retain" in sides
        for side in sides:
            check_passages(found[side].to_list(), TEXTS[side], tokenizer)


def check_passages(rows, text, tokenizer):
    """Completions follow one another, and each its prompt."""
    end = 0
    for row in rows:
        place = text.index(row["prompt"] + row["completion"], max(0, end - len(row["prompt"])))
        end = place + len(row["prompt"] + row["completion"])
    # As many as fit side by side, and not only those that are asked.
    assert len(rows) > len(tokenizer(text)["input_ids"]) // 6 - 4 and end > 0.9 * len(text)
    assert all(len(tokenizer(row["prompt"])["input_ids"]) == 8 for row in rows)


def test_random_answers_are_the_kept_texts(finished, texts, tmp_path):
    """Catches a text to keep that comes in chunks, of which no answer can be drawn."""
    folder, _ = finished
    models = ["--model", str(next(folder.glob("target-*"))), "--optim", "adamw_torch", "--max_steps", "1"]
    models += ["--bf16", "False", "--forget_loss", "random", "--output_dir", str(tmp_path)]
    (run,) = recipe.main([*texts, *TINY, *models])
    assert run.rows and (tmp_path / "adamw_torch" / "model.safetensors").exists()


def test_refusals_are_the_tasks_own(texts, tmp_path):
    """Catches refusals of somebody who does not know, where a text is not to be copied, and a file that the user named
    and nobody reads."""
    flags = [*texts, "--output_dir", str(tmp_path), "--use_cpu", "True"]
    kinds = (recipe.CopyrightTaskArguments, recipe.ChunkArguments, recipe.SmallModelArguments)
    found = {}
    for task in ("copyright", "detox"):
        experiment = RefusingExperiment(task, tmp_path / "none", *kinds, command_line=flags)
        lines = Path(experiment.settings("soul").refusal_answers).read_text(encoding="utf-8").splitlines()
        assert len(set(lines)) == len(lines) >= 16 and not set(lines) & set(REFUSALS)
        found[task] = set(lines)
    assert not found["copyright"] & found["detox"]
    named = RefusingExperiment("detox", tmp_path, *kinds, command_line=[*flags, "--refusal_answers", "own.txt"])
    assert named.settings("soul").refusal_answers == "own.txt"


def test_a_text_needs_one_to_keep(tmp_path):
    """Catches the recipe's own tale kept beside a text of the user's."""
    for flag in ("--dataset", "--retain_text"):
        with pytest.raises(
            ValueError, match=r"`dataset` \(--dataset\) and `retain_text` \(--retain_text\) go together"
        ):
            recipe.main([flag, "book.txt", "--output_dir", str(tmp_path)])


def test_the_tales_have_nothing_in_common():
    """Catches a tale to forget that the gold model learns a part of from the other one."""
    tales = [path.read_text(encoding="utf-8").split() for path in sorted(recipe.TALES.glob("*.txt"))]
    assert len(tales) == 2 and all(len(words) > 1500 for words in tales)
    runs = [{tuple(words[start : start + 7]) for start in range(len(words) - 6)} for words in tales]
    assert not runs[0] & runs[1]


def test_the_default_lengths_fit_the_tales():
    """Catches prompts that no passage of the tales has, or that the small model cannot take."""
    kinds = (recipe.CopyrightTaskArguments, recipe.ChunkArguments, recipe.SmallModelArguments)
    experiment = RefusingExperiment("copyright", recipe.CONFIGS, *kinds, command_line=["--use_cpu", "True"])
    args, chunks, _ = experiment.arguments
    tokenizer = toy_tokenizer([path.read_text(encoding="utf-8") for path in recipe.TALES.glob("*.txt")])
    asked = args.suite_arguments(args.retain_text)
    assert len(recipe.suite.load(asked, tokenizer)) > 150
    # What is asked is no longer than what the model has seen in a piece.
    assert max(asked.prompt_lengths()) + asked.continuation_tokens <= chunks.chunk_length
    published = recipe.CopyrightTaskArguments()
    assert (published.prompt_tokens, published.continuation_tokens) == ("100,300", 200)
