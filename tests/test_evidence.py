"""The record of a run: what it says, what it keeps to itself, and what a reader can check."""

import base64
import json
import shutil
import stat
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from experiment_scenes import scene_experiment, scene_task
from scenes import FORGET, RETAIN, scene_model, scene_tokenizer
from test_continual import continual_task, scene_requests

from soul_eval.__main__ import main as soul_eval
from soul_eval.continual import run_requests
from soul_eval.evidence import complete_record, new_key, read_record, verify_record, write_row_keys
from soul_eval.evidence.envelope import load_public_key, load_signing_key, pre_authentication_encoding
from soul_eval.evidence.hashing import canonical_row, row_hash, row_key
from soul_eval.evidence.record import PREDICATE_TYPE, salt_file_of


def statuses(*args, **kwargs):
    """What each check of a record found."""
    return {check.name: check.status for check in verify_record(*args, **kwargs)}


def failed(*args, **kwargs):
    """Names of the checks that failed."""
    return [name for name, status in statuses(*args, **kwargs).items() if status == "failed"]


# A record does not depend on what is asked, and likelihoods are the quickest.
ASKED = {"generate": False}


@pytest.fixture(scope="module")
def signed(tmp_path_factory):
    """A folder with a key pair and a run of the scene, whose record is signed and has figures of an attack."""
    folder = tmp_path_factory.mktemp("signed")
    new_key(folder / "key.pem")
    flags = ["--optim", "soul", "--signing_key", str(folder / "key.pem"), "--attacks", "quantization_8"]
    task = replace(scene_task(folder), asked=ASKED, settings={"note": "seen by no reader of the record"})
    scene_experiment(folder, *flags).run(task)
    return folder


@pytest.fixture
def copy(signed, tmp_path):
    """A copy of it that a test may change."""
    return shutil.copytree(signed, tmp_path / "copy")


def rewritten(path, change):
    """Changes the statement within a signed record, and leaves the signature."""
    envelope = json.loads(path.read_text())
    statement = json.loads(base64.b64decode(envelope["payload"]))
    change(statement)
    envelope["payload"] = base64.b64encode(json.dumps(statement).encode()).decode()
    path.write_text(json.dumps(envelope))


def test_the_record_is_an_in_toto_statement_with_all_that_was_done(signed):
    """Would catch a record without one of its parts, or that other readers of such statements refuse."""
    statement = read_record(signed / "out" / "soul.record.json").statement
    assert set(statement) == {"_type", "subject", "predicateType", "predicate"}
    assert statement["_type"] == "https://in-toto.io/Statement/v1" and statement["predicateType"] == PREDICATE_TYPE
    subjects = {entry["name"]: entry["digest"] for entry in statement["subject"]}
    assert set(subjects) == {"soul", "model.safetensors", "config.json", "generation_config.json"}
    predicate = statement["predicate"]
    assert len(predicate["rows"]["forget"]) == len(FORGET) and len(predicate["rows"]["retain"]) == len(RETAIN)
    assert predicate["before"]["name"] == "target" and predicate["before"]["files"].keys() == subjects.keys() - {
        "soul"
    }
    assert predicate["before"]["files"]["model.safetensors"] != subjects["model.safetensors"]["sha256"]
    assert "tokenizer.json" in predicate["tokenizer"]["files"]
    assert predicate["settings"]["forget_loss"] == "npo" and predicate["settings"]["learning_rate"] == 1e-2
    assert predicate["seeds"] == {"seed": 42, "data_seed": None} and predicate["parent"] is None
    roles = [predicate["figures"][role] for role in ("before", "after", "gold")]
    for role in roles:
        figure = role["figures"]["forget_probability"]
        assert figure["low"] <= figure["value"] <= figure["high"] and figure["num_rows"] == len(FORGET)
    assert len({role["model"]["weightsSha256"] for role in roles}) == 3
    assert roles[1]["model"] == subjects["soul"]
    attacked = predicate["attacks"]["quantization_8"]["unlearned"]["probability"]
    assert attacked["unlearned"]["value"] == pytest.approx(
        roles[1]["figures"]["forget_probability"]["value"], abs=1e-4
    )
    assert {"torch", "transformers"} <= predicate["environment"]["packages"].keys()
    assert predicate["environment"]["device"]["type"] == "cpu"
    assert predicate["times"]["started"].endswith("Z") and predicate["times"]["started"] <= predicate["times"]["ended"]
    assert "certif" not in json.dumps(statement).lower() and "does not prove" in predicate["note"]


def test_it_tells_no_row_no_path_and_no_secret(signed):
    """Would catch text to forget in what may be published, and a salt that lets anyone guess it."""
    record = read_record(signed / "out" / "soul.record.json")
    text = record.payload.decode() + json.dumps(record.envelope)
    salt = json.loads((signed / "out" / "soul.record.salt").read_text())["salt"]
    for row in FORGET + RETAIN:
        assert row["question"] not in text and row["answer"] not in text
    for secret in (str(signed), salt, "key.pem", "Mara", "Rome", "seen by no reader"):
        assert secret not in text, secret
    assert stat.S_IMODE((signed / "out" / "soul.record.salt").stat().st_mode) == 0o600
    assert stat.S_IMODE((signed / "key.pem").stat().st_mode) == 0o600
    assert not list((signed / "out" / "soul").rglob("*record*")), "the folder is what goes to a hub"
    # Without the salt a row cannot be tried out: its plain hash is nowhere.
    assert not any(row_hash(b"", row) in text for row in FORGET)


def test_all_of_it_can_be_checked(signed):
    """Would catch a check that fails on the very run that was recorded."""
    record, rows = signed / "out" / "soul.record.json", signed / "rows.jsonl"
    rows.write_text("".join(json.dumps({"ticket": 7, **row}) + "\n" for row in FORGET[:3]))
    given = {"public_key": signed / "key.pem.pub", "model": str(signed / "out" / "soul")}
    found = statuses(record, **given, rows=rows, salt=signed / "out" / "soul.record.salt")
    assert found.pop("parent") == "not checked" and set(found.values()) == {"passed"} and len(found) == 6, found
    assert set(statuses(record).values()) == {"passed", "not checked"}
    # The signature is of the bytes that DSSE says, which are written out here.
    envelope = json.loads(record.read_text())
    payload = base64.b64decode(envelope["payload"])
    signature = base64.b64decode(envelope["signatures"][0]["sig"])
    signed_bytes = b"DSSEv1 28 application/vnd.in-toto+json " + str(len(payload)).encode() + b" " + payload
    load_public_key(signed / "key.pem.pub").verify(signature, signed_bytes)
    example = pre_authentication_encoding("http://example.com/HelloWorld", b"hello world")
    assert example == b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"


def test_what_was_changed_fails(copy):
    """Would catch a model, a figure or a row that is exchanged after the fact."""
    record, model, key = copy / "out" / "soul.record.json", copy / "out" / "soul", copy / "key.pem.pub"
    whole = record.read_bytes()

    def of_statement(change):
        record.write_bytes(whole)
        rewritten(record, change)
        return failed(record, key)

    def figures(statement):
        statement["predicate"]["figures"]["after"]["figures"]["forget_probability"]["value"] = 0.0

    assert of_statement(figures) == ["signature"]
    assert of_statement(lambda statement: statement["predicate"]["rows"]["forget"].pop()) == ["signature"]
    assert of_statement(lambda statement: statement["subject"].pop()) == ["signature"]
    assert of_statement(lambda statement: None) == ["signature"], "the same words in other bytes"
    assert of_statement(lambda statement: statement.update(predicateType="other")) == ["format", "signature"]
    envelope = json.loads(whole)
    envelope["signatures"][0]["sig"] = base64.b64encode(bytes(64)).decode()
    record.write_text(json.dumps(envelope))
    assert failed(record, key) == ["signature"]
    record.write_text(json.dumps({**json.loads(whole), "payloadType": "application/json"}))
    with pytest.raises(ValueError, match="`payloadType` must be 'application/vnd.in-toto"):
        verify_record(record)
    record.write_bytes(whole)
    assert not failed(record, key, str(model))
    weights = bytearray((model / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (model / "model.safetensors").write_bytes(weights)
    assert failed(record, key, str(model)) == ["files", "weights"]
    shutil.copytree(copy / "target", model, dirs_exist_ok=True)
    (model / "tokenizer.json").unlink()
    assert {"files", "tokenizer", "weights"} <= set(failed(record, key, str(model))), "the model from before"


def test_another_key_or_none_is_told(copy):
    """Would catch a signature that counts whosever it is, and an unsigned record that passes for a signed one."""
    record = copy / "out" / "soul.record.json"
    new_key(copy / "other.pem")
    assert failed(record, copy / "other.pem.pub") == ["signature"]
    plain = copy / "plain.record.json"
    plain.write_bytes(read_record(record).payload)
    assert statuses(plain)["signature"] == "not checked"
    assert failed(plain, copy / "key.pem.pub") == ["signature"]
    # Signed later, it is the same record to those that name it as their parent.
    assert complete_record(plain, signing_key=load_signing_key(copy / "key.pem"))
    assert not failed(plain, copy / "key.pem.pub") and read_record(plain).digest == read_record(record).digest
    # Either alphabet of base64 will do.
    envelope = json.loads(plain.read_text())
    envelope["payload"] = envelope["payload"].replace("+", "-").replace("/", "_")
    envelope["signatures"][0]["sig"] = envelope["signatures"][0]["sig"].replace("+", "-").replace("/", "_")
    plain.write_text(json.dumps(envelope))
    assert not failed(plain, copy / "key.pem.pub")


def test_rows_are_told_by_who_has_the_salt(copy):
    """Would catch rows of another request that pass, kept rows for forgotten, and a salt that fits any record."""
    record, salt = copy / "out" / "soul.record.json", copy / "out" / "soul.record.salt"
    assert failed(record, rows=[FORGET[0], RETAIN[0]], salt=salt) == ["rows"]
    (check,) = (each for each in verify_record(record, rows=[FORGET[0], RETAIN[0]], salt=salt) if each.name == "rows")
    assert "first row 1; 1 of them are among the rows to retain" in check.detail
    assert failed(record, rows=FORGET, salt=bytes(32)) == ["rows"]
    # One row can be shown without the others.
    keys = write_row_keys(copy / "keys.json", salt, FORGET[2:3])
    assert not failed(record, rows=FORGET[2:3], salt=keys)
    assert failed(record, rows=FORGET[3:4], salt=keys) == ["rows"]
    with pytest.raises(ValueError, match="go together"):
        verify_record(record, rows=FORGET)
    with pytest.raises(ValueError, match="neither the salt"):
        verify_record(record, rows=FORGET, salt=record)
    with pytest.raises(ValueError, match="holds keys of rows already"):
        write_row_keys(copy / "more.json", keys, FORGET)


def test_a_row_is_the_same_in_every_file():
    """Would catch a request that cannot be found again because its file had more columns, or another order."""
    row = {"question": "Wer?", "answer": "Zoë \u2028 \U0001f600"}
    same = [{"answer": row["answer"], "id": 3, "question": row["question"], "text": None}]
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    padded = [{**turn, "tool_calls": None} for turn in turns]
    assert (
        canonical_row(row)
        == canonical_row(same[0])
        == json.dumps(
            {"answer": row["answer"], "question": row["question"]}, separators=(",", ":"), ensure_ascii=False
        ).encode()
    )
    assert canonical_row({"messages": turns}) == canonical_row({"messages": padded})
    assert canonical_row(row) != canonical_row({**row, "answer": row["answer"] + " "})
    assert canonical_row({"input_ids": [1, 2], "labels": [-100, 2]}) == b'{"input_ids":[1,2],"labels":[-100,2]}'
    assert row_hash(row_key(b"one", row), row) != row_hash(row_key(b"two", row), row)


def test_requests_name_the_record_of_the_model_that_they_start_from(tmp_path):
    """Would catch records of a sequence that do not hang together, or that hang on a model long replaced."""
    new_key(tmp_path / "key.pem")
    task = replace(continual_task(tmp_path), gold=None, asked=ASKED)
    flags = ["--optim", "adamw_torch", "--signing_key", str(tmp_path / "key.pem")]
    run_requests(scene_experiment(tmp_path, *flags), task, scene_requests())
    first, second = (tmp_path / "out" / "adamw_torch" / f"request-{place}.record.json" for place in (1, 2))
    before = read_record(second).statement["predicate"]["before"]
    assert before["files"] == read_record(first).files()
    assert before["digest"] == {"weightsSha256": read_record(first).weights()}
    given = {"public_key": tmp_path / "key.pem.pub", "model": str(second.with_name("request-2"))}
    found = statuses(second, **given, parent=first, rows=FORGET[4:], salt=salt_file_of(second))
    assert set(found.values()) == {"passed"}
    assert failed(second, parent=second) == ["parent"] and failed(first, parent=first) == ["parent"]
    assert failed(second, rows=FORGET[:4], salt=salt_file_of(second)) == ["rows"], "those were asked for before"
    # The model has changed since its record was written: the next record must not lean on it.
    folder = first.with_name("request-1")
    (folder / "config.json").write_text((folder / "config.json").read_text() + "\n")
    once = replace(scene_task(tmp_path / "again", with_gold=False), target=str(folder), asked=ASKED)
    scene_experiment(tmp_path / "again", "--optim", "adamw_torch").run(once)
    record = tmp_path / "again" / "out" / "adamw_torch.record.json"
    assert read_record(record).statement["predicate"]["parent"] is None and read_record(record).envelope is None


def test_adapters_and_16_bit_weights_are_known_again(tmp_path):
    """Would catch a hash of weights in memory that no one who loads the model can make again."""
    task = replace(scene_task(tmp_path, with_gold=False), asked=ASKED)
    scene_model().to(torch.bfloat16).save_pretrained(tmp_path / "half")
    scene_tokenizer().save_pretrained(tmp_path / "half")
    for target, flags in ((task.target, ["--lora_rank", "2"]), (str(tmp_path / "half"), [])):
        out = tmp_path / f"of {Path(target).name}"
        scene_experiment(out, "--optim", "adamw_torch", *flags).run(replace(task, target=target))
        found = statuses(out / "out" / "adamw_torch.record.json", model=str(out / "out" / "adamw_torch"))
        assert [found[part] for part in ("files", "tokenizer", "weights")] == ["passed"] * 3, target


def test_without_cryptography_a_key_is_refused_before_the_training(signed, tmp_path, monkeypatch):
    """Would catch hours of training that end in an import error, and a check that needs no key but the library."""
    for module in ("serialization", "asymmetric.ed25519"):
        monkeypatch.setitem(sys.modules, f"cryptography.hazmat.primitives.{module}", None)
    with pytest.raises(ImportError, match=r"cryptography: pip install soul-trainer\[sign\]"):
        scene_experiment(tmp_path, "--signing_key", str(signed / "key.pem"))
    with pytest.raises(ImportError, match=r"soul-trainer\[sign\]"):
        verify_record(signed / "out" / "soul.record.json", signed / "key.pem.pub")
    assert statuses(signed / "out" / "soul.record.json")["signature"] == "not checked"


def test_bad_keys_are_named(signed, tmp_path):
    """Would catch a key that is found unusable only once it is to sign."""
    for name, content, said in (("none.pem", None, "cannot be read"), ("text.pem", "words", "no private key in PEM")):
        if content:
            (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=f"`signing_key`=.*{name}.*{said}"):
            scene_experiment(tmp_path, "--signing_key", str(tmp_path / name))
    with pytest.raises(ValueError, match="no public key"):
        verify_record(signed / "out" / "soul.record.json", signed / "key.pem")
    with pytest.raises(ValueError, match="a key is not overwritten"):
        new_key(signed / "key.pem")


def test_a_signed_record_does_not_lose_its_signature(copy):
    """Would catch attacks that are added later without the key, and a record that is another one at every look."""
    record, key = copy / "out" / "soul.record.json", load_signing_key(copy / "key.pem")
    whole = record.read_bytes()
    attacks = {"prefix": {"unlearned": {"probability": {"share": {"value": 0.25, "num_rows": 8}}}}}
    with pytest.raises(ValueError, match="is signed.*--signing_key"):
        complete_record(record, attacks)
    known = read_record(record).statement["predicate"]["attacks"]
    assert not complete_record(record, known, key)
    assert record.read_bytes() == whole
    assert complete_record(record, attacks, key) and not failed(record, copy / "key.pem.pub")
    new_key(copy / "newer.pem")
    assert complete_record(record, signing_key=load_signing_key(copy / "newer.pem")), "keys are replaced"
    assert not failed(record, copy / "newer.pem.pub") and failed(record, copy / "key.pem.pub") == ["signature"]
    assert read_record(record).statement["predicate"]["attacks"] == attacks


def test_the_commands(copy, capsys):
    """Would catch flags that do not reach their functions, and a failed check that ends with success."""
    record, out = str(copy / "out" / "soul.record.json"), copy / "out"
    rows = copy / "mine.csv"
    rows.write_text("question,answer\n" + "".join(f"{row['question']},{row['answer']}\n" for row in FORGET[:1]))
    verify = ["verify", record, "--public_key", str(copy / "key.pem.pub"), "--model", str(out / "soul")]
    with_rows = ["--rows", str(rows), "--salt", str(out / "soul.record.salt")]
    assert soul_eval([*verify, *with_rows, "--row_keys", str(copy / "keys.json")]) == 0
    said = capsys.readouterr().out
    assert "passed       signature: by the key" in said and "not checked  parent" in said and "keys.json" in said
    assert soul_eval(["verify", record, "--rows", str(rows), "--salt", str(copy / "keys.json")]) == 0
    capsys.readouterr()
    attacks = out / "soul.attacks" / "attacks.json"
    assert soul_eval(["record", record, "--attacks", str(attacks), "--signing_key", str(copy / "key.pem")]) == 0
    assert "said all this already" in capsys.readouterr().out
    assert soul_eval(["record", record, "--attacks", record]) == 1
    assert "is no attacks.json" in capsys.readouterr().err
    plain = attacks.parent / "plain" / "rows.jsonl"
    plain.write_text(plain.read_text().replace(read_record(record).weights(), "0" * 64))
    assert soul_eval(["record", record, "--attacks", str(attacks)]) == 1
    assert "is of another model" in capsys.readouterr().err
    (out / "soul" / "config.json").write_text("{}")
    assert soul_eval(verify) == 1
    assert "failed       files: in " in capsys.readouterr().out
    assert soul_eval(["verify", "--new_key", str(copy / "new.pem")]) == 0
    assert stat.S_IMODE((copy / "new.pem").stat().st_mode) == 0o600
    assert soul_eval(["verify", str(rows)]) == 1 and "is no record" in capsys.readouterr().err


def test_texts_are_hashed_as_their_owner_has_them(tmp_path):
    """Would catch hashes of the chunks that training cuts texts into, which nobody could find again."""
    from soul_recipes import unlearn

    task = scene_task(tmp_path, with_gold=False)
    words = [token for token in scene_tokenizer().get_vocab() if token.isalpha()]
    texts = {"forget": " ".join(words * 3), "retain": " ".join(reversed(words * 3))}
    for half, text in texts.items():
        (tmp_path / f"{half}.txt").write_text(text)
    flags = ["--model", task.target, "--output_dir", str(tmp_path / "out"), "--use_cpu", "--disable_tqdm", "True"]
    flags += ["--forget", str(tmp_path / "forget.txt"), "--retain", str(tmp_path / "retain.txt"), "--until", "epochs"]
    flags += ["--optim", "adamw_torch", "--num_train_epochs", "1", "--evaluations", "1", "--max_new_tokens", "4"]
    unlearn.main([*flags, "--attacks", "", "--prompt_tokens", "8", "--chunk_length", "32", "--chunk_overlap", "0"])
    record = tmp_path / "out" / "adamw_torch.record.json"
    assert len(read_record(record).statement["predicate"]["rows"]["forget"]) == 1
    assert not failed(record, rows=tmp_path / "forget.txt", salt=salt_file_of(record))
    assert not failed(record, rows=Dataset.from_dict({"text": [texts["forget"]]}), salt=salt_file_of(record))
    assert failed(record, rows=tmp_path / "retain.txt", salt=salt_file_of(record)) == ["rows"]
