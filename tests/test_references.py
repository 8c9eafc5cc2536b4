"""What losses need of the model before unlearning, in whole runs: kept with rows, on disk, or as a model put back."""

import gc
import math
import weakref

import pytest
import torch
from scenes import FORGET, RETAIN, largest_difference, logged, scene_config, scene_model, scene_tokenizer, weights
from toys import ToyLM, toy_batch, toy_rows

from soul_recipes.reference_error import errors
from soul_trainer import UnlearnTrainer
from soul_trainer.divergences import WholeVocabulary, token_cross_entropy, token_distillation, token_kl
from soul_trainer.log_probs import shift_labels
from soul_trainer.records import run_settings
from soul_trainer.reference import forward_halves
from soul_trainer.reference_rows import top_tokens
from soul_trainer.weighting import dual_step


# Float32 sums of a few hundred terms in another order.
SAME_SUMS = 2e-5
ALTERNATES = ["I do not know that .", "the writer Bo was born in Oslo ."]
WITH_ALTERNATES = [{**row, "alternate": ALTERNATES} for row in FORGET]


def make_trainer(folder, forget=FORGET, model=None, peft_config=None, **settings):
    config = scene_config(folder, **settings)
    return UnlearnTrainer(model or scene_model(), config, forget, RETAIN, scene_tokenizer(), peft_config=peft_config)


def answer_log_prob(model, tokenizer, prompt, answer):
    """Of an answer and its end, one forward a row, no batch, no cache."""
    prompt_ids = tokenizer(prompt)["input_ids"]
    ids = tokenizer(f"{prompt} {answer}")["input_ids"] + [tokenizer.eos_token_id]
    scores = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return sum(float(scores[place - 1, ids[place]]) for place in range(len(prompt_ids), len(ids)))


@pytest.mark.parametrize(("forget_loss", "forget"), [("dpo", FORGET), ("altpo", WITH_ALTERNATES)])
def test_preferred_answers_come_with_their_own_reference(tmp_path, forget_loss, forget):
    """
    Would catch a reference of the row's own answer, or of another epoch's draw, beside a preferred answer, and ratios
    that are not 1 at the start, where the loss is (2 / beta) log 2 by its formula.
    """
    trainer = make_trainer(tmp_path, forget, forget_loss=forget_loss, dpo_beta=0.5, num_train_epochs=3)
    original, tokenizer = scene_model().eval(), scene_tokenizer()
    trainer.train()
    assert logged(trainer, "forget_loss")[0] == pytest.approx(2 / 0.5 * math.log(2), rel=1e-5)
    rows, drawn = trainer.train_dataset, set()
    for epoch in range(3):
        rows.set_epoch(epoch)
        for index in range(len(rows)):
            item = rows[index]
            assert item["forget"]["content"] == FORGET[index]["answer"] != item["preferred"]["content"]
            drawn.add(item["preferred"]["content"])
            for part in ("forget", "preferred"):
                row = item[part]
                wanted = answer_log_prob(original, tokenizer, row["prompt"], row["content"])
                assert row["reference_log_prob"] == pytest.approx(wanted, rel=1e-5)
    assert len(drawn) > 1
    if forget_loss == "altpo":
        assert drawn == set(ALTERNATES)


@pytest.mark.parametrize(
    ("settings", "num_epochs"),
    [({}, 4), ({"per_device_train_batch_size": 5, "dataloader_drop_last": True}, 7)],
    ids=["whole epochs", "epochs that are cut short"],
)
def test_max_steps_prefer_no_answer_without_a_reference(tmp_path, settings, num_epochs):
    """Would catch references for the epochs of `num_train_epochs` alone, or of whole ones, where steps need more."""
    trainer = make_trainer(tmp_path, forget_loss="dpo", max_steps=7, num_train_epochs=1, **settings)
    trainer.train()
    assert trainer.state.global_step == 7 and math.ceil(trainer.state.epoch) == num_epochs


def test_alternate_answers_are_asked_for_by_name(tmp_path):
    """Would catch DPO of a row against itself where nobody made alternates, and an empty one taken for an answer."""
    with pytest.raises(ValueError, match="no column `alternate`.*add_alternates"):
        make_trainer(tmp_path, forget_loss="altpo")
    with pytest.raises(ValueError, match="Row 0 of `forget_dataset`: `alternate` must hold at least one"):
        make_trainer(tmp_path, [{**FORGET[0], "alternate": []}], forget_loss="altpo")


SEQUENCES = {
    "dpo": {"forget_loss": "dpo"},
    "undial": {"forget_loss": "undial", "retain_loss": "kl", "reference": "cached_topk", "reference_topk": 5},
    "rmu": {"forget_loss": "rmu", "retain_loss": "activations", "rmu_layer": 0, "frozen_parameters": "norm"},
    "ceu": {"forget_loss": "ceu"},
    "simnpo": {"forget_loss": "simnpo", "retain_weight_schedule": "primal_dual", "retain_loss_limit": 1.0},
}


@pytest.mark.parametrize("name", SEQUENCES)
def test_accumulation_does_not_change_the_trajectory(tmp_path, name):
    """
    Would catch preferred rows that are counted, or split off their forget rows, references that stay behind their rows
    in a smaller batch, and a dual variable that moves once a micro-batch.
    """
    final = []
    for batch_size, accumulation in ((4, 1), (1, 4)):
        trainer = make_trainer(
            tmp_path / f"{batch_size}",
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            optim="adamw_torch",
            adam_epsilon=1e-3,  # Adam's default turns rounding of tiny gradients into whole steps
            **SEQUENCES[name],
        )
        trainer.train()
        final.append(weights(trainer.model))
    assert largest_difference(*final) < SAME_SUMS


def test_loss_skips_the_first_token_of_each_answer_and_does_not_count_it(tmp_path):
    """Would catch CE-U divided by tokens that it leaves out, and rows of one token that have no loss at all."""
    trainer = make_trainer(tmp_path, forget_loss="ceu", per_device_train_batch_size=8)
    row = trainer.train_dataset.forget[0]
    labels = [label for label in row["labels"] if label >= 0]
    whole = scene_tokenizer()(FORGET[0]["answer"])["input_ids"] + [scene_tokenizer().eos_token_id]
    assert labels == whole[1:]
    batches, counts = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 1, torch.device("cpu"))
    assert counts[0, 0] == sum(len(scene_tokenizer()(row["answer"])["input_ids"]) for row in FORGET)
    short = [{"input_ids": [1, 2, 3], "labels": [-100, -100, 3]}]
    with pytest.raises(ValueError, match="Row 0 of `forget_dataset`: this loss skips 1 answer token"):
        make_trainer(tmp_path, short, forget_loss="ceu")


METHODS = [("undial", "kl"), ("kl", "nll")]


@pytest.mark.parametrize(("forget_loss", "retain_loss"), METHODS)
def test_all_tokens_kept_on_disk_are_the_model_put_back(tmp_path, forget_loss, retain_loss):
    """
    Would catch distributions of other rows or positions, of a model in training mode, or rounded on their way; and
    rows to forget that stay on disk, once more with each run.
    """
    losses = {}
    for reference, settings in (("auto", {}), ("cached_topk", {"reference_topk": 10_000})):
        trainer = make_trainer(
            tmp_path / reference,
            forget_loss=forget_loss,
            retain_loss=retain_loss,
            reference=reference,
            optim="adamw_torch",
            adam_epsilon=1e-3,  # Adam's default, and Sophia, turn rounding of tiny gradients into whole steps
            **settings,
        )
        trainer.train()
        losses[reference] = logged(trainer, "loss"), weights(trainer.model)
        assert (trainer.reference is None) == (reference == "cached_topk")
        files = list((tmp_path / reference).glob("_reference-*/rows.arrow"))
        assert len(files) == (reference == "cached_topk") * (2 if retain_loss == "kl" else 1)
        del trainer
        gc.collect()
        assert not list((tmp_path / reference).glob("_*")), "what is to be forgotten stays on disk"
    assert losses["cached_topk"][0] == pytest.approx(losses["auto"][0], rel=1e-4)
    assert largest_difference(losses["auto"][1], losses["cached_topk"][1]) < SAME_SUMS


def toy_inputs():
    batch = toy_batch([], toy_rows(6, seed=4))
    logits, reference = (ToyLM(seed)(batch["input_ids"]).logits.detach() for seed in (0, 1))
    return logits, reference, shift_labels(batch["labels"])


def test_top_tokens_are_the_label_and_the_most_probable_others():
    """Would catch a label that is missing where the reference finds it improbable, or there twice."""
    _, reference, targets = toy_inputs()
    ids, log_probs = (each[targets >= 0] for each in top_tokens(reference, targets, 3))
    places = (targets >= 0).nonzero().tolist()
    assert len(ids) == len(places)
    for found, scores, (row, place) in zip(ids.tolist(), log_probs, places):
        label, whole = int(targets[row, place]), reference[row, place].double().log_softmax(0)
        others = [token for token in whole.argsort(descending=True).tolist() if token != label][:2]
        assert found == [label, *others]
        torch.testing.assert_close(scores[:3].double(), whole[found], rtol=1e-5, atol=1e-6)
        assert float(scores.exp().sum()) == pytest.approx(1.0, abs=1e-6)


def test_merged_outcomes_cost_what_lies_within_them():
    """
    Would catch a KL divergence of unnormalized parts, or above the whole one: the difference is the mass that is not
    kept times the divergence within it, and goes to nothing with it.
    """
    logits, reference, targets = toy_inputs()
    whole = token_kl(logits, WholeVocabulary(reference), targets)
    gaps = []
    for num_tokens in (1, 3, 6, 7):
        top = top_tokens(reference, targets, num_tokens)
        value = token_kl(logits, top, targets)
        for row, place in (targets >= 0).nonzero().tolist():
            p, q = (each[row, place].double().softmax(0) for each in (logits, reference))
            rest = torch.ones(7, dtype=torch.bool)
            rest[top.ids[row, place]] = False
            within = (q[rest] * ((q[rest] / q[rest].sum()).log() - (p[rest] / p[rest].sum()).log())).sum()
            assert float(whole[row, place] - value[row, place]) == pytest.approx(float(within), abs=2e-6)
        gaps.append(float((whole - value).sum()))
    assert gaps[0] > gaps[1] > gaps[2] > -1e-5 and abs(gaps[2]) < 1e-5 and abs(gaps[3]) < 1e-5


@pytest.mark.parametrize("num_tokens", [1, 3, 7])
@pytest.mark.parametrize("name", ["kl", "cross_entropy", "distillation"])
def test_gradients_of_merged_outcomes_are_those_of_autograd(name, num_tokens):
    """Would catch tokens outside the kept ones that get no gradient, or each the whole of their outcome's."""
    logits, reference, targets = toy_inputs()
    top = top_tokens(reference, targets, num_tokens)
    logits.requires_grad_()
    function = {
        "kl": token_kl,
        "cross_entropy": token_cross_entropy,
        "distillation": lambda *inputs: token_distillation(*inputs, 2.0),
    }[name]
    value = function(logits, top, targets)
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    total = 0.0
    for row, place in (targets >= 0).nonzero().tolist():
        log_p = logits[row, place].double().log_softmax(0)
        ids = top.ids[row, place]
        rest = torch.ones(7, dtype=torch.bool)
        rest[ids] = False
        has_rest = bool(rest.any())
        outcomes = torch.cat([log_p[ids], log_p[rest].logsumexp(0)[None]] if has_rest else [log_p[ids]])
        log_q = top.log_probs[row, place].double()[: len(outcomes)]
        if name == "kl":
            total = total + (log_q.exp() * (log_q - outcomes)).sum()
        elif name == "distillation":
            label = torch.zeros_like(log_q)
            label[0] = 2.0
            total = total - ((log_q - label).softmax(0) * outcomes).sum()
        else:
            share = torch.zeros_like(log_q)
            share[-1] = math.log(int(rest.sum())) if has_rest else 0.0
            total = total - (outcomes.exp() * (log_q - share)).sum()
    (wanted,) = torch.autograd.grad(total, logits)
    assert float(value.sum()) == pytest.approx(float(total), rel=1e-5, abs=1e-5)
    torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=2e-6)


def test_misdirection_moves_three_matrices_and_nothing_else(tmp_path):
    """Would catch gradients outside RMU's layers: weights above the layer, or beside the down projections, move."""
    model = scene_model(num_hidden_layers=5)
    before = weights(model)
    trainer = make_trainer(
        tmp_path, model=model, forget_loss="rmu", retain_loss="activations", rmu_layer=3, rmu_coefficient=4.0
    )
    trainer.train()
    moved = {name for name, value in weights(model).items() if not torch.equal(value, before[name])}
    assert moved == {f"model.layers.{layer}.mlp.down_proj.weight" for layer in (1, 2, 3)}
    assert logged(trainer, "retain_loss")[0] == 0 and logged(trainer, "retain_loss")[-1] > 0
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == sorted(moved)


def test_gradients_of_misdirection_end_at_its_layer(tmp_path):
    """Would catch a loss on another layer's output: with all weights trained, those above the layer stay."""
    model = scene_model(num_hidden_layers=3)
    before = weights(model)
    settings = {"forget_loss": "rmu", "retain_loss": "none", "trainable_parameters": "."}
    make_trainer(tmp_path, model=model, rmu_layer=1, optim="adamw_torch", **settings).train()
    moved = {name for name, value in weights(model).items() if not torch.equal(value, before[name])}
    assert any("layers.0." in name for name in moved) and any("layers.1." in name for name in moved)
    assert not any("layers.2." in name or "norm.weight" == name or "lm_head" in name for name in moved)


def test_a_layer_that_is_not_there_is_refused(tmp_path):
    """Would catch an IndexError in the first step, or Python's negative index taken for a layer."""
    with pytest.raises(ValueError, match="`rmu_layer`=7 is not in the model, whose 1 layers"):
        make_trainer(tmp_path, forget_loss="rmu", trainable_parameters=".")
    with pytest.raises(ValueError, match="`rmu_layer` must be >= 0"):
        scene_config(tmp_path, rmu_layer=-1)


def test_the_reference_keeps_no_layers_that_nobody_asks_for(tmp_path):
    """Would catch every layer's output before unlearning, and the logits, in memory beside the training forward."""
    trainer = make_trainer(tmp_path, forget_loss="rmu", retain_loss="activations", rmu_layer=0, optim="adamw_torch")
    trainer.train()
    alive, outputs = [], trainer.reference.outputs

    def watched(*args, **kwargs):
        found = outputs(*args, **kwargs)
        alive.extend(weakref.ref(each) for each in (found, found.logits))
        return found

    trainer.reference.outputs = watched
    trainer.model.register_forward_pre_hook(lambda *_: gone.append([each() is None for each in alive]))
    batch = trainer.data_collator([trainer.train_dataset[0]])
    gone: list = []
    halves, _ = forward_halves(trainer.model, batch, trainer.objectives, trainer.args, trainer.reference)
    assert gone[-1] == [True, True]
    assert halves[1].reference is None and halves[1].reference_hidden_states is not None


def test_the_dual_variable_follows_the_retain_loss_and_survives_a_resume(tmp_path):
    """Would catch a weight that starts over at a resume, moves during warm-up, or follows another loss."""
    settings = {
        "retain_weight_schedule": "primal_dual",
        "retain_loss_limit": 2.0,
        "dual_step_size": 0.5,
        "dual_warmup_epochs": 1.0,
        "num_train_epochs": 3,
        "save_strategy": "steps",
        "save_steps": 4,
    }
    trainer = make_trainer(tmp_path, **settings)
    trainer.train()
    wanted, weight = [], 1.0
    for step, loss in enumerate(logged(trainer, "retain_loss")):
        weight = dual_step(weight, loss, 2.0, 0.5) if step >= 2 else weight  # two steps an epoch
        wanted.append(weight)
    assert logged(trainer, "retain_weight") == pytest.approx(wanted, rel=1e-6)
    assert len(set(wanted)) > 3
    first = [entry for entry in trainer.state.log_history if "loss" in entry]
    for entry, factor in zip(first, [1.0, *wanted]):
        assert entry["loss"] == pytest.approx(entry["forget_loss"] + factor * entry["retain_loss"], rel=1e-4)
    (tmp_path / "unlearning.json").unlink()
    resumed = make_trainer(tmp_path, **settings)
    resumed.train(resume_from_checkpoint=f"{tmp_path}/checkpoint-4")
    assert largest_difference(weights(trainer.model), weights(resumed.model)) == 0
    assert logged(resumed, "retain_weight") == logged(trainer, "retain_weight")


def test_the_measured_error_of_kept_tokens_is_that_of_the_formulas():
    """Would catch a table that compares a reference with itself, or counts positions that are no answers."""
    logits, reference, targets = toy_inputs()
    found = errors(logits, reference, targets, 3)
    is_answer = targets >= 0
    whole = token_kl(logits, WholeVocabulary(reference), targets)[is_answer]
    merged = token_kl(logits, top_tokens(reference, targets, 3), targets)[is_answer]
    assert found["KL"] == pytest.approx(float(whole.mean()), rel=1e-5)
    assert found["KL error"] == pytest.approx(float((merged - whole).mean()), rel=1e-4) and found["KL error"] < 0
    assert 0 < found["KL gradient error"] < 1 and 0 < found["kept"] < 1
    assert abs(errors(logits, reference, targets, 7)["UNDIAL gradient error"]) < 1e-5


def test_a_run_is_recorded_by_the_settings_that_it_used(tmp_path):
    """Would catch a run that is taken for another because of settings that neither of them reads."""
    idle = run_settings(scene_config(tmp_path, forget_loss="npo", simnpo_beta=3.0, reference_topk=7))
    assert "npo_beta" in idle and not {"simnpo_beta", "reference", "reference_topk"} & set(idle)
    used = run_settings(scene_config(tmp_path, forget_loss="undial", reference="cached_topk", reference_topk=7))
    assert used["reference"] == "cached_topk" and used["reference_topk"] == 7 and used["undial_strength"] == 10.0


def test_a_layer_without_down_projections_is_named_by_its_setting(tmp_path):
    """Would catch a regular expression that the user never wrote as the only word on a layer that is too high."""
    with pytest.raises(ValueError, match="`rmu_layer`=7 and the two before it.*found in no parameter"):
        make_trainer(tmp_path, forget_loss="rmu")
