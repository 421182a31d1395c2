"""How image files of other programs become pixels: formats, orientation and transparency."""

import io
import json
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tarflow_scale import cli
from tarflow_scale.config.prepare import PrepareConfig, SourceConfig
from tarflow_scale.errors import ConfigError
from tarflow_scale.shards.images import FILE_EXTENSIONS
from tarflow_scale.shards.manifest import read_manifest
from tarflow_scale.shards.reader import ShardSet
from tarflow_scale.shards.sources import open_source

HALVES = np.repeat(np.array([[10, 200]], np.uint8), 8, axis=1).repeat(16, axis=0)
"""An image of 16x16 pixels, dark on the left and bright on the right."""
FORMATS = {"jfif": "JPEG", "jpe": "JPEG", "tif": "TIFF", "tiff": "TIFF", "ppm": "PPM", "pgm": "PPM", "avif": "AVIF"}


def saved(format: str, tag: int = 1, **options: Any) -> bytes:
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = tag
    if format != "PPM":
        options["exif"] = exif
    Image.fromarray(HALVES).save(buffer, format, **options)
    return buffer.getvalue()


def write(kind: str, path: Path, members: dict[str, bytes]) -> str:
    """Open the same files as a folder, a zip or a tar."""
    path.mkdir()
    if kind == "folder":
        for name, content in members.items():
            (path / name).write_bytes(content)
        return str(path)
    if kind == "zip":
        with zipfile.ZipFile(path / "images.zip", "w") as archive:
            for name, content in members.items():
                archive.writestr(name, content)
        return str(path / "images.zip")
    with tarfile.open(path / "images.tar", "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return str(path)


@pytest.mark.parametrize("kind", ["folder", "zip", "webdataset"])
def test_every_format_is_read_from_folders_zips_and_tars(kind: str, tmp_path: Path) -> None:
    members = {
        f"{number}.{extension}": saved(FORMATS.get(extension, extension.upper().replace("JPG", "JPEG")))
        for number, extension in enumerate(FILE_EXTENSIONS)
        if extension not in ("pbm", "pnm")
    }
    assert {"tif", "tiff", "jfif", "ppm", "avif"} < set(FILE_EXTENSIONS)
    path = write(kind, tmp_path / "images", members)
    source = open_source(SourceConfig.model_validate({"kind": kind, "path": path}))
    assert len(source) == len(members)
    for number in range(len(source)):
        assert abs(source.image(number)[0].astype(int) - HALVES).max() < 12


@pytest.mark.parametrize("kind", ["folder", "zip", "webdataset"])
def test_orientation_is_applied_by_default_and_recorded(kind: str, tmp_path: Path) -> None:
    path = write(kind, tmp_path / "images", {f"{n}.png": saved("PNG", tag=6) for n in range(4)})
    arguments = ["prepare", f"source.kind={kind}", f"source.path={path}", "split.test_fraction=0"]
    for setting, expected in (("apply", np.rot90(HALVES, -1)), ("ignore", HALVES)):
        out = tmp_path / setting
        assert cli.main([*arguments, f"shards.path={out}", f"source.orientation={setting}"]) == 0
        shards = ShardSet(f"{out}/train")
        assert np.array_equal(shards.take(np.arange(1)).events[0, 0], expected)
        assert json.loads((out / "train/manifest.json").read_bytes())["reading"] == {
            "orientation": setting,
            "transparency": "white",
        }
    assert cli.main([*arguments, f"shards.path={tmp_path}/apply", "source.orientation=ignore"]) == 2


def test_an_image_on_its_side_has_its_upright_size(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "images").mkdir()
    Image.fromarray(HALVES[:8]).save(tmp_path / "images/a.jpg", exif=exif)  # 8 high and 16 wide, as it is stored
    Image.fromarray(np.rot90(HALVES[:8], -1)).save(tmp_path / "images/b.png")
    config = {"kind": "folder", "path": f"{tmp_path}/images", "resize": "center_crop", "size_pixels": 8}
    source = open_source(SourceConfig.model_validate(config))
    assert abs(source.image(0).astype(int) - source.image(1)).max() < 12
    stored = open_source(SourceConfig.model_validate(config | {"orientation": "ignore"}))
    assert abs(stored.image(0).astype(int) - source.image(1)).max() > 100


@pytest.mark.parametrize("setting", ["white", "black", "refuse"])
def test_transparency_is_laid_over_what_the_setting_says(
    setting: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pixels = np.full((8, 8, 4), (200, 100, 50, 255), np.uint8)
    (tmp_path / "images").mkdir()
    Image.fromarray(pixels).save(tmp_path / "images/opaque.png")
    pixels[..., 3] = 0
    Image.fromarray(pixels).save(tmp_path / "images/through.png")
    arguments = ["source.kind=folder", f"source.path={tmp_path}/images", "split.test_fraction=0"]
    code = cli.main(["prepare", *arguments, f"shards.path={tmp_path}/out", f"source.transparency={setting}"])
    if setting == "refuse":
        assert code == 2
        assert "through.png has transparent pixels (got source.transparency=refuse)" in capsys.readouterr().err
        return
    assert code == 0
    assert f"transparency over {setting}" in capsys.readouterr().out
    shards = ShardSet(f"{tmp_path}/out/train")
    colours = {tuple(image[:, 0, 0].tolist()) for image in shards.take(np.arange(2)).events}
    assert colours == {(200, 100, 50), (255,) * 3 if setting == "white" else (0,) * 3}


def test_tars_in_place_are_read_by_the_manifest(tmp_path: Path) -> None:
    path = Path(write("webdataset", tmp_path / "tars", {f"{n}.png": saved("PNG", tag=3) for n in range(2)}))
    arguments = ["prepare", "source.kind=webdataset", f"source.path={path}", f"shards.path={path}"]
    assert cli.main([*arguments, "source.in_place=true"]) == 0
    assert np.array_equal(ShardSet(str(path)).take(np.arange(1)).events[0, 0], HALVES[:, ::-1])
    manifest = json.loads((path / "manifest.json").read_bytes())
    assert manifest["reading"] == {"orientation": "apply", "transparency": "white"}
    assert cli.main(["prepare", "--check", str(path)]) == 0


def test_settings_about_files_do_not_change_recipes_of_sources_without_files(digits: Path) -> None:
    """The recipe equals that of ``prepare`` at commit b8a8d6a, which had no settings for tags or transparency."""
    assert read_manifest(f"{digits}/train").recipe == "29651fce8e7ce68a0b7520173e4976fbe62b278a41060dbaf280b93860c385bb"


@pytest.mark.parametrize("override", ["source.orientation=ignore", "source.transparency=black"])
def test_settings_about_files_need_files(override: str) -> None:
    with pytest.raises(ConfigError, match="(orientation|transparency) needs kind=folder"):
        PrepareConfig.load(None, ["source.kind=digits", "shards.path=x", override])
