"""A small text classifier, trained where none can be downloaded. It knows the words of its corpus and no others."""

import random
from pathlib import Path

from datasets import Dataset
from tokenizers import processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DataCollatorWithPadding,
    PreTrainedTokenizerFast,
    TrainingArguments,
    set_seed,
)

from soul_eval.classification import classify
from soul_eval.markdown import markdown_text
from soul_recipes.neutral_tokenizer import EOS_TOKEN, train_tokenizer
from soul_recipes.training import train_once
from soul_trainer.records import write_whole


VOCABULARY, MAX_LENGTH, EPOCHS, HELD_OUT = 700, 96, 6, 0.1


def train_classifier(texts: dict[str, list[str]], folder: Path, seed: int = 0, use_cpu: bool = False) -> str:
    """
    Trains a BERT of 0.1 million parameters to tell texts apart, or finds it trained.

    Args:
        texts (`dict[str, list[str]]`): By label; what comes twice counts twice. A tenth of those that differ is kept
            apart, and how much of it is told rightly is written to the model's card.
        folder (`Path`): Where it goes; a hash of the texts and settings is added to its name.
        seed (`int`, *optional*, defaults to 0): Seed of the weights and of the order of texts.
        use_cpu (`bool`, *optional*, defaults to `False`): See [`~transformers.TrainingArguments`].

    Returns:
        `str`: Its folder, for transformers' text-classification pipeline.
    """
    labels = sorted(texts)
    rows = [(text, label) for label in labels for text in texts[label]]
    random.Random(seed).shuffle(rows)
    held_out = sorted(set(rows))
    random.Random(seed).shuffle(held_out)
    held_out = held_out[: max(1, int(HELD_OUT * len(held_out)))]
    unseen = set(held_out)
    learnt = [row for row in rows if row not in unseen]
    tokenizer = _opened(train_tokenizer([text for text, _ in learnt], VOCABULARY))
    encoded = tokenizer([text for text, _ in learnt], truncation=True, return_token_type_ids=False)
    args = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=EPOCHS,
        per_device_train_batch_size=16,
        learning_rate=1e-3,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        seed=seed,
        use_cpu=use_cpu,
    )

    def make_model():
        set_seed(seed)
        config = BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=96,
            max_position_embeddings=MAX_LENGTH,
            pad_token_id=tokenizer.pad_token_id,
            id2label=dict(enumerate(labels)),
            label2id={label: index for index, label in enumerate(labels)},
        )
        return BertForSequenceClassification(config)

    data = Dataset.from_dict({**encoded, "labels": [labels.index(label) for _, label in learnt]})
    identity = [labels, tokenizer.backend_tokenizer.to_str()]
    collator = DataCollatorWithPadding(tokenizer)
    found = train_once(make_model, data, tokenizer, folder, args, identity, collator=collator)
    if args.process_index == 0 and not (found / "README.md").exists():
        _write_card(found, labels, held_out)
    return str(found)


def _write_card(folder: Path, labels: list[str], held_out: list[tuple[str, str]]) -> None:
    scores = [classify([text for text, _ in held_out], str(folder), label, progress=False) for label in labels]
    best = [labels[max(range(len(labels)), key=lambda place: row[place])] for row in zip(*scores)]
    share = sum(label == found for (_, label), found in zip(held_out, best)) / len(held_out)
    write_whole(
        folder / "README.md",
        f"# A small classifier: {markdown_text(' or '.join(labels))}\n\n"
        "Trained by `recipes/small_classifier.py` on the corpus of a recipe, and of no use beyond it. It is right on "
        f"{share:.1%} of {len(held_out)} texts that it never saw.\n",
    )


def _opened(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """With a token before every text, from which BERT tells its label."""
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{EOS_TOKEN} $A", special_tokens=[(EOS_TOKEN, tokenizer.eos_token_id)]
    )
    tokenizer.model_max_length = MAX_LENGTH
    return tokenizer
