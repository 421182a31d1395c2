"""Logs, tables, versions."""

import json
import re
import shutil
import sys
import time
from itertools import pairwise
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from tarflow_scale.errors import ConfigError
from tarflow_scale.runtime import console, provenance
from tarflow_scale.training import run_log


def test_reopening_a_log_drops_a_torn_line_and_what_will_be_written_again(tmp_path: Path) -> None:
    path = tmp_path / "run/log.jsonl"
    with run_log.JsonLog(path) as log:
        for images in (10, 20, 30):
            log.write({"images": images})
    path.write_text(path.read_text() + '{"images": 4')
    with run_log.JsonLog(path, keep_until_images=20) as log:
        log.write({"images": 21})
    assert [json.loads(line)["images"] for line in path.read_text().splitlines()] == [10, 20, 21]


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Arguments that Weights & Biases, which needs an account, gets for each run that is opened."""
    calls: list[dict[str, Any]] = []

    class Wandb(ModuleType):
        @staticmethod
        def init(**facts: Any) -> Any:
            calls.append(facts)
            return SimpleNamespace(log=lambda *_, **__: None, finish=lambda: None)

    monkeypatch.setitem(sys.modules, "wandb", Wandb("wandb"))
    return calls


def open_run(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with run_log.open_log(folder, 0, False, "flows", {}):
        pass


def test_runs_of_two_folders_of_one_name_are_two_in_weights_and_biases(
    tmp_path: Path, told: list[dict[str, Any]]
) -> None:
    for folder in ("a/run", "b/run", "a/run"):
        open_run(tmp_path / folder)
    assert [one["name"] for one in told] == ["run"] * 3
    first, second, again = (one["id"] for one in told)
    assert first == again != second
    assert all(one["resume"] == "allow" for one in told)


def test_a_run_folder_keeps_its_id_where_it_is_moved_or_restored_and_a_copy_gets_another(
    tmp_path: Path, told: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    open_run(tmp_path / "run")
    (tmp_path / "run").rename(tmp_path / "moved")
    open_run(tmp_path / "moved")
    shutil.copytree(tmp_path / "moved", tmp_path / "copy")
    (tmp_path / "moved").rename(tmp_path / "backup")
    shutil.copytree(tmp_path / "backup", tmp_path / "moved")  # restored where it was
    open_run(tmp_path / "moved")
    assert len({one["id"] for one in told}) == 1
    assert capsys.readouterr().err == ""
    for _ in range(2):
        open_run(tmp_path / "copy")
    assert told[-1]["id"] == told[-2]["id"] != told[0]["id"]
    assert capsys.readouterr().err.startswith(
        f"{tmp_path}/copy is a copy of {tmp_path}/moved, so it gets a new run of "
    )


def test_a_damaged_id_of_weights_and_biases_is_refused(tmp_path: Path, told: list[dict[str, Any]]) -> None:
    open_run(tmp_path / "run")
    (tmp_path / "run/wandb-id.json").write_text('{"id": ')
    with pytest.raises(ConfigError, match="wandb-id.json must name a run of Weights & Biases .*; delete the file"):
        open_run(tmp_path / "run")
    assert len(told) == 1


def test_a_table_is_as_wide_as_its_cells() -> None:
    text = console.table([("a", "long cell"), ("longer", "b")], ("x", "y"))
    assert text.splitlines() == ["x       y", "------  ---------", "a       long cell", "longer  b"]


def test_a_table_shows_what_would_steer_a_terminal() -> None:
    text = console.table([("a\x1b[31m\n\u202eb", "ü ∞ 龍")], ("x", "y"))
    assert text.splitlines()[2] == r"a\x1b[31m\n\u202eb  ü ∞ 龍"


def test_versions_and_memory() -> None:
    versions = provenance.package_versions()
    assert versions["torch"][0].isdigit()
    assert provenance.peak_memory_bytes() > 10_000_000


def test_the_commit_is_the_checkouts_or_what_an_image_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = provenance.git_commit()
    monkeypatch.setenv("TARFLOW_SCALE_COMMIT", "0123abc")
    assert provenance.git_commit() == here or here == "unknown"
    monkeypatch.setenv("PATH", str(tmp_path))  # no git, as in the images
    assert provenance.git_commit() == "0123abc"
    monkeypatch.delenv("TARFLOW_SCALE_COMMIT")
    assert provenance.git_commit() == "unknown"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def work(clock: list[float], seconds: int) -> None:
    """Five images a second, with a fact to tell."""
    with console.ProgressBar(5 * seconds, "train", initial=0) as bar:
        for second in range(seconds):
            clock[0] += 1.0
            bar.tell(f"loss {second}", "loss")
            bar.update(5)


def test_progress_in_a_log_file_is_a_line_a_minute_and_more_at_first(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    work(clock, 3600)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "train: 10 of 18,000 images (0%), 5.00 per second, 2 s passed, 59 min 58 s left; loss 1"
    assert lines[-1].startswith("train: 18,000 of 18,000 images (100%), 5.00 per second, 1 h 00 min passed; loss 3599")
    counts = [int(re.findall(r"[\d,]+", line)[0].replace(",", "")) for line in lines]
    gaps = [(after - before) / 5 for before, after in pairwise(counts)]
    assert gaps[:4] == [4, 8, 16, 32]
    assert set(gaps[4:-1]) == {60}
    assert all(line.isprintable() for line in lines)


def test_the_start_of_workers_is_no_part_of_the_speed(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with console.ProgressBar(1000, "evaluate", initial=200) as bar:
        for seconds in (50.0, 0.1, 4.9, 10.0):
            clock[0] += seconds
            bar.update(200)
    assert capsys.readouterr().err.splitlines() == [
        "evaluate: 400 of 1,000 images (40%), 50 s passed",
        "evaluate: 800 of 1,000 images (80%), 80 per second, 55 s passed, 2 s left",
        "evaluate: 1,000 of 1,000 images (100%), 20 per second, 1 min 05 s passed",
    ]


def test_short_work_and_ranks_that_do_not_report_leave_no_line(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    work(clock, 1)
    with console.ProgressBar(100, "train", enabled=False) as bar:
        clock[0] += 100.0
        bar.update(50)
    assert capsys.readouterr().err == ""


def test_a_terminal_has_a_bar_and_the_same_lines_above_it(
    clock: list[float], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    work(clock, 100)
    shown = capsys.readouterr().err
    assert "train: 10 of 500 images (2%), 5.00 per second, 2 s passed, 1 min 38 s left; loss 1\n" in shown
    assert "train: 100%|" in shown
    with console.ProgressBar(100, "verify", unit="files") as bar:  # nothing to tell, so the bar is all
        clock[0] += 100.0
        bar.update(100)
    assert "100 of 100 files" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("seconds", "words"), [(12.4, "12 s"), (200, "3 min 20 s"), (18420, "5 h 07 min"), (277200, "3 d 5 h")]
)
def test_durations_in_words(seconds: float, words: str) -> None:
    assert console._clock(seconds) == words
