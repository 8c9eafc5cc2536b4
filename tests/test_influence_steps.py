"""Influence unlearning with Kronecker curvature, in one step and in several, and with curvature from a file."""

import json
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from scenes import FORGET, RETAIN, largest_difference, scene_model, scene_tokenizer, weights
from test_gauss_newton import DAMPING, ROUNDING, dense_gauss_newton, flat, mean_loss, num_answers
from test_layer_statistics import LinearLM, tiny_gpt2
from toys import VOCABULARY, ToyLM, tiny_llama, toy_batch, toy_batches, toy_rows

from soul_trainer.curvature import Curvature, KroneckerCurvature, load_curvature, save_curvature
from soul_trainer.curvature.products import measure_curvature
from soul_trainer.formats import prepare
from soul_trainer.influence import SOLVERS, InfluenceArguments, influence_update, main


kronecker = partial(InfluenceArguments, solver="kronecker")


class HeadLM(torch.nn.Module):
    """A body that stays, and a linear head: a softmax regression, in which the loss is convex."""

    def __init__(self, mixes: bool = True, seed: int = 0):
        super().__init__()
        random, self.mixes = torch.Generator().manual_seed(seed), mixes
        self.register_buffer("body", torch.randn(VOCABULARY, 4, generator=random))
        self.head = torch.nn.Linear(4, VOCABULARY)
        self.head.weight.data = 0.5 * torch.randn(VOCABULARY, 4, generator=random)
        self.head.bias.data.zero_()

    def forward(self, input_ids, attention_mask=None, use_cache=False):
        hidden = self.body[input_ids]
        counts = torch.arange(1, input_ids.shape[1] + 1)[None, :, None]
        hidden = torch.tanh(hidden + 0.5 * hidden.cumsum(1) / counts) if self.mixes else hidden
        return SimpleNamespace(logits=self.head(hidden))


def one_input() -> tuple[HeadLM, list, list]:
    """A model whose retain rows all have the same one input, so that the head's G is a Kronecker product; its rows."""
    retain = [{"input_ids": [3, label], "labels": [-100, label], "row": label} for label in range(4)]
    forget = [{"input_ids": [token, 1], "labels": [-100, 1], "row": token} for token in (2, 5)]
    return HeadLM(mixes=False).double(), [toy_batch(forget, [])], [toy_batch([], retain)]


def exact_curvature(model, retain) -> tuple[Curvature, torch.Tensor]:
    """Of [`one_input`], in its own eigenbasis, and the dense matrix: a block a weight, the bias's diagonal."""
    dense = dense_gauss_newton(model, retain, list(model.parameters()))
    size = model.head.weight.numel()
    block, diagonal = dense[:size, :size], dense.diagonal()[size:]
    inputs = model.body[3]
    probabilities = (model.head.weight @ inputs).detach().softmax(0)
    spread, outputs = torch.linalg.eigh(probabilities.diag() - torch.outer(probabilities, probabilities))
    vectors = torch.linalg.qr(torch.stack([inputs, *torch.eye(4).double()[:3]], 1)).Q
    values = torch.outer(spread, inputs.square().sum() * torch.tensor([1.0, 0.0, 0.0, 0.0], dtype=torch.float64))
    none = values.new_zeros
    matrix = KroneckerCurvature(vectors, outputs, values, none(VOCABULARY), none(4), none(()))
    diagonals = {"head.weight": block.diagonal().view(VOCABULARY, 4), "head.bias": diagonal}
    return Curvature(diagonals, {"head.weight": matrix}), torch.block_diag(block, diagonal.diag())


def test_the_kronecker_step_is_the_dense_inverse_where_curvature_is_a_kronecker_product():
    """Catches a damping in units of a weight's mean, a strength or n that is lost, and a bias that is left out."""
    model, forget, retain = one_input()
    curvature, dense = exact_curvature(model, retain)
    before = flat(model.parameters())
    slope = flat(torch.autograd.grad(2 * mean_loss(model, forget), list(model.parameters())))
    wanted = 0.5 * torch.linalg.solve(dense + DAMPING * torch.eye(len(dense)).double(), slope / 40)
    args = kronecker(strength=0.5, damping=DAMPING)
    report = influence_update(model, forget, [], args, num_tokens=40, curvature=curvature)
    step = flat(model.parameters()) - before
    torch.testing.assert_close(step, wanted, rtol=0, atol=ROUNDING * float(wanted.abs().max()))
    assert report.step_norm == pytest.approx(float(step.norm()))
    trace = float(dense.diagonal().sum())
    assert report.kept_share == pytest.approx(curvature.matrices["head.weight"].trace / trace)
    assert report.retain_losses == [] and report.num_steps == 1


def test_measured_curvature_is_the_exact_one_in_the_mean():
    """Catches a sum over draws or rows that is no mean per token: the step would be that of another damping."""
    model, _, retain = one_input()
    exact, dense = exact_curvature(model, retain)
    found = measure_curvature(model, dict(model.named_parameters()), retain, num_draws=150)
    step = torch.randn(VOCABULARY, 4, generator=torch.Generator().manual_seed(1)).double()
    wanted = exact.matrices["head.weight"].quadratic(step)
    # 600 squares of a spread of their mean: a standard error of a few percent.
    assert found.matrices["head.weight"].quadratic(step) == pytest.approx(wanted, rel=0.2)
    for name, diagonal in exact.diagonals.items():
        torch.testing.assert_close(found.diagonals[name], diagonal, rtol=0, atol=0.2 * float(diagonal.max()))
    assert found.metadata["num_tokens"] == num_answers(retain)


def forgetting(model, direction, forget, retain, cost) -> float:
    """How far the forget loss rises where a step of this direction raises the retain loss by `cost`."""
    before, start = weights(model), (mean_loss(model, forget), mean_loss(model, retain))
    low, high = 0.0, 1e4
    for _ in range(30):
        middle = (low + high) / 2
        for name, parameter in model.named_parameters():
            parameter.data = before[name] + middle * direction[name]
        low, high = (middle, high) if mean_loss(model, retain) < start[1] + cost else (low, middle)
    found = float(mean_loss(model, forget).detach() - start[0].detach())
    model.load_state_dict(before, strict=False)
    return found


def learnt(model, batches) -> None:
    """Trains the head to the minimum of the loss with a little weight decay."""
    optimizer = torch.optim.LBFGS([model.head.weight], max_iter=300, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = mean_loss(model, batches) + 1e-3 * model.head.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    model.zero_grad()


@pytest.mark.parametrize("seed", [0, 1])
def test_in_a_convex_model_kronecker_forgets_more_than_the_diagonal_at_equal_cost(seed):
    """Catches curvature of another layer, of another layout or of no effect: it must beat the diagonal at its task."""
    rows = toy_rows(40)
    forget, retain = [toy_batch(rows[:6], [])], [toy_batch([], rows[6:])]
    model, found = HeadLM(seed=seed).double(), {}
    learnt(model, forget + retain)
    start = weights(model)
    for solver in SOLVERS:
        settings = {"trainable_parameters": ["head.weight"], "num_draws": 40}
        args = kronecker(solver=solver, strength=1e-3, damping=1e-2, **settings)
        influence_update(model, forget, retain, args)
        direction = {name: (after - start[name]) / args.strength for name, after in weights(model).items()}
        model.load_state_dict(start, strict=False)
        found[solver] = forgetting(model, direction, forget, retain, cost=0.01)
    assert found["kronecker"] > 1.15 * found["diagonal"], found
    # Which knows G itself, up to what is beyond the second order.
    assert found["kronecker"] == pytest.approx(found["conjugate_gradient"], rel=0.15), found


def test_steps_of_shares_of_the_strength_approach_the_flow():
    """Catches steps of the whole strength each, gradients that stay those of the first weights, a last one lost."""
    forget, retain, ends = toy_batches((3,), num_forget=3), toy_batches((4,)), {}
    start = LinearLM().double()
    curvature = measure_curvature(start, dict(start.named_parameters()), retain)
    for num_steps in (1, 4, 8, 64):
        model = LinearLM().double()
        args = kronecker(strength=0.05, num_steps=num_steps, damping=DAMPING)
        report = influence_update(model, forget, retain, args, curvature=curvature)
        assert len(report.forget_losses) == len(report.retain_losses) == num_steps + 1
        assert report.forget_losses[-1] == pytest.approx(float(mean_loss(model, forget)), rel=1e-5)
        ends[num_steps] = flat(model.parameters())
    assert report.forget_losses == sorted(report.forget_losses)
    errors = {num_steps: float((end - ends[64]).norm()) for num_steps, end in ends.items()}
    # Against k steps, 64 leave 1/k - 1/64 of a first-order error.
    assert errors[1] > 2 * errors[4] and errors[8] / errors[4] == pytest.approx(7 / 15, rel=0.15), errors


def test_curvature_is_measured_again_only_when_told():
    """Catches curvature that follows the weights unasked, and a `remeasure` that does nothing."""
    forget, retain, ends = toy_batches((3,), num_forget=3), toy_batches((4,)), []
    for remeasure in (False, True):
        model = tiny_llama()
        kept = measure_curvature(model, dict(model.named_parameters()), retain)
        args = kronecker(strength=0.3, num_steps=2, damping=DAMPING, remeasure=remeasure)
        influence_update(model, forget, retain, args)
        ends.append(weights(model))
    given = tiny_llama()
    args = kronecker(strength=0.3, num_steps=2, damping=DAMPING)
    influence_update(given, forget, retain, args, curvature=kept)
    assert largest_difference(ends[0], weights(given)) == 0 < largest_difference(*ends)


def test_a_later_step_that_fails_leaves_the_first_weights():
    """Catches a model that is half unlearned after an error."""
    model = ToyLM()
    before = weights(model)
    args = kronecker(solver="diagonal", strength=1e38, num_steps=3, damping=1e-3)
    with pytest.raises(FloatingPointError):
        influence_update(model, toy_batches((2,)), toy_batches((3,)), args)
    assert largest_difference(before, weights(model)) == 0 and model.lm_head.requires_grad


@pytest.mark.parametrize("make_model", [tiny_llama, tiny_gpt2])
def test_curvature_from_a_file_is_that_in_memory(make_model, tmp_path):
    """Catches weights that change places, a transposed matrix, and an n that is not the file's."""
    forget, retain, ends = toy_batches((3,), num_forget=3), toy_batches((4,)), []
    for source in ("memory", "file"):
        model = make_model().eval()
        args = kronecker(damping=DAMPING, num_draws=2, seed=1)
        if source == "memory":
            save_curvature(
                tmp_path / "c", measure_curvature(model, dict(model.named_parameters()), retain, True, 2, seed=1)
            )
            influence_update(model, forget, retain, args)
        else:
            report = influence_update(model, forget, [], args, curvature=load_curvature(tmp_path / "c"))
            assert report.retain_tokens == num_answers(retain)
        ends.append(weights(model))
    assert largest_difference(*ends) == 0 < largest_difference(ends[0], weights(make_model()))


def test_an_adapter_has_curvature_of_its_own():
    """Catches the base model's weights that move, and an adapter that falls back on the diagonal."""
    model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    before = weights(model)
    report = influence_update(model, toy_batches((2,)), toy_batches((3,)), kronecker(damping=DAMPING))
    moved = {name for name, weight in weights(model).items() if not torch.equal(weight, before[name])}
    assert moved == {name for name in before if "lora_" in name} and report.kept_share == pytest.approx(1)


def of(model, **changes) -> Curvature:
    measured = measure_curvature(model, dict(model.named_parameters()), toy_batches((2,)))
    return Curvature(**{**vars(measured), **changes})


@pytest.mark.parametrize(
    "make_curvature, settings, message",
    [
        (lambda: of(tiny_llama()), {"solver": "conjugate_gradient"}, "serves kronecker and diagonal"),
        (lambda: of(tiny_llama()), {"remeasure": True}, "without `remeasure`"),
        (lambda: of(tiny_llama(), matrices={}), {}, "diagonals alone"),
        (lambda: of(tiny_llama(hidden_size=8)), {}, r"embed_tokens.weight, of shape \(7, 4\), is of shape \(7, 8\)"),
        (lambda: of(tiny_llama(num_hidden_layers=1), diagonals={}), {}, "embed_tokens.weight.* is not there"),
        (lambda: of(tiny_llama(), metadata={}), {}, "set `num_tokens`"),
        (lambda: of(tiny_llama(), metadata={"weights": "another", "num_tokens": 9}), {}, "hash another"),
    ],
)
def test_curvature_that_cannot_serve_is_refused(make_curvature, settings, message):
    """Catches a step by the curvature of another model, or by none, that says nothing."""
    model = tiny_llama()
    before = weights(model)
    with pytest.raises(ValueError, match=message):
        influence_update(model, toy_batches((2,)), [], kronecker(**settings), curvature=make_curvature())
    assert largest_difference(before, weights(model)) == 0 and all(p.requires_grad for p in model.parameters())


def test_the_command_takes_curvature_in_the_place_of_retain_rows(tmp_path, capsys):
    """Catches a command that wants the rows all the same, another n, and steps that are not told of."""
    model, tokenizer = scene_model().eval(), scene_tokenizer()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    for name, half in (("forget", FORGET), ("retain", RETAIN)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in half))
    retain = [toy_batch([], list(prepare(RETAIN, tokenizer)))]
    path = tmp_path / "curvature.safetensors"
    save_curvature(path, measure_curvature(model, dict(model.named_parameters()), retain))
    shared = [
        f"--model={tmp_path / 'model'}",
        f"--forget={tmp_path / 'forget.jsonl'}",
        "--device=cpu",
        "--num_steps=2",
        "--solver=kronecker",
    ]
    assert main([*shared, f"--output={tmp_path / 'rows'}", f"--retain={tmp_path / 'retain.jsonl'}"]) == 0
    assert main([*shared, f"--output={tmp_path / 'file'}", f"--curvature={path}"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("step 2: forget loss") == 2 and printed.count("step 2: retain loss") == 1
    rows, file = (json.loads((tmp_path / name / "unlearning.json").read_text()) for name in ("rows", "file"))
    for key in ("retain_tokens", "damping", "step_norm", "kept_share"):
        assert rows["metrics"][key] == pytest.approx(file["metrics"][key], rel=1e-4), key
    assert main([*shared, f"--output={tmp_path / 'none'}"]) == 1
    assert "Set `retain`" in capsys.readouterr().err
