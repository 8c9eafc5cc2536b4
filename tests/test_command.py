"""The command `soul`: at once where it says what it can do, in a sentence where it cannot."""

import os
import resource
import subprocess
import sys
from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import pytest
from transformers import TrainingArguments

import soul_eval.__main__ as evaluation
from soul_eval.console import EXPECTED, Parser, run, run_script
from soul_eval.settings_files import SettingsParser
from soul_recipes import help_texts
from soul_recipes.command import COMMANDS, EVALUATION, GROUPS, main
from soul_recipes.launching import Launch, launch_files, split_launch, start_processes
from soul_trainer.command_line import COMMON, REST, TRAINING, CommandParser, PlainParser


ROOT = Path(__file__).parents[1]
HEAVY = {"torch", "transformers", "accelerate", "datasets", "numpy", "scipy", "matplotlib", "soul_trainer"}
CPU_SECONDS = 1.5


@dataclass
class ToyArguments:
    """What is asked of a toy. More of it."""

    model: str = field(metadata={"help": "Folder or hub id."})
    learning_rate_of_it: float = field(default=0.5, metadata={"help": "Its rate."})
    generate: bool = field(default=True, metadata={"help": "Whether it answers."})


@pytest.mark.parametrize(
    "module, arguments",
    [
        *(("soul_recipes", arguments) for arguments in ((), ("--help",), ("--version",), ("tofu", "--help"))),
        ("soul_recipes", ("eval", "tofu", "--help")),
        ("soul_recipes", ("unlearn", "--model", "DIR", "-h")),
        ("soul_eval", ("--help",)),
        ("soul_eval", ("attack", "--help")),
    ],
)
def test_help_is_there_at_once(module, arguments, tmp_path):
    """Would catch an import of torch, which takes seconds, on the way to a help that is a file."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-X", "importtime", "-m", module, *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=python_path())
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0 and done.stdout.strip()
    imported = {line.split("|")[-1].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert not imported & HEAVY
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < CPU_SECONDS


def python_path() -> dict[str, str]:
    """The environment of a child that imports from where this process does."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


def test_files_of_help_are_what_parsers_print():
    """Would catch a flag that was added, renamed or given another default, and a help that knows nothing of it."""
    texts = help_texts.help_texts()
    different = {path.name for path, text in texts.items() if not path.is_file() or path.read_text() != text}
    assert not different, f"run `python -m soul_recipes.help_texts`: {different}"
    folders = {path.parent for path in texts}
    assert {path for folder in folders for path in folder.iterdir()} == set(texts)
    for path, text in texts.items():
        assert "{command}" in text and "recipes/" + path.stem + ".py" not in text


def test_every_command_is_there_and_in_the_overview(capsys):
    """Would catch a module that was moved, a command that nobody finds, and a suite that one table does not have."""
    for name, command in COMMANDS.items():
        module, function = (evaluation.COMMANDS if command.module == EVALUATION else {}).get(name, command[:2])
        assert callable(getattr(import_module(module), function)), name
    assert sorted(name for names in GROUPS.values() for name in names) == sorted(COMMANDS)
    assert set(evaluation.SUITES) == set(import_module("soul_eval.suites").SUITES)
    assert main([]) == 0
    overview = capsys.readouterr().out
    assert all(command.summary in overview for command in COMMANDS.values())
    page = (ROOT / "docs" / "command_line.md").read_text(encoding="utf-8")
    assert not [name for name in COMMANDS if f"| `{name}` |" not in page]


def test_help_calls_the_command_as_its_user_does(capsys):
    """Would catch `soul eval tofu` that tells of `python -m soul_eval tofu`, and a help without soul's own flags."""
    assert main(["eval", "tofu", "--help"]) == 0 == evaluation.main(["tofu", "--help"])
    printed = capsys.readouterr().out
    assert "usage: soul eval tofu --model" in printed and "usage: python -m soul_eval tofu --model" in printed
    assert printed.count("--num_processes") == 1
    assert main(["tofu", "--help"]) == 0
    printed = capsys.readouterr().out
    assert "    soul tofu --num_requests 4" in printed and "--accelerate_config" in printed
    assert main(["difference", "apply", "--help"]) == 0
    assert "--scale" in capsys.readouterr().out
    assert main(["--version"]) == 0 and version("soul-trainer") in capsys.readouterr().out


def test_help_has_the_own_flags_first_and_each_once():
    """Would catch 100 flags of the Trainer before the ten that a user looks for, and a flag that is left out."""
    parser = CommandParser((ToyArguments, TrainingArguments), "What it does.")
    text = parser.format_help()
    places = [text.index(part) for part in ("What is asked of a toy:", f"{TRAINING}:", f"{REST}:")]
    assert places == sorted(places) and text.index("--model TEXT") < places[1]
    assert "More of it" not in text and "--[no_]generate [BOOL]" in text and "Its rate. (default: 0.5)" in text
    written = [line.split()[0] for line in text.splitlines() if line.startswith("  --")]
    flags = {action.option_strings[0] for action in parser._actions if action.dest != "help"}
    assert len(written) == len(set(written)) == len({flag for flag in flags if not flag.startswith("--no_")})
    assert {f"--{name}" for name in COMMON} <= set(written)
    assert all(len(line) <= 100 for line in text.splitlines())


def parsers():
    plain, light = PlainParser("A tool.", prog="toy"), Parser(prog="toy")
    for parser in (plain, light):
        parser.add_argument("--learning_rate_of_it", type=float)
        parser.add_argument("--model", required=True)
    settings = SettingsParser((ToyArguments,))
    settings.prog = "toy"
    return {
        "dataclasses": CommandParser(ToyArguments, prog="toy"),
        "settings": settings,
        "plain": plain,
        "light": light,
    }


@pytest.mark.parametrize("kind", ["dataclasses", "settings", "plain", "light"])
def test_a_mistake_on_the_command_line_is_one_sentence(kind, capsys):
    """Would catch pages of usage, and an unknown flag that is hidden by what is missing."""
    parser = parsers()[kind]
    with pytest.raises(SystemExit) as stopped:
        parser.parse_args(["--model", "m", "--learning_rat_of_it", "3"])
    printed = capsys.readouterr().err
    assert stopped.value.code == 2 and printed.count("\n") == 1
    assert printed.startswith("toy: error: ") and "did you mean --learning_rate_of_it? See toy --help." in printed
    with pytest.raises(SystemExit):
        parser.parse_args(["--model", "m", "--learning_rate_of_it", "fast"])
    assert capsys.readouterr().err.count("\n") == 1
    if kind != "light":
        with pytest.raises(SystemExit):
            parser.parse_args(["--learning-rate"])
        assert "unknown flag --learning-rate, did you mean --learning_rate_of_it?" in capsys.readouterr().err


def test_an_abbreviation_is_no_flag(capsys):
    """Would catch `--mod`, which another flag makes ambiguous one day, and a stray word that is passed over."""
    parser = CommandParser(ToyArguments, prog="toy")
    for wrong, message in (("--mod", "unknown flag --mod, did you mean --model?"), ("m", "unexpected argument 'm'")):
        with pytest.raises(SystemExit):
            parser.parse_args_into_dataclasses([wrong])
        assert message in capsys.readouterr().err


def test_an_unknown_command_names_the_nearest(capsys):
    """Would catch a traceback at a typing error, or a list that the user has to search."""
    assert main(["unlern"]) == 2 == evaluation.main(["tof"])
    printed = capsys.readouterr().err
    assert "soul: error: unknown command 'unlern', did you mean unlearn? See soul --help." in printed
    assert "did you mean tofu?" in printed


@pytest.mark.parametrize("kind", EXPECTED)
def test_errors_are_sentences_and_tracebacks_are_asked_for(kind, capsys):
    """Would catch a traceback for a wrong path, and one that is lost when it is needed."""

    def fails(arguments):
        assert arguments == ["--debug", "underflow_overflow", "last"]  # the Trainer's own flag
        raise kind("`model` must be there.")

    arguments = ["--debug", "underflow_overflow", "last"]
    assert run("soul toy", fails, arguments) == 1
    assert capsys.readouterr().err == "soul toy: error: `model` must be there.\n"
    assert run("soul toy", fails, [*arguments, "--debug"]) == 1
    printed = capsys.readouterr().err
    assert "Traceback" in printed and printed.endswith("soul toy: error: `model` must be there.\n")


def test_a_bug_keeps_its_traceback():
    """Would catch an error of ours that is told as if it were the user's."""
    with pytest.raises(AssertionError):
        run("soul toy", lambda arguments: _raise(AssertionError), [])


def _raise(error: type[BaseException]):
    raise error


def test_an_interrupt_ends_with_its_own_status(capsys):
    """Would catch a traceback after Ctrl-C, and a script that takes it for success."""
    assert run("soul toy", lambda arguments: _raise(KeyboardInterrupt), []) == 130
    assert capsys.readouterr().err == "\nsoul toy: interrupted\n"


def test_a_status_is_the_functions_own_and_the_arguments_are_the_process_s(monkeypatch):
    """Would catch a report taken for an exit status, and parsers that call themselves by another name."""
    monkeypatch.setattr(sys, "argv", ["/some/where/tofu.py", "--flag"])
    seen = []
    assert run_script(lambda arguments: seen.append((arguments, sys.argv[0]))) == 0
    assert seen == [(["--flag"], "tofu.py")] and sys.argv[0] == "/some/where/tofu.py"
    assert run("soul toy", lambda arguments: 3, []) == 3
    assert run("soul toy", lambda arguments: ["run"], []) == 0


def test_the_launcher_gets_its_flags_and_the_command_the_others():
    """Would catch a flag that reaches the wrong parser, and one process where two were asked for."""
    assert split_launch(["--a", "1"], True) == (None, ["--a", "1"])
    assert split_launch(["--a", "--num_processes=2", "--b=c=d"], True) == (Launch(2), ["--a", "--b=c=d"])
    assert split_launch(["--num_processes", "1"], True) == (None, [])
    launch, rest = split_launch(["--accelerate_config", "ddp", "x"], True)
    assert launch.config.name == "ddp.yaml" and launch.num_processes is None and rest == ["x"]
    for wrong in (["--num_processes", "0"], ["--num_processes"], ["--accelerate_config", "none"]):
        with pytest.raises(ValueError):
            split_launch(wrong, True)
    with pytest.raises(ValueError, match="one process"):
        split_launch(["--num_processes", "2"], False)
    assert {"ddp", "fsdp2", "zero3"} <= set(launch_files())


def test_processes_are_started_and_their_failure_is_told(capfd, monkeypatch):
    """Would catch one process on a CPU, where accelerate starts no more by itself, and a failure taken for success."""
    monkeypatch.setenv("PYTHONPATH", python_path()["PYTHONPATH"])
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert start_processes(Launch(2), ["--version"]) == 0
    assert capfd.readouterr().out.count(f"soul-trainer {version('soul-trainer')}") == 2
    assert start_processes(Launch(2), ["unlern"]) == 2
    assert "did you mean unlearn?" in capfd.readouterr().err
    assert "ACCELERATE_USE_CPU" not in os.environ, "left to what this process does next"
