"""What goes wrong in use: arguments, rows and numbers that must be refused by name, before anything is lost."""

import logging

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig
from scenes import (
    FORGET,
    RETAIN,
    largest_difference,
    scene_config,
    scene_model,
    scene_tokenizer,
    scene_trainer,
    spoil,
    weights,
)
from transformers import AutoModelForCausalLM, Seq2SeqTrainingArguments

from soul_trainer import UnlearnConfig, UnlearnTrainer
from soul_trainer.engines import find_soul
from soul_trainer.formats import prepare


@pytest.mark.parametrize("half", ["forget", "retain"])
def test_a_loss_that_is_not_finite_stops_before_the_step(tmp_path, half):
    """Would catch weights that become NaN for good, and an error that does not say which row."""
    # A word of one row alone, at which the model gives no number.
    row = 3 if half == "forget" else 5
    rows = {"forget": [dict(r) for r in FORGET], "retain": [dict(r) for r in RETAIN]}
    rows[half][row]["question"] += " that"
    tokenizer, model = scene_tokenizer(), scene_model()
    spoil(model, "that")
    trainer = scene_trainer(tmp_path, model=model, forget_loss="ga", hessian_data="training", hessian_interval=1,
                            hessian_estimator="empirical_fisher", num_train_epochs=4)  # fmt: skip
    trainer.train_dataset.forget = prepare(rows["forget"], tokenizer, 64)
    trainer.train_dataset.retain = prepare(rows["retain"], tokenizer, 64)
    with pytest.raises(FloatingPointError, match=rf"loss is not finite at row {row} of `{half}_dataset`"):
        trainer.train()
    checkpoint = tmp_path / f"checkpoint-{trainer.state.global_step}"
    saved = weights(AutoModelForCausalLM.from_pretrained(checkpoint))
    assert all(float(tensor.abs().max()) < 10 for tensor in saved.values())
    assert (checkpoint / "optimizer.pt").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"forget_dataset": []}, "`forget_dataset` is empty"),
        ({"retain_dataset": []}, "`retain_dataset` is empty"),
        ({"retain_dataset": None}, "needs `forget_dataset`, `retain_dataset`"),
        ({"forget_dataset": [{"question": None, "answer": "no"}]}, "Row 0 of `forget_dataset`: `question` is empty"),
        ({"forget_dataset": [{"prompt": 3, "completion": "no"}]}, "Row 0 of `forget_dataset`: `prompt` is not"),
        ({"retain_dataset": [{"input_ids": [1] * 65, "labels": [1] * 65}]}, "Row 0 of `retain_dataset`: 65 tokens"),
        ({"retain_dataset": [{"input_ids": [1, 2], "labels": [1, -100]}]}, "Row 0 of `retain_dataset`: no label"),
        ({"retain_dataset": [{"input_ids": [1, 2], "labels": [1]}]}, "Row 0 of `retain_dataset`: 2 `input_ids`"),
        ({"optimizers": (torch.optim.AdamW(scene_model().parameters()), None)}, "`optimizers` is a AdamW, but"),
        ({"compute_loss_func": print}, "`compute_loss_func` has no place"),
        ({"args": {"max_length": 0}}, "`max_length` must be >= 1"),
        ({"args": {"label_smoothing_factor": 0.1}}, "`label_smoothing_factor` has no meaning"),
        ({"forget_dataset": [{"question": "who ?"}]}, "`forget_dataset` needs the columns"),
        ({"args": {"max_length": 65}}, "`max_length`=65 is over the model's 64"),
        ({"args": {"forget_loss": "nop"}}, "`forget_loss` must be one of ga, .*, none, but it is 'nop'"),
        ({"args": {"retain_loss": "l2"}}, "`retain_loss` must be one of nll, kl, activations, curvature, none"),
        ({"args": {"forget_loss": "none", "retain_loss": "none"}}, "nothing to train on"),
        ({"args": {"hessian_estimator": "exact"}}, "`hessian_estimator` must be one of gauss_newton_bartlett"),
        ({"args": {"optim_args": "rho=0.1,lambda=3"}}, "Unknown key 'lambda'.*rho, beta1"),
        ({"args": {"optim_args": "rho=big"}}, "rho='big'.*no float"),
        ({"args": {"npo_beta": 0.0}}, "`npo_beta` must be > 0"),
        ({"args": {"retain_weight": -1.0}}, "`retain_weight` must be >= 0"),
        ({"args": {"hessian_data": "training"}}, "`hessian_data='training'` squares the training gradient"),
    ],
)
def test_bad_input_is_refused_at_construction(tmp_path, arguments, message):
    """Would catch a run that dies, or goes wrong silently, an hour after a mistake in its arguments."""
    settings = arguments.pop("args", {})
    parts = {"forget_dataset": FORGET, "retain_dataset": RETAIN, "processing_class": scene_tokenizer(), **arguments}
    with pytest.raises(ValueError, match=message):
        UnlearnTrainer(scene_model(), scene_config(tmp_path, **settings), **parts)


def test_rows_on_both_sides_are_counted(tmp_path, caplog):
    """Would catch rows that are forgotten and retained at once, which no log would show."""
    with caplog.at_level(logging.WARNING):
        UnlearnTrainer(
            scene_model(), UnlearnConfig(output_dir=str(tmp_path)), FORGET, RETAIN + FORGET[:3], scene_tokenizer()
        )
    assert "3 rows of `forget_dataset` are rows of `retain_dataset` too" in caplog.text


@pytest.mark.parametrize("estimator", ["gauss_newton_bartlett", "empirical_fisher", "hutchinson"])
def test_a_refresh_that_is_not_finite_leaves_the_hessian_alone(tmp_path, estimator):
    """Would catch weights that a NaN in the Hessian destroys, an innocent row blamed for it, a spoilt checkpoint."""
    rows = [dict(row) for row in RETAIN]
    rows[5]["question"] += " that"
    tokenizer, model = scene_tokenizer(), scene_model()
    spoil(model, "that")
    settings = {"hessian_estimator": estimator, "hessian_batch_size": len(rows)}
    trainer = UnlearnTrainer(model, scene_config(tmp_path, **settings), FORGET, rows, tokenizer)
    with pytest.raises(FloatingPointError, match="refresh is not finite at row 5 of `retain_dataset`.*checkpoint-0"):
        trainer.train()
    saved = weights(AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-0"))
    assert all(float(tensor.abs().max()) < 10 for tensor in saved.values())
    assert not find_soul(trainer.optimizer).state
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_resume_from_a_stopped_step_refreshes_once(tmp_path):
    """Would catch a Hessian that counts a refresh twice: the stop comes after the refresh and before the step."""
    whole = scene_trainer(tmp_path / "whole", forget_loss="ga")
    whole.train()
    tokenizer, stopped = scene_tokenizer(), scene_trainer(tmp_path / "stopped", forget_loss="ga")
    good = stopped.train_dataset.forget
    spoil(stopped.model, "that")
    bad = [{**row, "question": row["question"] + " that"} for row in FORGET]
    stopped.train_dataset.forget = prepare(bad, tokenizer, 64)
    with pytest.raises(FloatingPointError):
        stopped.train()
    stopped.train_dataset.forget = good
    resumed = scene_trainer(tmp_path / "stopped", forget_loss="ga")
    resumed.train(resume_from_checkpoint=True)
    assert largest_difference(weights(resumed.model), weights(whole.model)) == 0


def test_an_adapter_that_lengthens_the_sequence_is_refused(tmp_path):
    """Would catch losses at positions that prompt tuning has shifted, which no shape error betrays."""
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    trainer = scene_trainer(tmp_path, trainer_arguments={"peft_config": config}, forget_loss="ga")
    with pytest.raises(ValueError, match="adds positions of its own"):
        trainer.train()


def test_an_adapter_taken_out_of_the_weights_is_no_reference_when_off(tmp_path):
    """Would catch a KL to a model that never was: PiSSA moves a part of the weights into the adapter."""
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="pissa")
    trainer = scene_trainer(
        tmp_path, trainer_arguments={"peft_config": config}, forget_loss="ga", retain_loss="kl", max_steps=1
    )
    trainer.train()
    batch = {"input_ids": torch.arange(6)[None]}
    before = scene_model()(**batch).logits
    assert torch.allclose(trainer.reference.outputs(batch).logits, before, atol=1e-5)


def test_adapters_begin_with_the_same_weights_for_the_same_seed(tmp_path):
    """Would catch an adapter that is made before the seed is set."""
    config, first = LoraConfig(r=2, target_modules=["q_proj"]), []
    for _ in range(2):
        trainer = scene_trainer(tmp_path, trainer_arguments={"peft_config": config})
        first.append(weights(trainer.model))
        torch.rand(3)
    assert largest_difference(*first) == 0


def test_overwriting_leaves_nothing_of_the_old_run(tmp_path):
    """Would catch a resume that goes on from another run's checkpoint."""
    scene_trainer(tmp_path, save_strategy="steps", save_steps=1).train()
    trainer = scene_trainer(tmp_path, overwrite=True, seed=3, save_strategy="steps", save_steps=3)
    trainer.train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-4"]


def test_raw_rows_can_be_evaluated_and_other_arguments_understood(tmp_path):
    """Would catch `evaluate(rows)` that needs rows tokenized by hand, and the subclasses of TrainingArguments."""
    args = Seq2SeqTrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True, optim="soul")
    trainer = UnlearnTrainer(scene_model(), args, FORGET, RETAIN, scene_tokenizer())
    assert trainer.args.optim == "soul"
    raw, prepared = (trainer.evaluate(rows)["eval_loss"] for rows in (RETAIN, prepare(RETAIN, scene_tokenizer())))
    assert raw == prepared


def test_a_tokenizer_without_an_end_of_sequence_is_refused(tmp_path):
    """Would catch answers that never end."""
    tokenizer = scene_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="Row 0 of `forget_dataset`: the tokenizer has no `eos_token`"):
        UnlearnTrainer(scene_model(), scene_config(tmp_path), FORGET, RETAIN, tokenizer)
