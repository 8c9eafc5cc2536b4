"""The recipe for MUSE, from rows to report, on a few articles."""

import json

import pytest
from muse_data import DATA, muse_tokenizer, write_plain
from privacy import check_files

from soul_eval.rows import read_rows
from soul_recipes import muse as recipe
from soul_recipes.muse_texts import SEPARATOR, MuseTexts
from soul_trainer.chunks import text_start


SMALL = "--use_cpu --articles 2 --hidden_size 16 --finetune_epochs 1 --num_train_epochs 1 --max_length 48 --rho 1"
SMALL += " --evaluations 1 --knowmem_tokens 4 --verbmem_tokens 8 --hessian_interval 2 --disable_tqdm true"


def run(folder, *arguments):
    return recipe.main(["--output_dir", str(folder), *SMALL.split(), *arguments])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("muse")


def test_the_recipe_runs_from_rows_to_report(folder, capsys):
    """Would catch a break anywhere between articles and report, and an optimizer that is not compared."""
    runs = run(folder / "once")
    assert [each.name for each in runs] == ["AdamW", "SOUL"]
    out = capsys.readouterr().out
    assert all(f"\n{name} " in out for name in ("target", "AdamW", "SOUL", "gold"))
    rows = read_rows(folder / "once" / "soul.rows.jsonl")[1]
    counts = {split: sum(row["split"] == split for row in rows) for split in recipe.muse.SPLITS}
    assert counts == {"knowmem_forget": 6, "knowmem_retain": 6, **dict.fromkeys(recipe.muse.SPLITS[2:], 2)}
    assert "privleak" in runs[0].summary and (folder / "once" / "report.html").is_file()
    forget = [row["answer"] for row in rows if row["split"] in ("knowmem_forget", "verbmem_forget")]
    check_files(folder / "once", forget, ["soul.rows.jsonl", "target.rows.jsonl", "report.html"])


def test_growing_forget_sets_start_from_the_target_each(folder):
    """Would catch sets that are all the same, a run that starts where another ended, and runs in one folder."""
    runs = run(folder / "scal", "--requests", "scal", "--optim", "adamw_torch")
    assert [each.name for each in runs] == [f"AdamW forget_{fold}" for fold in (1, 2, 3, 4)]
    steps, targets = [], set()
    for fold in (1, 2, 3, 4):
        header, _ = read_rows(folder / "scal" / f"adamw_torch-forget_{fold}.rows.jsonl")
        state = folder / "scal" / f"adamw_torch-forget_{fold}" / "trainer_state.json"
        steps.append(json.loads(state.read_text(encoding="utf-8"))["global_step"])
        targets.add(header["settings"]["target"])
    assert steps == sorted(set(steps)) and len(targets) == 1


def test_requests_follow_one_another(folder):
    """Would catch a request that starts from the target, and one whose texts nobody asks about."""
    runs = run(folder / "sust", "--requests", "sust", "--optim", "adamw_torch")
    assert [each.name for each in runs] == [f"AdamW {fold}/4" for fold in (1, 2, 3, 4)]
    former = None
    for fold, each in enumerate(runs, 1):
        asked = [row["index"] for row in each.rows if row["split"] == recipe.muse.VERBMEM]
        assert asked == list(range(2 * fold))
        header, _ = read_rows(folder / "sust" / "adamw_torch" / f"request-{fold}.rows.jsonl")
        assert former is None or header["settings"]["target"] == former
        former = str(folder / "sust" / "adamw_torch" / f"request-{fold}")


def test_texts_are_joined_and_cut_as_muse_does(tmp_path):
    """Would catch texts that are cut one by one, and MUSE's own lists of bare texts that are not read."""
    raw = ["Ada painted the old map.", "Bo lost a boat."]
    dataset = write_plain(tmp_path / "news", {**DATA, "raw": {"forget": [], "retain1": []}})
    (tmp_path / "news" / "raw" / "forget.json").write_text(json.dumps(raw), encoding="utf-8")
    tokenizer = muse_tokenizer()
    chunks = MuseTexts(dataset).chunks("raw", "forget", tokenizer, 6)
    start = text_start(tokenizer)
    joined = [token for ids in chunks["input_ids"] for token in ids[len(start) :]]
    assert joined == tokenizer(SEPARATOR.join(raw), add_special_tokens=False)["input_ids"]
    assert len(start) == 1 and max(map(len, chunks["input_ids"])) == 6


def test_a_continuation_is_of_the_text_and_follows_its_prompt(tmp_path):
    """Would catch prompts that hold the answer, a prompt of half the text, and indices of another request's rows."""
    texts = ["Ada painted the old map.", "Bo lost a boat. " * 5]
    (tmp_path / "sust").mkdir()
    (tmp_path / "sust" / "forget_2.json").write_text(json.dumps(texts), encoding="utf-8")
    rows = MuseTexts(str(tmp_path)).continuations(1, 2, muse_tokenizer(), 4, 6)
    assert [row["index"] for row in rows] == [2, 3] and {row["split"] for row in rows} == {"verbmem_forget"}
    assert all(text.startswith(row["prompt"] + row["answer"]) for text, row in zip(texts, rows))
    assert {row["end"] for row in rows} == {muse_tokenizer().eos_token}


def test_an_unknown_kind_of_requests_is_refused():
    """Would catch a typing error that runs something else."""
    with pytest.raises(ValueError, match="once, scal, sust"):
        recipe.MuseRunArguments(requests="twice")
