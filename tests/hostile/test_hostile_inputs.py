"""Models and rows of other kinds than the trainer's: taken where that is cheap, else refused with the way out."""

import shutil
from types import SimpleNamespace

import pandas
import pytest
import torch
from datasets import Dataset, DatasetDict, IterableDataset
from peft import LoraConfig, get_peft_model
from scenes import FORGET, RETAIN, scene_config, scene_model, scene_tokenizer
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Model,
    LlamaForSequenceClassification,
    LlamaModel,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

from soul_trainer import HessianCallback, UnlearnTrainer
from soul_trainer.formats import longest_row, prepare


WORDS = len(scene_tokenizer())
T5 = T5Config(vocab_size=WORDS, d_model=8, d_ff=8, d_kv=4, num_heads=2, num_layers=1, decoder_start_token_id=0)
VIT = ViTConfig(
    hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=8, patch_size=4
)
BERT = BertConfig(vocab_size=WORDS, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
GPT2 = GPT2Config(vocab_size=WORDS, n_embd=16, n_layer=2, n_head=2, n_positions=64)
MODELS = {
    "string": (lambda: "someone/model", "is the string 'someone/model': load it"),
    "module": (lambda: torch.nn.Linear(2, 2), "is a Linear and no model of transformers"),
    "list": (lambda: [1], "is a list and no model of transformers"),
    "t5": (lambda: T5ForConditionalGeneration(T5), "is a T5ForConditionalGeneration, whose encoder reads the prompt"),
    "vit": (
        lambda: ViTForImageClassification(VIT),
        "is a ViTForImageClassification, which has no language",
    ),
    "bert": (lambda: BertModel(BERT), "is a BertModel, which has no language-model head"),
    "headless_llama": (lambda: LlamaModel(scene_model().config), "is a LlamaModel, which has no language-model head"),
    "headless_gpt2": (lambda: GPT2Model(GPT2), "is a GPT2Model, which has no language-model head"),
    "classifier": (
        lambda: LlamaForSequenceClassification(scene_model().config),
        "is a LlamaForSequenceClassification, which has no language-model head",
    ),
    "headless_peft": (
        lambda: get_peft_model(LlamaModel(scene_model().config), LoraConfig(r=2, target_modules=["q_proj"])),
        "is a LlamaModel, which has no language-model head",
    ),
}


def make_trainer(folder, model=None, forget=FORGET, retain=RETAIN, **settings) -> UnlearnTrainer:
    """A trainer that is not to be trained."""
    return UnlearnTrainer(model or scene_model(), scene_config(folder, **settings), forget, retain, scene_tokenizer())


@pytest.mark.parametrize("name", MODELS)
def test_what_is_no_causal_language_model_is_refused(tmp_path, name):
    """Would catch an AttributeError from deep within, or a model that trains on something else."""
    make_model, message = MODELS[name]
    with pytest.raises(ValueError, match=f"`model` {message}"):
        make_trainer(tmp_path, make_model())


class Rows(torch.utils.data.Dataset):
    """Rows as PyTorch has them."""

    def __len__(self):
        return len(FORGET)

    def __getitem__(self, place):
        return FORGET[place]


TAKEN = {
    "dataset": lambda: Dataset.from_list(FORGET),
    "list": lambda: FORGET,
    "tuple": lambda: tuple(FORGET),
    "data_frame": lambda: pandas.DataFrame(FORGET),
    "odd_index": lambda: pandas.DataFrame(FORGET, index=range(5, 5 + len(FORGET))),
    "columns": lambda: {key: [row[key] for row in FORGET] for key in FORGET[0]},
    "torch": Rows,
}
REFUSED = {
    "dict": (
        lambda: DatasetDict({"train": Dataset.from_list(FORGET)}),
        r"several splits, 'train': give one of",
    ),
    "iterable": (lambda: IterableDataset.from_generator(lambda: iter(FORGET)), "is read in a stream"),
    "string": (lambda: "forget.jsonl", "is the string 'forget.jsonl': load its rows"),
    "number": (lambda: 7, "is a int: give a `datasets.Dataset`"),
    "generator": (lambda: (row for row in FORGET), "is a generator: give"),
    "texts": (lambda: ["a text"], "Row 0 of `forget_dataset` must have columns"),
    "tensor": (lambda: torch.zeros(2, 3), "Row 0 of `forget_dataset` must have columns"),
    "one_row": (lambda: FORGET[0], "is no table of rows, each column of one type and one length"),
    "two_types": (
        lambda: [
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": ["b"]}]},
        ],
        "Row 1 of `forget_dataset`: .* is no table of rows",
    ),
    "surrogate": (lambda: [{"text": "\ud800"}], "holds half of a character"),
    "missing": (
        lambda: pandas.DataFrame({"question": ["a", None], "answer": ["b", "c"]}),
        "Row 1 of `forget_dataset`: `question` is empty or not a string: None",
    ),
    "floats": (lambda: [{"input_ids": [1.0, 2.0], "labels": [1, 2]}], "`forget_dataset` must be whole numbers"),
    "empty": (lambda: [], "`forget_dataset` is empty"),
    "empty_frame": (lambda: pandas.DataFrame({"question": [], "answer": []}), "`forget_dataset` is empty"),
}


@pytest.mark.parametrize("name", TAKEN)
def test_rows_come_in_whatever_holds_them(tmp_path, name):
    """Would catch a row that is lost or out of place on its way from another library."""
    found = make_trainer(tmp_path, forget=TAKEN[name]()).train_dataset.forget
    wanted = prepare(FORGET, scene_tokenizer(), 64)
    assert found["input_ids"][:] == wanted["input_ids"][:] and found["row"][:] == list(range(len(FORGET)))


@pytest.mark.parametrize("name", REFUSED)
def test_what_holds_no_rows_is_refused(tmp_path, name):
    """Would catch an error from another library that does not say which argument is meant."""
    make_rows, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, forget=make_rows())


@pytest.mark.parametrize("half", ["forget", "retain"])
@pytest.mark.parametrize("token", [WORDS, WORDS + 500, -1])
def test_tokens_that_the_model_does_not_know_are_refused(tmp_path, half, token):
    """Would catch an index error of a GPU, which stops at another line and names no row."""
    rows = [{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}, {"input_ids": [1, token, 3], "labels": [-100, -100, 3]}]
    with pytest.raises(ValueError, match=rf"Row 1 of `{half}_dataset` has the token {token}.*resize_token_embeddings"):
        make_trainer(tmp_path, **{half: rows})


def test_a_tokenizer_that_grew_is_refused_until_the_model_grows(tmp_path):
    """Would catch words that a tokenizer was taught and the model has no embedding for."""
    tokenizer, model = scene_tokenizer(), scene_model()
    tokenizer.add_tokens(["Xylophon"])
    rows = [{"question": "who is Xylophon ?", "answer": "the writer Xylophon ."}]
    with pytest.raises(ValueError, match="Row 0 of `forget_dataset` has the token"):
        UnlearnTrainer(model, scene_config(tmp_path), rows, RETAIN, tokenizer)
    model.resize_token_embeddings(len(tokenizer))
    UnlearnTrainer(model, scene_config(tmp_path), rows, RETAIN, tokenizer)


def test_embeddings_that_an_adapter_wraps_are_known(tmp_path):
    """Would catch a check that fails on adapters of the embeddings."""
    adapter = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens"], task_type="CAUSAL_LM")
    make_trainer(tmp_path, get_peft_model(scene_model(), adapter))


def test_a_callback_s_rows_must_be_tokens_of_the_model(tmp_path):
    """Would catch a KeyError in the first refresh, after hours of waiting for a machine."""
    rows = prepare(RETAIN, scene_tokenizer(), 64)
    args = TrainingArguments(str(tmp_path), optim="soul", use_cpu=True, report_to="none")
    trainer = Trainer(scene_model(), args, train_dataset=rows, processing_class=scene_tokenizer())
    with pytest.raises(ValueError, match="`retain` needs rows of tokens"):
        HessianCallback(trainer, Dataset.from_list(RETAIN))
    strange = Dataset.from_list([{"input_ids": [1, 10_000], "labels": [1, 10_000], "row": 0}])
    with pytest.raises(ValueError, match="Row 0 of `retain` has the token 10000"):
        HessianCallback(trainer, strange)


def test_hutchinson_with_reentrant_checkpoints_is_refused(tmp_path):
    """Would catch an error of autograd in the first refresh."""
    settings = {"hessian_estimator": "hutchinson", "gradient_checkpointing": True}
    settings["gradient_checkpointing_kwargs"] = {"use_reentrant": True}
    with pytest.raises(ValueError, match="reentrant checkpoints cannot"):
        make_trainer(tmp_path, **settings)


def test_the_longest_row_of_a_model_of_several_parts_is_that_of_its_texts():
    """Would catch rows that are longer than the positions of a model that also sees."""

    class Config:
        max_position_embeddings = None

        def get_text_config(self):
            return type("Text", (), {"max_position_embeddings": 12})

    model = type("Model", (), {"config": Config()})()
    assert longest_row(None, model, scene_tokenizer()) == 12
    with pytest.raises(ValueError, match="`max_length`=13 is over the model's 12 positions"):
        longest_row(13, model, scene_tokenizer())


@pytest.mark.parametrize("tokenizer", ["someone/model", scene_tokenizer, SimpleNamespace(tokenizer=None)])
def test_what_is_no_tokenizer_is_refused(tmp_path, tokenizer):
    """Would catch an AttributeError from within for a name, a class or a processor in the tokenizer's place."""
    with pytest.raises(ValueError, match="`processing_class` is .* and no tokenizer: load one"):
        UnlearnTrainer(scene_model(), scene_config(tmp_path), FORGET, RETAIN, tokenizer)


def test_the_tokenizer_of_a_processor_is_named(tmp_path):
    """Would catch a processor of images and texts that fails somewhere within."""
    with pytest.raises(ValueError, match="no tokenizer: give its `tokenizer`"):
        UnlearnTrainer(
            scene_model(), scene_config(tmp_path), FORGET, RETAIN, SimpleNamespace(tokenizer=scene_tokenizer())
        )


@pytest.mark.parametrize("args", ["out", {"output_dir": "out"}])
def test_settings_of_another_kind_are_refused(args):
    """Would catch an AttributeError for a folder's name in the place of settings."""
    with pytest.raises(ValueError, match="`args` is .*: give an `UnlearnConfig`"):
        UnlearnTrainer(scene_model(), args, FORGET, RETAIN, scene_tokenizer())


def test_a_file_of_curvature_that_is_not_there_is_refused_at_once(tmp_path):
    """Would catch a typing error that is found when training begins."""
    with pytest.raises(ValueError, match="`curvature`='/no.safetensors': there is no such file"):
        make_trainer(tmp_path, rule="diagonal", curvature="/no.safetensors")


def test_a_file_in_the_place_of_the_output_folder_is_named(tmp_path):
    """Would catch an error of one process, for which the others wait."""
    trainer = make_trainer(tmp_path / "out")
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    (tmp_path / "out").write_text("mine", encoding="utf-8")
    with pytest.raises(ValueError, match="/out' cannot be written to: .*File exists"):
        trainer.train()
    assert (tmp_path / "out").read_text(encoding="utf-8") == "mine"


def test_other_families_are_taken(tmp_path):
    """Would catch a check that refuses a causal model with names of its own."""
    make_trainer(tmp_path, GPT2LMHeadModel(GPT2), learning_rate=1e-3)
