"""Answers for many files: batches, workers, a table that grows by whole lines, and a risk that is kept."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from nestling.bundle import from_pretrained
from nestling.commands import answers
from nestling.commands.answers import Progress, Table, whole_lines
from nestling.evaluate.predictor import Predictor
from running import FOUR, QUICK, nestling, picture, refuse, succeed, tree


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on 320 pictures, 25 of which are calibration rows."""
    place = tmp_path_factory.mktemp("many")
    source = tree(place / "colours", dict.fromkeys(FOUR, 80), size=8)
    succeed("train", source, *QUICK, "--out", place / "run")
    return place


@pytest.fixture
def run(place: Path) -> Path:
    return place / "run"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """30 pictures and one that cannot be read."""
    for number in range(30):
        picture(tmp_path / "many" / f"{number:02}.png", number % 4, 1000 + number, size=8)
    (tmp_path / "many" / '07, torn "\n.png').write_bytes(b"no picture")
    return tmp_path / "many"


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_a_folder_without_pictures_stops_nothing(run: Path, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refuse(3, ["the folder holds no pictures"], "predict", run, tmp_path / "empty")
    table = tmp_path / "answers.csv"
    done = nestling("predict", run, tmp_path / "empty", folder, "--csv", table)
    assert done.code == 3 and "the folder holds no pictures" in done.err
    assert len(rows(table)) == 32 and [row["input"] for row in rows(table) if "holds no" in row["error"]] == [
        str(tmp_path / "empty")
    ]


def test_a_table_goes_on_behind_its_last_whole_line(
    run: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answers, "MOST", 8)
    whole = tmp_path / "whole.csv"
    command = ("predict", run, folder, "--csv")
    done = nestling(*command, whole)
    assert done.code == 3 and done.err.count("nestling: ") == 1 and "torn" in done.err.splitlines()[-1]
    assert len(rows(whole)) == 31 and [bool(row["error"]) for row in rows(whole)].count(True) == 1
    assert rows(whole) == rows_of_json(run, folder) and not whole.with_name("whole.csv.state").exists()

    # It dies in the third batch, and the last line is torn.
    seen: list[int] = []
    describe = Predictor.describe

    def dies(self: Predictor, images, *arguments, **options):
        seen.append(len(images))
        if len(seen) == 3:
            raise KeyboardInterrupt
        return describe(self, images, *arguments, **options)

    torn = tmp_path / "torn.csv"
    with monkeypatch.context() as patch:
        patch.setattr(Predictor, "describe", dies)
        with pytest.raises(KeyboardInterrupt):
            nestling(*command, torn)
    assert seen == [7, 8, 8] and len(rows(torn)) == 16
    torn.write_bytes(torn.read_bytes()[:-5])
    answered: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(
            Predictor, "describe", lambda self, images, **o: answered.append(len(images)) or describe(self, images, **o)
        )
        done = nestling(*command, torn)
    assert sum(answered) == 31 - 15 and "holds 15 answers of 31: it goes on from there" in done.err
    # The file that could not be read was read by the first call, and is listed by the second.
    assert done.code == 3 and "torn" in done.err.splitlines()[-1]
    assert torn.read_bytes() == whole.read_bytes() and not torn.with_name("torn.csv.state").exists()
    # One that wants all answers as JSON begins anew.
    done = nestling(*command, torn, "--json", tmp_path / "all.json")
    assert torn.read_bytes() == whole.read_bytes()
    assert len(json.loads((tmp_path / "all.json").read_text(encoding="utf-8"))) == 31
    assert nestling(*command, torn, "--json", tmp_path / "all.json").code == 3


def test_what_lies_there_is_not_written_over(run: Path, folder: Path, tmp_path: Path) -> None:
    """Neither a table of somebody's own, nor half the answers to something else; a test for each way to lose one."""
    own = tmp_path / "labels.csv"
    own.write_text("path,coarse\n1.png,red\n", encoding="utf-8")
    before = own.read_bytes()
    refuse(2, ["labels.csv is there and holds no answers", "another name"], "predict", run, folder, "--csv", own)
    refuse(2, ["labels.csv is there and holds no answers"], "predict", run, folder, "--json", own)
    notes = tmp_path / "notes.json"
    notes.write_text('[{"path": "1.png"}]', encoding="utf-8")
    refuse(2, ["notes.json is there"], "predict", run, folder, "--csv", tmp_path / "new.csv", "--json", notes)
    assert own.read_bytes() == before and not (tmp_path / "new.csv").exists()
    other = tmp_path / "other.csv"
    Table(other, {"other": 1}).add([{"input": "a"}])
    before = other.read_bytes()
    for more in ((), ("--json", tmp_path / "all.json")):
        refuse(2, ["the unfinished answers of another model"], "predict", run, folder, "--csv", other, *more)
    assert other.read_bytes() == before and not (tmp_path / "all.json").exists()
    (tmp_path / "empty.csv").touch()
    assert nestling("predict", run, folder, "--csv", tmp_path / "empty.csv").code == 3
    assert len(rows(tmp_path / "empty.csv")) == 31


def rows_of_json(run: Path, folder: Path) -> list[dict[str, str]]:
    found = json.loads(nestling("predict", run, folder, "--json", "-").out)
    result = []
    for one in found:
        answer = one.get("answer") or {"class": "", "level": "", "confidence": ""}
        row = {"input": one["input"], "answer": answer["class"], "level": answer["level"]}
        row |= {"confidence": str(answer["confidence"]), "path": "/".join(one.get("path", []))}
        row |= {"confidences": "/".join(f"{c:.4f}" for c in one.get("confidence", [])), "error": one.get("error", "")}
        result.append(row)
    return result


def test_workers_answer_alike(run: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "MOST", 8)
    for workers in (0, 2):
        assert nestling("predict", run, folder, "--csv", tmp_path / f"{workers}.csv", "--workers", workers).code == 3
    assert (tmp_path / "0.csv").read_bytes() == (tmp_path / "2.csv").read_bytes()


def test_a_line_ends_outside_quotes() -> None:
    assert whole_lines(b"a,b\n1,2\n3") == b"a,b\n1,2\n"
    assert whole_lines(b'a\n"x\ny"\n"z\n') == b'a\n"x\ny"\n'
    assert whole_lines(b"") == whole_lines(b"torn") == b""


def test_progress_is_said_now_and_then(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 10.0, 20.0])
    monkeypatch.setattr(answers.time, "monotonic", lambda: next(clock))
    progress = Progress(1000, 400)
    for _ in range(3):
        progress.add(200)
    assert capsys.readouterr().err == "800 of 1,000 pictures, 40 a second, 5 s left\n"


def test_answers_that_keep_a_risk(run: Path, folder: Path) -> None:
    refuse(
        2, ["--delta has no effect"], "predict", run, folder, "--risk", "0.2", "--guarantee", "crc", "--delta", "0.2"
    )
    done = nestling("predict", run, folder, "--risk", "0.2", "--guarantee", "crc", "--json", "-", "--sets")
    assert done.code == 3 and "risk 20 %: answers down to level fine" in done.err
    assert "labels are missing at random" in done.err
    found = [one for one in json.loads(done.out) if "path" in one]
    predictor = from_pretrained(run)
    backoff = predictor.back_off(0.2, guarantee="crc")
    assert "from which training began" not in backoff.text
    predictor.init = "runs/before"
    assert "as long as runs/before, from which training began" in predictor.back_off(0.2, guarantee="crc").text
    least = backoff.thresholds[0][0]
    for one in found:
        deep = sum(confidence >= least for confidence in one["confidence"])
        assert (one["answer"] or {}).get("class") == (one["path"][deep - 1] if deep else None)
        assert set(one["sets"]) == {"coarse", "fine"}
    inputs = [one["input"] for one in found]
    assert predictor.predict(inputs, risk=0.2, guarantee="crc", sets=True) == found
    refuse(2, ["needs 45 calibration rows", "(coarse 25, fine 25)"], "predict", run, folder, "--risk", "0.05")
    refuse(2, ["risk must lie between 0 and 1"], "predict", run, folder, "--risk", "5")
    refuse(2, ["--delta says how a risk is kept: add --risk"], "predict", run, folder, "--delta", "0.2")
    text = succeed("predict", run, folder / "00.png", "--risk", "0.3", "--per", "level")
    assert "for all levels at once" in text.err and " > " in text.out


def test_an_answer_may_be_none(run: Path, folder: Path) -> None:
    """Nothing that the network says of noise is ever certain enough for so little risk."""
    predictor = from_pretrained(run)
    calibration = predictor.scores["calibration"]
    wrong = (calibration.columns + 1) % 2
    predictor.scores["calibration"] = type(calibration)(
        calibration.taxonomy, calibration.levels, calibration.confidence, calibration.columns, wrong, calibration.truth
    )
    found = predictor.predict([folder / "00.png"], risk=0.2)
    assert found[0]["answer"] is None and len(found[0]["path"]) == 2
