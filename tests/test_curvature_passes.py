"""Passes over the rows: what is kept of the first for the second, deaths in the middle, and several processes."""

import json
from pathlib import Path

import pytest
import torch
from curvature_scenes import assert_alike, measured, write_scene
from curvature_worker import TOGETHER, TOGETHER_FLAGS
from safetensors import safe_open
from scenes import NAMES, RETAIN, logged, question_rows, scene_model, scene_tokenizer, scene_trainer
from subprocesses import python, succeeded
from test_layer_statistics import LinearLM, answer_losses, assert_same_sums
from toys import tiny_llama, toy_batch, toy_batches

from soul_trainer.curvature import layers as layer_statistics
from soul_trainer.curvature import load_curvature, measure, resumable
from soul_trainer.curvature.estimators import ESTIMATORS, logits_of
from soul_trainer.curvature.kronecker import eigenbasis
from soul_trainer.curvature.labels import answer_uniforms, signed_label_loss
from soul_trainer.curvature.layers import Factors, LayerStatistics, Moments, linear_layers
from soul_trainer.curvature.measure import MatrixPasses, can_keep
from soul_trainer.curvature.resumable import Measurement, SummingEngine
from soul_trainer.engines import find_soul
from soul_trainer.formats import prepare


DOUBLE_ROUNDING = 1e-12


# What is kept


def passes_over(model, batches, limit, keeps=True) -> tuple[MatrixPasses, list[int]]:
    """The passes of an estimate a batch, which are done, and the estimates for which the model ran."""
    passes, ran = MatrixPasses([linear_layers(model)], keeps=keeps, limit=limit), []
    while not passes.are_done:
        for number, batch in enumerate(batches):

            def run(statistics, number=number, batch=batch):
                losses = answer_losses(model, batch)
                statistics.gradient_scale, statistics.num_tokens = len(losses), statistics.num_tokens + len(losses)
                losses.mean().backward()
                ran.append(number)

            passes.estimate(number, run)
        passes.finish_pass()
    return passes, ran


def assert_same_bits(found, wanted):
    assert found.keys() == wanted.keys() and wanted
    for name, matrix in wanted.items():
        assert all(torch.equal(tensor, found[name].tensors()[key]) for key, tensor in matrix.tensors().items()), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make_model", [LinearLM, tiny_llama])
def test_what_is_kept_gives_the_bits_of_another_run(make_model, dtype):
    """
    Catches positions in another order or of another estimate, a gradient that is scaled twice or by another estimate's
    number of tokens, memory beyond its limit, and a model that runs in vain.
    """
    model, batches = make_model().to(dtype), toy_batches((3, 2, 4))
    wanted, ran = passes_over(model, batches, limit=0)
    assert ran == [0, 1, 2, 0, 1, 2]
    whole, ran = passes_over(model, batches, limit=2**20)
    assert ran == [0, 1, 2]
    assert_same_bits(whole.matrices, wanted.matrices)
    # As much as fits: the first estimate, and not the second.
    with LayerStatistics(
        linear_layers(model), {n: Factors(each) for n, each in linear_layers(model).items()}
    ) as first:
        with first.keeping(2**20) as kept:
            answer_losses(model, batches[0]).mean().backward()
    part, ran = passes_over(model, batches, limit=kept.num_bytes)
    assert ran == [0, 1, 2, 1, 2] and kept.num_bytes > 0
    assert_same_bits(part.matrices, wanted.matrices)
    assert passes_over(model, batches, limit=2**20, keeps=False)[1] == [0, 1, 2, 0, 1, 2]


def test_kept_positions_are_those_with_a_gradient():
    """Catches padding that fills the memory, and inputs that layers share but that are kept for each."""
    model, (batch,) = tiny_llama(), toy_batches((4,))
    layers = linear_layers(model)
    for name, value in (("input_ids", 3), ("attention_mask", 0), ("labels", -100)):
        batch[name] = torch.nn.functional.pad(batch[name], (0, 20), value=value)
    with LayerStatistics(layers, {name: Factors(layer) for name, layer in layers.items()}) as statistics:
        with statistics.keeping(2**20) as kept:
            answer_losses(model, batch).mean().backward()
    by_name = dict(kept.positions)
    assert by_name.keys() == layers.keys()
    num_positions = int(batch["attention_mask"].sum())
    assert all(0 < len(positions.gradients) <= num_positions for positions in by_name.values())
    gate, up = (by_name[f"model.layers.0.mlp.{part}_proj.weight"] for part in ("gate", "up"))
    key, value = (by_name[f"model.layers.0.self_attn.{part}_proj.weight"] for part in "kv")
    assert gate.inputs is up.inputs and key.inputs is value.inputs and gate.inputs is not key.inputs
    tensors = {id(tensor): tensor for each in by_name.values() for tensor in (each.gradients, each.sizes)}
    tensors |= {id(t): t for each in by_name.values() for t in (each.inputs.numbers, each.inputs.places)}
    assert kept.num_bytes == sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


@pytest.mark.parametrize("make_sums", [Factors, lambda layer: Moments(layer, *bases_of(layer))])
def test_layers_that_read_one_tensor_have_the_sums_of_each_alone(make_sums):
    """Catches a product of one layer's inputs, or in one layer's basis, that another layer takes for its own."""
    model, batches = tiny_llama().double(), toy_batches((3, 2))
    layers = linear_layers(model)

    def sums(names):
        with LayerStatistics(layers, {name: make_sums(layers[name]) for name in names}) as statistics:
            for batch in batches:
                answer_losses(model, batch).sum().backward()
        return statistics.accumulators

    together, alone = sums(layers), {}
    for name in layers:
        alone |= sums([name])
    assert_same_sums(together, alone, DOUBLE_ROUNDING)


def bases_of(layer):
    random = torch.Generator().manual_seed(layer.in_features)
    sizes = layer.in_features, layer.out_features
    return [torch.linalg.qr(torch.randn(size, size, generator=random, dtype=torch.float64)).Q for size in sizes]


def test_layers_that_read_one_tensor_share_its_basis():
    """Catches a factor that is decomposed once for each, and bases of layers that only look alike."""
    model, decomposed = tiny_llama(), []
    with pytest.MonkeyPatch.context() as patch:
        whole = measure.eigenbasis
        patch.setattr(measure, "eigenbasis", lambda *args: decomposed.append(None) or whole(*args))
        matrices = passes_over(model, toy_batches((4,)), 0)[0].matrices
    # Of 8 layers there are 8 factors of gradients; key and value share one of inputs, gate and up another.
    assert len(matrices) == 8 and len(decomposed) == 14
    bases = {name.split(".")[-2]: matrix.input_vectors for name, matrix in matrices.items()}
    assert bases["k_proj"] is bases["v_proj"] and bases["gate_proj"] is bases["up_proj"]
    assert len({id(basis) for basis in bases.values()}) == 6


@pytest.mark.parametrize("chunk", [1, 40, 2**26])
@pytest.mark.parametrize("rank", [None, 2])
def test_rows_at_once_change_nothing(monkeypatch, chunk, rank):
    """Catches rows that are lost or counted twice between groups, and padding that is taken for a position."""
    model, (batch,) = LinearLM().double(), toy_batches((6,))
    layers = linear_layers(model)

    def moments():
        sums = {name: Moments(layer, *(v[:, :rank] for v in bases_of(layer))) for name, layer in layers.items()}
        with LayerStatistics(layers, sums):
            answer_losses(model, batch).sum().backward()
        return sums

    wanted = moments()
    monkeypatch.setattr(layer_statistics, "CACHE_NUMBERS", chunk)
    assert_same_sums(moments(), wanted, DOUBLE_ROUNDING)


# Who keeps


@pytest.mark.parametrize("estimator, num_saved", [("empirical_fisher", 3), ("gauss_newton_bartlett", 0)])
def test_a_refresh_runs_the_model_once_where_it_may(tmp_path, estimator, num_saved):
    """
    Catches a second run that costs as much as the first, one that is saved where it needs other labels, and curvature
    that depends on the memory there is.
    """
    found, num_forwards = [], []
    for limit in (2**30, 0):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(measure, "KEPT_BYTES", limit)
            settings = {"rule": "kronecker", "hessian_estimator": estimator, "max_steps": 1, "hessian_interval": 0}
            trainer = scene_trainer(tmp_path / str(limit), scene_model(), **settings)
            forwards = []
            trainer.model.register_forward_hook(lambda *args, forwards=forwards: forwards.append(None))
            trainer.train()
        num_forwards.append(len(forwards))
        soul = find_soul(trainer.optimizer)
        diagonals = {name: soul.state[each]["hessian"] for name, each in trainer.model.named_parameters()}
        found.append((soul.matrices, diagonals))
        assert len(logged(trainer, "curvature/hessian_mean")) == 1
    # Of 16 rows there are 3 estimates of 6, in one forward each.
    assert num_forwards[1] - num_forwards[0] == num_saved
    assert_same_bits(found[0][0], found[1][0])
    assert all(torch.equal(tensor, found[1][1][name]) for name, tensor in found[0][1].items())


@pytest.mark.parametrize("estimator, num_draws", [("empirical_fisher", 2), ("gauss_newton_bartlett", 4)])
def test_the_second_pass_has_other_labels_where_it_must(estimator, num_draws):
    """Catches a basis of the labels that are then measured in it, and a diagonal that counts an estimate twice."""
    model, batches, engine = tiny_llama(), toy_batches((3, 3)), SummingEngine()
    passes = MatrixPasses([linear_layers(model)], engine, keeps=can_keep(estimator))
    measurement = Measurement(model, lambda number: [batches[number]], 2, passes, estimator, 0.0, 0)
    measurement.run(lambda: None, lambda: None)
    soul = resumable.Soul(model.parameters(), rule="diagonal")
    engine.folds = True
    for draw in range(num_draws):
        batch = [batches[draw % 2]]
        resumable.estimate_hessian(model, soul, batch, estimator, draw=draw, decay=draw / (draw + 1), engine=engine)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(measurement.diagonals[name], soul.state[parameter]["hessian"])


def estimation_error(model, batch, estimator, draws) -> float:
    """
    How far second moments of the second draw, in the basis of the first, are from those of ten other draws: the
    divergence of a coordinate's normal distributions with these precisions, damped by a tenth of the mean.
    """
    layers = linear_layers(model)

    def sums_of(accumulators, draw):
        with LayerStatistics(layers, accumulators):
            uniforms = answer_uniforms(batch, 0, draw)
            ESTIMATORS[estimator](logits_of(model, batch), batch, uniforms, 0.0).sum().backward()
        return accumulators

    bases = {
        name: [eigenbasis(factor, factors.count) for factor in (factors.inputs, factors.outputs)]
        for name, factors in sums_of({name: Factors(layer) for name, layer in layers.items()}, draws[0]).items()
    }

    def moments(draw):
        found = sums_of({name: Moments(layer, *bases[name]) for name, layer in layers.items()}, draw)
        return {name: sums.values for name, sums in found.items()}

    found, others = moments(draws[1]), [moments(1000 + draw) for draw in range(10)]
    errors = []
    for name, values in found.items():
        expected = torch.stack([other[name] for other in others]).mean(0)
        left, right = (each / each.mean() + 0.1 for each in (expected, values))
        errors.append(float((left / right - 1 - (left / right).log()).mean()))
    return sum(errors) / len(errors)


@pytest.mark.parametrize(
    "estimator, largest, least", [("empirical_fisher", 1.5, 0.5), ("gauss_newton_bartlett", 9, 2)]
)
def test_repeated_labels_cost_nothing_where_they_are_true(estimator, largest, least):
    """Catches second moments that are too steep in a basis of the same labels, and a second run that is in vain."""
    batch, model = toy_batch([], list(prepare(RETAIN, scene_tokenizer()))), scene_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(40):  # until it knows the rows: surprises are rare then
        optimizer.zero_grad()
        signed_label_loss(logits_of(model, batch), batch, torch.ones(batch["labels"].shape), 0.0).mean().backward()
        optimizer.step()
    repeated, independent = (
        sum(estimation_error(model, batch, estimator, (draw, draw + offset)) for draw in range(4))
        for offset in (0, 100)
    )
    assert least < repeated / independent < largest
    assert can_keep(estimator) == (largest < 2)


# Deaths, and several processes


@pytest.fixture(scope="module")
def lived(tmp_path_factory) -> tuple[Path, str, str]:
    """The folder of what processes measured, and what they printed."""
    folder = tmp_path_factory.mktemp("lived")
    write_scene(folder)
    rows = [*RETAIN, *question_rows(NAMES[:1])[:1]]  # 17: the last of three estimates of 8 rows is a single row
    (folder / "more.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = python(Path(__file__).parent / "curvature_worker.py", folder, folder=folder)
    return folder, succeeded(done), done.stderr


@pytest.mark.xdist_group("curvature_worker")
def test_a_measurement_that_was_killed_ends_with_the_same_bits(lived):
    """
    Catches sums that are lost or count twice after a death, bases that are made again of other sums, positions that
    were kept in a life before, a progress that is half written, and settings that are mixed in one file.
    """
    folder, printed, errors = lived
    places = [line for line in printed.splitlines() if line.startswith("killed")]
    expected = [(0, 1), (1, 2), (2, 1), (2, 3), (3, 1)]
    assert places == [f"killed in pass {number}, estimate {estimate}" for number, estimate in expected]
    assert "`rank` is 5, not 4" in errors
    contents = []
    for name in ("whole", "killed"):
        with safe_open(folder / f"{name}.safetensors", "pt") as file:
            contents.append(({key: file.get_tensor(key) for key in file.keys()}, file.metadata()))
    (whole, whole_metadata), (killed, killed_metadata) = contents
    assert whole.keys() == killed.keys() and all(killed[name].equal(tensor) for name, tensor in whole.items())
    assert whole_metadata == killed_metadata
    assert not list(folder.glob("*progress*"))


@pytest.mark.xdist_group("curvature_worker")
def test_two_processes_measure_what_one_does(lived):
    """
    Catches rows that count twice, sums that are means, an estimate of which a process has no row, a progress that each
    process goes on with, a second writer, and a process that waits for another which kept what it did not.
    """
    folder, printed, _ = lived
    wanted = measured(folder, folder / "one.safetensors", *TOGETHER_FLAGS, dataset="more.jsonl")
    assert printed.count("alone until pass 0, estimate 2") == len(TOGETHER)
    for name in TOGETHER:
        assert printed.count(f"{name}.safetensors: ") == 1
        found = load_curvature(folder / f"{name}.safetensors")
        assert_alike(found, wanted)
        assert found.metadata == wanted.metadata


@pytest.mark.xdist_group("curvature_worker")
def test_two_processes_share_the_decompositions(lived, tmp_path, monkeypatch):
    """Catches processes that all decompose all factors, and one that waits for a basis which another cannot make."""
    folder, printed, errors = lived
    whole, alone = measure.eigenbasis, []
    monkeypatch.setattr(measure, "eigenbasis", lambda *args: alone.append(None) or whole(*args))
    measured(folder, tmp_path / "one.safetensors", *TOGETHER_FLAGS, dataset="more.jsonl")
    lines = [line.split() for line in printed.splitlines() if line.startswith("process ")]
    counts = [[int(line[-1]) for line in lines if line[1] == rank] for rank in "01"]
    for one, other in list(zip(*counts))[: len(TOGETHER)]:
        assert one + other == len(alone) and abs(one - other) <= 2
    assert errors.count("A factor is not finite. It is that of the") == 2
