"""The influence step against its dense equation, against exact retraining, and as a command."""

import json

import pytest
import torch
from scenes import FORGET, RETAIN, largest_difference, scene_model, scene_tokenizer, weights
from test_gauss_newton import DAMPING, ROUNDING, dense_gauss_newton, flat, mean_loss, num_answers
from toys import ToyLM, tiny_llama, toy_batch, toy_batches, toy_rows
from transformers import AutoModelForCausalLM

from soul_trainer.batch import IGNORE_INDEX
from soul_trainer.curvature.products import gauss_newton_diagonal
from soul_trainer.formats import prepare
from soul_trainer.influence import SOLVERS, InfluenceArguments, influence_update, main


@pytest.mark.parametrize("solver", ["diagonal", "conjugate_gradient"])
@pytest.mark.parametrize("make_model", [ToyLM, tiny_llama])
def test_the_step_is_the_solution_of_its_equation(make_model, solver):
    """Catches a sign, the strength, n of the wrong rows, and a step of another matrix than is said."""
    model = make_model().double()
    parameters = list(model.parameters())
    forget, retain = [toy_batch(toy_rows(2, seed=9), [])], toy_batches((3, 2))
    slope = flat(torch.autograd.grad(num_answers(forget) * mean_loss(model, forget), parameters))
    if solver == "diagonal":
        matrix = flat(gauss_newton_diagonal(model, parameters, retain, num_draws=3, seed=4)).diag()
    else:
        matrix = dense_gauss_newton(model, retain, parameters)
    damped = matrix + DAMPING * torch.eye(len(matrix), dtype=torch.float64)
    wanted = 0.5 * torch.linalg.solve(damped, slope / 40)
    before = flat(parameters)
    settings = {"strength": 0.5, "damping": DAMPING, "max_iterations": 300, "tolerance": 1e-9}
    args = InfluenceArguments(solver=solver, num_draws=3, seed=4, **settings)
    report = influence_update(model, forget, retain, args, num_tokens=40)
    step = flat(parameters) - before
    torch.testing.assert_close(step, wanted, rtol=0, atol=ROUNDING * float(wanted.abs().max()))
    assert report.step_norm == pytest.approx(float(step.norm()), rel=1e-6)
    assert report.applied_norm == pytest.approx(report.step_norm, rel=1e-9)
    assert (report.forget_tokens, report.retain_tokens, report.damping) == (num_answers(forget), 40, DAMPING)
    assert report.num_parameters == len(step)


def fitted(retain, forget, forget_weight) -> ToyLM:
    """The minimum of the summed loss, in which forget rows weigh so much, plus half the squared head, to the end."""
    model = ToyLM().double()
    counts = [num_answers(batches) for batches in (retain, forget)]
    optimizer = torch.optim.LBFGS(
        [model.lm_head], max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-15, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        loss = counts[0] * mean_loss(model, retain) + model.lm_head.square().sum() / 2
        (loss + forget_weight * counts[1] * mean_loss(model, forget)).backward()
        return loss + forget_weight * counts[1] * mean_loss(model, forget)

    optimizer.step(closure)
    closure()
    assert model.lm_head.grad.norm() < 1e-6, "the minimum was not found"
    model.zero_grad()
    return model


def test_in_a_convex_model_the_step_is_almost_retraining():
    """
    Catches the wrong sign above all, a wrong n, and forget rows within G. The head of a fixed body is a logistic
    regression, whose Hessian is G, and its weight decay is a damping. A Newton step's error is of second order: rows
    that weighed a quarter leave a sixteenth of it.
    """
    rows = toy_rows(24)
    forget, retain = [toy_batch(rows[:3], [])], [toy_batch([], rows[3:])]
    gold = fitted(retain, forget, 0.0).lm_head.detach()
    ways, errors = [], []
    for weight in (1.0, 0.25):
        model = fitted(retain, forget, weight)
        start, loss = model.lm_head.detach().clone(), mean_loss(model, forget)
        settings = {"damping": 1 / num_answers(retain), "tolerance": 1e-9, "max_iterations": 100}
        args = InfluenceArguments(strength=weight, trainable_parameters=["lm_head"], **settings)
        influence_update(model, forget, retain, args)
        assert mean_loss(model, forget) > loss
        ways.append(float((start - gold).norm()))
        errors.append(float((model.lm_head.detach() - gold).norm()))
    assert errors[0] < 0.2 * ways[0], f"{errors[0] / ways[0]:.3f} of the way is left"
    # An eighth, because the third order is there as well.
    assert errors[1] < errors[0] / 8


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("sizes", [(1,) * 6, (2, 4), (5, 1)])
def test_the_step_does_not_depend_on_how_rows_are_split(solver, sizes):
    """Catches means of means, and labels that follow the place in a batch."""
    found = []
    for split in ((6,), sizes):
        model = tiny_llama()
        before = weights(model)
        args = InfluenceArguments(solver=solver, damping=DAMPING, seed=3, tolerance=1e-5)
        influence_update(model, toy_batches(split, num_forget=6), toy_batches(split), args)
        found.append({name: weight - before[name] for name, weight in weights(model).items()})
    size = max(float(step.abs().max()) for step in found[0].values())
    assert size > 0 and largest_difference(*found) < 1e-4 * size


def test_the_default_damping_is_a_tenth_of_the_mean_of_the_diagonal():
    """Catches a damping of another scale than the docs say."""
    model = ToyLM()
    parameters, retain = list(model.parameters()), toy_batches((4,))
    diagonal = flat(gauss_newton_diagonal(model, parameters, retain, seed=2))
    for solver in ("diagonal", "conjugate_gradient"):
        report = influence_update(ToyLM(), toy_batches((2,)), retain, InfluenceArguments(solver=solver, seed=2))
        assert report.damping == pytest.approx(float(diagonal.mean()) / 10, rel=1e-5)
    assert report.residuals[-1] <= 1e-3
    llama = tiny_llama()
    # Of two passes with labels of their own.
    diagonal = flat(gauss_newton_diagonal(llama, list(llama.parameters()), retain, num_draws=2, seed=2))
    report = influence_update(llama, toy_batches((2,)), retain, InfluenceArguments("kronecker", 1e-3, seed=2))
    assert report.damping == pytest.approx(float(diagonal.mean()) / 10, rel=1e-5)


def test_only_named_weights_move_and_all_can_train_afterwards():
    """Catches frozen weights that move, gradients that stay behind, and a model that is left frozen or evaluating."""
    model = tiny_llama().train()
    model.model.embed_tokens.weight.requires_grad_(False)
    before = weights(model)
    args = InfluenceArguments(
        trainable_parameters=["mlp", "lm_head"], frozen_parameters=["down_proj"], damping=DAMPING
    )
    report = influence_update(model, toy_batches((2,)), toy_batches((3,)), args)
    moved = {name for name, weight in weights(model).items() if not torch.equal(weight, before[name])}
    assert moved == {"lm_head.weight", *(f"model.layers.0.mlp.{name}_proj.weight" for name in ("gate", "up"))}
    assert report.num_parameters == sum(before[name].numel() for name in moved)
    assert all(p.requires_grad != (p is model.model.embed_tokens.weight) for p in model.parameters())
    assert all(p.grad is None for p in model.parameters()) and model.training
    with pytest.raises(ValueError, match="trainable_parameters.*no_such.*lm_head"):
        influence_update(
            model, toy_batches((2,)), toy_batches((3,)), InfluenceArguments(trainable_parameters=["no_such"])
        )
    assert model.model.norm.weight.requires_grad


@pytest.mark.parametrize("solver", SOLVERS)
def test_what_is_not_finite_stops_it_and_moves_nothing(solver):
    """Catches a model of NaN that is saved, and an error that does not name the row."""
    model = ToyLM()
    rows = toy_rows(4)
    model.embed.data[5] = float("nan")
    rows = [{**row, "input_ids": [i if i != 5 else 4 for i in row["input_ids"]]} for row in rows]
    before = weights(model)
    bad = {**rows[2], "input_ids": [5, *rows[2]["input_ids"][1:]]}
    args = InfluenceArguments(solver=solver, damping=DAMPING)
    with pytest.raises(FloatingPointError, match=r"rows \[2\]"):
        influence_update(model, [toy_batch([rows[1], bad], [])], [toy_batch([], rows)], args)
    with pytest.raises(FloatingPointError):
        influence_update(model, [toy_batch(rows, [])], [toy_batch([], [rows[0], bad])], args)
    for name, weight in weights(model).items():
        assert torch.equal(weight.nan_to_num(), before[name].nan_to_num())


def test_a_step_that_bfloat16_swallows_is_reported(caplog):
    """Catches a command that says it has unlearned while rounding has undone it."""
    model = tiny_llama().bfloat16()
    args = InfluenceArguments(strength=1e-6, solver="diagonal", damping=1.0)
    report = influence_update(model, toy_batches((2,)), toy_batches((3,)), args)
    assert report.applied_norm < 0.9 * report.step_norm and "Load the model in float32" in caplog.text


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"solver": "lissa"}, "`solver`.*kronecker, diagonal, conjugate_gradient.*lissa"),
        ({"strength": 0.0}, "`strength`.*> 0"),
        ({"damping": -1.0}, "`damping`.*> 0"),
        ({"damping": float("inf")}, "`damping`.*finite"),
        ({"tolerance": 1.0}, r"`tolerance`.*\(0, 1\)"),
        ({"max_iterations": 0}, "`max_iterations`.*>= 1"),
        ({"num_draws": 0}, "`num_draws`.*>= 1"),
        ({"num_steps": 0}, "`num_steps`.*>= 1"),
        ({"curvature_rank": 0}, "`curvature_rank`.*>= 1"),
    ],
)
def test_settings_out_of_range_are_named(settings, message):
    """Catches an error from deep within, after the model was loaded."""
    with pytest.raises(ValueError, match=message):
        InfluenceArguments(**settings)


def test_what_cannot_be_done_is_refused(monkeypatch):
    """Catches several processes that each take a step, a division by no tokens, and an n below the sample's."""
    batches = toy_batches((2,))
    empty = [{**batches[0], "labels": torch.full_like(batches[0]["labels"], IGNORE_INDEX)}]
    with pytest.raises(ValueError, match="`forget_batches` hold no answer token"):
        influence_update(ToyLM(), empty, batches)
    with pytest.raises(ValueError, match="`retain_batches` hold no answer token"):
        influence_update(ToyLM(), batches, empty)
    with pytest.raises(ValueError, match="`num_tokens`=1 is less"):
        influence_update(ToyLM(), batches, batches, num_tokens=1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="one process"):
        influence_update(ToyLM(), batches, batches)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A model that has learnt its rows, and the rows."""
    folder = tmp_path_factory.mktemp("influence")
    model, tokenizer = scene_model(), scene_tokenizer()
    rows = prepare([*FORGET, *RETAIN], tokenizer)
    batch = toy_batch(list(rows), [])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        model(batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    for name, half in (("forget", FORGET), ("retain", RETAIN)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in half))
    return folder


def command(files, output, *flags) -> list[str]:
    rows = [f"--{name}={files / name}.jsonl" for name in ("forget", "retain")]
    return [f"--model={files / 'model'}", *rows, f"--output={output}", "--device=cpu", *flags]


def losses(folder) -> list[float]:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), scene_tokenizer()
    with torch.no_grad():
        return [float(mean_loss(model, [toy_batch(list(prepare(rows, tokenizer)), [])])) for rows in (FORGET, RETAIN)]


# How many times as much the loss rises on forget rows as on the retain rows that the step knows the curvature of: the
# diagonal leaves out most of it.
@pytest.mark.parametrize("solver, selectivity", [("diagonal", 1.4), ("kronecker", 1.5), ("conjugate_gradient", 20.0)])
def test_the_command_makes_a_model_that_has_forgotten(files, tmp_path, solver, selectivity, capsys):
    """Catches a saved model that is the old one, damage that is as large as forgetting, and a record that lacks it."""
    output = tmp_path / "out"
    assert main(command(files, output, f"--solver={solver}", "--damping=0.01", "--strength=0.1", "--num_draws=4")) == 0
    forget, retain = (after - before for after, before in zip(losses(output), losses(files / "model")))
    assert forget > 0.1 and forget > selectivity * retain
    record = json.loads((output / "unlearning.json").read_text())
    assert record["settings"]["method"] == "influence" and record["settings"]["solver"] == solver
    printed = capsys.readouterr().out
    assert f"{record['metrics']['applied_norm']:.4g}" in printed
    assert printed.count("residual") == len(record["metrics"]["residuals"])
    assert (output / "model.safetensors").exists() and (output / "tokenizer_config.json").exists()
    assert not (tmp_path / "out.part").exists()


def test_the_command_replaces_results_only_when_told(files, tmp_path, capsys):
    """Catches a finished model that is lost, a folder of other things that is, and the model itself that is."""
    output, fast = tmp_path / "out", ("--solver=diagonal", "--batch_size=16")
    assert main(command(files, output, *fast)) == 0
    first = (output / "model.safetensors").read_bytes()
    assert main(command(files, output, *fast, "--strength=2")) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert (output / "model.safetensors").read_bytes() == first
    assert main(command(files, output, *fast, "--strength=2", "--overwrite")) == 0
    assert (output / "model.safetensors").read_bytes() != first
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("mine")
    for folder in (tmp_path / "notes", files / "model"):
        assert main(command(files, folder, *fast, "--overwrite")) == 1
        assert "choose another folder" in capsys.readouterr().err
    assert (tmp_path / "notes" / "mine.txt").read_text() == "mine"


def test_a_sample_of_retain_rows_stands_for_all(files, tmp_path):
    """Catches an n of the sample, with which the step would be as many times too long."""
    fast = ("--solver=diagonal", "--damping=0.01")
    assert main(command(files, tmp_path / "all", *fast)) == 0
    assert main(command(files, tmp_path / "some", *fast, "--retain_rows=4")) == 0
    metrics = [json.loads((tmp_path / name / "unlearning.json").read_text())["metrics"] for name in ("all", "some")]
    assert metrics[0]["retain_tokens"] == metrics[1]["retain_tokens"]
    assert metrics[0]["step_norm"] != metrics[1]["step_norm"]


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--forget=missing.jsonl"], "'missing.jsonl': no such file"),
        (["--dtype=int8"], "`dtype` must be one of auto, float32"),
        (["--batch_size=0"], "`batch_size` must be >= 1"),
        (["--trainable_parameters", "nothing_like_it"], "nothing_like_it"),
        (["--max_length=4"], "Row 0 of `forget`: no answer token is left"),
    ],
)
def test_a_mistake_on_the_command_line_is_named(files, tmp_path, capsys, flags, message):
    """Catches a traceback in the place of a reason, and a folder that is left behind."""
    assert main(command(files, tmp_path / "out", "--solver=diagonal", *flags)) == 1
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_the_command_moves_an_adapter_alone(files, tmp_path):
    """Catches a base model that is saved in full, and an adapter that is loaded frozen."""
    from peft import LoraConfig, PeftModel, get_peft_model

    base = AutoModelForCausalLM.from_pretrained(files / "model")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        adapted = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    scene_tokenizer().save_pretrained(tmp_path / "adapter")
    arguments = [f"--model={tmp_path / 'adapter'}", *command(files, tmp_path / "out", "--solver=diagonal")[1:]]
    assert main(arguments) == 0
    assert not (tmp_path / "out" / "model.safetensors").exists()
    found = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(files / "model"), tmp_path / "out")
    before, after = weights(adapted), weights(found)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and all("lora_" in name for name in moved)
