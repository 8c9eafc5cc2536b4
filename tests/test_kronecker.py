"""Kronecker curvature against dense matrices, exact Gauss-Newton matrices and another library."""

import pytest
import torch
from test_curvature import exact_gauss_newton
from test_layer_statistics import LinearLM, answers_of, assert_close, measure, moments_of, random_basis, tiny_gpt2
from torch import nn
from toys import toy_batches

from soul_trainer.curvature.kronecker import KroneckerCurvature, eigenbasis, truncation_error
from soul_trainer.curvature.layers import Factors, Layer, LayerStatistics, Moments, linear_layers


ROUNDING = 1e-10  # of float64, as a share of the largest entry
INPUTS, OUTPUTS, DAMPING = 5, 4, 0.1
RANKS = [(None, None), (5, 4), (3, 2), (5, 2), (3, 4), (1, 1)]


def random_tensor(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def curvature_of(rank_a=None, rank_g=None, transposed=False) -> KroneckerCurvature:
    """Of random rows of tokens, under a random basis."""
    layer = Layer((), INPUTS, OUTPUTS, transposed, torch.float64, torch.device("cpu"))
    moments = Moments(layer, random_basis(INPUTS, rank_a, 1), random_basis(OUTPUTS, rank_g, 2))
    moments.add(random_tensor(6, 3, INPUTS), random_tensor(6, 3, OUTPUTS, seed=1))
    return KroneckerCurvature.from_moments(moments, num_tokens=18)


def dense_of(function, shape) -> torch.Tensor:
    """The matrix of a linear map of matrices, a unit matrix at a time."""
    units = torch.eye(shape[0] * shape[1], dtype=torch.float64)
    return torch.stack([function(unit.view(shape)).flatten() for unit in units], 1)


def spectrum_of(curvature) -> tuple[torch.Tensor, torch.Tensor]:
    """Full bases of both sides as a Kronecker product `(in * out, in * out)`, and the curvature of each pair."""
    bases = []
    for vectors in (curvature.output_vectors, curvature.input_vectors):
        others = torch.linalg.svd(vectors, full_matrices=True).U[:, vectors.shape[1] :]
        bases.append(torch.cat([vectors, others], 1))
    kept_g, kept_a = curvature.values.shape
    values = curvature.rest_rest.expand(len(bases[0]), len(bases[1])).clone()
    values[:kept_g] = curvature.output_rest[:, None]
    values[:, :kept_a] = curvature.input_rest
    values[:kept_g, :kept_a] = curvature.values
    return torch.kron(*bases), values


@pytest.mark.parametrize("rank_a, rank_g", RANKS)
def test_the_preconditioner_is_the_dense_inverse(rank_a, rank_g):
    """Catches a block that is lost, counted twice or scaled by another block's curvature, and a misplaced mean."""
    curvature = curvature_of(rank_a, rank_g)
    basis, values = spectrum_of(curvature)
    dense = basis @ values.flatten().diag() @ basis.T
    for mean in (None, 0.3):
        scale = mean or dense.trace() / len(dense)
        wanted = torch.linalg.inv(dense / scale + DAMPING * torch.eye(len(dense), dtype=torch.float64))
        found = dense_of(lambda unit, mean=mean: curvature.precondition(unit, DAMPING, mean), (OUTPUTS, INPUTS))
        assert_close(found, wanted, ROUNDING)
    assert_close(dense_of(curvature.product, (OUTPUTS, INPUTS)), dense, ROUNDING)
    assert_close(curvature.diagonal().flatten(), dense.diagonal(), ROUNDING)
    assert curvature.mean == pytest.approx(float(values.mean()))
    step = random_tensor(OUTPUTS, INPUTS, seed=5)
    assert curvature.quadratic(step) == pytest.approx(float(step.flatten() @ dense @ step.flatten()))


@pytest.mark.parametrize("rank_a, rank_g", RANKS)
def test_truncation_keeps_the_trace_and_positivity(rank_a, rank_g):
    """Catches curvature that gets lost with the rank, and a preconditioner that could turn a step uphill."""
    whole, part = curvature_of(), curvature_of(rank_a, rank_g)
    assert part.trace == pytest.approx(whole.trace)
    left, right = random_tensor(OUTPUTS, INPUTS), random_tensor(OUTPUTS, INPUTS, seed=3)
    there = (left * part.precondition(right, DAMPING)).sum()
    assert there == pytest.approx(float((right * part.precondition(left, DAMPING)).sum()))
    assert (left * part.precondition(left, DAMPING)).sum() > 0 and part.diagonal().min() > 0
    is_whole = part.values.numel() == OUTPUTS * INPUTS
    assert part.kept_share == pytest.approx(float(part.values.sum()) / whole.trace)
    assert (part.kept_share == 1.0) == is_whole
    if is_whole:
        for name, tensor in whole.tensors().items():
            torch.testing.assert_close(part.tensors()[name], tensor)
        assert not part.output_rest.any() and not part.input_rest.any() and not part.rest_rest


def test_rest_blocks_are_the_means_of_what_they_stand_for():
    """Catches a sum in the place of a mean, and inputs that are taken for outputs."""
    whole, part = curvature_of(), curvature_of(3, 2)
    assert_close(part.values, whole.values[:2, :3], ROUNDING)
    assert_close(part.output_rest, whole.values[:2, 3:].mean(1), ROUNDING)
    assert_close(part.input_rest, whole.values[2:, :3].mean(0), ROUNDING)
    assert_close(part.rest_rest, whole.values[2:, 3:].mean(), ROUNDING)


@pytest.mark.parametrize("rank_a, rank_g", [(None, None), (3, 2)])
def test_a_transposed_weight_is_taken_and_given_in_its_own_layout(rank_a, rank_g):
    """Catches GPT-2's weights, `(in, out)`, preconditioned as if they were `(out, in)`."""
    plain, flipped = curvature_of(rank_a, rank_g), curvature_of(rank_a, rank_g, transposed=True)
    step = random_tensor(OUTPUTS, INPUTS, seed=4)
    assert_close(flipped.precondition(step.T, DAMPING), plain.precondition(step, DAMPING).T, ROUNDING)
    assert_close(flipped.diagonal(), plain.diagonal().T, ROUNDING)
    assert flipped.quadratic(step.T) == pytest.approx(plain.quadratic(step))
    model = tiny_gpt2().double()
    parameters = dict(model.named_parameters())
    for name, moments in moments_of(model, toy_batches((3,))).items():
        curvature = KroneckerCurvature.from_moments(moments, 5)
        assert moments.transposed and curvature.diagonal().shape == parameters[name].shape
        assert curvature.precondition(parameters[name], DAMPING).shape == parameters[name].shape


def test_tensors_make_the_same_curvature_again(tmp_path):
    """Catches a tensor that the file lacks, and one that safetensors refuses."""
    safetensors = pytest.importorskip("safetensors.torch")
    curvature, step = curvature_of(3, 2, transposed=True), random_tensor(INPUTS, OUTPUTS)
    safetensors.save_file(curvature.tensors(), tmp_path / "curvature.safetensors")
    again = KroneckerCurvature.from_tensors(safetensors.load_file(tmp_path / "curvature.safetensors"), transposed=True)
    assert torch.equal(again.precondition(step, DAMPING), curvature.precondition(step, DAMPING))


def test_a_weight_without_curvature_is_scaled_by_the_damping_alone():
    """Catches 0 / 0 in an expert that no token reached, and a result in another dtype than the gradient's."""
    none = curvature_of()
    none.values.zero_()
    step = random_tensor(OUTPUTS, INPUTS).float()
    found = none.precondition(step, DAMPING)
    assert found.dtype == torch.float32 and none.kept_share == 1.0
    torch.testing.assert_close(found, step / DAMPING)
    with pytest.raises(ValueError, match="no answer token"):
        KroneckerCurvature.from_moments(moments_of(LinearLM(), toy_batches((1,)))["first.weight"], 0)


def test_the_eigenbasis_leads_with_the_largest_and_fixes_signs():
    """Catches the smallest eigenvectors kept in the place of the largest, and signs that follow the LAPACK at hand."""
    outer = random_tensor(40, INPUTS)
    factor = outer.T @ outer
    vectors = eigenbasis(factor, 40)
    spectrum = vectors.T @ factor @ vectors
    assert_close(spectrum, spectrum.diagonal().diag(), ROUNDING)
    assert (spectrum.diagonal().diff() < 0).all()
    assert (vectors.gather(0, vectors.abs().argmax(0, keepdim=True)) > 0).all()
    assert torch.equal(eigenbasis(factor, torch.tensor(40), rank=2), vectors[:, :2])
    assert eigenbasis(factor.float(), 40, rank=9).shape == (INPUTS, INPUTS)
    assert eigenbasis(factor.float(), 40).dtype == torch.float32 and eigenbasis(torch.zeros(3, 3), 0).isfinite().all()
    with pytest.raises(FloatingPointError, match="not finite"):
        eigenbasis(factor * float("nan"), 40)


def test_a_decomposition_that_does_not_converge_is_made_in_double(monkeypatch):
    """Catches a measurement of hours that a float32 decomposition ends."""
    decompose, factor = torch.linalg.eigh, random_tensor(40, INPUTS).float()

    def eigh(matrix):
        if matrix.dtype == torch.float32:
            raise torch.linalg.LinAlgError("The algorithm failed to converge.")
        return decompose(matrix)

    wanted = eigenbasis(factor.T @ factor, 40)
    monkeypatch.setattr(torch.linalg, "eigh", eigh)
    torch.testing.assert_close(eigenbasis(factor.T @ factor, 40), wanted)


@pytest.mark.parametrize("rank_a, rank_g", RANKS)
def test_the_truncation_error_is_that_of_the_whole_spectrum(rank_a, rank_g):
    """Catches an error that is 0 where something is dropped, squared, or relative to the kept part."""
    factors = [matrix.T @ matrix for matrix in (random_tensor(9, INPUTS), random_tensor(9, OUTPUTS, seed=1))]
    bases = [eigenbasis(factor, 1, rank) for factor, rank in zip(factors, (rank_a, rank_g))]
    a, g = (torch.linalg.eigvalsh(factor).flip(0) for factor in factors)
    exact = torch.outer(g, a)
    approximate, kept_g, kept_a = exact.clone(), bases[1].shape[1], bases[0].shape[1]
    blocks = [(slice(i, i + 1), slice(kept_a, None)) for i in range(kept_g)]
    blocks += [(slice(kept_g, None), slice(j, j + 1)) for j in range(kept_a)]
    for block in [*blocks, (slice(kept_g, None), slice(kept_a, None))]:
        if approximate[block].numel():
            approximate[block] = exact[block].mean()
    wanted = float((approximate - exact).norm() / exact.norm())
    assert truncation_error(*factors, *bases) == pytest.approx(wanted, rel=1e-6, abs=1e-7)
    assert (wanted > 0.01) == (exact.shape != (kept_g, kept_a))


def enumerated(model, accumulators, inputs) -> LayerStatistics:
    """Every label of every position, its gradient weighted by the root of its probability: the exact expectation."""
    with LayerStatistics(linear_layers(model), accumulators) as statistics:
        for label in range(model(inputs).shape[-1]):
            log_p = model(inputs).log_softmax(-1)[..., label]
            (-(0.5 * log_p.detach()).exp() * log_p).sum().backward()
    return statistics


def single_layer(inputs) -> tuple[KroneckerCurvature, torch.Tensor]:
    """A softmax regression's curvature, measured in its own basis, and its dense Gauss-Newton matrix."""
    model = nn.Sequential(nn.Linear(INPUTS, OUTPUTS, bias=False)).double()
    nn.init.normal_(model[0].weight, generator=torch.Generator().manual_seed(0))
    (layer,) = linear_layers(model).values()
    factors = Factors(layer)
    enumerated(model, {"0.weight": factors}, inputs)
    moments = Moments(layer, *(eigenbasis(part, factors.count) for part in (factors.inputs, factors.outputs)))
    enumerated(model, {"0.weight": moments}, inputs)
    dense = 0.0
    for a, p in zip(inputs, model(inputs).detach().softmax(-1)):
        dense = dense + torch.kron(p.diag() - torch.outer(p, p), torch.outer(a, a)) / len(inputs)
    return KroneckerCurvature.from_moments(moments, num_tokens=len(inputs)), dense


def test_values_are_the_best_diagonal_of_the_exact_gauss_newton_matrix():
    """Catches a wrong number of tokens, second moments in another basis, and a pair (i, j) that is read as (j, i)."""
    curvature, dense = single_layer(random_tensor(7, INPUTS))
    basis = torch.kron(curvature.output_vectors, curvature.input_vectors)
    assert_close(curvature.values.flatten(), (basis.T @ dense @ basis).diagonal(), ROUNDING)
    assert curvature.trace == pytest.approx(float(dense.trace()))


def test_one_input_alone_has_the_gauss_newton_matrix_itself():
    """Catches a Kronecker product that is not the curvature even where there is nothing to approximate."""
    curvature, dense = single_layer(random_tensor(1, INPUTS))
    assert_close(dense_of(curvature.product, (OUTPUTS, INPUTS)), dense, ROUNDING)
    damped = dense / curvature.mean + DAMPING * torch.eye(len(dense), dtype=torch.float64)
    found = dense_of(lambda unit: curvature.precondition(unit, DAMPING), (OUTPUTS, INPUTS))
    assert_close(found, torch.linalg.inv(damped), ROUNDING)


def test_sampled_labels_give_the_exact_curvature_of_a_row_in_the_mean():
    """Catches cross terms between a row's tokens that do not cancel: the trace would be off by the row's length."""
    model = LinearLM().double()
    (batch,) = batches = toy_batches((4,))
    num_tokens, random = len(answers_of(batch)), torch.Generator().manual_seed(0)
    layers = linear_layers(model)
    bases = {
        name: [random_basis(size) for size in (layer.in_features, layer.out_features)]
        for name, layer in layers.items()
    }
    answers = answers_of(batch)
    draws = []
    for _ in range(400):
        probabilities = model(batch["input_ids"]).logits.detach().softmax(-1)
        for row, place, _ in answers:
            batch["labels"][row, place + 1] = torch.multinomial(probabilities[row, place], 1, generator=random)
        accumulators = {name: Moments(layer, *bases[name]) for name, layer in layers.items()}
        measure(model, layers, accumulators, batches)
        draws.append([KroneckerCurvature.from_moments(m, num_tokens).trace for m in accumulators.values()])
    draws, wanted, start = torch.tensor(draws).double(), [], 0
    exact = exact_gauss_newton(model, batch)
    for name, parameter in model.named_parameters():
        if name in layers:
            wanted.append(exact[start : start + parameter.numel()].sum())
        start += parameter.numel()
    deviations = (draws.mean(0) - torch.stack(wanted)).abs() / (draws.std(0) / len(draws) ** 0.5)
    assert deviations.max() < 4, deviations


def test_another_library_finds_the_same_factors_and_the_same_matrix():
    """Catches what our own closed forms would repeat: a convention of K-FAC that we got wrong."""
    curvlinops = pytest.importorskip("curvlinops")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(INPUTS, 6), nn.Tanh(), nn.Linear(6, OUTPUTS)).double()
    data, labels = random_tensor(8, INPUTS), torch.arange(8) % OUTPUTS
    layers = linear_layers(model)
    weights = [model[0].weight, model[2].weight]
    options = {"fisher_type": "empirical", "check_deterministic": False}
    kfac = curvlinops.KFACLinearOperator(model, nn.CrossEntropyLoss(), weights, [(data, labels)], **options)
    kfac.compute_kronecker_factors()
    ekfac = curvlinops.EKFACLinearOperator(model, nn.CrossEntropyLoss(), weights, [(data, labels)], **options)
    dense = ekfac @ torch.eye(ekfac.shape[1], dtype=torch.float64)

    def measured(accumulators):
        with LayerStatistics(layers, accumulators) as statistics:
            statistics.gradient_scale = len(data)
            nn.functional.cross_entropy(model(data), labels).backward()
        return accumulators

    factors = measured({name: Factors(layer) for name, layer in layers.items()})
    moments = {}
    for name, sums in factors.items():
        module = name.removesuffix(".weight")
        assert_close(sums.inputs / sums.count, kfac._input_covariances[module], ROUNDING)
        assert_close(sums.outputs / sums.count, kfac._gradient_covariances[module], ROUNDING)
        bases = (eigenbasis(factor, sums.count) for factor in (sums.inputs, sums.outputs))
        moments[name] = Moments(layers[name], *bases)
    start = 0
    for name, sums in measured(moments).items():
        curvature = KroneckerCurvature.from_moments(sums, len(data))
        size = curvature.values.numel()
        found = dense_of(curvature.product, (layers[name].out_features, layers[name].in_features))
        assert_close(found, dense[start : start + size, start : start + size], ROUNDING)
        start += size
