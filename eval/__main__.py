"""
python -m soul_eval tofu --model DIR [--reference ROWS.jsonl] --output DIR
python -m soul_eval summarise ROWS.jsonl [--reference ROWS.jsonl] [--json]
"""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from .report import Run, table
from .rows import make_header, read_rows, write_rows, write_whole
from .suites import tofu


if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    args = _parser().parse_args(arguments)
    try:
        args.command(args)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def run_summarise(args: argparse.Namespace) -> None:
    """Prints the figures of rows, and writes nothing."""
    header, rows = read_rows(args.rows)
    reference = read_rows(args.reference)[1] if args.reference else None
    summary = tofu.summarise(rows, reference)
    if args.json:
        print(json.dumps(summary, indent=2, allow_nan=False))
    else:
        print(_table(str(header.get("model", args.rows)), summary, args.reference, reference))


def run_tofu(args: argparse.Namespace) -> None:
    """Evaluates a model, writes `rows.jsonl` and `summary.json`, and prints the figures."""
    output = Path(args.output)
    if any((output / name).exists() for name in ("rows.jsonl", "summary.json")) and not args.overwrite:
        raise ValueError(f"--output {output} holds results: add --overwrite, or choose another folder.")
    splits = tofu.load_splits(args.dataset, args.forget_split, args.limit, args.held_out_rows)
    reference = read_rows(args.reference)[1] if args.reference else None
    if reference:
        # Before the model runs: a reference of other rows would only be found out afterwards.
        tofu.match_reference(tofu.unscored_rows(splits), reference)
    model, tokenizer = load_model(args.model, args.device, args.dtype, args.seed)
    (output / "summary.json").unlink(missing_ok=True)
    rows = tofu.evaluate_model(model, tokenizer, splits, args.batch_size, args.prompt_template, args.max_new_tokens)
    apart = ("command", "model", "output", "overwrite", "seed")
    settings = {name: value for name, value in vars(args).items() if name not in apart}
    settings |= {"device": str(model.device), "dtype": str(model.dtype).removeprefix("torch.")}
    write_rows(output / "rows.jsonl", rows, make_header(args.model, settings, args.seed))
    summary = tofu.summarise(rows, reference)
    write_whole(output / "summary.json", json.dumps(summary, indent=2, allow_nan=False) + "\n")
    print(_table(args.model, summary, args.reference, reference))


def load_model(
    name: str, device: str | None = None, dtype: str = "auto", seed: int = 0
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """
    Loads a model, or an adapter on its base model, with its tokenizer.

    Args:
        name (`str`): Folder or hub id.
        device (`str`, *optional*): By default a GPU if there is one.
        dtype (`str`, *optional*, defaults to `"auto"`): `float32`, `bfloat16`, ...; by default that of the weights.
        seed (`int`, *optional*, defaults to 0): Set before anything else.

    Raises:
        ValueError: If `name` is a folder without a model, or `dtype` is no floating dtype.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

    folder = Path(name)
    is_adapter = (folder / "adapter_config.json").exists()
    if folder.exists() and not is_adapter and not (folder / "config.json").exists():
        raise ValueError(f"--model {name} holds no model: there is no config.json and no adapter_config.json in it.")
    if not folder.exists() and (folder.is_absolute() or name.startswith(".") or name.count("/") > 1):
        raise ValueError(f"--model {name}: no such folder.")
    if dtype != "auto" and not getattr(getattr(torch, dtype, None), "is_floating_point", False):
        raise ValueError(f"--dtype {dtype} is unknown: use auto, float32, bfloat16 or float16.")
    set_seed(seed)
    tokenizer_name = name
    if is_adapter:
        from peft import AutoPeftModelForCausalLM, PeftConfig

        model = AutoPeftModelForCausalLM.from_pretrained(name, dtype=dtype)
        if not (folder / "tokenizer_config.json").exists():
            tokenizer_name = PeftConfig.from_pretrained(name).base_model_name_or_path
    else:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return model.to(device).eval(), AutoTokenizer.from_pretrained(tokenizer_name)


def _table(name: str, summary: dict, reference_name: str | None, reference: list[dict] | None) -> str:
    runs = [Run(Path(name).name or name, summary)]
    if reference:
        runs.append(Run("reference", tofu.summarise(reference, reference), role="gold"))
    return table(runs)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m soul_eval", description="Evaluates unlearned models.")
    commands = parser.add_subparsers(required=True, metavar="{tofu,summarise}")
    suite = commands.add_parser("tofu", help="evaluate a model on TOFU, or on a dataset of its form")
    suite.set_defaults(command=run_tofu)
    suite.add_argument("--model", required=True, help="folder or hub id of a causal language model or an adapter")
    suite.add_argument("--output", required=True, help="folder for rows.jsonl and summary.json")
    suite.add_argument("--reference", metavar="ROWS", help="rows.jsonl of the gold model, for the forget quality")
    suite.add_argument("--dataset", default="locuslab/TOFU", help="hub id, or a folder in its layout (%(default)s)")
    suite.add_argument("--forget_split", default="forget10", help="forget01, forget05, forget10 (%(default)s)")
    suite.add_argument("--batch_size", type=int, default=32, help="answers in a forward (%(default)s)")
    suite.add_argument("--held_out_rows", type=int, default=0, help="last rows of retain_perturbed, held out")
    suite.add_argument("--limit", type=int, help="evaluate the first rows of each split only")
    suite.add_argument("--max_new_tokens", type=int, default=200, help="length of a generation (%(default)s)")
    suite.add_argument(
        "--prompt_template", help="as in training; by default the tokenizer's chat template, else plain"
    )
    suite.add_argument("--device", help="cpu, cuda, cuda:1, ...; by default a GPU if there is one")
    suite.add_argument("--dtype", default="auto", help="float32, bfloat16, float16; by default that of the weights")
    suite.add_argument("--seed", type=int, default=0, help="recorded with the rows (%(default)s)")
    suite.add_argument("--overwrite", action="store_true", help="replace finished results in --output")
    summarise = commands.add_parser("summarise", help="figures of rows that are there already; needs no model")
    summarise.set_defaults(command=run_summarise)
    summarise.add_argument("rows", help="rows.jsonl")
    summarise.add_argument("--reference", metavar="ROWS", help="rows.jsonl of the gold model, for the forget quality")
    summarise.add_argument("--json", action="store_true", help="print one flat JSON object and nothing else")
    return parser


if __name__ == "__main__":
    sys.exit(main())
