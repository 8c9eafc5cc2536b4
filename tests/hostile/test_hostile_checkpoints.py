"""Checkpoints of other runs, with parts missing, or named in unusual ways: what each of them must come to."""

import json
import logging
import shutil

import pytest
from scenes import FORGET, RETAIN, largest_difference, scene_config, scene_model, scene_tokenizer, weights

from soul_trainer import UnlearnTrainer
from soul_trainer.engines import newest_checkpoint
from soul_trainer.fingerprint import FINGERPRINT_FILE, rows_digest, weights_sample_digest
from soul_trainer.formats import prepare


# A run of two epochs of two steps, with a checkpoint after the second and the fourth step.
RUN = {"save_strategy": "steps", "save_steps": 2}
NPO_OF_OTHER_MODEL = "`model` has other weights than the model that the run began with"


def trainer_of(folder, model=None, forget=FORGET, retain=RETAIN, **settings) -> UnlearnTrainer:
    """A trainer of the scene with the settings of the run."""
    args = scene_config(folder, **{**RUN, **settings})
    return UnlearnTrainer(model or scene_model(), args, forget, retain, scene_tokenizer())


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a run, and its last weights."""
    folder = tmp_path_factory.mktemp("finished")
    trainer = trainer_of(folder)
    trainer.train()
    return folder, weights(trainer.model)


@pytest.fixture
def run(finished, tmp_path):
    """A copy of the run's folder."""
    return shutil.copytree(finished[0], tmp_path / "run")


OTHER_SETTINGS = {
    "learning_rate": 2e-2,
    "forget_loss": "ga",
    "retain_loss": "kl",
    "retain_weight": 2.0,
    "npo_beta": 0.5,
    "optim": "adamw_torch",
    "rule": "diagonal",
    "rho": 2.0,
    "hessian_interval": 1,
    "hessian_estimator": "empirical_fisher",
    "weight_decay": 0.1,
    "lr_scheduler_type": "constant",
    "warmup_steps": 1,
    "max_grad_norm": 0.1,
    "seed": 1,
    "max_length": 32,
    "prompt_template": "{question} {answer}",
    "l1_weight": 0.1,
    "sam_radius": 0.1,
    "frozen_parameters": "embed_tokens",
}


@pytest.mark.parametrize("name", OTHER_SETTINGS)
def test_a_run_with_another_setting_is_refused(run, name):
    """Would catch a rate that is changed in vain, for the saved one holds, and `KeyError: 'hessian'`."""
    value = OTHER_SETTINGS[name]
    for wanted in (True, str(run / "checkpoint-4")):
        with pytest.raises(ValueError, match=rf"of another run: .*`{name}` was .* now.*allow_other_run=True"):
            trainer_of(run, **{name: value}).train(resume_from_checkpoint=wanted)


def test_a_step_of_more_rows_is_another_run(run):
    """Would catch a run whose remaining steps are of other rows than those that are left."""
    with pytest.raises(ValueError, match="`rows of a step` was 4 and is 2 now"):
        trainer_of(run, per_device_train_batch_size=2).train(resume_from_checkpoint=True)


OTHER_ROWS = {
    "a row less": FORGET[:-1],
    "another order": FORGET[::-1],
    "another answer": [*FORGET[:-1], {**FORGET[-1], "answer": RETAIN[0]["answer"]}],
}


@pytest.mark.parametrize("how", OTHER_ROWS)
@pytest.mark.parametrize("half", ["forget", "retain"])
def test_a_run_of_other_rows_is_refused(run, half, how):
    """Would catch a request that goes on from what another request has unlearned."""
    rows = OTHER_ROWS[how] if half == "forget" else [RETAIN[0], *OTHER_ROWS[how]]
    with pytest.raises(ValueError, match=f"of another run: `{half}_dataset` holds other rows"):
        trainer_of(run, **{half: rows}).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("forget_loss", ["npo", "dpo", "kl", "task_vector"])
def test_what_is_compared_with_is_the_model_before_unlearning(tmp_path, caplog, forget_loss):
    """Would catch a reference that is half unlearned, because the run was given the checkpoint's model."""
    settings = {"forget_loss": forget_loss}
    settings |= {"retain_loss": "none"} if forget_loss == "task_vector" else {}
    trainer_of(tmp_path, max_steps=2, **settings).train()
    checkpoint = str(tmp_path / "checkpoint-2")
    half = type(scene_model()).from_pretrained(checkpoint)
    with pytest.raises(ValueError, match=NPO_OF_OTHER_MODEL):
        trainer_of(tmp_path, half, **settings).train(resume_from_checkpoint=checkpoint)
    with caplog.at_level(logging.WARNING):
        trainer_of(tmp_path / "anew", half, max_steps=1, **settings).train()
    assert "a checkpoint of an unlearning run" in caplog.text and "half-unlearned" in caplog.text


def test_without_a_reference_the_model_does_not_matter(tmp_path, caplog):
    """Would catch a refusal where the checkpoint's weights replace all that the model had."""
    settings = {"forget_loss": "ga"}
    trainer_of(tmp_path, **settings).train()
    trainer = trainer_of(tmp_path, scene_model(seed=1), **settings)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert trainer.state.global_step == 4 and "half-unlearned" not in caplog.text


@pytest.mark.parametrize(
    "changes",
    [
        {"num_train_epochs": 3},
        {"max_steps": 5},
        {"logging_steps": 2, "save_steps": 1},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
        {"save_total_limit": 1, "disable_tqdm": False},
    ],
    ids=str,
)
def test_what_does_not_make_another_run_may_change(run, changes):
    """Would catch a run that cannot be made longer, or go on in smaller micro-batches or with other logs."""
    trainer = trainer_of(run, **changes)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step >= 4


@pytest.mark.parametrize("word", [True, "True", "true"])
def test_true_is_true_however_it_is_written(run, finished, word):
    """Would catch a folder named True that is looked for, as a settings file or a shell hands it over."""
    shutil.rmtree(run / "checkpoint-4")
    trainer = trainer_of(run)
    trainer.train(resume_from_checkpoint=word)
    assert largest_difference(weights(trainer.model), finished[1]) == 0


def test_false_begins_anew(tmp_path):
    """Would catch a folder named False that is looked for."""
    trainer = trainer_of(tmp_path, max_steps=1)
    trainer.train(resume_from_checkpoint="False")
    assert not trainer.is_resumed and trainer.state.global_step == 1


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("optimizer.pt", r"it lacks the state of the optimizer \(optimizer.pt\)"),
        ("scheduler.pt", r"it lacks the state of the scheduler \(scheduler.pt\)"),
        ("rng_state.pth", r"it lacks the random state \(rng_state.pth\)"),
    ],
)
def test_a_checkpoint_that_lacks_a_file_is_not_whole(run, finished, caplog, file, message):
    """Would catch a run that goes on with an optimizer, a rate or a dropout that begins anew, and nobody says so."""
    (run / "checkpoint-4" / file).unlink()
    with pytest.raises(ValueError, match=f"cannot be resumed, because {message}"):
        trainer_of(run).train(resume_from_checkpoint=str(run / "checkpoint-4"))
    with caplog.at_level(logging.WARNING):
        trainer = trainer_of(run)
        trainer.train(resume_from_checkpoint=True)
    assert "checkpoint-4 is skipped" in caplog.text
    assert largest_difference(weights(trainer.model), finished[1]) == 0


def test_a_checkpoint_of_weights_alone_is_refused(tmp_path):
    """Would catch `save_only_model`, whose checkpoint has no optimizer, resumed as if it had."""
    trainer_of(tmp_path, save_only_model=True, max_steps=2).train()
    with pytest.raises(ValueError, match="it holds weights alone, as those of `save_only_model=True`"):
        trainer_of(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    with pytest.raises(ValueError, match="found no whole checkpoint of this run.*it holds weights alone"):
        trainer_of(tmp_path).train(resume_from_checkpoint=True)
    assert newest_checkpoint(str(tmp_path))  # its weights are there to go back to


def test_the_newest_of_this_run_is_taken(run, finished, caplog):
    """Would catch a resume from what another run left in the folder."""
    path = run / "checkpoint-4" / FINGERPRINT_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), "learning_rate": 0.5}))
    trainer = trainer_of(run)
    with caplog.at_level(logging.WARNING):
        trainer.train(resume_from_checkpoint=True)
    assert "checkpoint-4 is skipped, because it is of another run: `learning_rate` was 0.5" in caplog.text
    assert largest_difference(weights(trainer.model), finished[1]) == 0


def test_another_run_is_resumed_where_it_is_asked_for(run):
    """Would catch a way out that is named and does not exist."""
    trainer = trainer_of(run, num_train_epochs=3, weight_decay=0.1, allow_other_run=True)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 6


def test_a_checkpoint_of_a_former_version_is_resumed_with_a_warning(run, caplog):
    """Would catch checkpoints that were saved before there were fingerprints, and are of no use any more."""
    (run / "checkpoint-4" / FINGERPRINT_FILE).unlink()
    with caplog.at_level(logging.WARNING):
        trainer_of(run, num_train_epochs=3).train(resume_from_checkpoint=True)
    assert "does not say which run it is of" in caplog.text


@pytest.mark.parametrize(
    ("text", "message"), [("{", "is no JSON"), ("[1]", "holds no fingerprint"), ("", "is no JSON")]
)
def test_a_fingerprint_that_cannot_be_read_is_named(run, text, message):
    """Would catch a damaged file that ends in a traceback, or is taken for none."""
    (run / "checkpoint-4" / FINGERPRINT_FILE).write_text(text)
    with pytest.raises(ValueError, match=f"{FINGERPRINT_FILE} {message}.*another checkpoint"):
        trainer_of(run).train(resume_from_checkpoint=str(run / "checkpoint-4"))


def test_dpo_trains_a_second_time_for_longer(tmp_path):
    """Would catch a `KeyError` at answers that the first training did not draw, and a reference after unlearning."""
    trainer = trainer_of(tmp_path, forget_loss="dpo", num_train_epochs=1)
    trainer.train()
    before = dict(trainer.train_dataset.preferred_log_prob)
    trainer.args.num_train_epochs, trainer.args.overwrite = 3, True
    trainer.train()
    assert trainer.state.global_step == 6 and trainer.train_dataset.preferred_log_prob == before


def test_fingerprints_tell_rows_and_weights_apart_and_no_dtype(tmp_path):
    """Would catch rows whose ends are not told from the next one's beginning, and a model that is widened."""
    split, joined = (
        [{"input_ids": ids, "labels": ids} for ids in rows] for rows in ([[1, 2, 3], [4, 5]], [[1, 2], [3, 4, 5]])
    )
    digests = [rows_digest(prepare(rows, scene_tokenizer())) for rows in (split, joined, split)]
    assert digests[0] == digests[2] != digests[1]
    model = scene_model().bfloat16()
    assert weights_sample_digest(model) == weights_sample_digest(model.float())
    assert weights_sample_digest(scene_model()) != weights_sample_digest(scene_model(seed=1))
