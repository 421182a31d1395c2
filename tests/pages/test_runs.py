"""Run folders as they stand, and the picture of the loss that a run keeps."""

import io
import json
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageColor

from tarflow_scale.errors import DataError
from tarflow_scale.pages.charts import run_colour
from tarflow_scale.pages.runs import CurveFile, curves_of, read_run


def folder(path: Path, kind: str = "glow", unit: str = "bits", last: str = "") -> Path:
    (path / "previews").mkdir(parents=True)
    records = [{"images": 100 * n, f"{unit}_per_dim": 4.0 - n, "nats_per_dim": -float(n)} for n in (1, 2)]
    records[1][f"validation_{unit}_per_dim"] = 2.5
    (path / "log.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records) + last)
    (path / "config.yaml").write_text(f"model: {{kind: {kind}}}")
    (path / "status.json").write_text('{"state": "running", "images_seen": 0, "total_images": 500}')
    (path / "previews/images-000000000100.png").write_bytes(b"old")
    (path / "previews/images-000000000200.png").write_bytes(b"new")
    (path / "previews/curve.png").write_bytes(b"no sample")
    return path


def test_a_run_that_trains_is_read_as_it_stands(tmp_path: Path) -> None:
    run = read_run(str(folder(tmp_path / "run", last='{"images": 3')))  # a record that is being written
    assert (run.kind, run.state, run.images_seen, run.total_images) == ("glow", "running", 200, 500)
    assert run.preview == ("images-000000000200.png", b"new")
    assert run.loss.unit == "bits/dim"
    assert run.loss.series == ([(100, 3.0), (200, 2.0)], [(200, 2.5)])


def test_curves_have_a_colour_a_run_and_name_the_kind_of_model(tmp_path: Path) -> None:
    """Two folders of one name are two runs, and losses of other units are another chart."""
    paths = [
        folder(tmp_path / "a/train"),
        folder(tmp_path / "b/train", "tarflow"),
        folder(tmp_path / "c", "nice", "nats"),
    ]
    runs = [read_run(str(path)) for path in paths]
    bits = curves_of(runs, "bits/dim")
    assert [(name, one.run, one.dashed) for name, one in bits.items()] == [
        (f"{paths[0]} (glow)", 0, False),
        (f"{paths[0]} (glow), held out", 0, True),
        (f"{paths[1]} (tarflow)", 1, False),
        (f"{paths[1]} (tarflow), held out", 1, True),
    ]
    assert [one.run for one in curves_of(runs, "nats/dim").values()] == [2, 2]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("log.jsonl", '{"images": 1}\nnot json\n'),
        ("log.jsonl", '{"bits_per_dim": 1}\n'),
        ("config.yaml", "[1"),
        ("status.json", "[]"),
    ],
)
def test_what_is_no_run_is_named(tmp_path: Path, name: str, content: str) -> None:
    (folder(tmp_path / "run") / name).write_text(content)
    with pytest.raises(DataError, match=r"run is not the folder of a training run \(.*\); remove it from report.runs"):
        read_run(str(tmp_path / "run"))


def coloured(path: Path) -> int:
    image = np.asarray(Image.open(io.BytesIO(path.read_bytes())).convert("RGB"))
    return int((image == ImageColor.getrgb(run_colour(0))).all(axis=2).sum())


def test_a_run_draws_its_loss_as_it_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without TensorBoard; what was logged before it was resumed is part of it; at most a picture a minute."""
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    run = folder(tmp_path / "run")
    curve, copy = run / "curve.png", run / "previews/curve.png"
    with CurveFile(str(run)) as file:
        assert not curve.exists()
        file.take({"images": 300, "bits_per_dim": 1.5})
        first = curve.read_bytes()
        assert coloured(curve) > 300
        assert copy.read_bytes() == first
        file.take({"images": 400, "bits_per_dim": 1.25})
        assert curve.read_bytes() == first
        now[0] = 61.0
        file.take({"images": 500, "bits_per_dim": 1.0})
        second = curve.read_bytes()
        assert second != first
        file.take({"images": 600, "bits_per_dim": 0.5})
    assert copy.read_bytes() == curve.read_bytes() != second


def test_a_curve_that_cannot_be_written_stops_no_run(tmp_path: Path) -> None:
    run = folder(tmp_path / "run")
    (run / "curve.png").mkdir()
    with pytest.warns(UserWarning, match="no curve is drawn: cannot write .*curve.png"), CurveFile(str(run)) as file:
        file.take({"images": 300, "bits_per_dim": 1.5})
