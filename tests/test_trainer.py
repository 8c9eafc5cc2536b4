"""`UnlearnTrainer` with real Trainers: the loss, the counts that it is divided by, references, errors."""

import json
import math

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from scenes import FORGET, RETAIN, largest_difference, logged, scene_model, scene_tokenizer, scene_trainer, weights
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM, TrainingArguments

from soul_trainer import HessianCallback, Sophia, UnlearnTrainer
from soul_trainer.engines import find_soul
from soul_trainer.formats import encode, prepare, render
from soul_trainer.pairing import paired_row
from soul_trainer.refusals import REFUSALS
from soul_trainer.weighting import RETAIN_WEIGHT_SCHEDULES


# Sums of float32 in another order, over 4 steps of at most 0.01: a few units in the last place of each step.
SAME_SUMS = 2e-6


def slow_losses(model, rows: list[dict]) -> tuple[list[float], list[int]]:
    """Negative log-likelihood and number of answer tokens of each row, one token at a time."""
    tokenizer, losses, counts = scene_tokenizer(), [], []
    for row in rows:
        encoded = encode(tokenizer, render(row, tokenizer))
        logits = model(torch.tensor([encoded["input_ids"]])).logits[0]
        terms = [
            -logits[place - 1].log_softmax(0)[label].item()
            for place, label in enumerate(encoded["labels"])
            if label >= 0
        ]
        losses.append(sum(terms))
        counts.append(len(terms))
    return losses, counts


def test_the_logged_losses_are_token_means_of_both_halves(tmp_path):
    """Would catch a mean of row means, a loss on the prompt, or retain rows counted into the forget loss."""
    trainer = scene_trainer(tmp_path, forget_loss="ga", retain_weight=2.0, per_device_train_batch_size=8, max_steps=1)
    losses, counts = slow_losses(trainer.model, FORGET)
    pairs = [RETAIN[paired_row(0, 0, index, len(FORGET), len(RETAIN))] for index in range(len(FORGET))]
    retain_losses, retain_counts = slow_losses(trainer.model, pairs)
    trainer.train()
    forget, retain = -sum(losses) / sum(counts), sum(retain_losses) / sum(retain_counts)
    assert logged(trainer, "forget_loss")[0] == pytest.approx(forget, rel=1e-5)
    assert logged(trainer, "retain_loss")[0] == pytest.approx(retain, rel=1e-5)
    assert logged(trainer, "loss")[0] == pytest.approx(forget + 2 * retain, rel=1e-5)


@pytest.mark.parametrize("settings", [{"forget_loss": "npo"}, {"forget_loss": "ga", "l1_weight": 1e-3}])
@pytest.mark.parametrize("optim", ["soul", "adamw_torch"])
def test_accumulation_does_not_change_the_trajectory(tmp_path, settings, optim):
    """
    Would catch losses averaged over micro-batches of unequal token counts, an L1 term added once a micro-batch, and a
    refresh that leaves the optimizer stepping at a first micro-batch.
    """
    final = []
    for batch_size, accumulation in ((4, 1), (1, 4), (2, 2)):
        trainer = scene_trainer(
            tmp_path / f"{batch_size}",
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            optim=optim,
            adam_epsilon=1e-3,  # Adam's default turns rounding of tiny gradients into whole steps
            **settings,
        )
        trainer.train()
        assert trainer.state.global_step == 4
        final.append(weights(trainer.model))
    assert largest_difference(final[0], final[1]) < SAME_SUMS
    assert largest_difference(final[0], final[2]) < SAME_SUMS


SOUL_METHODS = {
    "FT": {"forget_loss": "none"},
    "l1_sparse": {"forget_loss": "none", "l1_weight": 1e-4},
    "GA": {"forget_loss": "ga", "retain_loss": "none"},
    "GA+FT": {"forget_loss": "ga"},
    "GA+KL": {"forget_loss": "ga", "retain_loss": "kl"},
    "KL": {"forget_loss": "kl", "retain_loss": "kl"},
    "CL": {"forget_loss": "refusal", "retain_loss": "none"},
    "CL+FT": {"forget_loss": "refusal"},
    "CL+KL": {"forget_loss": "refusal", "retain_loss": "kl"},
    "RL": {"forget_loss": "random", "retain_loss": "none"},
    "NPO": {"forget_loss": "npo"},
    "GA_FT_epoch": {"forget_loss": "ga", "retain_weight_schedule": "epoch"},
    "GA_KL_epoch": {"forget_loss": "ga", "retain_loss": "kl", "retain_weight_schedule": "epoch"},
    "CL_FT_epoch": {"forget_loss": "refusal", "retain_weight_schedule": "epoch"},
}


@pytest.mark.parametrize("method", SOUL_METHODS)
def test_every_method_of_the_released_code_moves_the_model(tmp_path, method):
    """Would catch a combination that dies on a missing half, or one whose gradient is zero at the start."""
    trainer = scene_trainer(tmp_path, **SOUL_METHODS[method])
    before = weights(trainer.model)
    trainer.train()
    # Sophia moves a coordinate by at most the learning rate a step; a mere rounding would be far below 1e-4.
    assert 1e-4 < largest_difference(before, weights(trainer.model)) < 4.1e-2
    assert all(math.isfinite(loss) for loss in logged(trainer, "loss"))


def test_the_epoch_schedule_starts_without_the_retain_loss(tmp_path):
    """Would catch a schedule that grows by step instead of by epoch, or starts at its full weight."""
    trainer = scene_trainer(tmp_path, forget_loss="ga", retain_weight=3.0, retain_weight_schedule="epoch")
    trainer.train()
    weights_seen = [
        (loss - forget) / retain
        for loss, forget, retain in zip(
            logged(trainer, "loss"), logged(trainer, "forget_loss"), logged(trainer, "retain_loss")
        )
    ]
    assert weights_seen == pytest.approx([0.0, 0.0, 1.5, 1.5], abs=1e-4)


def test_refusals_come_from_the_list_or_the_users_file(tmp_path):
    """Would catch refusals of ours in the place of the user's."""
    file = tmp_path / "refusals.txt"
    file.write_text("I do not know .\n\nnot that .\n", encoding="utf-8")
    assert scene_trainer(tmp_path, forget_loss="refusal").train_dataset.answers.shared == REFUSALS
    trainer = scene_trainer(tmp_path, forget_loss="refusal", refusal_answers=str(file))
    assert trainer.train_dataset.answers.shared == ["I do not know .", "not that ."]


def test_plain_training_arguments_select_sophia(tmp_path):
    """Would catch `optim="soul"` being refused without an `UnlearnConfig`, or its `optim_args` ignored."""
    args = TrainingArguments(
        output_dir=str(tmp_path),
        optim="soul",
        optim_args="rho=7.5,beta2=0.9,interval=3",
        max_steps=2,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = UnlearnTrainer(scene_model(), args, FORGET, RETAIN, scene_tokenizer())
    trainer.train()
    sophia = find_soul(trainer.optimizer)
    assert isinstance(sophia, Sophia)
    assert sophia.defaults["rho"] == 7.5 and sophia.defaults["betas"] == (0.9, 0.9)
    assert trainer.args.hessian_interval == 3


def test_npo_reads_its_reference_from_the_rows(tmp_path):
    """Would catch references that belong to other rows, and a second model in memory for one number a sequence."""
    trainer = scene_trainer(tmp_path, forget_loss="npo", max_steps=1, per_device_train_batch_size=8)
    expected, _ = slow_losses(trainer.model, FORGET)
    trainer.train()
    assert trainer.train_dataset.forget["reference_log_prob"][:] == pytest.approx(
        [-loss for loss in expected], rel=1e-5
    )
    assert trainer.reference is None
    # At the first step the model is its own reference: every row gives (2 / beta) log 2.
    assert logged(trainer, "forget_loss")[0] == pytest.approx(2 / 0.1 * math.log(2), rel=1e-5)


def test_the_reference_keeps_what_training_changes_and_no_more(tmp_path):
    """Would catch a whole second model in memory, a reference that moves with the model, and weights not put back."""
    model = scene_model()
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "mlp" in name
    trainer = scene_trainer(tmp_path, model=model, retain_loss="kl", forget_loss="ga")
    before = weights(model)
    trainer.train()
    trained = [name for name in before if "mlp" in name]
    for name, kept in zip(trained, trainer.reference.kept, strict=True):
        assert torch.equal(kept, before[name])
    after, inputs = weights(model), {"input_ids": torch.tensor([[3, 4, 5]])}
    reference_logits = trainer.reference.outputs(inputs).logits
    assert largest_difference(after, weights(model)) == 0 < largest_difference(after, before)
    model.load_state_dict(before)
    assert torch.equal(reference_logits, model(**inputs).logits)


def test_an_adapter_is_its_own_reference_and_alone_has_state(tmp_path):
    """Would catch a base model copied for a LoRA run, state for frozen weights, or a reference that is trained."""
    base = scene_model()
    before = weights(base)
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    trainer = scene_trainer(
        tmp_path, model=base, trainer_arguments={"peft_config": lora}, forget_loss="ga", retain_loss="kl"
    )
    inputs = {"input_ids": torch.tensor([[3, 4, 5]])}
    expected = base(**inputs).logits.detach()
    trainer.train()
    assert isinstance(trainer.model, PeftModel) and trainer.reference.model is trainer.model
    assert torch.equal(trainer.reference.outputs(inputs).logits, expected)
    assert not torch.equal(trainer.model(**inputs).logits, expected)
    trained = [name for name, p in trainer.model.named_parameters() if p in find_soul(trainer.optimizer).state]
    assert trained and all("lora_" in name for name in trained)
    after = {
        name.replace("base_model.model.", "").replace(".base_layer", ""): p
        for name, p in trainer.model.named_parameters()
    }
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_evaluate_save_and_card(tmp_path):
    """Would catch an evaluation that trips over row numbers, a model that does not load, a card without the method."""
    trainer = scene_trainer(tmp_path, forget_loss="ga", retain_weight=2.5)
    trainer.train()
    metrics = trainer.evaluate()
    losses, counts = slow_losses(trainer.model.eval(), FORGET)
    assert metrics["eval_forget_loss"] == pytest.approx(sum(losses) / sum(counts), rel=1e-4)
    assert metrics["eval_retain_loss"] > 0
    trainer.save_model()
    trainer.create_model_card()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert largest_difference(weights(loaded), weights(trainer.model)) == 0
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "| `retain_weight` | `2.5` |" in card and "| `optim` | `soul` |" in card
    record = json.loads((tmp_path / "unlearning.json").read_text(encoding="utf-8"))
    assert record["settings"]["forget_loss"] == "ga" and record["metrics"]["train_loss"] is not None


def test_an_eval_dataset_of_ones_own_is_tokenized(tmp_path):
    """Would catch raw rows that reach the model in evaluation."""
    rows = Dataset.from_list(RETAIN[:3])
    trainer = scene_trainer(tmp_path, trainer_arguments={"eval_dataset": {"kept": rows}})
    assert trainer.evaluate()["eval_kept_loss"] > 0


def test_a_finished_run_is_not_overwritten(tmp_path):
    """Would catch an hour of training lost to a second start in the same folder."""
    scene_trainer(tmp_path).train()
    with pytest.raises(ValueError, match="holds a finished run.*--overwrite"):
        scene_trainer(tmp_path).train()
    scene_trainer(tmp_path, overwrite=True).train()


def test_a_tokenizer_without_pad_will_do(tmp_path):
    """Would catch the many tokenizers that have no pad token: the mask comes from lengths, so any token may pad."""
    tokenizer = scene_tokenizer()
    tokenizer.pad_token = None
    final = []
    for processing_class in (tokenizer, scene_tokenizer()):
        trainer = scene_trainer(tmp_path / str(len(final)))
        trainer = UnlearnTrainer(scene_model(), trainer.args, FORGET, RETAIN, processing_class)
        trainer.train()
        final.append(weights(trainer.model))
    assert largest_difference(*final) == 0


def test_a_callback_added_by_hand_takes_over_in_a_plain_trainer(tmp_path):
    """Would catch two refreshes side by side: the optimizer's own and the callback's."""
    from scenes import scene_config
    from transformers import Trainer

    from soul_trainer.collator import UnlearnCollator

    tokenizer = scene_tokenizer()
    rows = prepare(RETAIN, tokenizer)
    trainer = Trainer(
        scene_model(), scene_config(tmp_path, max_steps=3), UnlearnCollator(0), rows, processing_class=tokenizer
    )
    trainer.add_callback(HessianCallback(trainer, rows))
    trainer.train()
    sophia = find_soul(trainer.optimizer)
    assert all(group["hessian_interval"] is None for group in sophia.param_groups)
    refreshes = {round(float(state["hessian_weight"]), 6) for state in sophia.state.values()}
    assert refreshes == {round(1 - 0.95**2, 6)}
    assert any("curvature/clipped" in entry for entry in trainer.state.log_history)


def test_components_are_logged_per_step_whenever_training_began(tmp_path):
    """Would catch components divided by steps that another run took: after a resume, or in a second `train()`."""
    settings = {"num_train_epochs": 4, "logging_steps": 3, "forget_loss": "ga", "learning_rate": 0.0}
    whole = scene_trainer(tmp_path, save_strategy="steps", save_steps=4, **settings)
    whole.train()
    expected = logged(whole, "retain_loss")
    resumed = scene_trainer(tmp_path, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    # The model stands still: each step's loss is about the mean, and steps 5 and 6 come instead of 4 to 6.
    assert logged(resumed, "retain_loss")[1] == pytest.approx(expected[1], rel=0.2)
    again = scene_trainer(tmp_path / "again", **settings)
    again.train()
    again.args.overwrite = True
    again.train()
    assert logged(again, "retain_loss")[0] == pytest.approx(expected[0], rel=1e-6)


def test_schedules_end_at_the_weight_with_max_steps_too(tmp_path, monkeypatch):
    """Would catch a retain weight of a multiple of what was asked for, where `max_steps` sets the epochs."""
    factors = []
    schedule = RETAIN_WEIGHT_SCHEDULES["linear"]
    monkeypatch.setitem(
        RETAIN_WEIGHT_SCHEDULES, "linear", lambda *args: factors.append(schedule(*args)) or factors[-1]
    )
    scene_trainer(tmp_path, max_steps=8, num_train_epochs=2, retain_weight_schedule="linear").train()
    assert factors == [step / 8 for step in range(8)]


@pytest.mark.parametrize("estimator", ["gauss_newton_bartlett", "hutchinson"])
def test_gradient_checkpointing_changes_no_weight(tmp_path, estimator):
    """Would catch a recomputation under other attention kernels than the forward's, which torch refuses."""
    final = []
    for is_on in (False, True):
        trainer = scene_trainer(tmp_path / str(is_on), hessian_estimator=estimator, gradient_checkpointing=is_on)
        trainer.train()
        final.append(weights(trainer.model))
    assert largest_difference(*final) == 0


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_an_evaluated_loss_is_a_mean_of_tokens_whatever_the_batch(tmp_path, batch_size):
    """Would catch a mean of batches, in which a token of a short last batch counts more than others."""
    trainer = scene_trainer(tmp_path, per_device_eval_batch_size=batch_size)
    metrics = trainer.evaluate()
    for split, rows in (("forget", FORGET), ("retain", RETAIN)):
        losses, counts = slow_losses(trainer.model.eval(), rows)
        assert metrics[f"eval_{split}_loss"] == pytest.approx(sum(losses) / sum(counts), rel=1e-5)


def test_an_evaluated_loss_has_no_router_s_loss_in_it(tmp_path):
    """Would catch a Mixtral's auxiliary loss, which its own loss holds, in a figure that is compared with others."""
    size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = MixtralConfig(vocab_size=len(scene_tokenizer()), num_key_value_heads=2, num_local_experts=2, **size)
    config.output_router_logits, config.router_aux_loss_coef = True, 10.0
    trainer = scene_trainer(tmp_path, MixtralForCausalLM(config), learning_rate=1e-3)
    losses, counts = slow_losses(trainer.model.eval(), FORGET)
    assert trainer.evaluate()["eval_forget_loss"] == pytest.approx(sum(losses) / sum(counts), rel=1e-4)
