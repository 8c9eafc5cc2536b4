"""The command that measures curvature once: against slow sums, on what it refuses, and as its files are used."""

import json
from pathlib import Path

import pytest
import torch
from curvature_scenes import (
    NUM_ESTIMATES,
    ROUNDING,
    assert_alike,
    assert_close,
    command,
    measured,
    stopped,
    write_scene,
)
from scenes import RETAIN, scene_tokenizer, scene_trainer
from torch.nn.functional import cross_entropy
from toys import tiny_llama, toy_batch, toy_batches
from transformers import AutoModelForCausalLM

from soul_trainer.batch import IGNORE_INDEX
from soul_trainer.curvature import check_model, load_curvature, resumable, save_curvature
from soul_trainer.curvature.command import main
from soul_trainer.curvature.labels import answer_uniforms
from soul_trainer.curvature.measure import MatrixPasses
from soul_trainer.engines import find_soul
from soul_trainer.formats import prepare
from soul_trainer.weights import weights_digest


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model, its rows, and a file of its whole curvature."""
    folder = tmp_path_factory.mktemp("curvature")
    write_scene(folder)
    assert main(command(folder, folder / "whole.safetensors")) == 0
    return folder


def model_of(folder):
    return AutoModelForCausalLM.from_pretrained(folder / "model").eval()


def signed_loss(model, batch, draw):
    """Each row's smoothed loss, the sum over tokens under a random sign, by PyTorch's own cross-entropy."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    targets = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=IGNORE_INDEX)
    losses = cross_entropy(
        logits.transpose(1, 2), targets, ignore_index=IGNORE_INDEX, reduction="none", label_smoothing=0.1
    )
    signs = torch.where(answer_uniforms(batch, seed=0, draw=draw) < 0.5, -1.0, 1.0)
    return (signs * losses).sum(1), int((targets != IGNORE_INDEX).sum())


@pytest.fixture(scope="module")
def slow(folder):
    """Of each row the gradient of its loss, the mean over estimates of the diagonal, and the number of tokens."""
    model, rows = model_of(folder), list(prepare(RETAIN, scene_tokenizer()))
    parameters = dict(model.named_parameters())
    row_gradients, diagonals, num_tokens = [], [], 0
    for draw in range(NUM_ESTIMATES):
        sums, tokens = {name: torch.zeros_like(each) for name, each in parameters.items()}, 0
        for row in rows[6 * draw : 6 * draw + 6]:
            (loss,), count = signed_loss(model, toy_batch([], [row]), draw)
            gradients = dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values()))))
            row_gradients.append(gradients)
            sums, tokens = {name: sums[name] + gradients[name] for name in sums}, tokens + count
        diagonals.append({name: each.square() / tokens for name, each in sums.items()})
        num_tokens += tokens
    means = {name: torch.stack([each[name] for each in diagonals]).mean(0) for name in parameters}
    return row_gradients, means, num_tokens


def test_the_file_holds_what_slow_sums_give(folder, slow):
    """
    Catches dropout, rows or prompt tokens that count wrongly, a last estimate that is left out, a running mean that is
    none, and moments of other gradients than the rows'.
    """
    row_gradients, diagonals, num_tokens = slow
    found = load_curvature(folder / "whole.safetensors")
    model = model_of(folder)
    assert found.diagonals.keys() == diagonals.keys() and len(found.matrices) == 15
    for name, diagonal in found.diagonals.items():
        assert_close(diagonal, diagonals[name])
    for name, matrix in found.matrices.items():
        values = sum(
            (matrix.output_vectors.T @ gradients[name] @ matrix.input_vectors).square() for gradients in row_gradients
        )
        assert_close(matrix.values, values / num_tokens)
        for vectors in (matrix.input_vectors, matrix.output_vectors):
            assert_close(vectors.T @ vectors, torch.eye(vectors.shape[1]), 1e-5)
    digest = weights_digest(model)
    expected = {"weights": digest, "kind": "kronecker", "num_tokens": num_tokens, "num_rows": len(RETAIN)}
    assert found.metadata.items() >= {**expected, "estimator": "empirical_fisher"}.items()
    assert found.metadata["settings"]["label_smoothing"] == 0.1 and found.metadata["dataset"].endswith("retain.jsonl")
    assert all(found.metadata["kept_share"][name] == 1 for name in found.matrices)


def test_the_bases_are_those_of_the_layers_inputs_and_gradients(folder):
    """Catches bases of another layer, or of sums over some of the rows alone."""
    found, model = load_curvature(folder / "whole.safetensors").matrices["lm_head.weight"], model_of(folder)
    rows, kept, factors = list(prepare(RETAIN, scene_tokenizer())), {}, [0.0, 0.0]

    def keep(module, inputs, output):
        output.retain_grad()
        kept.update(inputs=inputs[0].detach(), outputs=output)

    model.lm_head.register_forward_hook(keep)
    for draw in range(NUM_ESTIMATES):
        batch = toy_batch([], rows[6 * draw : 6 * draw + 6])
        signed_loss(model, batch, draw)[0].sum().backward()
        gradients = kept["outputs"].grad.flatten(0, 1)
        is_used = gradients.any(1)
        for place, each in enumerate((kept["inputs"].flatten(0, 1), gradients)):
            factors[place] = factors[place] + each[is_used].T @ each[is_used]
    for factor, vectors in zip(factors, (found.input_vectors, found.output_vectors)):
        turned = vectors.T @ factor @ vectors
        assert_close(turned, turned.diagonal().diag(), 1e-4)
        assert (turned.diagonal().diff() <= ROUNDING * turned.max()).all()


def test_the_diagonal_alone_takes_one_pass(folder, slow, tmp_path):
    """Catches a second pass that is for nothing, and matrices that nobody asked for."""
    found = measured(folder, tmp_path / "out", "--kind=diagonal")
    assert not found.matrices and found.metadata["kind"] == "diagonal"
    for name, diagonal in found.diagonals.items():
        assert_close(diagonal, slow[1][name])


@pytest.mark.parametrize("flags", [("--layers_at_once=1",), ("--layers_at_once=4", "--batch_size=1")])
def test_layers_in_groups_give_the_same(folder, tmp_path, flags):
    """Catches a diagonal that counts some passes again, and a group whose gradients are cut off too early."""
    assert_alike(measured(folder, tmp_path / "out", *flags), load_curvature(folder / "whole.safetensors"))


def test_a_rank_keeps_the_trace_and_says_what_it_cost(folder, tmp_path):
    """Catches a rank that is not used, and a quality that is of something else."""
    whole, found = load_curvature(folder / "whole.safetensors"), measured(folder, tmp_path / "out", "--rank=3")
    for name, matrix in found.matrices.items():
        assert matrix.values.shape == (3, 3)
        assert matrix.trace == pytest.approx(whole.matrices[name].trace, rel=1e-4)
        assert found.metadata["kept_share"][name] == pytest.approx(matrix.kept_share) and matrix.kept_share < 1
        assert 0 < found.metadata["truncation_error"][name] < 1


def test_plain_text_is_cut_and_all_of_it_counts(folder, tmp_path):
    """Catches a text that is cut off at the longest row, chunks whose tokens have no label, and files left out."""
    texts = [" ".join(row["answer"] for row in 2 * RETAIN[start::2]) for start in range(2)]
    (tmp_path / "texts").mkdir()
    for place, text in enumerate(texts):
        (tmp_path / "texts" / f"{place}.txt").write_text(text)
    (tmp_path / "one.txt").write_text(texts[0])
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    tokenizer, chunks = scene_tokenizer(), []
    for text in texts:
        ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        assert len(ids) > 64, "longer than the model takes"
        chunks += [ids[start : start + 20] for start in range(0, len(ids), 20)]
    cut = "".join(json.dumps({"input_ids": ids, "labels": ids}) + "\n" for ids in chunks)
    (tmp_path / "cut.jsonl").write_text(cut)
    flags = ("--chunk_length=20", "--kind=diagonal")
    wanted = measured(folder, tmp_path / "cut", *flags, dataset=tmp_path / "cut.jsonl")
    assert wanted.metadata["num_tokens"] == sum(len(ids) - 1 for ids in chunks)
    for dataset in ("texts", "rows.jsonl"):
        found = measured(folder, tmp_path / "out", *flags, "--overwrite", dataset=tmp_path / dataset)
        assert_alike(found, wanted)
        assert found.metadata["rows"] == wanted.metadata["rows"]
    alone = measured(folder, tmp_path / "out", *flags, "--overwrite", dataset=tmp_path / "one.txt")
    assert 0 < alone.metadata["num_tokens"] < wanted.metadata["num_tokens"]


def test_a_sample_of_rows_is_drawn_by_the_seed(folder, tmp_path):
    """Catches the first rows in the place of a sample, and a sample that nobody can draw again."""
    flags = ("--num_rows=5", "--kind=diagonal", "--overwrite")
    hashes = [measured(folder, tmp_path / "out", *flags, f"--seed={seed}").metadata["rows"] for seed in (1, 1, 2)]
    assert hashes[0] == hashes[1] != hashes[2]
    assert load_curvature(tmp_path / "out").metadata["num_rows"] == 5


def test_an_adapter_is_measured_alone(folder, tmp_path):
    """Catches the base model's parameters in the file, and an adapter that is loaded frozen."""
    from peft import LoraConfig, get_peft_model

    with torch.random.fork_rng():
        torch.manual_seed(0)
        settings = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(folder / "model"), settings)
    adapted.save_pretrained(tmp_path / "adapter")
    flags = [f"--model={tmp_path / 'adapter'}", *command(folder, tmp_path / "out")[1:]]
    assert main(flags) == 0
    found = load_curvature(tmp_path / "out")
    trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert len(trained) == 4 and found.diagonals.keys() == found.matrices.keys() == trained
    assert all(diagonal.any() for diagonal in found.diagonals.values())
    check_model(found, weights_digest(adapted))


def test_a_parameter_that_no_row_reaches_has_a_curvature_of_zero():
    """Catches a file without it, which training would refuse, and a mean over those estimates alone that reach it."""
    model, batches = tiny_llama(), toy_batches((2, 2))
    model.sometimes = torch.nn.Parameter(torch.ones(()))
    model.never = torch.nn.Parameter(torch.ones(3))
    logits, engine = model.lm_head.forward, resumable.SummingEngine()
    reaches = [False, True]
    model.lm_head.forward = lambda hidden: logits(hidden) * (model.sometimes if reaches[measurement.position] else 1)
    measurement = resumable.Measurement(
        model, lambda number: [batches[number]], 2, MatrixPasses([], engine), "gauss_newton_bartlett", 0.0, 0
    )
    measurement.run(lambda: None, lambda: None)
    once = resumable.Soul([model.sometimes], rule="diagonal")
    reaches[:] = [True, True]
    measurement.position = 1
    resumable.estimate_hessian(model, once, [batches[1]], draw=1, decay=0.0)
    assert not measurement.diagonals["never"].any() and once.state[model.sometimes]["hessian"] > 0
    assert measurement.diagonals["sometimes"] == once.state[model.sometimes]["hessian"] / 2


@pytest.mark.parametrize("rule", ["diagonal", "kronecker"])
def test_training_takes_the_file(folder, tmp_path, rule):
    """Catches names or shapes that the optimizer does not know."""
    settings = {"retain_loss": "curvature", "rule": rule, "hessian_interval": None, "learning_rate": 0.05}
    curvature = str(folder / "whole.safetensors")
    trainer = scene_trainer(tmp_path, model_of(folder), curvature=curvature, max_steps=2, **settings)
    trainer.train()
    soul, found = find_soul(trainer.optimizer), load_curvature(curvature)
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(soul.state[parameter]["hessian"], found.diagonals[name])
    assert set(soul.matrices) == (set(found.matrices) if rule == "kronecker" else set())


def test_curvature_of_another_model_is_refused(folder, tmp_path, capsys):
    """Catches curvature of a model that has been trained since, in a run and in a measurement that goes on."""
    found, model = load_curvature(folder / "whole.safetensors"), model_of(folder)
    digest = weights_digest(model)
    check_model(found, digest)
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    other = weights_digest(model)
    with pytest.raises(ValueError, match=f"{digest}.*{other}.*float32.*soul_trainer.curvature"):
        check_model(found, other)
    found.metadata = {}
    save_curvature(tmp_path / "bare", found)
    check_model(load_curvature(tmp_path / "bare"), other)
    assert stopped(command(folder, tmp_path / "out", "--save_minutes=0")) == (0, 2)
    model.save_pretrained(tmp_path / "model")
    scene_tokenizer().save_pretrained(tmp_path / "model")
    flags = [f"--model={tmp_path / 'model'}", *command(folder, tmp_path / "out")[1:]]
    assert main(flags) == 1
    error = capsys.readouterr().err
    assert digest in error and other in error and "--overwrite" in error and not (tmp_path / "out").exists()
    assert main([*flags, "--overwrite"]) == 0
    assert load_curvature(tmp_path / "out").metadata["weights"] == other


def test_a_finished_file_is_replaced_only_when_told(folder, tmp_path, capsys):
    """Catches hours of measuring that are lost, and a folder that is taken for a file."""
    output = tmp_path / "out"
    measured(folder, output, "--kind=diagonal")
    before = output.read_bytes()
    assert main(command(folder, output, "--kind=diagonal", "--seed=3")) == 1
    assert "--overwrite" in capsys.readouterr().err and output.read_bytes() == before
    measured(folder, output, "--kind=diagonal", "--seed=3", "--overwrite")
    assert output.read_bytes() != before
    assert main(command(folder, tmp_path, "--overwrite")) == 1


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--dataset=missing.jsonl"], "'missing.jsonl': no such file"),
        (["--dataset=missing.txt"], "'missing.txt': no such file"),
        (["--kind=full"], "`kind` must be one of diagonal, kronecker"),
        (["--estimator=hutchinson"], "`estimator` must be one of empirical_fisher, gauss_newton_bartlett"),
        (["--dtype=float16"], "`dtype` must be one of float32"),
        (["--rank=0"], "`rank` must be >= 1"),
        (["--label_smoothing=1"], "`label_smoothing` must be in [0, 1)"),
        (["--trainable_parameters", "nothing_like_it"], "nothing_like_it"),
        (["--trainable_parameters", "norm"], "--kind diagonal"),
        (["--max_length=4"], "Row 0 of `dataset`: no answer token is left"),
        (["--max_length=65"], "`max_length`=65 is over"),
    ],
)
def test_a_mistake_on_the_command_line_is_named(folder, tmp_path, capsys, flags, message):
    """Catches a traceback in the place of a reason, and a file that is left behind."""
    assert main(command(folder, tmp_path / "out", *flags)) == 1
    error = capsys.readouterr().err
    assert message in error and not list(tmp_path.iterdir())
