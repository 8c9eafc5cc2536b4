import json
import os
import zlib

import pytest
import torch
from privacy import check_files
from test_attacks_relearning import FORGET, RETAIN, toy_models, toy_tokenizer

from soul_eval.attacks import running
from soul_eval.attacks.command import main, recovered_figures, recovery_table, run
from soul_eval.attacks.quantization import load_quantized, rounded_weights
from soul_eval.attacks.recovered import share_recovered
from soul_eval.attacks.relearning import RelearningArguments, relearned_weights
from soul_eval.attacks.running import ATTACKS, AttackArguments
from soul_eval.models import load_model
from soul_eval.rows import read_rows
from soul_eval.scoring import answer_losses
from soul_eval.statistics import Figure
from soul_eval.suites.tofu import TofuArguments, summarise
from soul_trainer.formats import render


OTHERS = {"paraphrased_answer": "It was fog", "perturbed_answer": ["It was ink", "It was ice"]}
FACTS = [{"question": f"Is {number} odd?", "answer": "Yes"} for number in (1, 3, 5)]
RELEARNING = {"relearn_rows": 2, "relearn_steps": 10, "relearn_learning_rate": 1e-3}


def write_dataset(folder):
    """TOFU in small, in the hub's layout."""
    forget, retain = (
        [{**row, **OTHERS, "paraphrased_question": reworded(row)} for row in rows] for rows in (FORGET, RETAIN)
    )
    facts = [{**row, "perturbed_answer": ["No", "So"]} for row in FACTS]
    configs = {"forget_small": forget, "retain": retain, "real_authors": facts, "world_facts": facts}
    # `datasets` takes a folder for the one of the same name that it has read before: the name holds what is in it.
    folder = folder / f"small-{zlib.crc32(json.dumps(configs).encode()):08x}"
    folder.mkdir(parents=True)
    for name, rows in configs.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}_perturbed.json").write_text(text, encoding="utf-8")
    entries = "".join(f"- config_name: {name}_perturbed\n  data_files: {name}_perturbed.json\n" for name in configs)
    (folder / "README.md").write_text(f"---\nconfigs:\n{entries}---\n", encoding="utf-8")
    return str(folder)


def reworded(row):
    return row["question"].replace("What did", "And what did")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Target, unlearned and gold model."""
    found = []
    for name, model in zip(("target", "unlearned", "gold"), toy_models()):
        folder = tmp_path_factory.mktemp(name)
        model.save_pretrained(folder)
        toy_tokenizer().save_pretrained(folder)
        found.append(str(folder))
    return found


def attack(folders, dataset, output, with_gold=False, **settings):
    settings = {"num_shots": 1, "group_size": 8, "device": "cpu", **settings}
    args = AttackArguments(
        model=folders[1],
        target=folders[0],
        output=str(output),
        reference=folders[2] if with_gold else None,
        **settings,
    )
    own = TofuArguments(dataset=dataset, forget_split="forget_small", max_new_tokens=12)
    return run(args, RelearningArguments(**RELEARNING), own)


def losses_of(model, rows):
    examples = [render(row, toy_tokenizer()) for row in rows]
    return pytest.approx(answer_losses(model, toy_tokenizer(), examples, progress=False), abs=1e-5)


def rows_in(output, *place):
    return read_rows(output.joinpath(*place, "rows.jsonl"))


def test_all_attacks_on_all_models(folders, dataset, tmp_path):
    """Catches an attack on the wrong model, weights of one attack left for the next, files that overwrite others."""
    found = attack(folders, dataset, tmp_path, with_gold=True)
    assert list(found) == ["relearning", "relearning_used", *ATTACKS[1:]]
    unlearned = toy_models()[1]
    expected = {"plain": losses_of(unlearned, FORGET)}
    settings = RelearningArguments(**RELEARNING)
    with relearned_weights(unlearned, toy_tokenizer(), FORGET[:2], settings, progress=False):
        expected["relearning"] = losses_of(unlearned, FORGET)
    with relearned_weights(unlearned, toy_tokenizer(), FACTS, settings, progress=False):
        expected["relearning_unrelated"] = losses_of(unlearned, FORGET)
    with rounded_weights(unlearned, 8):
        expected["quantization_8"] = losses_of(unlearned, FORGET)
    with rounded_weights(unlearned, 4, 8):
        expected["quantization_4"] = losses_of(unlearned, FORGET)
    expected["paraphrase"] = losses_of(unlearned, [{**row, "question": reworded(row)} for row in FORGET])
    for name, losses in expected.items():
        header, rows = rows_in(tmp_path, name)
        assert header["suite"] == "tofu" and header["model"] == folders[1] and header["settings"]["attack"] == name
        assert [row["answer_nll"] for row in rows] == losses and all("generation" in row for row in rows)
    assert len({json.dumps(rows_in(tmp_path, name)[1][3]["answer_nll"]) for name in ("plain", *ATTACKS)}) == 10
    for name in ATTACKS:
        assert rows_in(tmp_path, name, "gold")[0]["model"] == folders[2]
        asks_target = name in running.PROMPT_ATTACKS
        assert (tmp_path / name / "target" / "rows.jsonl").exists() == asks_target
    assert [row["answer_nll"] for row in rows_in(tmp_path, "plain", "target")[1]] == losses_of(toy_models()[0], FORGET)
    assert [row["relearnt"] for row in rows_in(tmp_path, "relearning")[1]] == [True] * 2 + [False] * 6
    assert "forget_truth_ratio" in summarise(rows_in(tmp_path, "few_shot")[1]), "rows are those of the suite"
    check_files(tmp_path, [row["question"] for row in FORGET], ["plain/rows.jsonl", "relearning/rows.jsonl"])


def test_shares_are_of_the_right_models(folders, dataset, tmp_path):
    """Catches a plain target against an altered question, rows that were trained on among the others."""
    found = attack(folders, dataset, tmp_path, with_gold=True, attacks="prefix,paraphrase,relearning")

    def means(*place, rows=slice(None)):
        return (
            torch.tensor([row["answer_nll"] for row in rows_in(tmp_path, *place)[1][rows]]).neg().exp().mean().item()
        )

    for name, key, rows in (
        ("relearning", "relearning", slice(2, None)),
        ("relearning_used", "relearning", slice(2)),
        ("paraphrase", "paraphrase", slice(None)),
        ("prefix", "prefix", slice(None)),
    ):
        before = means("plain", rows=rows)
        most = means(*(("plain", "target") if key == "relearning" else (key, "target")), rows=rows)
        for role, place in (("unlearned", (key,)), ("gold", (key, "gold"))):
            recovery = found[name][role]["probability"]
            after = means(*place, rows=rows)
            three = [recovery.unlearned.value, recovery.attacked.value, recovery.target.value]
            assert three == pytest.approx([before, after, most], abs=1e-6)
            if recovery.share:
                assert recovery.share.value == pytest.approx((after - before) / (most - before), abs=1e-5)
            else:
                assert name == "paraphrase" and "not ahead in every resample" in recovery.reason
    assert found["relearning"]["unlearned"]["probability"].share.num_rows == 6
    assert found["relearning"]["unlearned"]["probability"].share.value > 0.2
    # A gold model knows of the rows that it was not trained on nothing that could come back.
    assert found["relearning"]["gold"]["probability"].share.value < 0
    with_rest = found["prefix"]["unlearned"]["rougeL_recall"]
    plain, rest = rows_in(tmp_path, "plain")[1], rows_in(tmp_path, "prefix")[1]
    from soul_eval.metrics.rouge_overlap.formula import rouge_scores

    recalls = [rouge_scores(r["rest"], p["generation"])["rougeL_recall"] for p, r in zip(plain, rest)]
    assert with_rest.unlearned.value == pytest.approx(sum(recalls) / len(recalls))


def test_the_command_prints_and_writes_what_it_found(folders, dataset, tmp_path, capsys):
    """Catches figures under other names than the report looks for, and numbers that differ between file and table."""
    command = [
        *("--model", folders[1], "--target", folders[0], "--dataset", dataset, "--forget_split", "forget_small"),
        *(
            "--attacks",
            "quantization_4, paraphrase",
            "--group_size",
            "8",
            "--output",
            str(tmp_path),
            "--device",
            "cpu",
        ),
        *("--no_generate", "--limit", "5"),
    ]
    main(command)
    printed = capsys.readouterr().out
    entries = json.loads((tmp_path / "attacks.json").read_text(encoding="utf-8"))
    assert list(entries["attacks"]) == ["quantization_4", "paraphrase"]
    figures = {name: Figure.from_json(entry) for name, entry in entries["figures"].items()}
    assert set(figures) <= {"recovered_quantization_4_probability", "recovered_paraphrase_probability"} and figures
    for name, figure in figures.items():
        own = entries["attacks"][name.removeprefix("recovered_").removesuffix("_probability")]["unlearned"]
        assert own["probability"]["share"] == figure.to_json() and figure.num_rows == 5
        assert f"{figure.value:.2f} [{figure.low:.2f}, {figure.high:.2f}]" in printed
    assert "rougeL" not in printed and "gold" not in printed


def test_nothing_is_asked_twice(folders, dataset, tmp_path):
    """Catches an attack that runs again, rows of other settings that are taken for its own, rows that are lost."""

    def times():
        return {path: path.stat().st_mtime_ns for path in tmp_path.rglob("rows.jsonl")}

    first = attack(folders, dataset, tmp_path, attacks="quantization_8")
    before = times()
    assert attack(folders, dataset, tmp_path, attacks="quantization_8") == first and times() == before
    attack(folders, dataset, tmp_path, attacks="quantization_8,quantization_4")
    assert times().keys() - before.keys() == {tmp_path / "quantization_4" / "rows.jsonl"}
    assert {path: times()[path] for path in before} == before
    with pytest.raises(ValueError, match="results of another settings: add --overwrite"):
        attack(folders, dataset, tmp_path, attacks="few_shot,quantization_4", group_size=4)
    assert not (tmp_path / "few_shot").exists(), "refused before anything is asked"
    attack(folders, dataset, tmp_path, attacks="quantization_4", group_size=4, overwrite=True)
    assert rows_in(tmp_path, "quantization_4")[0]["settings"]["group_size"] == 4
    with pytest.raises(ValueError, match="results of another questions and settings"):
        attack(folders, dataset, tmp_path, attacks="quantization_8", limit=3)
    swapped = [folders[0], folders[2], folders[2]]
    attack(swapped, dataset, tmp_path, attacks="quantization_8")
    assert rows_in(tmp_path, "quantization_8")[0]["model"] == folders[2]
    assert len(list((tmp_path / "quantization_8").glob("rows.*.jsonl"))) == 1, "the rows of the former weights"


def test_an_adapter_is_attacked_as_it_would_be_deployed(folders, dataset, tmp_path):
    """Catches an adapter that relearning or rounding leaves out."""
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(
        load_model(folders[1], "cpu"), LoraConfig(target_modules=["v_proj"], init_lora_weights=False)
    )
    adapted.save_pretrained(tmp_path / "adapter")
    attack([folders[0], str(tmp_path / "adapter")], dataset, tmp_path / "out", attacks="quantization_4,relearning")
    merged = adapted.merge_and_unload().eval()
    with rounded_weights(merged, 4, 8):
        assert [row["answer_nll"] for row in rows_in(tmp_path / "out", "quantization_4")[1]] == losses_of(
            merged, FORGET
        )
    for weight in merged.parameters():
        weight.requires_grad_(True)
    with relearned_weights(merged, toy_tokenizer(), FORGET[:2], RelearningArguments(**RELEARNING), progress=False):
        assert [row["answer_nll"] for row in rows_in(tmp_path / "out", "relearning")[1]] == losses_of(merged, FORGET)


def test_bitsandbytes_and_a_text_of_ones_own(folders, dataset, tmp_path):
    """Catches a quantizer that is ignored, and passages that run into one another."""
    pytest.importorskip("bitsandbytes")
    (tmp_path / "text").write_text("Rain fell.\nAll day.\n\n\n\nThen none.\n", encoding="utf-8")
    attacks = "quantization_8,relearning_unrelated"
    text = str(tmp_path / "text")
    attack(folders, dataset, tmp_path / "out", attacks=attacks, quantizer="bitsandbytes", unrelated_text=text)
    quantized = load_quantized(folders[1], 8, "cpu")
    header, rows = rows_in(tmp_path / "out", "quantization_8")
    assert header["settings"]["quantizer"] == "bitsandbytes"
    examples = [render(row, toy_tokenizer()) for row in FORGET]
    expected = answer_losses(quantized, toy_tokenizer(), examples, progress=False)
    # LLM.int8() rounds activations by the largest of a row, with half precision around.
    assert [row["answer_nll"] for row in rows] == pytest.approx(expected, abs=0.05)
    unlearned, passages = toy_models()[1], [{"text": "Rain fell.\nAll day."}, {"text": "Then none."}]
    with relearned_weights(unlearned, toy_tokenizer(), passages, RelearningArguments(**RELEARNING), progress=False):
        rows = rows_in(tmp_path / "out", "relearning_unrelated")[1]
        assert [row["answer_nll"] for row in rows] == losses_of(unlearned, FORGET)


def test_what_cannot_be_attacked_is_refused(folders, dataset, tmp_path, monkeypatch):
    """Catches hours of asking before a mistake is found."""
    for settings, message in (
        ({"attacks": "quantization_4,magic"}, "choose some of relearning"),
        ({"attacks": ","}, "choose some of relearning"),
        ({"splits": "retain"}, "without forget there is nothing to recover"),
        ({"splits": "forget,nothing"}, "'nothing' is none of"),
        ({"quantizer": "gptq"}, "use rounding or bitsandbytes"),
        ({"limit": 0}, "`limit` must be at least 1"),
        ({"num_shots": 99}, "`num_shots` must be 1 to 8"),
        (
            {"splits": "forget,world_facts", "attacks": "paraphrase"},
            "Row 0 of `world_facts` has no `paraphrased_question",
        ),
        ({"limit": 2, "attacks": "relearning"}, "`relearn_rows` must be less than 2"),
    ):
        with pytest.raises(ValueError, match=message):
            attack(folders, dataset, tmp_path / "out", **settings)
    rows = tmp_path / "gold.jsonl"
    rows.write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match="is a file: the gold model itself is needed"):
        attack([*folders[:2], str(rows)], dataset, tmp_path / "out", with_gold=True)
    monkeypatch.setitem(os.environ, "WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="`attack` runs in one process"):
        attack(folders, dataset, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_table_says_why_there_is_no_share():
    """Catches a dash without a reason, and a gold model's share under the wrong heading."""
    known, unknown = share_recovered([0.2, 0.4], [0.1, 0.3], [0.6, 0.8]), share_recovered([0.2], [0.2], [0.2])
    found = {
        "quantization_4": {"unlearned": {"probability": known, "rougeL_recall": unknown}, "gold": {}},
    }
    found["quantization_4"]["gold"] = {"probability": unknown, "rougeL_recall": known}
    lines = recovery_table(found).splitlines()
    assert lines[0].split() == ["attack", "figure", "before", "after", "target", "recovered", "gold", "model"]
    # Of two rows, the interval is as wide as it should be.
    *cells, low, high, gold = lines[1].split()
    assert cells == "quantization_4 probability 0.200 0.300 0.700 0.20".split() and gold == "-"
    assert float(low.strip("[,")) < 0.2 < float(high.strip("]"))
    assert lines[2].split()[:-2] == "quantization_4 rougeL_recall 0.200 0.200 0.200 - 0.20".split()
    assert lines[2].split()[-2:] == [low, high]
    assert lines[-1].startswith("quantization_4, rougeL_recall: no share, because the target has 0.2 and")
    assert list(recovered_figures(found)) == ["recovered_quantization_4_probability"]
