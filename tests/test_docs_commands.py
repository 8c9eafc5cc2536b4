"""Every command that a page or a docstring shows exists, and so does each of its flags."""

import dataclasses
import re
import runpy
from pathlib import Path

import pytest
from transformers import TrainingArguments

from soul_recipes.command import COMMANDS
from soul_trainer import UnlearnConfig


ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SOURCES = [path for room in ("soul_trainer", "recipes", "eval") for path in sorted((ROOT / room).rglob("*.py"))]
# A command begins a line or a span of code, and goes on after a backslash at the end of a line.
SHOWN = re.compile(r"(?:^ *|`)((?:soul|python|accelerate launch|torchrun) (?:[^`\\\n]|\\+\n)+)", re.MULTILINE)
# It is called as `soul NAME`, as a module, or by a recipe's file. What is before are flags of the launcher.
CALLED = re.compile(r"(?:^soul |-m soul_eval |-m soul_trainer\.|(recipes/))([a-z_]+)(?:\.py)?(?: (.*))?$", re.DOTALL)
LAUNCHER = {"--help", "--num_processes"}
TRAINING = {"finetune": TrainingArguments} | dict.fromkeys(
    ("unlearn", "tofu", "muse", "wmdp", "copyright", "detox", "search"), UnlearnConfig
)


def shown() -> list[tuple[str, str, str]]:
    """Where a command is shown, its name or its file, and what follows it."""
    found = []
    for path in (*PAGES, *SOURCES):
        for line in SHOWN.findall(path.read_text(encoding="utf-8")):
            if called := CALLED.search(line.partition("  #")[0].strip()):
                is_script, name, arguments = called.groups()
                known = COMMANDS[name].module if name in COMMANDS else None
                name = f"recipes/{name}.py" if is_script and known != f"soul_recipes.{name}" else name
                found.append((path.relative_to(ROOT).as_posix(), name, arguments or ""))
    return found


def help_of(name: str, words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> str:
    """What `--help` prints; a script's, by running it."""
    if name.endswith(".py"):
        command = words[:1] if name == "recipes/benchmark.py" else []
        monkeypatch.setattr("sys.argv", [name, *command, "--help"])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / name), run_name="__main__")
        assert not ended.value.code
        return capsys.readouterr().out
    name = words[0] if name == "eval" and words else name
    name = f"{name}_{words[0]}" if words and words[0] in ("save", "apply") else name
    # A task is both a recipe and a suite.
    paths = [path for path in ROOT.glob(f"*/help/{name}.txt") if path.parts[-3] in ("eval", "recipes")]
    assert paths or (name in COMMANDS and not words), f"there is no command {name}"
    return "".join(path.read_text(encoding="utf-8") for path in paths)


@pytest.mark.parametrize("name", sorted({name for _, name, _ in shown()}))
def test_a_command_that_is_shown_exists_with_its_flags(name, monkeypatch, capsys):
    """Would catch a command or a flag that was renamed and is still what a page tells users to type."""
    settings = {f"--{field.name}" for field in dataclasses.fields(TRAINING[name])} if name in TRAINING else set()
    unknown = []
    for place, called, arguments in shown():
        if called == name:
            known = re.findall(r"--\w+", help_of(name, arguments.split(), monkeypatch, capsys))
            flags = re.findall(r"(?<!\S)--\w+", arguments)
            unknown += [(place, flag) for flag in flags if flag not in {*known, *settings, *LAUNCHER}]
    assert not unknown


def test_commands_are_found():
    """Would catch a pattern that finds no commands any more, so that the test above tests nothing."""
    names = {name for _, name, _ in shown()}
    assert {"unlearn", "tofu", "verify", "curvature", "attack", "influence"} <= names
    assert {"recipes/real.py", "recipes/memory_plan.py", "recipes/influence.py"} <= names
    assert len(shown()) > 120
