"""Fine-tunes a causal language model on a text or JSON file, in the style of the examples of transformers."""

import logging
import math
import os
import sys
from dataclasses import dataclass, field
from itertools import chain

import datasets
import transformers
from datasets import load_dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint


logger = logging.getLogger(__name__)


@dataclass
class ModelArguments:
    """Which model to train."""

    model_name_or_path: str = field(metadata={"help": "Folder or hub id of the model."})
    tokenizer_name: str | None = field(default=None, metadata={"help": "Tokenizer, if it is not the model's."})


@dataclass
class DataTrainingArguments:
    """What to train and evaluate on."""

    train_file: str = field(metadata={"help": "Text or JSON file with the rows to train on."})
    validation_file: str | None = field(default=None, metadata={"help": "The same for the evaluation."})
    block_size: int = field(default=64, metadata={"help": "Tokens in a row after grouping."})
    preprocessing_num_workers: int | None = field(default=None, metadata={"help": "Processes of the preprocessing."})

    def __post_init__(self):
        if self.train_file.rpartition(".")[2] not in ("txt", "json", "jsonl"):
            raise ValueError("`train_file` should be a txt, json or jsonl file.")


def parse_arguments() -> tuple[ModelArguments, DataTrainingArguments, TrainingArguments]:
    """Reads the command line, or the JSON file that it names."""
    parser = HfArgumentParser((ModelArguments, DataTrainingArguments, TrainingArguments))
    if len(sys.argv) == 2 and sys.argv[1].endswith(".json"):
        return parser.parse_json_file(json_file=os.path.abspath(sys.argv[1]))
    return parser.parse_args_into_dataclasses()


def load_blocks(data_args: DataTrainingArguments, training_args: TrainingArguments, tokenizer) -> datasets.DatasetDict:
    """Tokenizes the files, joins their rows and cuts them into blocks of one length."""
    files = {"train": data_args.train_file, "validation": data_args.validation_file}
    files = {split: file for split, file in files.items() if file}
    kind = data_args.train_file.rpartition(".")[2]
    raw = load_dataset({"txt": "text", "jsonl": "json"}.get(kind, kind), data_files=files)
    column = "text" if "text" in raw["train"].column_names else raw["train"].column_names[0]

    def tokenize(rows):
        return tokenizer(rows[column])

    def group(rows):
        joined = {key: list(chain(*rows[key])) for key in rows}
        length = len(joined["input_ids"]) // data_args.block_size * data_args.block_size
        starts = range(0, length, data_args.block_size)
        blocks = {key: [ids[start : start + data_args.block_size] for start in starts] for key, ids in joined.items()}
        blocks["labels"] = blocks["input_ids"].copy()
        return blocks

    workers = data_args.preprocessing_num_workers
    with training_args.main_process_first(desc="tokenizing and grouping"):
        tokenized = raw.map(tokenize, batched=True, num_proc=workers, remove_columns=raw["train"].column_names)
        return tokenized.map(group, batched=True, num_proc=workers)


def main() -> None:
    """Trains, saves and evaluates."""
    model_args, data_args, training_args = parse_arguments()
    logging.basicConfig(handlers=[logging.StreamHandler(sys.stdout)], level=logging.INFO)
    transformers.utils.logging.set_verbosity(training_args.get_process_log_level())
    logger.info("Training arguments: %s", training_args)

    last_checkpoint = None
    if os.path.isdir(training_args.output_dir):
        last_checkpoint = get_last_checkpoint(training_args.output_dir)
        if last_checkpoint is not None and training_args.resume_from_checkpoint is None:
            logger.info("Checkpoint found, training goes on from %s", last_checkpoint)
    set_seed(training_args.seed)

    tokenizer = AutoTokenizer.from_pretrained(model_args.tokenizer_name or model_args.model_name_or_path)
    model = AutoModelForCausalLM.from_pretrained(model_args.model_name_or_path)
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(len(tokenizer))
    blocks = load_blocks(data_args, training_args, tokenizer)
    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=blocks["train"] if training_args.do_train else None,
        eval_dataset=blocks["validation"] if training_args.do_eval else None,
        processing_class=tokenizer,
        data_collator=default_data_collator,
    )
    if training_args.do_train:
        result = trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint or last_checkpoint)
        trainer.save_model()
        trainer.log_metrics("train", result.metrics)
        trainer.save_metrics("train", result.metrics)
        trainer.save_state()
    if training_args.do_eval:
        metrics = trainer.evaluate()
        metrics["perplexity"] = math.exp(metrics["eval_loss"])
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)


if __name__ == "__main__":
    main()
