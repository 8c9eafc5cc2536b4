"""The wheel, installed away from the repository: the command runs there, and everything that it reads is inside."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
SOURCES = ("soul_trainer", "eval", "recipes", "setup.cfg", "pyproject.toml", "README.md", "LICENSE")
PACKAGES = {"soul_trainer": "soul_trainer", "eval": "soul_eval", "recipes": "soul_recipes"}
# What the packages read at run time, besides Python.
DATA = (".yaml", ".json", ".txt", ".css", ".js")


def done(*command: str | Path, folder: Path, **variables: str) -> str:
    """What a command printed that must have succeeded."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | variables
    ran = subprocess.run([*map(str, command)], cwd=folder, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]
    return ran.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder into which the wheel is installed."""
    folder = tmp_path_factory.mktemp("wheel")
    (folder / "source").mkdir()
    # A copy: a build writes into its folder, and takes what an earlier one has left there.
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / "source" / name)
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet")
    built = ("--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", "built", "./source")
    done(*pip, "wheel", *built, folder=folder)
    (wheel,) = (folder / "built").glob("*.whl")
    done(*pip, "install", "--no-deps", "--no-index", "--target", "installed", wheel, folder=folder)
    return folder / "installed"


def test_everything_that_is_read_is_inside(installed):
    """Would catch settings, corpora and texts of help that an editable install finds and a wheel leaves out."""
    wanted = {
        PACKAGES[folder] + "/" + path.relative_to(ROOT / folder).as_posix()
        for folder in PACKAGES
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", *DATA) or path.name.endswith("_yaml")
    }
    wanted = {name for name in wanted if "__pycache__" not in name}
    inside = {path.relative_to(installed).as_posix() for path in installed.rglob("*") if path.is_file()}
    assert wanted - inside == set()
    assert {
        "soul_recipes/configs/tofu/small/defaults.yaml",
        "soul_recipes/accelerate/zero3.yaml",
        "soul_recipes/fictitious_authors.json",
        "soul_recipes/help/unlearn.txt",
        "soul_eval/help/tofu.txt",
    } <= inside


def test_the_command_runs_away_from_the_repository(installed, tmp_path):
    """Would catch an entry point that is not there, and help that is read from the repository."""
    variables = {"PYTHONPATH": str(installed)}
    place = done(
        sys.executable, "-c", "import soul_recipes; print(soul_recipes.__file__)", folder=tmp_path, **variables
    )
    assert Path(place.strip()).is_relative_to(installed)
    soul = installed / "bin" / "soul"
    assert "unlearn" in done(soul, "--help", folder=tmp_path, **variables)
    assert "--forget" in done(soul, "unlearn", "--help", folder=tmp_path, **variables)
    assert "usage: soul eval own" in done(soul, "eval", "own", "--help", folder=tmp_path, **variables)
