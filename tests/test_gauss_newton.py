"""The gradient, the Gauss-Newton matrix and conjugate gradients against dense matrices."""

import pytest
import torch
from test_curvature import assert_unbiased, exact_gauss_newton
from torch.nn.attention import SDPBackend, sdpa_kernel
from toys import ToyLM, answers_of, tiny_llama, toy_batch, toy_batches, toy_rows
from transformers import OPTConfig, OPTForCausalLM

from soul_trainer.curvature.products import (
    conjugate_gradient,
    gauss_newton_diagonal,
    gauss_newton_product,
    loss_gradient,
)


# As a share of the largest entry: of float64, and of float32, in which Llama's norms and our log-probabilities compute
# whatever the dtype of the weights.
DOUBLE_ROUNDING, ROUNDING = 1e-10, 1e-5
DAMPING = 0.05


def tiny_opt() -> OPTForCausalLM:
    """A model whose embedding has a `padding_idx`, which toy rows use as a token."""
    size = {"hidden_size": 4, "word_embed_proj_dim": 4, "ffn_dim": 6, "num_hidden_layers": 1, "num_attention_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return OPTForCausalLM(OPTConfig(vocab_size=7, pad_token_id=0, max_position_embeddings=16, **size)).eval()


def flat(vector) -> torch.Tensor:
    return torch.cat([part.detach().flatten() for part in vector])


def shaped(flat_vector, parameters) -> list[torch.Tensor]:
    parts = flat_vector.split([p.numel() for p in parameters])
    return [part.view_as(p) for part, p in zip(parts, parameters)]


def random_vector(parameters, seed=0) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    return [torch.randn(p.shape, generator=random).to(p) for p in parameters]


def dense_gauss_newton(model, batches, parameters) -> torch.Tensor:
    """The whole matrix, a logit's derivative at a time."""
    total, count = 0.0, 0
    for batch in batches:
        with sdpa_kernel(SDPBackend.MATH):
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        for row, place, _ in answers_of(batch):
            jacobian = torch.stack(
                [
                    flat(torch.autograd.grad(score, parameters, retain_graph=True, materialize_grads=True))
                    for score in logits[row, place]
                ]
            )
            p = logits[row, place].detach().softmax(0)
            total = total + jacobian.T @ (p.diag() - torch.outer(p, p)) @ jacobian
            count += 1
    return total / count


def mean_loss(model, batches) -> torch.Tensor:
    """Mean negative log-likelihood per answer token, by a loop."""
    losses = []
    for batch in batches:
        log_p = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.log_softmax(-1)
        losses += [-log_p[answer] for answer in answers_of(batch)]
    return torch.stack(losses).mean()


def num_answers(batches) -> int:
    return sum(len(answers_of(batch)) for batch in batches)


@pytest.mark.parametrize(
    "make_model, rounding", [(ToyLM, DOUBLE_ROUNDING), (tiny_llama, ROUNDING), (tiny_opt, DOUBLE_ROUNDING)]
)
def test_products_are_those_of_the_dense_matrix(make_model, rounding):
    """
    Catches a wrong scale, prompt or padding tokens that count, the Hessian in the place of G, p p' left out, and a
    J v that knows of other weights than J' u does.
    """
    model = make_model().double()
    batches, parameters = toy_batches((3, 2)), list(model.parameters())
    dense = dense_gauss_newton(model, batches, parameters)
    for seed in range(3):
        vector = random_vector(parameters, seed)
        found = flat(gauss_newton_product(model, parameters, batches, vector))
        wanted = dense @ flat(vector)
        torch.testing.assert_close(found, wanted, rtol=0, atol=rounding * float(wanted.abs().max()))


def test_conjugate_gradients_solve_the_dense_system():
    """Catches a damping that is left out or scaled, a wrong recursion, and residuals that are not the true ones."""
    model = ToyLM().double()
    batches, parameters = toy_batches((3, 3)), list(model.parameters())
    damped = dense_gauss_newton(model, batches, parameters) + DAMPING * torch.eye(63, dtype=torch.float64)
    target = random_vector(parameters)

    def product(vector):
        return gauss_newton_product(model, parameters, batches, vector)

    solution, residuals = conjugate_gradient(product, target, DAMPING, 200, 1e-10)
    wanted = torch.linalg.solve(damped, flat(target))
    torch.testing.assert_close(flat(solution), wanted, rtol=0, atol=1e-8 * float(wanted.abs().max()))
    assert residuals[-1] <= 1e-10 and len(residuals) <= 63
    early, shares = conjugate_gradient(product, target, DAMPING, 4, 1e-10)
    true_share = (damped @ flat(early) - flat(target)).norm() / flat(target).norm()
    assert shares[-1] == pytest.approx(float(true_share), rel=1e-8) and len(shares) == 4


def test_a_matrix_that_is_not_positive_is_refused():
    """Catches conjugate gradients that divide by a negative or infinite curvature and go on."""
    target = [torch.ones(3)]
    for scale in (-1.0, float("nan")):
        with pytest.raises(FloatingPointError, match="curvature of .* in iteration 1"):
            conjugate_gradient(lambda vector, scale=scale: [scale * part for part in vector], target, 0.1)
    with pytest.raises(FloatingPointError, match="right side"):
        conjugate_gradient(lambda vector: vector, [torch.tensor([float("inf")])], 0.1)


@pytest.mark.parametrize("make_model", [ToyLM, tiny_llama])
def test_the_diagonal_is_the_exact_one_in_the_mean(make_model):
    """Catches rows that all weigh the same however long they are, draws that repeat, and a wrong scale."""
    model = make_model()
    num_seeds = 150 if make_model is ToyLM else 50
    parameters, batches = list(model.parameters()), toy_batches((4,))
    exact = exact_gauss_newton(model.double(), batches[0])
    model.float()
    draws = [
        flat(gauss_newton_diagonal(model, parameters, batches, num_draws=2, seed=seed)) for seed in range(num_seeds)
    ]
    assert_unbiased(torch.stack(draws).double(), exact)


def test_a_weight_that_a_row_does_not_use_has_none_of_its_curvature():
    """Catches a mean that counts the row before again where a row gives a weight no gradient."""

    class Switched(ToyLM):
        """Adds a weight's logits only where the first token is 0, so that other rows give it no gradient at all."""

        def __init__(self):
            super().__init__()
            self.extra = torch.nn.Parameter(torch.linspace(-1, 1, 7))

        def forward(self, input_ids, attention_mask=None, use_cache=False):
            output = super().forward(input_ids)
            if (input_ids[:, 0] == 0).any():
                output.logits = output.logits + self.extra * (input_ids[:, :1] == 0)[..., None]
            return output

    model = Switched()
    rows = [{**row, "input_ids": [int(place == 1), *row["input_ids"][1:]]} for place, row in enumerate(toy_rows(3))]
    for row in rows:
        row["input_ids"][0] = 0 if row["row"] == 0 else 1
    whole = gauss_newton_diagonal(model, list(model.parameters()), [toy_batch([], rows)])[-1]
    alone = gauss_newton_diagonal(model, list(model.parameters()), [toy_batch([], rows[:1])])[-1]
    share = num_answers([toy_batch([], rows[:1])]) / num_answers([toy_batch([], rows)])
    assert alone.max() > 0
    torch.testing.assert_close(whole, share * alone, rtol=1e-5, atol=0)


@pytest.mark.parametrize("make_model", [ToyLM, tiny_llama])
def test_the_loss_gradient_is_the_sum_over_answer_tokens(make_model):
    """Catches a mean, and prompt tokens that count."""
    model = make_model()
    parameters, batches = list(model.parameters()), toy_batches((3, 2))
    wanted = flat(torch.autograd.grad(num_answers(batches) * mean_loss(model, batches), parameters))
    found = flat(loss_gradient(model, parameters, batches))
    torch.testing.assert_close(found, wanted, rtol=0, atol=ROUNDING * float(wanted.abs().max()))
