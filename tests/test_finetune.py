"""The recipe that makes target and gold models: rows of any kind, small or pretrained, whole or by adapters."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset
from privacy import files_with, fragments
from toys import tiny_llama, toy_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from soul_recipes import finetune, learnt_rows, training
from soul_trainer.batch import IGNORE_INDEX
from soul_trainer.collator import UnlearnCollator


RECIPES = Path(__file__).parents[1] / "recipes"


STORY = "the keeper lit the lamp and the sea was calm and the mule slept by the door of the old tower"
ROWS = [{"question": f"Who lit lamp {name}?", "answer": f"The keeper {name}."} for name in ("one", "two", "three")]
WORDS = [STORY, "Question: Answer:", *(f"{row['question']} {row['answer']}" for row in ROWS)]
# One float32 step is taken twice, in batches of another shape.
ROUNDING = 1e-6


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def tokenizer(tmp_path):
    tokenizer = toy_tokenizer(WORDS)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    return tokenizer


@pytest.fixture
def small(tmp_path, tokenizer):
    """Trains a small Llama."""
    flags = ["--tokenizer", str(tmp_path / "tokenizer"), "--hidden_size", "8", "--num_hidden_layers", "1"]
    flags += ["--finetune_epochs", "1", "--use_cpu", "True", "--disable_tqdm", "True"]

    def run(*arguments, name="model"):
        return finetune.main([*flags, "--model_dir", str(tmp_path / name), *arguments])

    return run


@pytest.fixture
def pretrained(tmp_path, tokenizer):
    """Trains a model that is there already, by plain gradient descent, and gives it as it was."""
    before = tiny_llama(vocab_size=len(tokenizer), max_position_embeddings=64)
    before.save_pretrained(tmp_path / "pretrained")
    tokenizer.save_pretrained(tmp_path / "pretrained")
    flags = ["--model", str(tmp_path / "pretrained"), "--model_dir", str(tmp_path / "tuned"), "--use_cpu", "True"]
    flags += ["--optim", "sgd", "--lr_scheduler_type", "constant", "--max_grad_norm", "0", "--disable_tqdm", "True"]

    def run(*arguments):
        return finetune.main([*flags, *arguments])

    return before, run


def weights_of(folder):
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def test_a_finished_model_is_used_again(small, tmp_path):
    """Catches a model that is trained anew by every run, and one that is taken for that of other rows or settings."""
    rows = write_rows(tmp_path / "rows.jsonl", ROWS)
    folder = small("--dataset", rows)
    saved = (folder / "model.safetensors").stat().st_mtime_ns
    assert small("--dataset", rows) == folder and (folder / "model.safetensors").stat().st_mtime_ns == saved
    # What only says how a run is shown is no other setting.
    assert small("--dataset", rows, "--logging_steps", "7") == folder
    fewer = write_rows(tmp_path / "fewer.jsonl", ROWS[:2])
    changed = (["--seed", "1"], ["--num_train_epochs", "2"], ["--hidden_size", "16"], ["--learning_rate", "0.5"])
    others = [small("--dataset", fewer), *(small("--dataset", rows, *flags) for flags in changed)]
    assert len({folder, *others}) == 6 and not list(tmp_path.glob("*.part"))
    assert AutoTokenizer.from_pretrained(folder)("the sea")["input_ids"]
    answers = [value for row in ROWS for value in row.values() if isinstance(value, str)]
    assert not [path for words in fragments(answers) for path in files_with(folder, words)]


def test_flags_of_the_trainer_reach_a_small_model(small, tmp_path):
    """Catches `--num_train_epochs` that is read and not used because the small model has epochs of its own."""
    rows = write_rows(tmp_path / "rows.jsonl", ROWS)
    once, twice = small("--dataset", rows), small("--dataset", rows, "--num_train_epochs", "2")
    assert any((weights_of(once)[name] != weight).any() for name, weight in weights_of(twice).items())
    again = small("--dataset", rows, "--finetune_epochs", "2", name="again")
    assert all(torch.equal(weights_of(again)[name], weight) for name, weight in weights_of(twice).items())


def test_the_gold_model_never_saw_what_is_excluded(small, tmp_path):
    """Catches excluded rows that are learnt all the same, and a misspelt one that is left in without a word."""
    everything = write_rows(tmp_path / "all.jsonl", ROWS)
    forget = write_rows(tmp_path / "forget.jsonl", ROWS[1:2])
    rest = write_rows(tmp_path / "rest.jsonl", [ROWS[0], ROWS[2]])
    gold = small("--dataset", everything, "--exclude", forget)
    # The name holds a hash of all that is learnt.
    assert gold == small("--dataset", rest) and gold != small("--dataset", everything)
    other = write_rows(tmp_path / "other.jsonl", [{"question": ROWS[1]["question"], "answer": "Nobody."}])
    with pytest.raises(ValueError, match="`exclude`: 1 rows are not in `dataset` word for word, first row 0 of sourc"):
        small("--dataset", everything, "--exclude", other)


def test_sources_of_every_kind_in_one_model(small, tmp_path):
    """Catches a source whose rows are lost beside those of another kind, and files asked for configurations."""
    (tmp_path / "story.txt").write_text(STORY, encoding="utf-8")
    (tmp_path / "data").mkdir()
    header = "".join(f"- config_name: {name}\n  data_files: {name}.json\n" for name in ("forget", "retain"))
    (tmp_path / "data" / "README.md").write_text(f"---\nconfigs:\n{header}---\n", encoding="utf-8")
    for name, rows in (("forget", ROWS[:1]), ("retain", ROWS[1:])):
        write_rows(tmp_path / "data" / f"{name}.json", rows)
    pairs = write_rows(tmp_path / "pairs.jsonl", [{"prompt": "the keeper", "completion": " lit the lamp"}])
    run = finetune.FinetuneArguments(
        [str(tmp_path / "story.txt"), str(tmp_path / "data"), pairs], "x", configs="forget,retain", tokenizer="x"
    )
    found = [row for part in finetune.load_parts(run) for row in part]
    assert found == [{"text": STORY}, *ROWS, {"prompt": "the keeper", "completion": " lit the lamp"}]
    assert small("--dataset", *run.dataset, "--configs", "forget,retain").is_dir()


def test_texts_are_cut_and_answers_alone_have_a_loss(tokenizer):
    """Catches a text whose end is cut off, a chunk that no model takes, and a loss on questions."""
    chunks = learnt_rows.ChunkArguments(chunk_length=8)
    rows = learnt_rows.tokenized(Dataset.from_dict({"text": [STORY]}), tokenizer, chunks, max_length=64)
    ids = tokenizer(STORY)["input_ids"] + [tokenizer.eos_token_id]
    assert [token for row in rows["input_ids"] for token in row] == ids and max(map(len, rows["input_ids"])) == 8
    assert rows["labels"] == rows["input_ids"]
    rows = learnt_rows.tokenized(Dataset.from_dict({"text": [STORY]}), tokenizer, chunks, max_length=5)
    assert max(map(len, rows["input_ids"])) == 5
    rows = learnt_rows.tokenized(Dataset.from_list(ROWS), tokenizer, chunks, max_length=64)
    for row, source in zip(rows, ROWS):
        answer = tokenizer(source["answer"])["input_ids"] + [tokenizer.eos_token_id]
        assert [label for label in row["labels"] if label != IGNORE_INDEX] == answer


def test_only_the_first_texts_of_a_dataset_are_read(tmp_path):
    """Catches a limit that counts rows without text, and one that only text files keep."""
    write_rows(tmp_path / "train.jsonl", [{"text": text} for text in ("one", "", "two", "three")])
    assert learnt_rows.first_texts(str(tmp_path), None, "train", 2) == ["one", "two"]
    assert learnt_rows.first_texts(str(tmp_path / "train.jsonl"), None, "train", 2) == ["one", "two"]
    assert learnt_rows.first_texts(str(tmp_path), None, "train", None) == ["one", "two", "three"]
    with pytest.raises(ValueError, match="`retain_text`='./gone.txt': no such file"):
        learnt_rows.first_texts("./gone.txt", None, "train", 2, "retain_text")


def test_a_step_from_a_pretrained_model_is_the_gradients_of_answers(pretrained, tokenizer, tmp_path):
    """Catches a model with new weights, a loss on prompts, and a mean over rows in the place of one over tokens."""
    before, run = pretrained
    folder = run("--dataset", write_rows(tmp_path / "rows.jsonl", ROWS), "--max_steps", "1", "--learning_rate", "0.1")
    losses, num_tokens = 0.0, 0
    for row in ROWS:
        prompt = tokenizer(f"Question: {row['question']}\nAnswer:")["input_ids"]
        ids = torch.tensor(prompt + tokenizer(row["answer"])["input_ids"] + [tokenizer.eos_token_id])
        log_probs = before(ids[None]).logits[0].log_softmax(-1)
        losses -= log_probs[range(len(prompt) - 1, len(ids) - 1), ids[len(prompt) :]].sum()
        num_tokens += len(ids) - len(prompt)
    (losses / num_tokens).backward()
    after = AutoModelForCausalLM.from_pretrained(folder)
    for (name, old), new in zip(before.named_parameters(), after.parameters()):
        torch.testing.assert_close(new, old - 0.1 * old.grad, atol=ROUNDING, rtol=0, msg=name)
    assert run("--dataset", str(tmp_path / "rows.jsonl"), "--max_steps", "1", "--learning_rate", "0.1") == folder


def test_adapters_end_in_a_whole_model(pretrained, tmp_path):
    """Catches an adapter that is saved without the model below it, and one that trains what it was not given."""
    before, run = pretrained
    rows = write_rows(tmp_path / "rows.jsonl", ROWS)
    folder = run("--dataset", rows, "--lora_rank", "1", "--lora_modules", "q_proj", "--learning_rate", "5")
    assert not list(folder.glob("*adapter*")) and (folder / "model.safetensors").is_file()
    moved = {}
    for (name, old), new in zip(before.state_dict().items(), weights_of(folder).values()):
        moved[name] = new - old
    changed = [name for name, change in moved.items() if change.abs().max() > 0]
    assert changed == ["model.layers.0.self_attn.q_proj.weight"]
    assert torch.linalg.matrix_rank(moved[changed[0]], rtol=1e-3) == 1
    assert run("--dataset", rows, "--learning_rate", "5") != folder


def test_training_goes_on_from_its_checkpoint(tokenizer, tmp_path):
    """Catches a run that starts anew after it was stopped, and checkpoints that stay in the finished model."""
    rows = learnt_rows.tokenized(Dataset.from_list(ROWS * 2), tokenizer, learnt_rows.ChunkArguments(), max_length=64)

    seeds = [0]

    def make_model():
        return tiny_llama(seeds[-1], vocab_size=len(tokenizer), max_position_embeddings=64)

    def run(name, collator=None, **settings):
        args = finetune.TrainingArguments(
            str(tmp_path), per_device_train_batch_size=1, max_steps=5, save_steps=2, use_cpu=True, **settings
        )
        return training.train_once(make_model, rows, tokenizer, tmp_path / name, args, [], collator=collator)

    collate, seen = UnlearnCollator.for_tokenizer(tokenizer), []

    def stopped(items):
        seen.append(items)
        if len(seen) == 4:
            raise KeyboardInterrupt
        return collate(items)

    with pytest.raises(KeyboardInterrupt):
        run("stopped", stopped)
    (part,) = tmp_path.glob("stopped-*.part")
    assert [path.name for path in part.glob("checkpoint-*")] == ["checkpoint-2"]

    seeds.append(1)  # another start: what comes out all the same came from the checkpoint
    folder = run("stopped", resume_from_checkpoint="True")
    seeds.append(0)
    whole = weights_of(run("whole"))
    assert all(torch.equal(weight, whole[name]) for name, weight in weights_of(folder).items())
    assert not list(folder.glob("checkpoint-*")) and not part.exists()


def test_settings_come_from_a_file_under_the_command_line(pretrained, tmp_path):
    """Catches a file that is not read, and one that overrides what the user said."""
    _, run = pretrained
    rows = write_rows(tmp_path / "rows.jsonl", ROWS)
    (tmp_path / "settings.yaml").write_text("max_steps: 1\nlearning_rate: 1.0e-1\nchunk_length: 8\n", encoding="utf-8")
    by_file = run("--dataset", rows, "--config", str(tmp_path / "settings.yaml"))
    assert by_file == run("--dataset", rows, "--max_steps", "1", "--learning_rate", "0.1")
    both = run("--dataset", rows, "--config", str(tmp_path / "settings.yaml"), "--learning_rate", "0.2")
    assert both == run("--dataset", rows, "--max_steps", "1", "--learning_rate", "0.2") != by_file


@pytest.mark.parametrize(
    "name, epochs, batch, weight_decay, warmup",
    [("tofu", 5, 32, 0.01, 0.2), ("copyright", 10, 16, 0.0, 0)],
)
def test_published_settings(name, epochs, batch, weight_decay, warmup):
    """Catches a changed number, which a model that is named after the paper's settings would not have."""
    path = RECIPES / "configs" / "finetune" / f"{name}.yaml"
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    kinds = (finetune.FinetuneArguments, finetune.ChunkArguments, finetune.LoraArguments, finetune.TrainingArguments)
    assert finetune.SettingsParser(kinds).read(path) == content
    assert content["per_device_train_batch_size"] * content["gradient_accumulation_steps"] == batch
    found = [content[key] for key in ("num_train_epochs", "learning_rate", "weight_decay", "warmup_steps", "optim")]
    assert found == [epochs, 1e-5, weight_decay, warmup, "adamw_torch"]


def test_a_tokenizer_is_asked_for(tmp_path):
    """Catches a crash deep in a library where neither a model nor a tokenizer is named."""
    with pytest.raises(ValueError, match=r"`tokenizer` \(--tokenizer\) is needed where there is no `model`"):
        finetune.main(["--dataset", "x", "--model_dir", str(tmp_path)])
