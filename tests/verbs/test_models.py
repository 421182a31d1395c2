"""The verb ``models``: every command from the command line, on a small registry."""

from pathlib import Path

import pytest

from tarflow_scale import cli
from tarflow_scale.records import canonical_json
from tarflow_scale.registry import Registry
from tests.registry.test_registry import FACTS, registry_with, report


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return registry_with(tmp_path, 3)


def models(registry: Registry, command: str, *more: str) -> int:
    return cli.main(["models", command, f"registry.path={registry.path}", "registry.model=m", *more])


def test_init_and_a_registry_that_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = f"registry.path={tmp_path}/new"
    assert cli.main(["models", "init", where, "--dry-run"]) == 0
    assert not (tmp_path / "new").exists()
    assert cli.main(["models", "init", where]) == 0
    assert "is a registry (8 writers, 100 names, 100 winners)" in capsys.readouterr().out
    assert cli.main(["models", "init", f"registry.path={tmp_path}/one", "command.single_writer=true"]) == 0
    assert "only one process may write" in capsys.readouterr().out


def test_alias_is_for_what_no_gate_guards(registry: Registry, capsys: pytest.CaptureFixture[str]) -> None:
    assert models(registry, "alias", "registry.version=2", "command.alias=stable", "--dry-run") == 0
    assert registry.state().aliases == {}
    assert models(registry, "alias", "registry.version=2", "command.alias=stable", "command.reason=why") == 0
    assert models(registry, "alias", "registry.version=2", "command.alias=stable") == 0
    assert "m@2 is stable already" in capsys.readouterr().out
    registry.promote("champion", 1, None, {"gate": "digits"}, "")
    assert models(registry, "alias", "registry.version=3", "command.alias=champion") == 2
    assert "is guarded by gate digits; move it with the verb promote" in capsys.readouterr().err
    assert models(registry, "alias", "registry.version=3", "command.alias=latest") == 2
    assert models(registry, "alias", "registry.version=3") == 2
    assert registry.state().aliases == {"champion": 1, "stable": 2}


def test_approve_once_a_user(registry: Registry, capsys: pytest.CaptureFixture[str]) -> None:
    assert models(registry, "approve", "registry.version=2", "command.reason=seen the samples") == 0
    (approval,) = registry.state().approvals[2]
    assert approval.reason == "seen the samples"
    assert models(registry, "approve", "registry.version=2") == 2
    assert f"m@2 was already approved by {approval.user}" in capsys.readouterr().err


def test_retire_needs_a_reason_and_is_seen(registry: Registry, capsys: pytest.CaptureFixture[str]) -> None:
    assert models(registry, "retire", "registry.version=1") == 2
    assert models(registry, "retire", "registry.version=1", "command.reason=worse", "--dry-run") == 0
    assert models(registry, "retire", "registry.version=1", "command.reason=worse") == 0
    capsys.readouterr()
    assert models(registry, "list") == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("m@1      retired")
    assert models(registry, "show", "registry.version=1") == 0
    shown = capsys.readouterr().out
    assert "retired" in shown
    assert "worse" in shown


def test_diff_shows_what_differs(registry: Registry, capsys: pytest.CaptureFixture[str]) -> None:
    settings = [canonical_json({"optimizer": {"peak_lr": rate}, "training": {"seed": 0}}) for rate in (0.001, 0.002)]
    for number, configuration in enumerate(settings):
        facts = FACTS | {"config_digest": f"c{number}", "git_commit": f"commit{number}"}
        registry.register({"model.safetensors": b"weights"}, facts, "", configuration)
    registry.attach_report(report(5, registry.resolve(5).weights_digest), "")
    assert models(registry, "diff", "registry.version=5", "command.other=4") == 0
    shown = capsys.readouterr().out
    assert "optimizer.peak_lr  0.001    0.002" in shown
    assert "(code)             commit0  commit1" in shown
    assert "training.seed" not in shown
    assert shown.splitlines()[-1].split() == ["p", "(i)", "-", "1.0000"]
    assert models(registry, "diff", "registry.version=5") == 2  # there is no champion to compare with
    assert "m has no alias 'champion'" in capsys.readouterr().err


def test_verify_names_everything_that_is_wrong(registry: Registry, capsys: pytest.CaptureFixture[str]) -> None:
    assert models(registry, "verify") == 0
    assert "3 events of 1 models and 4 files match their digests" in capsys.readouterr().out
    first, second = (registry.resolve(number).files["model.safetensors"].sha256 for number in (1, 2))
    blob = Path(registry.store.blob(first))
    blob.write_bytes(b"wX")
    Path(registry.store.blob(second)).unlink()
    assert models(registry, "verify") == 2
    captured = capsys.readouterr()
    assert "model.safetensors of m@1 does not match its digest" in captured.out
    assert "model.safetensors of m@2 is missing" in captured.out
    assert "has 2 damaged or missing parts" in captured.err
    event = Path(registry.log.location(3))
    event.write_bytes(event.read_bytes().replace(b'"reason":"test"', b'"reason":"tset"'))
    assert cli.main(["models", "verify", f"registry.path={registry.path}"]) == 2
    assert "000000000003.json is damaged" in capsys.readouterr().out


def test_verify_notices_a_log_that_lost_its_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    registry = registry_with(tmp_path, 60)
    Registry(registry.path, "m").state()
    for number in range(40, 61):
        Path(registry.log.location(number)).unlink()
    assert models(registry, "verify") == 2
    assert "ends at event 39, but a snapshot has 50 events" in capsys.readouterr().out


def test_collect_only_lists_unless_it_is_told_to(registry: Registry, capsys: pytest.CaptureFixture[str]) -> None:
    assert models(registry, "collect") == 0
    assert "nothing to collect" in capsys.readouterr().out
    assert models(registry, "collect", "command.grace_days=0.01") == 2
    assert "command.grace_days" in capsys.readouterr().err


def test_commands_that_need_a_model_say_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("show", "diff", "alias", "approve", "rollback", "export"):
        arguments = ["command.alias=x", "command.path=y", "registry.version=champion"]
        assert cli.main(["models", command, f"registry.path={tmp_path}", *arguments]) == 2
        assert "set registry.model" in capsys.readouterr().err
