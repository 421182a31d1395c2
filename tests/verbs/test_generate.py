"""``generate``: plain WebDataset shards, made once, made again byte for byte."""

import hashlib
import json
import os
import re
import shutil
import tarfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image

from tarflow_scale import cli
from tarflow_scale.records import GenerationPlan
from tarflow_scale.registry import Registry
from tarflow_scale.sampling import Sampler
from tarflow_scale.shards.reader import ShardSet
from tests.conftest import Trained, command
from tests.linkless import needs_compiler, without_links


def arguments(trained: Trained, path: Path, *more: str) -> list[str]:
    return [
        "generate",
        f"registry.path={trained.registry}",
        "registry.model=small",
        f"shards.path={path}",
        "shards.samples_per_shard=40",
        "sampling.num_images=150",
        "sampling.batch_size=16",
        "cluster.executor=local",
        *more,
    ]


def content(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


@pytest.fixture(scope="module")
def generated(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("generate") / "out"
    assert cli.main(arguments(trained, path)) == 0
    return path


def test_plain_webdataset_opens_the_shards(generated: Path) -> None:
    urls = [str(file) for file in sorted(generated.glob("*.tar"))]
    assert len(urls) == 4
    data = webdataset.WebDataset(urls, shardshuffle=False).decode("pil").to_tuple("__key__", "png", "cls", "json")
    found = list(data)
    assert len({key for key, *_ in found}) == 150
    assert [label for _, _, label, _ in found] == [i % 10 for i in range(150)]
    facts = found[7][3]
    assert (facts["index"], facts["label"], facts["model"]) == (7, 7, "small@1")


def test_the_result_is_a_data_set_that_can_be_read_and_trained_on(generated: Path) -> None:
    shards = ShardSet(str(generated), verify="full")
    batch = next(shards.batches(0, 150, 150))
    assert batch.events.shape == (150, 1, 8, 8)
    assert (batch.events % 17 == 0).all()
    assert shards.manifest.split == "generated"


@pytest.mark.slow
@needs_compiler
def test_prepare_and_generate_without_hard_links(
    trained: Trained, digits: Path, generated: Path, tmp_path: Path
) -> None:
    environment = without_links("EPERM")
    packing = ["prepare", "source.kind=digits", f"shards.path={tmp_path}/packed", "shards.samples_per_shard=200"]
    packed = command(*packing, environment=environment)
    assert (packed.returncode, packed.stderr) == (0, "")
    assert content(tmp_path / "packed") == content(digits)
    made = command(*arguments(trained, tmp_path / "made"), environment=environment)
    assert made.returncode == 0, made.stderr
    assert content(tmp_path / "made") == content(generated)
    refused = command(*arguments(trained, tmp_path / "no"), environment=without_links("EPERM", "EINVAL"))
    assert refused.returncode == 2
    assert f"{tmp_path}/no must be on a file system with hard links or RENAME_NOREPLACE" in refused.stderr
    assert list((tmp_path / "no").iterdir()) == []


def test_running_it_again_does_nothing(trained: Trained, generated: Path, capsys: pytest.CaptureFixture[str]) -> None:
    times = {file: file.stat().st_mtime_ns for file in generated.rglob("*")}
    assert cli.main(arguments(trained, generated)) == 0
    assert "nothing to do, all 150 images exist" in capsys.readouterr().out
    assert {file: file.stat().st_mtime_ns for file in generated.rglob("*")} == times


@pytest.mark.parametrize("lost", ["generated-00001.tar", "generated-00002.index.npz", "records/generated-00003.json"])
def test_what_is_lost_comes_back_byte_for_byte(trained: Trained, generated: Path, lost: str) -> None:
    before = content(generated)
    (generated / lost).unlink()
    assert cli.main(arguments(trained, generated)) == 0
    assert content(generated) == before


def test_a_truncated_shard_is_made_again(trained: Trained, generated: Path) -> None:
    before = content(generated)
    tar = generated / "generated-00000.tar"
    tar.write_bytes(tar.read_bytes()[:1000])
    assert cli.main(arguments(trained, generated)) == 0
    assert content(generated) == before


@pytest.mark.ray
def test_ray_workers_make_the_same_bytes(trained: Trained, generated: Path, tmp_path: Path, on_ray: list[str]) -> None:
    result = command(*arguments(trained, tmp_path / "out", *on_ray, "cluster.num_workers=2"))
    assert result.returncode == 0, result.stderr
    assert content(tmp_path / "out") == content(generated)


@pytest.mark.parametrize(
    ("override", "changed"),
    [
        ("sampling.seed=5", "seed was 0, is 5"),
        ("sampling.num_images=151", "num_images was 150, is 151"),
        ("sampling.guidance.scale=1", "sampling.guidance.scale was 0.0, is 1.0"),
    ],
)
def test_another_plan_is_refused(
    trained: Trained, generated: Path, override: str, changed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = content(generated)
    assert cli.main(arguments(trained, generated, override)) == 2
    assert capsys.readouterr().err == (
        f"tarflow-scale: error: {generated} holds another plan ({changed}); choose another shards.path\n"
    )
    assert content(generated) == before


@pytest.mark.parametrize("lost", ["generated-00001.tar", "generated-00001.index.npz"])
def test_other_bytes_for_the_same_plan_are_refused_and_what_is_there_stays(
    trained: Trained, generated: Path, lost: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another version of a library may decode other pixels; it must not replace what was made before."""
    before = content(generated)
    (generated / lost).unlink()
    original = Sampler.draw
    monkeypatch.setattr(Sampler, "draw", lambda self, indices, attempt=0: -original(self, indices, attempt))
    for _ in range(2):
        assert cli.main(arguments(trained, generated)) == 2
        assert "generated-00001.tar must have the same bytes as in the first run" in capsys.readouterr().err
        assert content(generated) == {name: data for name, data in before.items() if name != lost}
    monkeypatch.undo()
    assert cli.main(arguments(trained, generated)) == 0
    assert content(generated) == before


def test_a_flipped_bit_in_a_shard_is_noticed_and_mended(trained: Trained, generated: Path) -> None:
    before = content(generated)
    tar = generated / "generated-00002.tar"
    damaged = bytearray(tar.read_bytes())
    damaged[1000] ^= 1
    tar.write_bytes(bytes(damaged))
    assert cli.main(arguments(trained, generated)) == 0
    assert content(generated) == before


# -- what is asked for -------------------------------------------------------------------------------------------------


def labels_in(path: Path) -> list[int]:
    return next(ShardSet(str(path)).batches(0, 150, 150)).labels.tolist()


def test_labels_from_a_list_and_by_weight(trained: Trained, tmp_path: Path) -> None:
    assert cli.main(arguments(trained, tmp_path / "listed", "sampling.labels=[3,3,7]")) == 0
    assert labels_in(tmp_path / "listed") == [3, 3, 7] * 50
    assert cli.main(arguments(trained, tmp_path / "drawn", "sampling.labels={1: 1, 8: 3}")) == 0
    drawn = labels_in(tmp_path / "drawn")
    assert set(drawn) == {1, 8}
    assert 80 < drawn.count(8) < 145
    assert (
        cli.main(arguments(trained, tmp_path / "again", "sampling.labels={8: 3, 1: 1}", "sampling.batch_size=7")) == 0
    )
    assert labels_in(tmp_path / "again") == drawn  # a function of the index, not of the batch


def abandoned(path: Path) -> None:
    """What a process left that was killed two hours ago."""
    path.write_bytes(b"half")
    os.utime(path, (time.time() - 7200,) * 2)


def test_debris_of_a_first_write_and_a_missing_grid_are_mended(
    trained: Trained, generated: Path, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    abandoned(tmp_path / "out/.0123.partial")
    assert cli.main(arguments(trained, tmp_path / "out")) == 0
    abandoned(tmp_path / "out/records/.45.partial")
    (tmp_path / "out/grid.png").unlink()
    assert cli.main(arguments(trained, tmp_path / "out")) == 0
    assert content(tmp_path / "out") == content(generated)


@pytest.mark.parametrize(("codec", "extension"), [("webp", "webp"), ("raw", "npy"), ("jpeg", "jpg")])
def test_codecs(trained: Trained, generated: Path, tmp_path: Path, codec: str, extension: str) -> None:
    assert cli.main(arguments(trained, tmp_path / "out", f"shards.codec={codec}")) == 0
    with tarfile.open(tmp_path / "out/generated-00000.tar") as tar:
        assert f"000000000.{extension}" in tar.getnames()
    assert ShardSet(str(tmp_path / "out")).manifest.codec == codec
    found, expected = (next(ShardSet(str(path)).batches(0, 150, 150)).events for path in (tmp_path / "out", generated))
    if codec == "jpeg":
        assert 0 < abs(found.astype(int) - expected.astype(int)).max() < 60
    else:
        assert (found == expected).all()


def test_single_files_and_an_npz_too(
    trained: Trained, generated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files, npz = tmp_path / "files", tmp_path / "samples.npz"
    also = [f"shards.folder={files}", f"shards.npz={npz}"]
    assert cli.main(arguments(trained, generated, *also)) == 0
    images = next(ShardSet(str(generated)).batches(0, 150, 150)).events
    pictures = sorted(files.glob("*/*.png"))
    assert len(pictures) == 150
    assert sorted({picture.parent.name for picture in pictures}) == [str(i) for i in range(10)]
    seventh = np.asarray(Image.open(files / "7/000000017.png"))
    assert (seventh == images[17, 0]).all()
    facts = json.loads((files / "7/000000017.json").read_text())
    assert (facts["index"], facts["label"], facts["class"]) == (17, 7, "7")
    assert facts["sampling"]["guidance"]["scale"] == 0.0
    with np.load(npz) as found:
        assert (found["arr_0"][:, :, :, 0] == images[:, 0]).all()
        assert found["arr_1"].tolist() == [i % 10 for i in range(150)]
    pictures[0].unlink()
    (files / "complete").unlink()  # as if it had been killed
    assert cli.main(arguments(trained, generated, *also)) == 0
    assert len(list(files.glob("*/*.png"))) == 150
    other = tmp_path / "other"
    other.mkdir()
    (other / "mine.txt").write_text("x")
    assert cli.main(arguments(trained, generated, f"shards.folder={other}")) == 2
    assert [path.name for path in other.iterdir()] == ["mine.txt"]
    before = content(tmp_path)
    for one, reason in (
        (f"shards.folder={files}", f"shards.folder={files} holds another data set"),
        (f"shards.npz={npz}", f"shards.npz={npz} holds another data set"),
        (f"shards.npz={other}/mine.txt", f"shards.npz={other}/mine.txt holds another data set"),
        (f"shards.npz={other}", f"shards.npz must be a file (got the folder {other})"),
        (f"shards.folder={npz}", "samples.npz"),
        (f"shards.folder={tmp_path}/new/", "must not be shards.path"),
    ):
        for dry in ((), ("--dry-run",)):  # and nothing is sampled
            capsys.readouterr()
            assert cli.main(arguments(trained, tmp_path / "new", one, *dry)) == 2
            said = capsys.readouterr()
            assert (reason in said.err, said.out, said.err.count("\n")) == (True, "", 1)
    assert content(tmp_path) == before
    assert cli.main(arguments(trained, generated, "sampling.seed=5", *also)) == 2
    assert "choose another shards.path and shards.folder and shards.npz\n" in capsys.readouterr().err
    assert cli.main(arguments(trained, tmp_path / "new", f"shards.folder={tmp_path}/n", "--dry-run")) == 0
    assert f"files     {tmp_path}/n\n" in capsys.readouterr().out


def spoil(monkeypatch: pytest.MonkeyPatch, indices: set[int], attempts: int) -> None:
    """Some images are not finite at first."""
    real = Sampler.draw

    def draw(self: Sampler, some: Sequence[int], attempt: int = 0) -> torch.Tensor:
        x = real(self, some, attempt)
        for row, index in enumerate(some):
            if index in indices and attempt < attempts:
                x[row] = float("nan")
        return x

    monkeypatch.setattr(Sampler, "draw", draw)


def test_a_bad_image_is_drawn_again_and_told(
    trained: Trained, generated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, {77}, 2)
    assert cli.main(arguments(trained, tmp_path / "out")) == 0
    quality = json.loads((tmp_path / "out/quality.json").read_text())
    assert (quality["images"], quality["redrawn"], quality["not_finite"]) == (150, 1, 2)
    names = [name for name in content(generated) if content(generated)[name] != content(tmp_path / "out").get(name)]
    assert sorted(names) == [
        "generated-00001.index.npz", "generated-00001.tar", "grid.png", "manifest.json",
        "quality.json", "quality/generated-00001.json", "records/generated-00001.json",
    ]  # fmt: skip
    stored = {key: json.loads(facts) for key, facts in facts_of(tmp_path / "out/generated-00001.tar").items()}
    assert stored["000000077"]["attempt"] == 2
    assert "attempt" not in stored["000000076"]
    (tmp_path / "out/generated-00003.tar").unlink()  # what was counted before is not forgotten
    assert cli.main(arguments(trained, tmp_path / "out")) == 0
    assert json.loads((tmp_path / "out/quality.json").read_text())["redrawn"] == 1


def facts_of(tar: Path) -> dict[str, bytes]:
    with tarfile.open(tar) as opened:
        members = [member for member in opened if member.name.endswith(".json")]
        return {member.name.removesuffix(".json"): opened.extractfile(member).read() for member in members}  # type: ignore[union-attr]


def test_too_many_bad_images_end_the_generation(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(monkeypatch, {3, 60, 100, 110}, 1)
    assert cli.main(arguments(trained, tmp_path / "out")) == 2
    said = capsys.readouterr().err
    assert "not finite, 0 saturated; sampling.guard.most_redrawn_share=0.01 allows 3 of 150)" in said
    assert "; lower sampling.temperature (with a new shards.path)" in said  # there is no guidance
    assert not (tmp_path / "out/manifest.json").exists()
    for _ in range(4):  # nor does it pass by being run again
        assert cli.main(arguments(trained, tmp_path / "out")) == 2
    assert not (tmp_path / "out/manifest.json").exists()
    monkeypatch.undo()
    spoil(monkeypatch, {3}, 9)
    assert cli.main(arguments(trained, tmp_path / "never")) == 2
    assert "image 3 was not finite after 4 attempts" in capsys.readouterr().err


@pytest.fixture
def dry(trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Iterator[str]:
    assert cli.main(arguments(trained, tmp_path / "dry", "--dry-run")) == 0
    yield capsys.readouterr().out
    assert not (tmp_path / "dry").exists()


PLAN = (
    '{"class_names":["0","1","2","3","4","5","6","7","8","9"],"codec":"png","decoding":null,"device":"cpu",'
    '"guard":{"attempts":3,"most_redrawn_share":0.01,"saturated_share":null},"image_size_pixels":8,"jpeg_quality":95,'
    '"labels":"balanced","model":"small","num_channels":1,"num_images":150,'
    '"pixels":{"bit_depth":4,"noise":"uniform","noise_std":0.0},"samples_per_shard":40,'
    '"sampling":{"batch_size":16,"decoder":{"kind":"exact","precision":"fp32","tolerance":0.001},"denoise":0.0,'
    '"guidance":{"annealed":false,"attention_temperature":1.0,"blocks":"all","scale":0.0,"what":"both"},'
    '"temperature":1.0},"seed":0,"threads":1,"version":1,"weights_digest":"%s"}'
)
"""``plan.json`` as version 0.1.0 writes it; the recipe of the manifest is its digest."""


def test_the_bytes_of_a_plan_stay_the_same(trained: Trained, generated: Path) -> None:
    plan = PLAN % Registry(str(trained.registry), "small").resolve(1).weights_digest
    assert (generated / "plan.json").read_text() == plan
    assert GenerationPlan.from_json(plan.encode(), "plan").to_json() == plan.encode()
    assert ShardSet(str(generated)).manifest.recipe == hashlib.sha256(plan.encode()).hexdigest()


def test_a_plan_of_before_there_were_decoders_is_the_same_plan(
    trained: Trained, generated: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    location = generated / "plan.json"
    frozen = json.loads(location.read_text())
    del frozen["decoding"], frozen["sampling"]["decoder"], frozen["sampling"]["guidance"]["blocks"]
    kept = location.read_bytes()
    location.write_text(json.dumps(frozen))
    try:
        assert cli.main(arguments(trained, generated)) == 0
        assert "nothing to do" in capsys.readouterr().out
    finally:
        location.write_bytes(kept)


@pytest.mark.ray
def test_calibrating_stores_a_plan_that_generating_follows(
    trained: Trained, generated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], on_ray: list[str]
) -> None:
    registry = tmp_path / "registry"  # the plan must not reach other tests
    shutil.copytree(trained.registry, registry)
    trained = Trained(trained.data, trained.run, registry)
    adaptive = ["sampling.decoder.kind=adaptive", "sampling.guidance.scale=0.5"]
    assert cli.main(arguments(trained, tmp_path / "out", *adaptive)) == 2
    assert "needs a calibration of this version (got none)" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert cli.main([*arguments(trained, tmp_path / "out", *adaptive), "--calibrate", "--dry-run"]) == 0
    assert cli.main(arguments(trained, tmp_path / "out", *adaptive)) == 2  # a dry run stores nothing
    assert cli.main([*arguments(trained, tmp_path / "out", *adaptive), "--calibrate"]) == 0
    assert re.search("of pixels within one level|exact decoding is the fastest", capsys.readouterr().out)
    assert cli.main(arguments(trained, tmp_path / "out", *adaptive)) == 0
    frozen = GenerationPlan.from_json((tmp_path / "out/plan.json").read_bytes(), "plan")
    stored = Registry(str(trained.registry), "small").state().calibrations[1][-1]
    assert frozen.decoding == stored
    exact = tmp_path / "exact"
    assert cli.main(arguments(trained, exact, "sampling.guidance.scale=0.5")) == 0
    found, expected = (next(ShardSet(str(path)).batches(0, 150, 150)).events for path in (tmp_path / "out", exact))
    assert (abs(found.astype(int) - expected.astype(int)) <= 17).mean() > 0.99  # a level of 4 bits
    result = command(*arguments(trained, tmp_path / "ray", *adaptive, *on_ray, "cluster.num_workers=1"))
    assert result.returncode == 0, result.stderr
    assert content(tmp_path / "ray") == content(tmp_path / "out")
    models = ["models", "show", f"registry.path={trained.registry}", "registry.model=small", "registry.version=1"]
    assert cli.main(models) == 0
    assert "decoding on cpu" in capsys.readouterr().out
    other = ["sampling.decoder.tolerance=0.5", *adaptive]
    assert cli.main(arguments(trained, tmp_path / "other", *other)) == 2
    assert "measured with a different guidance, precision or tolerance" in capsys.readouterr().err


def test_dry_run_prints_the_plan_and_writes_nothing(dry: str) -> None:
    assert "150 of 1x8x8, balanced labels, seed 0" in dry
    assert "4 of up to 40 images, 4 to make" in dry
