"""What unlearning changed, as a file: back to the bit, onto a later version, one tensor at a time."""

import copy
import json
import resource

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file
from scenes import NAMES, question_rows, scene_config, scene_model, scene_tokenizer
from transformers import AutoModelForCausalLM

from soul_trainer import UnlearnTrainer
from soul_trainer.difference import apply_difference, main, save_difference
from soul_trainer.stored_weights import stored_weights
from soul_trainer.weights import weights_digest


ROWS = question_rows(NAMES)
FORGET, RETAIN, HELD_OUT, NEW = ROWS[:4], ROWS[4:12], ROWS[12:16], ROWS[16:]


def answer_loss(model, rows):
    """Mean loss of a model's answers to rows, in nats per token."""
    tokenizer, columns = scene_tokenizer(), {"input_ids": [], "labels": []}
    for row in rows:
        prompt, answer = (
            tokenizer(text)["input_ids"] for text in (f"Question : {row['question']} Answer :", row["answer"])
        )
        columns["input_ids"].append(torch.tensor(prompt + answer))
        columns["labels"].append(torch.tensor([-100] * len(prompt) + answer))
    pad = torch.nn.utils.rnn.pad_sequence
    ids, labels = pad(columns["input_ids"], True), pad(columns["labels"], True, -100)
    return model(input_ids=ids, labels=labels).loss


def learn(model, rows, num_steps, learning_rate):
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    for _ in range(num_steps):
        answer_loss(model, rows).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def moved(model, seed=1, size=1e-3):
    """A copy whose weights are all a little elsewhere."""
    other, random = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += size * torch.randn(parameter.shape, generator=random).to(parameter.dtype)
    return other


def saved(model, folder, **settings):
    model.save_pretrained(folder, **settings)
    return folder


def test_a_later_version_forgets_again_and_keeps_the_rest(tmp_path):
    """Would catch a difference of the wrong sign, one that undoes the later training, and a base that is not named."""
    base = learn(scene_model(hidden_size=32, intermediate_size=48), FORGET + RETAIN + HELD_OUT, 100, 5e-3)
    forgotten = copy.deepcopy(base)
    settings = {"optim": "adamw_torch", "learning_rate": 1e-3, "num_train_epochs": 20, "retain_weight": 5.0}
    UnlearnTrainer(forgotten, scene_config(tmp_path / "run", **settings), FORGET, RETAIN, scene_tokenizer()).train()
    file = save_difference(base, forgotten.cpu(), tmp_path / "difference.safetensors")
    later = learn(copy.deepcopy(base), NEW + RETAIN + HELD_OUT, 20, 2e-3)
    rows = {"forget": FORGET, "held_out": HELD_OUT, "new": NEW}
    before = {name: answer_loss(later, part).item() for name, part in rows.items()}
    done = apply_difference(later, file)
    rise = {name: answer_loss(later, part).item() - before[name] for name, part in rows.items()}
    assert not done.is_same_base and done.num_tensors == len(later.state_dict())
    assert rise["forget"] > 0.1 > 10 * abs(rise["held_out"]), rise
    assert abs(rise["new"]) < 0.1 < before["new"], "what it has learnt since stays"


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("shard", ["50GB", "5KB"], ids=["one file", "shards"])
def test_before_plus_difference_is_after(tmp_path, tied, shard):
    """Would catch a file that transformers cannot load, a tensor of another shard, and a tied one that moves twice."""
    before = scene_model(tie_word_embeddings=tied)
    after = moved(before)
    folders = [saved(model, tmp_path / name, max_shard_size=shard) for model, name in ((before, "b"), (after, "a"))]
    scene_tokenizer().save_pretrained(folders[0])
    file = save_difference(*folders, tmp_path / "exact.safetensors", dtype="float64")
    assert apply_difference(folders[0], file, output=tmp_path / "out").is_same_base
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    for name, tensor in after.state_dict().items():
        assert torch.equal(loaded[name], tensor), name
    for path in folders[1].glob("*.safetensors"):
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes(), "as transformers writes it"
    assert (tmp_path / "out" / "tokenizer.json").exists()
    # In memory, in float32, and back.
    save_difference(before, after, tmp_path / "plain.safetensors")
    here = copy.deepcopy(before)
    for scale, goal in ((1.0, after), (-1.0, before)):
        apply_difference(here, tmp_path / "plain.safetensors", scale)
        for name, tensor in goal.state_dict().items():
            largest = torch.maximum(before.state_dict()[name].abs(), after.state_dict()[name].abs())
            assert ((here.state_dict()[name] - tensor).abs() <= 2 * 2**-22 * largest).all(), name


def test_16_bit_weights_come_back_to_the_bit(tmp_path):
    """Would catch a sum that is rounded before it is a sum, and a dtype that changes on the way."""
    before = scene_model().to(torch.bfloat16)
    after = moved(before, size=1e-2)
    folder = saved(before, tmp_path / "b")
    file = save_difference(folder, saved(after, tmp_path / "a"), tmp_path / "d.safetensors", dtype="float64")
    apply_difference(folder, file, output=tmp_path / "out")
    loaded = load_file(tmp_path / "out" / "model.safetensors")
    assert all(
        torch.equal(loaded[name], tensor) for name, tensor in load_file(tmp_path / "a/model.safetensors").items()
    )
    half = save_difference(folder, tmp_path / "a", tmp_path / "half.safetensors", dtype="bfloat16")
    assert half.stat().st_size < file.stat().st_size / 2


def test_hashes_are_those_of_the_models_however_they_are_kept(tmp_path):
    """Would catch a warning about the same weights because a folder holds a tied tensor once."""
    for tied in (True, False):
        model = scene_model(tie_word_embeddings=tied)
        for name, settings in (("one", {}), ("shards", {"max_shard_size": "5KB"})):
            folder = saved(model, tmp_path / f"{name}-{tied}", **settings)
            assert stored_weights(folder).digest() == stored_weights(model).digest() == weights_digest(model)
    plain = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    plain[1].weight = plain[0].weight
    assert stored_weights(plain).tied == {"1.weight": "0.weight"}
    assert stored_weights(plain).digest() == weights_digest(plain)


def test_what_did_not_change_is_left_out_and_the_header_tells_the_models(tmp_path):
    """Would catch a file as large as the model for one layer, and hashes of other models."""
    before = scene_model()
    after = copy.deepcopy(before)
    with torch.no_grad():
        after.model.layers[0].mlp.up_proj.weight += 1e-3
    file = save_difference(before, after, tmp_path / "new" / "d.safetensors")
    with safe_open(file, "pt") as opened:
        assert list(opened.keys()) == ["model.layers.0.mlp.up_proj.weight"]
        metadata = opened.metadata()
    assert metadata["soul_trainer"] == "soul_trainer.difference/1"
    assert (metadata["before"], metadata["after"]) == (weights_digest(before), weights_digest(after))
    with pytest.raises(ValueError, match="same weights"):
        save_difference(before, copy.deepcopy(before), tmp_path / "none.safetensors")
    with pytest.raises(ValueError, match="exists"):
        save_difference(before, after, file)
    save_difference(before, moved(before), file, overwrite=True)


def test_a_tie_that_came_or_went_since_is_minded(tmp_path):
    """Would catch an output layer that keeps what the embeddings forget, and a tied tensor that gets two changes."""
    tied, untied = scene_model(tie_word_embeddings=True), scene_model(tie_word_embeddings=False)
    file = save_difference(tied, moved(tied), tmp_path / "tied.safetensors")
    with torch.no_grad():
        untied.lm_head.weight.copy_(tied.lm_head.weight)
    apply_difference(untied, file)
    apply_difference(tied, file)
    assert torch.equal(untied.lm_head.weight, tied.lm_head.weight)
    untied = scene_model(tie_word_embeddings=False)
    file = save_difference(untied, moved(untied), tmp_path / "untied.safetensors")
    with pytest.raises(ValueError, match="'lm_head.weight' is tied to 'model.embed_tokens.weight'"):
        apply_difference(tied, file)
    with pytest.raises(ValueError, match="'lm_head.weight' is tied.*in `after` alone"):
        save_difference(untied, scene_model(tie_word_embeddings=True), tmp_path / "x.safetensors")


def test_a_model_that_does_not_fit_is_refused_and_stays_as_it_was(tmp_path):
    """Would catch half a difference in a model, and an error that does not name the tensor."""
    before = scene_model()
    file = save_difference(before, moved(before), tmp_path / "d.safetensors")
    wider, deeper = scene_model(vocab_size=len(scene_tokenizer()) + 3), scene_model(num_hidden_layers=2)
    digest = weights_digest(wider)
    with pytest.raises(ValueError, match="'lm_head.weight' has the shape.*vocabulary"):
        apply_difference(wider, file)
    assert weights_digest(wider) == digest
    with pytest.raises(ValueError, match="`after` has the tensor 'model.layers.1.* and `before` does not"):
        save_difference(before, deeper, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="'lm_head.weight' has the shape .* before and .* after"):
        save_difference(before, wider, tmp_path / "x.safetensors")
    deep_file = save_difference(deeper, moved(deeper), tmp_path / "deep.safetensors")
    with pytest.raises(ValueError, match="changes 'model.layers.1.*', which is no tensor of `model`"):
        apply_difference(before, deep_file)
    broken = moved(before)
    with torch.no_grad():
        broken.lm_head.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="difference of 'lm_head.weight' is not finite"):
        save_difference(before, broken, tmp_path / "x.safetensors")
    assert not list(tmp_path.glob("x.safetensors*")), "nothing is left of a file that could not be written"


def test_adapters_are_refused_with_the_way_out(tmp_path):
    """Would catch an adapter taken for a whole model, with its few tensors for all of them."""
    adapted = get_peft_model(scene_model(), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match="`after` has LoRA adapters: merge them first"):
        save_difference(scene_model(), adapted, tmp_path / "d.safetensors")
    adapted.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="is an adapter, which is a difference already.*merge_and_unload"):
        save_difference(scene_model(), tmp_path / "adapter", tmp_path / "d.safetensors")


def test_a_write_that_breaks_off_leaves_nothing(tmp_path):
    """Would catch half a file or half a model under the name of a whole one when the disk is full."""
    before = scene_model(hidden_size=32, intermediate_size=48)
    folders = saved(before, tmp_path / "b"), saved(moved(before), tmp_path / "a")
    file = save_difference(*folders, tmp_path / "d.safetensors")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # what is written beyond fails
    try:
        with pytest.raises(OSError):
            save_difference(*folders, tmp_path / "cut.safetensors")
        with pytest.raises(OSError):
            save_difference(*folders, file, overwrite=True)
        with pytest.raises(OSError):
            apply_difference(folders[0], file, output=tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b", "d.safetensors"}
    assert apply_difference(folders[0], file, output=tmp_path / "out").is_same_base, "the former file is whole"


def test_the_command_line_saves_and_applies(tmp_path, capsys):
    """Would catch flags that do not reach their functions, and a model of one's own that is overwritten."""
    before = scene_model()
    after = moved(before)
    folders = [str(saved(model, tmp_path / name)) for model, name in ((before, "b"), (after, "a"))]
    file, out = str(tmp_path / "d.safetensors"), str(tmp_path / "out")
    assert main(["save", "--before", folders[0], "--after", folders[1], "--output", file, "--dtype", "bfloat16"]) == 0
    apply = ["apply", "--model", folders[0], "--difference", file, "--output"]
    assert main([*apply, out, "--scale", "0.5"]) == 0
    assert "model that it was taken from" in capsys.readouterr().out
    record = json.loads((tmp_path / "out" / "unlearning.json").read_text())
    assert record["settings"]["scale"] == 0.5 and record["settings"]["weights"] == weights_digest(before)
    name = "model.embed_tokens.weight"
    change = AutoModelForCausalLM.from_pretrained(out).state_dict()[name] - before.state_dict()[name]
    torch.testing.assert_close(
        change, (after.state_dict()[name] - before.state_dict()[name]) / 2, rtol=1e-2, atol=1e-7
    )
    assert main([*apply, out]) == 1 and "set `overwrite=True`" in capsys.readouterr().err
    assert main([*apply, out, "--overwrite"]) == 0
    assert main([*apply, folders[1], "--overwrite"]) == 1 and "something else" in capsys.readouterr().err
    assert main(["apply", "--model", out, "--difference", f"{out}/model.safetensors", "--output", out + "2"]) == 1
    assert "soul_trainer.difference save" in capsys.readouterr().err
    with pytest.raises(ValueError, match="`output`=None: name the folder"):
        apply_difference(folders[0], file)
    with pytest.raises(ValueError, match="`scale` must be"):
        apply_difference(before, file, 0.0)
