"""`python -m soul_trainer SCRIPT`: what the script, and who started it, can tell from `python SCRIPT`."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from subprocesses import RUNNER, python, succeeded

import soul_trainer


@pytest.fixture(scope="module")
def light(tmp_path_factory) -> str:
    """A folder with a package of our name that holds the runner alone: the contract without seconds of imports."""
    folder = tmp_path_factory.mktemp("light")
    package = folder / "soul_trainer"
    package.mkdir()
    # What a library that is imported before the script may hold on to.
    (package / "__init__.py").write_text("import __main__ as early\n", encoding="utf-8")
    shutil.copy(Path(soul_trainer.__file__).parent / "__main__.py", package)
    return str(folder)


def same(light: str, folder: Path, *arguments: str, **variables) -> subprocess.CompletedProcess:
    """Runs `python ARGUMENT...` without and with the runner, and asserts that both give the same."""
    variables["PYTHONPATH"] = light
    expected = python(*arguments, folder=folder, **variables)
    found = python(*RUNNER, *arguments, folder=folder, **variables)
    assert found.stdout == expected.stdout
    assert found.stderr == expected.stderr
    assert found.returncode == expected.returncode
    return found


PORTRAIT = """
'''A docstring.'''
import sys
import __main__, soul_trainer
print(sys.argv, sys.path, __name__, __file__, __spec__, __package__, __doc__)
print({name: str(value)[:9] for name, value in globals().items()}, globals().get("__cached__"))
print(__loader__.name, __loader__.path, __main__.__dict__ is globals(), soul_trainer.early is __main__)
"""


@pytest.mark.parametrize("name", ["script.py", "./../{folder}/script.py", "{path}/script.py", "link.py", "script"])
def test_a_script_sees_what_it_sees_under_python(light, tmp_path, name):
    """
    Would catch our own arguments, folder, names or module in the script's, an option for the script that we take, and
    a new `__main__` beside the one that libraries imported before the script, dill for one, hold.
    """
    home = tmp_path / "home"
    home.mkdir()
    for file in (home / "script.py", home / "script"):
        file.write_text(PORTRAIT, encoding="utf-8")
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "real.py").write_text(PORTRAIT, encoding="utf-8")
    (home / "link.py").symlink_to(tmp_path / "target" / "real.py")
    done = same(light, home, name.format(folder=home.name, path=home), "-h", "--optim", "soul", "")
    assert "'-h', '--optim', 'soul', ''" in succeeded(done) and done.stdout.endswith("True True\n")


def test_python_that_keeps_folders_off_its_path_does_so(light, tmp_path):
    """Would catch an entry of `sys.path` that is overwritten although it is not the launcher's."""
    (tmp_path / "script.py").write_text(PORTRAIT, encoding="utf-8")
    succeeded(same(light, tmp_path, "script.py", PYTHONSAFEPATH="1"))


def test_a_folder_runs_by_its_main_file(light, tmp_path):
    """Would catch a packaged script that cannot import what lies beside it."""
    (tmp_path / "app").mkdir()
    (tmp_path / "app" / "helper.py").write_text("NAME = 'beside'\n", encoding="utf-8")
    (tmp_path / "app" / "__main__.py").write_text(
        "import sys, helper\nprint(sys.argv, sys.path, __name__, __file__, helper.NAME)\n", encoding="utf-8"
    )
    assert "beside" in succeeded(same(light, tmp_path, "app", "x"))


ENDINGS = {
    "status": "sys.exit(3)",
    "text": "sys.exit('no data')",
    "nothing": "sys.exit()",
    "no exit": "print('done')",
    "at exit": "import atexit; atexit.register(lambda: print(sys.excepthook is sys.__excepthook__)); 1 / 0",
    "interrupt": "import signal; signal.raise_signal(signal.SIGINT)",
    "raised interrupt": "raise KeyboardInterrupt",
    "nested": "def f():\n    return {}['key']\n\n\ndef g():\n    f()\n\n\ng()",
    "cause": "try:\n    1 / 0\nexcept ZeroDivisionError as error:\n    raise ValueError('x') from error",
    "context": "def f():\n    try:\n        1 / 0\n    finally:\n        [][1]\n\n\nf()",
    "group": "try:\n    1 / 0\nexcept Exception as e:\n    raise BaseExceptionGroup('both', [e, KeyError(1)])",
    "exit in place of an error": "try:\n    1 / 0\nexcept ZeroDivisionError:\n    sys.exit(4)",
    "no traceback": "try:\n    1 / 0\nexcept ZeroDivisionError as error:\n    raise error.with_traceback(None)",
    "in a library": "import json\njson.loads('{')",
    "syntax": "print('never')\nif True print(1)",
    "indentation": "if True:\nprint(1)",
    "syntax warning": "print(1 is 1)",
    "hook": "sys.excepthook = lambda kind, error, tb: print('hook', kind, error, tb.tb_lineno, tb.tb_next)\n1 / 0",
    "post mortem": "import atexit\natexit.register(lambda: print(sys.last_traceback.tb_lineno))\n1 / 0",
    "thread": "import threading\nt = threading.Thread(target=lambda: 1 / 0, name='t')\nt.start()\nt.join()",
    "destructor": "class A:\n    def __del__(self):\n        print('gone', sys.modules is None)\n\n\na = A()",
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_script_ends_as_it_ends_under_python(light, tmp_path, ending):
    """
    Would catch frames of ours above the script's own, an exit status that is swallowed or made up, an interrupt that
    a shell does not see as one, and a script's own hook that is passed over.
    """
    (tmp_path / "script.py").write_text(f"import sys\n\n{ENDINGS[ending]}\n", encoding="utf-8")
    done = same(light, tmp_path, "script.py")
    assert "runpy" not in done.stderr and "soul_trainer" not in done.stderr
    if "interrupt" in ending and sys.platform != "win32":
        assert done.returncode == -2


@pytest.mark.parametrize(
    "source",
    [
        "# -*- coding: latin-1 -*-\nprint(ascii('caf\xe9'))\n1 / 0  # caf\xe9".encode("latin-1"),
        "\ufeffprint(ascii('caf\xe9'))".encode(),
        "print(ascii('caf\xe9'))\r\n1 / 0\r\n".encode(),
    ],
    ids=["declared", "mark", "line ends"],
)
def test_the_encoding_of_a_script_is_its_own(light, tmp_path, source):
    """Would catch a script that is read as UTF-8 whatever its first line says."""
    (tmp_path / "script.py").write_bytes(source)
    assert "'caf\\xe9'" in same(light, tmp_path, "script.py").stdout


def test_a_script_that_is_not_there_is_named(light, tmp_path):
    """Would catch a traceback of ours as the answer to a typing mistake."""
    done = same(light, tmp_path, "typo.py", "--optim", "soul")
    assert done.returncode == 2 and "typo.py': [Errno 2]" in done.stderr
    (tmp_path / "folder").mkdir()
    done = python(*RUNNER, "folder", folder=tmp_path, PYTHONPATH=light)
    assert done.returncode == 2 and "can't open file" in done.stderr and "__main__.py" in done.stderr


@pytest.mark.parametrize("arguments", [(), ("--optim", "script.py"), ("-h",)], ids=["none", "option", "help"])
def test_without_a_script_it_says_how_to_call_it(light, tmp_path, arguments):
    """Would catch options in front of the script that are silently taken for it, and help that counts as an error."""
    done = python(*RUNNER, *arguments, folder=tmp_path, PYTHONPATH=light)
    is_help = arguments == ("-h",)
    assert done.returncode == (0 if is_help else 2)
    assert "python -m soul_trainer SCRIPT" in (done.stdout if is_help else done.stderr)
    assert not (done.stderr if is_help else done.stdout)


WORKERS = """
import pickle
import sys

import datasets
import dill
import torch
from datasets.fingerprint import Hasher
from torch.utils.data import DataLoader

OFFSET = 3


class Row:
    def __init__(self, value):
        self.value = value


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return Row(index)


def collate(rows):
    return [row.value + OFFSET for row in rows]


class Named:
    def __init__(self, args):
        self.args = args

    def __call__(self, rows):
        return self.args.optim.value


def shift(row):
    return {"x": row["x"] + OFFSET}


if __name__ == "__main__":
    datasets.disable_progress_bars()
    for method in ("fork", "spawn"):
        loader = DataLoader(Rows(), 2, num_workers=1, collate_fn=collate, multiprocessing_context=method)
        print(method, list(loader))
    print(datasets.Dataset.from_dict({"x": [0, 1, 2]}).map(shift, num_proc=2)["x"][:])
    print(Hasher.hash(shift), dill.dumps(shift), pickle.dumps(Row(1)))
    torch.save(Row(5), sys.argv[1])
    print(torch.load(sys.argv[1], weights_only=False).value)
    if "--optim" in sys.argv:
        from transformers import TrainingArguments

        named = Named(TrainingArguments("out", optim=sys.argv[-1]))
        print(list(DataLoader(Rows(), 4, num_workers=1, collate_fn=named, multiprocessing_context="spawn")))
"""


def test_what_a_script_defines_travels_to_its_workers(tmp_path):
    """
    Would catch classes and functions that pickle looks for in a `__main__` that is not the script's, a cache of
    `datasets` that a script misses because we run it, and a spawned worker to whom the optimizer's name means nothing.
    With the whole package, whose imports could interfere.
    """
    (tmp_path / "script.py").write_text(WORKERS, encoding="utf-8")
    expected = succeeded(python("script.py", "row.pt", folder=tmp_path))
    assert "spawn [[3, 4], [5, 6]]" in expected and "[3, 4, 5]" in expected and expected.endswith("\n5\n")
    found = succeeded(python(*RUNNER, "script.py", "row.pt", "--optim", "soul", folder=tmp_path))
    assert found == expected + "['soul']\n"
