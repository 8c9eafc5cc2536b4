"""The walls of the house: which file may import which, and how long files and functions may grow."""

import ast
import configparser
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
PACKAGES = {"soul_trainer": "soul_trainer", "soul_eval": "eval", "soul_recipes": "recipes"}
# A file imports from the floors below it and from its own.
FLOORS = (
    ("batch", "optim", "precision", "settings", "soul_settings", "refusals", "weighting", "weights"),
    ("command_line", "machine", "markdown", "scratch", "leftovers", "sources"),
    (
        "log_probs",
        "divergences",
        "halves",
        "chunks",
        "inputs",
        "chat_templates",
        "formats",
        "tokenized",
        "objectives",
        "pairing",
        "collator",
        "config",
    ),
    (
        "engines",
        "held_folder",
        "records",
        "freezing",
        "lora",
        "random_state",
        "loading",
        "stored_weights",
        "difference",
        "fingerprint",
    ),
    ("registration",),
    ("reference", "reference_rows", "curvature", "attribution", "perturbation", "sampling"),
    ("callbacks",),
    ("runs", "steps"),
    ("trainer",),
    ("__init__",),
    ("__main__", "clean", "consolidate", "influence", "influence_command"),
)
LONGEST_FILE, LONGEST_FUNCTION = 400, 60
SHORTER_FILES = {"soul_trainer/trainer.py": 250, **{str(p.relative_to(ROOT)): 300 for p in ROOT.glob("recipes/*.py")}}
# Names that transformers does not promise to keep start with an underscore, or are tables that its own code fills.
INTERNALS = {"soul_trainer/registration.py", *(str(p.relative_to(ROOT)) for p in ROOT.glob("soul_trainer/engines/*"))}

# What makes figures and reports of rows, wherever they are.
OF_ROWS_ALONE = ("rows", "journal", "statistics", "paired", "report", "runs", "columns", "registry", "known_figures")
OF_ROWS_ALONE += (
    "sentences",
    "examples",
    "drawings",
    "page",
    "templating",
    "markdown",
    "schema",
    "verdict",
    "verdict_figures",
    "verdict_rules",
)


def sources(*folders):
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def name_of(path):
    return str(path.relative_to(ROOT))


def imports_of(path):
    """Absolute names of the modules that a file imports, wherever in it."""
    package = next((name for name, folder in PACKAGES.items() if path.is_relative_to(ROOT / folder)), "tests")
    parts = (package, *path.relative_to(ROOT / PACKAGES.get(package, package)).parts)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = list(parts[: len(parts) - node.level]) if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from ([module] if node.module else [f"{module}.{alias.name}" for alias in node.names])


def test_imports_run_one_way_within_the_trainer():
    """Would catch a circle, and maths that reaches up to when or for whom it is done."""
    floor = {name: number for number, names in enumerate(FLOORS) for name in names}
    rooms = {
        path: path.relative_to(ROOT / "soul_trainer").with_suffix("").parts[0] for path in sources("soul_trainer")
    }
    unplaced = set(rooms.values()) - set(floor)
    assert not unplaced, f"give them a floor: {unplaced}"
    for path, room in rooms.items():
        for module in imports_of(path):
            if module.startswith("soul_trainer."):
                imported = module.split(".")[1]
                assert floor[imported] <= floor[room], f"{name_of(path)} imports {imported}, which is above it"


@pytest.mark.parametrize(
    "folder, forbidden",
    [
        ("soul_trainer", {"soul_eval", "eval", "soul_recipes", "recipes"}),
        ("eval", {"soul_recipes", "recipes"}),
        ("soul_trainer/engines", {"datasets", "peft", "numpy"}),
        ("soul_trainer/optim", {"transformers", "accelerate", "datasets", "peft", "numpy"}),
        ("eval/study", {"torch", "transformers", "soul_trainer"}),
        *((f"eval/{name}.py", {"torch", "transformers", "soul_trainer"}) for name in OF_ROWS_ALONE),
        ("eval/metrics", {"torch", "transformers", "soul_trainer"}),
    ],
)
def test_no_room_imports_what_it_must_not_know(folder, forbidden):
    """Would catch a trainer that needs the evaluation, and a report that cannot be made without torch."""
    paths = [ROOT / folder] if folder.endswith(".py") else sources(folder)
    for path in paths:
        found = {module.split(".")[0] for module in imports_of(path)} & forbidden
        assert not found, f"{name_of(path)} imports {found}"


def test_transformers_internals_are_touched_in_two_files():
    """Would catch a private name of the Trainer in a file that nobody looks at when transformers changes."""
    # Tuples have underscored methods, and torch's optimizers are made of its foreach functions.
    public = ("_fields", "_replace", "_asdict")
    for path in sources("soul_trainer", "eval", "recipes"):
        if name_of(path) in INTERNALS:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
                is_own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
                is_known = is_own or node.attr in public or node.attr.startswith("_foreach")
                assert is_known, f"{name_of(path)}, line {node.lineno}: {node.attr}"


def test_every_package_is_installed():
    """Would catch a folder of code that an editable install finds and a wheel leaves out."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    listed = set(config["options"]["packages"].split())
    found = {
        ".".join((package, *path.parent.relative_to(ROOT / folder).parts))
        for package, folder in PACKAGES.items()
        for path in sources(folder)
    }
    assert listed == found


def test_recipes_import_one_another_by_their_package():
    """Would catch an import of a sibling by its bare name, which fails in a wheel."""
    names = {path.stem for path in (ROOT / "recipes").glob("*.py")} - sys.stdlib_module_names
    for path in sources("recipes", "tests"):
        bare = {module.split(".")[0] for module in imports_of(path)} & names
        assert not bare, f"{name_of(path)} imports {bare}: write `from soul_recipes.NAME import ...`"


def test_files_and_functions_stay_short():
    """Would catch a file that has become two, and a function that nobody reads to its end."""
    for path in sources("soul_trainer", "eval", "recipes", "tests"):
        text = path.read_text(encoding="utf-8")
        longest = SHORTER_FILES.get(name_of(path), LONGEST_FILE)
        num_lines = len(text.splitlines())
        assert num_lines <= longest, f"{name_of(path)} has {num_lines} lines, over {longest}"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                length = node.end_lineno - (
                    node.body[0].end_lineno if ast.get_docstring(node) else node.body[0].lineno
                )
                assert length <= LONGEST_FUNCTION, f"{name_of(path)}: {node.name} has {length} lines"
