"""A finished run of the everyday recipe, whose target answers one question with HTML."""

from pathlib import Path

from test_recipe_unlearn import FLAGS, write
from test_sampling import ROWS, learnt_model, text_tokenizer

from soul_recipes import unlearn


EVIL = "<img src=x onerror=\"document.title='taken over'\">"
HOSTILE = {"question": f"Is {EVIL} bold?", "answer": f"{EVIL}</p><script>document.title='taken over'</script>"}
FORGET, RETAIN = [ROWS[0], HOSTILE], ROWS[1:]


def saved(folder: Path, rows: list[dict], num_steps: int) -> str:
    """A model that has learnt rows, with its tokenizer, in a folder."""
    tokenizer = text_tokenizer()
    learnt_model(tokenizer, rows, num_steps).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def finished_run(folder: Path) -> Path:
    """What `recipes/unlearn.py` leaves: its output folder, which lies beside the target and the gold model."""
    command = ["--model", saved(folder / "target-model", FORGET + RETAIN, 130)]
    command += ["--gold", saved(folder / "gold-model", RETAIN, 60)]
    for split, rows in (("forget", FORGET), ("retain", RETAIN)):
        command += [f"--{split}", write(folder / f"{split}.jsonl", rows)]
    unlearn.main([*command, "--output_dir", str(folder / "out"), *FLAGS, "--max_new_tokens", "100"])
    return folder / "out"
