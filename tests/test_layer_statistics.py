"""Sums over linear layers' inputs and output gradients, against loops over autograd."""

import weakref
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from toys import VOCABULARY, answers_of, tiny_llama, toy_batch, toy_batches, toy_rows
from transformers import GPT2Config, GPT2LMHeadModel

from soul_trainer.curvature.layers import Factors, LayerStatistics, Moments, linear_layers


# As a share of the largest entry: float64, and float32 in which Llama's norms compute whatever the weights' dtype.
DOUBLE_ROUNDING, ROUNDING = 1e-10, 1e-5
# bfloat16 keeps 8 bits, and the two orders of summation differ by a few of them.
BFLOAT16_ROUNDING = 3e-2


class LinearLM(torch.nn.Module):
    """A language model of three linear layers; a token sees the mean of those before it, so that positions mix."""

    def __init__(self, seed: int = 0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.embed = torch.nn.Embedding(VOCABULARY, 5)
            self.first = torch.nn.Linear(5, 6)
            self.second = torch.nn.Linear(6, 4, bias=False)
            self.lm_head = torch.nn.Linear(4, VOCABULARY)

    def forward(self, input_ids, attention_mask=None, use_cache=False):
        embedded = self.embed(input_ids)
        counts = torch.arange(1, input_ids.shape[1] + 1)[None, :, None]
        hidden = self.first(embedded + 0.5 * embedded.cumsum(1) / counts).tanh_()  # in place, as fast models do it
        hidden = hidden.cumsum(1) / counts
        return SimpleNamespace(logits=self.lm_head(torch.tanh(self.second(hidden))))


def tiny_gpt2() -> GPT2LMHeadModel:
    """A GPT-2, whose linear weights lie transposed and whose head is its embedding."""
    size = {"vocab_size": VOCABULARY, "n_positions": 16, "n_embd": 4, "n_layer": 1, "n_head": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return GPT2LMHeadModel(GPT2Config(**size, initializer_range=0.7, bos_token_id=0, eos_token_id=0)).eval()


def answer_losses(model, batch) -> torch.Tensor:
    """Negative log-likelihoods of all answer tokens of a batch."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.double()
    log_p = logits.log_softmax(-1)
    return -torch.stack([log_p[answer] for answer in answers_of(batch)])


def measure(model, layers, accumulators, batches) -> LayerStatistics:
    """One pass over the batches, with a loss that is divided as an estimate divides it."""
    num_tokens = sum(len(answers_of(batch)) for batch in batches)
    with LayerStatistics(layers, accumulators) as statistics:
        statistics.gradient_scale = num_tokens
        for batch in batches:
            (answer_losses(model, batch).sum() / num_tokens).backward()
    model.zero_grad()
    return statistics


def factors_of(model, batches, **options) -> dict[str, Factors]:
    layers = linear_layers(model, **options)
    return measure(model, layers, {name: Factors(layer) for name, layer in layers.items()}, batches).accumulators


def random_basis(size, rank=None, seed=0, dtype=torch.float64) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(size, size, generator=random, dtype=torch.float64)).Q[:, :rank].to(dtype)


def moments_of(model, batches, rank=None, dtype=torch.float64) -> dict[str, Moments]:
    layers = linear_layers(model)
    accumulators = {}
    for name, layer in layers.items():
        vectors = [random_basis(size, rank, size, dtype) for size in (layer.in_features, layer.out_features)]
        accumulators[name] = Moments(layer, *vectors)
    return measure(model, layers, accumulators, batches).accumulators


def row_gradients(model, batches, name, transposed) -> list[torch.Tensor]:
    """The gradient `(out, in)` of each row's summed loss in one weight, a row at a time."""
    parameter, gradients = dict(model.named_parameters())[name], []
    for batch in batches:
        losses = answer_losses(model, batch)
        for row in range(len(batch["input_ids"])):
            chosen = losses[torch.tensor([answer[0] == row for answer in answers_of(batch)])].sum()
            (gradient,) = torch.autograd.grad(chosen, parameter, retain_graph=True)
            gradients.append((gradient.T if transposed else gradient).double())
    return gradients


def assert_close(found, wanted, rounding):
    assert wanted.abs().max() > 0
    torch.testing.assert_close(found.to(wanted), wanted, rtol=0, atol=rounding * float(wanted.abs().max()))


def assert_same_sums(found, wanted, rounding):
    assert found.keys() == wanted.keys() and wanted
    for name, accumulator in wanted.items():
        for key, tensor in accumulator.tensors().items():
            assert_close(found[name].tensors()[key], tensor, rounding)


def test_factors_are_those_of_a_loop_over_positions():
    """Catches prompt tokens or padding that count, a gradient of the mean loss, and inputs taken after the layer."""
    model = LinearLM().double()
    batches = toy_batches((3, 2))
    found = factors_of(model, batches)
    assert list(found) == ["first.weight", "second.weight", "lm_head.weight"]
    for name, module in (("second", model.second), ("lm_head", model.lm_head), ("first", model.first)):
        seen, inputs, outputs, count = {}, 0.0, 0.0, 0
        # The clone is what the model modifies in place.
        handle = module.register_forward_hook(
            lambda module, args, output, seen=seen: seen.update(a=args[0], b=output) or output.clone()
        )
        for batch in batches:
            losses = answer_losses(model, batch)
            (gradient,) = torch.autograd.grad(losses.sum(), seen["b"])
            for a, g in zip(seen["a"].flatten(0, 1), gradient.flatten(0, 1)):
                if g.any():
                    inputs, outputs, count = inputs + torch.outer(a, a), outputs + torch.outer(g, g), count + 1
        handle.remove()
        assert_close(found[f"{name}.weight"].inputs, inputs.detach(), DOUBLE_ROUNDING)
        assert_close(found[f"{name}.weight"].outputs, outputs, DOUBLE_ROUNDING)
        assert found[f"{name}.weight"].count == count
    assert found["lm_head.weight"].count == sum(len(answers_of(batch)) for batch in batches)


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize(
    "make_model, rounding", [(LinearLM, DOUBLE_ROUNDING), (tiny_llama, ROUNDING), (tiny_gpt2, DOUBLE_ROUNDING)]
)
def test_moments_are_those_of_each_rows_gradient(make_model, rounding, rank):
    """Catches squares of positions or of whole batches, a mixed-up basis or layout, and totals of the kept part."""
    model = make_model().double()
    batches = toy_batches((3, 2))
    for name, moments in moments_of(model, batches, rank).items():
        rows = torch.stack(row_gradients(model, batches, name, moments.transposed))
        left, right = moments.output_vectors.T @ rows, rows @ moments.input_vectors
        assert_close(moments.values, (left @ moments.input_vectors).square().sum(0), rounding)
        assert_close(moments.output_totals, left.square().sum((0, 2)), rounding)
        assert_close(moments.input_totals, right.square().sum((0, 1)), rounding)
        assert_close(moments.total, rows.square().sum(), rounding)


@pytest.mark.parametrize("measure_all", [factors_of, moments_of])
@pytest.mark.parametrize("make_model", [LinearLM, tiny_llama])
def test_sums_do_not_depend_on_batches_or_padding(make_model, measure_all):
    """Catches a sum that is divided by the batch, and padding that counts as a position."""
    model = make_model().double()
    # A first token attends to itself alone, so that its query's gradient is zero or rounding as the layout has it.
    if measure_all is factors_of and make_model is tiny_llama:
        model.model.layers[0].self_attn.q_proj.requires_grad_(False)
    whole = measure_all(model, toy_batches((6,)))
    assert_same_sums(measure_all(model, toy_batches((1,) * 6)), whole, ROUNDING)
    rows = toy_rows(6)
    padded = toy_batch([], rows)
    for key, value in (("input_ids", 3), ("attention_mask", 0), ("labels", -100)):
        padded[key] = torch.nn.functional.pad(padded[key], (0, 5), value=value)
    assert_same_sums(measure_all(model, [padded]), whole, ROUNDING)


@pytest.mark.parametrize("measure_all", [factors_of, moments_of])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(use_reentrant, measure_all):
    """Catches positions that the recomputed forward counts again, and ones that count in neither forward."""
    wanted = measure_all(tiny_llama().double(), toy_batches((3, 2)))
    model = tiny_llama().double().train()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    found = measure_all(model, toy_batches((3, 2)))
    assert_same_sums(found, wanted, ROUNDING)


def test_checkpointing_still_drops_the_inputs():
    """Catches a hook that keeps every layer's inputs alive, and with them all that checkpointing would free."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3))
    layers, seen = linear_layers(model), []
    model[2].register_forward_pre_hook(lambda module, args: seen.append(weakref.ref(args[0].untyped_storage())))
    with LayerStatistics(layers, {name: Factors(layer) for name, layer in layers.items()}) as statistics:
        output = torch.utils.checkpoint.checkpoint(model, torch.ones(2, 5, 3), use_reentrant=False)
        assert seen[0]() is None
        output.sum().backward()
    assert all(factors.count == 10 for factors in statistics.accumulators.values())


def test_gradients_are_left_as_they_are_and_hooks_go():
    """Catches a pass that changes training, and a model that goes on paying for a pass that is over."""
    model, (batch,) = LinearLM(), toy_batches((4,))
    wanted = torch.autograd.grad(answer_losses(model, batch).sum(), list(model.parameters()))
    layers = linear_layers(model)
    with LayerStatistics(layers, {name: Factors(layer) for name, layer in layers.items()}) as statistics:
        found = torch.autograd.grad(answer_losses(model, batch).sum(), list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(found, wanted))
    before = [tensor.clone() for tensor in statistics.tensors()]
    answer_losses(model, batch).sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(statistics.tensors(), before))
    assert not any(module._forward_hooks for module in model.modules())


def test_tied_frozen_and_too_large_weights_are_left_out():
    """Catches a head whose weight the embedding moves too, and factors that would fill the memory."""
    tied = tiny_llama(tie_word_embeddings=True)
    names = list(linear_layers(tied))
    assert "lm_head.weight" not in names and "model.embed_tokens.weight" not in names and len(names) == 7
    assert "lm_head.weight" in linear_layers(tiny_llama())
    assert not any("mlp" in name for name in linear_layers(tied, max_size=5))
    tied.model.layers[0].mlp.requires_grad_(False)
    assert not any("mlp" in name for name in linear_layers(tied))
    assert list(linear_layers(tied, trainable_only=False)) == names
    wrapped = torch.nn.Sequential()
    wrapped.add_module("_orig_mod", LinearLM())
    assert list(linear_layers(wrapped)) == list(linear_layers(LinearLM()))


def test_linear_modules_that_share_a_weight_are_one_layer():
    """Catches a second user of a weight that goes unseen, or that is a layer under a name no parameter has."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 3, bias=False), torch.nn.Tanh(), torch.nn.Linear(3, 3, bias=False))
    model[2].weight = model[0].weight
    layers = linear_layers(model)
    assert list(layers) == ["0.weight"] and layers["0.weight"].modules == (model[0], model[2])
    inputs = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))
    with LayerStatistics(layers, {"0.weight": Factors(layers["0.weight"])}) as statistics:
        model(inputs).sum().backward()
    hidden = torch.tanh(model[0](inputs)).detach().flatten(0, 1)
    factors = statistics.accumulators["0.weight"]
    assert factors.count == 20
    assert_close(factors.inputs, inputs.flatten(0, 1).T @ inputs.flatten(0, 1) + hidden.T @ hidden, ROUNDING)


def test_adapters_of_lora_are_layers_and_their_frozen_bases_are_not():
    """Catches statistics of weights that do not train, and adapters under names that no parameter has."""
    targets = {"r": 2, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = get_peft_model(tiny_llama(), LoraConfig(**targets)).double()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    batches = toy_batches((3,))
    found = moments_of(model, batches)
    assert set(found) == trained and len(trained) == 4
    for name, moments in found.items():
        rows = torch.stack(row_gradients(model, batches, name, False))
        assert_close(moments.total, rows.square().sum(), ROUNDING)


def test_a_position_is_a_row_where_rows_cannot_be_told_apart():
    """Catches all tokens of an expert that are taken for one sequence, and an expert without tokens that fails."""

    class Experts(torch.nn.Module):
        """Hands half the tokens to one expert and none to the other two; one is called by keyword."""

        def __init__(self):
            super().__init__()
            self.experts = torch.nn.ModuleList([torch.nn.Linear(3, 2, bias=False) for _ in range(3)])

        def forward(self, hidden):
            tokens = hidden.flatten(0, 1)
            return self.experts[0](input=tokens[::2]).square().sum() + self.experts[1](tokens[:0]).sum()

    model, hidden = Experts().double(), torch.randn(2, 5, 3, dtype=torch.float64)
    layers = linear_layers(model)
    bases = random_basis(3, 2), random_basis(2)
    with LayerStatistics(layers, {name: Moments(layer, *bases) for name, layer in layers.items()}) as statistics:
        model(hidden).backward()
    tokens = hidden.flatten(0, 1)[::2]
    outer = torch.einsum("to,ti->toi", 2 * model.experts[0](tokens), tokens).detach()
    used, *unused = statistics.accumulators.values()
    assert_close(used.values, (bases[1].T @ outer @ bases[0]).square().sum(0), DOUBLE_ROUNDING)
    assert_close(used.total, outer.square().sum(), DOUBLE_ROUNDING)
    assert_close(used.output_totals, (bases[1].T @ outer).square().sum((0, 2)), DOUBLE_ROUNDING)
    assert_close(used.input_totals, (outer @ bases[0]).square().sum((0, 1)), DOUBLE_ROUNDING)
    assert not any(tensor.any() for moments in unused for tensor in moments.tensors().values())


def test_bfloat16_models_add_up_in_float32():
    """Catches sums in bfloat16, which stop growing after a few hundred positions."""
    found = [factors_of(model, toy_batches((6,))) for model in (LinearLM().bfloat16(), LinearLM())]
    (first, wanted_first), (head, wanted_head) = (
        [factors[name] for factors in found] for name in ("first.weight", "lm_head.weight")
    )
    assert first.inputs.dtype == head.outputs.dtype == torch.float32
    assert_close(first.inputs, wanted_first.inputs, BFLOAT16_ROUNDING)
    assert_close(head.outputs, wanted_head.outputs, BFLOAT16_ROUNDING)


def test_a_pass_goes_on_from_saved_sums():
    """Catches a resumed pass that starts anew, and sums of another model that are taken for this one's."""
    model, (first, second) = LinearLM(), toy_batches((3, 2))
    layers = linear_layers(model)

    def statistics():
        return LayerStatistics(layers, {name: Factors(layer) for name, layer in layers.items()})

    with statistics() as whole:
        for batch in (first, second):
            answer_losses(model, batch).sum().backward()
    with statistics() as before:
        answer_losses(model, first).sum().backward()
    saved = {name: tensor.clone() for name, tensor in before.state_tensors().items()}
    with statistics() as after:
        after.load_state_tensors(saved)
        answer_losses(model, second).sum().backward()
    assert "lm_head.weight.inputs" in saved
    assert all(torch.equal(a, b) for a, b in zip(after.tensors(), whole.tensors()))
    with pytest.raises(ValueError, match="other layers"):
        after.load_state_tensors({"head.weight.inputs": torch.zeros(1)})
