"""Logs, tables, versions."""

import json
from pathlib import Path

import pytest

from tarflow_scale import telemetry


def test_reopening_a_log_drops_a_torn_line_and_what_will_be_written_again(tmp_path: Path) -> None:
    path = tmp_path / "run/log.jsonl"
    with telemetry.JsonLog(path) as log:
        for images in (10, 20, 30):
            log.write({"images": images})
    path.write_text(path.read_text() + '{"images": 4')
    with telemetry.JsonLog(path, keep_until_images=20) as log:
        log.write({"images": 21})
    assert [json.loads(line)["images"] for line in path.read_text().splitlines()] == [10, 20, 21]


def test_a_table_is_as_wide_as_its_cells() -> None:
    text = telemetry.table([("a", "long cell"), ("longer", "b")], ("x", "y"))
    assert text.splitlines() == ["x       y", "------  ---------", "a       long cell", "longer  b"]


def test_a_table_shows_what_would_steer_a_terminal() -> None:
    text = telemetry.table([("a\x1b[31m\n\u202eb", "ü ∞ 龍")], ("x", "y"))
    assert text.splitlines()[2] == r"a\x1b[31m\n\u202eb  ü ∞ 龍"


def test_versions_and_memory() -> None:
    versions = telemetry.package_versions()
    assert versions["torch"][0].isdigit()
    assert telemetry.peak_memory_bytes() > 10_000_000


def test_the_commit_is_the_checkouts_or_what_an_image_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = telemetry.git_commit()
    monkeypatch.setenv("TARFLOW_SCALE_COMMIT", "0123abc")
    assert telemetry.git_commit() == here or here == "unknown"
    monkeypatch.setenv("PATH", str(tmp_path))  # no git, as in the images
    assert telemetry.git_commit() == "0123abc"
    monkeypatch.delenv("TARFLOW_SCALE_COMMIT")
    assert telemetry.git_commit() == "unknown"
