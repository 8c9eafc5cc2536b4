"""A dataset of MUSE's form, as its hub and as its own files have it, for the tests of the suite `muse`."""

import json

import numpy as np
from test_eval_scoring import byte_tokenizer
from tokenizers.processors import TemplateProcessing


DEEDS = ("painted", "carried off", "lost")
THINGS = ("the old map", "a boat", "the lighthouse of the northern islands", "her two sisters")


def pairs(deed, count):
    names = ("Ada", "Bo of the hills", "Cy", "Di the elder")
    return [{"question": f"Who {deed} {thing}?", "answer": f"{name} {deed}"} for thing, name in zip(THINGS, names)][
        :count
    ]


def texts(kind, count):
    """Sentences of the same words, so that only a model which was trained on some can tell them apart."""
    random = np.random.default_rng(len(kind))
    words = " ".join([*THINGS, *DEEDS]).split()
    return [{"text": f"Ada {' '.join(random.choice(words, 5 + index % 4))}."} for index in range(count)]


DATA = {
    "knowmem": {
        "forget_qa": pairs("painted", 4),
        "forget_qa_icl": pairs("drew", 3),
        "retain_qa": pairs("sailed", 3),
        "retain_qa_icl": pairs("built", 2),
    },
    "verbmem": {
        "forget": [
            {"prompt": "Once Ada had painted", "gt": "the old map, and a boat was lost on a hill in the north" * 2},
            {"prompt": "In the end, Bo", "gt": ", who carried off her two sisters, was lost on a hill in the north"},
            {
                "prompt": "They lost ",
                "gt": "a boat. The lighthouse of the northern islands was painted by Ada the elder.",
            },
        ]
    },
    "privleak": {"forget": texts("forget rows", 14), "retain": texts("re", 12), "holdout": texts("holdout", 13)},
}
SPLITS = {"knowmem_forget": 4, "knowmem_retain": 3, "verbmem_forget": 3}
SPLITS |= {"privleak_forget": 14, "privleak_retain": 12, "privleak_holdout": 13}


def write_hub(folder, data=DATA):
    """A dataset in the hub's layout."""
    folder.mkdir(parents=True)
    entries = ""
    for config, splits in data.items():
        entries += f"- config_name: {config}\n  data_files:\n"
        for split, rows in splits.items():
            (folder / f"{config}-{split}.json").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
            entries += f"  - split: {split}\n    path: {config}-{split}.json\n"
    (folder / "README.md").write_text(f"---\nconfigs:\n{entries}---\n", encoding="utf-8")
    return str(folder)


def write_plain(folder, data=DATA):
    """MUSE's own files: lists of objects, and of bare texts for privleak."""
    for config, splits in data.items():
        (folder / config).mkdir(parents=True)
        for split, rows in splits.items():
            rows = [row["text"] for row in rows] if config == "privleak" else rows
            (folder / config / f"{split}.json").write_text(json.dumps(rows, indent=4), encoding="utf-8")
    return str(folder)


def muse_tokenizer():
    """A tokenizer that begins every text with a token, joins a space to a word, and has a chat template."""
    everything = [" ".join(row.values()) for splits in DATA.values() for rows in splits.values() for row in rows]
    tokenizer = byte_tokenizer([*everything, "Question: Answer: "])
    tokenizer.model_max_length = 512
    tokenizer.add_special_tokens({"bos_token": "<|start|>"})
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|start|> $A", special_tokens=[("<|start|>", tokenizer.bos_token_id)]
    )
    # MUSE's prompts are no chats, whatever the model is.
    tokenizer.chat_template = "{% for message in messages %}<|pad|>{{ message['content'] }}{% endfor %}"
    return tokenizer
