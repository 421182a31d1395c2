"""Registries that several users write to: the mode of every file, and a model that one of them cannot read."""

import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tarflow_scale import cli
from tarflow_scale.errors import RegistryError
from tarflow_scale.registry import Registry, Store, collection, readable_models
from tarflow_scale.verbs import report  # noqa: F401 - another user may not be able to import them later
from tarflow_scale.verbs.models import commands  # noqa: F401 - another user may not be able to import them later
from tests.other_users import ALICE, BOB, CAROL, TEAM, needs_root, run_as
from tests.registry.test_registry import FACTS, registry_with


@pytest.fixture
def team() -> Iterator[Path]:
    """A folder of a group, as an administrator makes it; pytest's own folders can be entered by their owner alone."""
    place = Path(tempfile.mkdtemp(prefix="tarflow-scale-"))
    place.chmod(0o755)
    folder = place / "team"
    folder.mkdir()
    os.chown(folder, 0, TEAM)
    folder.chmod(0o2770)
    yield folder
    shutil.rmtree(place)


def register(path: Path, model: str, number: int) -> int:
    Registry(str(path), model).register({"w": f"{model} {number}".encode()}, FACTS, "")
    return 0


def modes(path: Path) -> dict[str, int]:
    found = [path, *path.rglob("*")]
    return {str(one.relative_to(path)): stat.S_IMODE(one.stat().st_mode) for one in found}


@needs_root
def test_a_group_reads_and_writes_what_a_writer_with_umask_077_left(team: Path) -> None:
    path = team / "new" / "registry"
    here = f"registry.path={path}"
    code, said = run_as(ALICE, "models", "init", here, "command.shared=group")
    assert (code, said.endswith(f"; group {TEAM} may read and write)\n")) == (0, True), said
    assert run_as(ALICE, work=lambda: register(path, "m", 0))[0] == 0

    assert run_as(BOB, "models", "list", here)[0] == 0
    assert run_as(BOB, "models", "alias", here, "registry.model=m", "command.alias=stable")[0] == 0
    assert run_as(BOB, work=lambda: register(path, "m", 1))[0] == 0
    assert run_as(BOB, work=lambda: register(path, "of-bob", 0))[0] == 0
    assert run_as(BOB, "models", "approve", here, "registry.model=m") == (0, f"m@2 is approved by user{BOB}\n")

    def many_events() -> None:  # until there is a snapshot, and another one
        registry = Registry(str(path), "m")
        for number in range(50):
            registry.append("approve", "", lambda _, n=number: {"version": 1, "user": f"user {n}"})

    for user in (ALICE, BOB):
        assert run_as(user, work=many_events) == (0, "")
    assert run_as(ALICE, work=lambda: register(path, "of-bob", 1))[0] == 0
    for user in (ALICE, BOB):
        code, said = run_as(user, "models", "verify", here)
        assert (code, said.endswith("events of 2 models and 4 files match their digests\n")) == (0, True), said
    assert (path / "m/_snapshot").exists()
    for name, mode in modes(path).items():
        assert mode == (0o2770 if (path / name).is_dir() else 0o660), name
        assert (path / name).stat().st_gid == TEAM
    assert {one.stat().st_uid for one in path.rglob("*.json")} == {ALICE, BOB}

    code, said = run_as(CAROL, "models", "list", here)
    assert code == 2
    assert f"(Permission denied: {team} is drwxrws--- of root:{TEAM})" in said


@needs_root
def test_a_folder_of_somebody_else_must_be_ready_to_be_shared(team: Path) -> None:
    team.chmod(0o770)
    assert run_as(ALICE, "models", "init", f"registry.path={team}", "command.shared=group") == (
        2,
        f"tarflow-scale: error: {team} must be writable by its group and have the set-group-ID bit (got "
        f"drwxrwx--- of root:{TEAM}); let its owner run this command or chmod g+rwxs\n",
    )
    assert list(team.iterdir()) == []
    team.chmod(0o2770)
    assert run_as(ALICE, "models", "init", f"registry.path={team}", "command.shared=group")[0] == 0
    assert modes(team) == {".": 0o2770, "registry.json": 0o660}


@needs_root
def test_a_registry_can_be_shared_later_and_each_owner_adds_modes(team: Path) -> None:
    path = team / "registry"
    here = f"registry.path={path}"
    assert run_as(ALICE, work=lambda: register(path, "m", 0)) == (0, "")
    code, said = run_as(BOB, "models", "show", here, "registry.model=m")
    assert code == 2
    assert f": {path} is drwx--S--- of {ALICE}:{TEAM}); check" in said
    code, said = run_as(BOB, "models", "init", here, "command.shared=group")
    assert code == 2
    path.chmod(0o2770)  # by hand, so that Bob leaves files that nobody shares
    (path / "blobs").chmod(0o2770)
    (path / "blobs/sha256").chmod(0o2770)
    (path / "registry.json").chmod(0o660)
    assert run_as(BOB, work=lambda: register(path, "of-bob", 0)) == (0, "")

    code, said = run_as(ALICE, "models", "init", here, "command.shared=group")
    assert code == 2
    assert "can be shared only by their owners (first: " in said
    assert f"of {BOB}:{TEAM}); let each owner run the same command" in said
    assert run_as(BOB, "models", "init", here, "command.shared=group")[0] == 0
    assert run_as(ALICE, "models", "verify", here)[0] == 0
    assert run_as(BOB, work=lambda: register(path, "m", 1)) == (0, "")
    assert run_as(ALICE, work=lambda: register(path, "of-bob", 1)) == (0, "")


@needs_root
def test_all_may_read_what_is_shared_with_all_and_others_may_not_write(team: Path) -> None:
    team.chmod(0o2775)
    path = team / "registry"
    here = f"registry.path={path}"
    assert run_as(ALICE, "models", "init", here, "command.shared=all")[0] == 0
    assert run_as(ALICE, work=lambda: register(path, "m", 0)) == (0, "")
    assert run_as(CAROL, "models", "verify", here)[0] == 0
    code, said = run_as(CAROL, "models", "alias", here, "registry.model=m", "command.alias=mine")
    assert code == 2
    assert "(Permission denied: " in said
    assert f"is drwxrwsr-x of {ALICE}:{TEAM}); check the path, permissions and space" in said


@needs_root
def test_one_unreadable_model_does_not_hide_the_others(team: Path) -> None:
    team.chmod(0o755)
    path = team / "registry"
    for model in ("a", "b", "c"):
        register(path, model, 0)
    (path / "lost+found").mkdir(mode=0o700)  # no name of a model
    (path / "b").chmod(0o700)
    here = f"registry.path={path}"
    code, said = run_as(BOB, "models", "list", here)
    assert code == 0
    assert [line.split()[0] for line in said.splitlines() if "@1 " in line] == ["a@1", "c@1"]
    (line,) = [line for line in said.splitlines() if "skipping" in line]
    assert line.startswith(f"tarflow-scale: warning: skipping a model that cannot be read: cannot read {path}/b/")
    assert f"(Permission denied: {path}/b is drwx------ of root:root)" in line
    assert run_as(BOB, "models", "show", here, "registry.model=a")[0] == 0
    assert run_as(BOB, "models", "list", here, "registry.model=b")[0] == 2

    code, said = run_as(BOB, "models", "verify", here)
    assert code == 2
    assert f"{path} has 1 damaged or missing parts" in said
    code, said = run_as(BOB, "models", "collect", here, "command.delete=true")
    assert code == 2  # what an unreadable log needs is not known, so nothing may be removed
    assert f"{path}/b is drwx------" in said
    (path / "a").chmod(0o700)
    (path / "c").chmod(0o700)
    assert run_as(BOB, "models", "list", here)[0] == 2


@needs_root
def test_verify_goes_on_after_a_file_that_cannot_be_read(team: Path) -> None:
    team.chmod(0o755)
    path = team / "registry"
    for number in range(3):
        register(path, "m", number)
    blobs = sorted((path / "blobs/sha256").iterdir())
    blobs[0].chmod(0o600)
    blobs[1].write_bytes(b"other")
    code, said = run_as(BOB, "models", "verify", f"registry.path={path}")
    assert code == 2
    assert f"(Permission denied: {blobs[0]} is -rw------- of root:root)" in said
    assert f"does not match its digest ({blobs[1]})" in said
    assert f"{path} has 2 damaged or missing parts" in said


def test_a_damaged_model_does_not_hide_the_others(tmp_path: Path) -> None:
    for model in ("a", "b"):
        register(tmp_path, model, 0)
    (tmp_path / "a/_log/000000000001.json").write_text("{")
    with pytest.warns(UserWarning, match="skipping a model that cannot be read: .*a/_log/000000000001.json"):
        assert list(readable_models(str(tmp_path))) == ["b"]
    with pytest.raises(RegistryError, match="000000000001.json"):
        collection.garbage(str(tmp_path), 7 * 86400)


def test_without_a_mode_the_umask_decides(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        registry = registry_with(tmp_path / "r", 1)
    finally:
        os.umask(before)
    marker = (tmp_path / "r/registry.json").read_bytes()
    assert Store(registry.path).init() == registry.store.marker()
    assert (tmp_path / "r/registry.json").read_bytes() == marker
    for name, mode in modes(tmp_path / "r").items():
        assert mode == (0o750 if (tmp_path / "r" / name).is_dir() else 0o640), name
    (tmp_path / "r/registry.json").unlink()  # a registry without it gets a new one
    assert Registry(registry.path, "m").register({"w": b"2"}, FACTS, "").version == 2


def test_a_writer_follows_when_a_registry_is_shared_meanwhile(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        store = Store(str(tmp_path / "r"))
        early = store.keep(b"early")
        Store(store.path).init(shared="group")
        late = store.keep(b"late")
    finally:
        os.umask(before)
    assert {stat.S_IMODE(Path(store.blob(one.sha256)).stat().st_mode) for one in (early, late)} == {0o660}


def test_reading_a_registry_without_a_marker_makes_none(tmp_path: Path) -> None:
    registry = registry_with(tmp_path, 51)
    for name in ("registry.json", "m/_snapshot"):
        (tmp_path / name).unlink()
    assert len(Registry(registry.path, "m").state().versions) == 51
    assert (tmp_path / "m/_snapshot").exists()
    assert not (tmp_path / "registry.json").exists()


def test_a_mode_is_for_folders(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    where = f"registry.path=memory://{tmp_path.name}"
    assert cli.main(["models", "init", where, "command.shared=group"]) == 2
    assert "command.shared must be used with a local folder (got memory://" in capsys.readouterr().err


def test_a_file_system_that_keeps_no_modes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "chmod", lambda *_, **__: None)  # as CIFS and FAT take it
    with pytest.raises(RegistryError, match=r"must be on a file system that keeps modes \(got drwx"):
        Store(str(tmp_path / "r")).init(shared="group")
    assert list((tmp_path / "r").iterdir()) == []
