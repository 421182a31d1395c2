"""The command line: light where it can be, one line and exit code 2 where the user erred."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tarflow_scale import __version__, cli
from tests.conftest import TOP

LIGHT = """
import sys
from tarflow_scale.cli import main
code = main({arguments!r})
print(sorted(set(sys.modules) & {heavy!r}))
sys.exit(code)
"""
HEAVY = {"torch", "ray", "deepspeed", "webdataset", "torch_fidelity", "numpy"}


def light(*arguments: str) -> "subprocess.CompletedProcess[str]":
    script = LIGHT.format(arguments=list(arguments), heavy=HEAVY)
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=TOP)


@pytest.mark.parametrize(
    "verb",
    ["", "prepare", "train", "evaluate", "promote", "generate", "encode", "score", "doctor", "models", "models show"],
)
def test_help_is_a_manual_and_imports_nothing_heavy(verb: str) -> None:
    script = (
        "import sys\nfrom tarflow_scale.cli import main\n"
        f"try:\n    main({[*verb.split(), '--help']!r})\nexcept SystemExit:\n"
        f"    assert not set(sys.modules) & {HEAVY!r}, sys.modules\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=TOP)
    assert result.returncode == 0, result.stderr
    assert "usage: tarflow-scale" in result.stdout


def test_the_manual_names_every_key_with_default_and_meaning(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    text = capsys.readouterr().out
    assert "optimizer.peak_lr (0.0001)\n      Highest learning rate of AdamW." in text
    assert "training.total_images (required)" in text
    assert "training.noise.std (0.0)" in text
    assert "launch/torchrun.sh 2 configs/train/digits.yaml" in text
    assert "data.mix ([])" in text
    assert "training.ema_half_life_images ([50000])" in text
    assert "validation.path (required with validation)" in text  # nothing is missing without that section
    assert text.count("\n  model.class_conditional (true)\n") == 1
    assert text.count("\nmodel.kind=") == 9
    (of_autoencoders,) = (line for line in text.splitlines() if line.startswith("model.kind=autoencoder:"))
    assert of_autoencoders.endswith(" Has no class_conditional, logit_alpha, dequantization.")
    assert "\n    0     12 + 4 E / N       12.5 " in text
    for markup in ("``", "(())", "====="):
        assert markup not in text


def test_the_manual_tells_sections_of_a_kind_apart(capsys: pytest.CaptureFixture[str]) -> None:
    for verb in ("score", "doctor"):
        with pytest.raises(SystemExit):
            cli.main([verb, "--help"])
        text = capsys.readouterr().out
        headings = [line.split(":  ", 1)[1] for line in text.splitlines() if ":  " in line]
        assert len(headings) == len(set(headings))
    assert "  model (none)\n      Section of `train`; see its manual for the keys.\n" in text


def test_models_and_promote_import_nothing_heavy(trained: object, tmp_path: Path) -> None:
    registry = f"registry.path={trained.registry}"  # type: ignore[attr-defined]
    result = light("models", "list", registry, "registry.model=small")
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith("[]\n")
    assert "small@1" in result.stdout
    result = light("promote", "configs/promote/digits.yaml", registry, "registry.model=small")
    assert result.returncode == 2
    assert result.stdout.endswith("[]\n")


def test_an_expected_failure_is_one_line_and_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "no/such.yaml"]) == 2
    captured = capsys.readouterr()
    assert captured.err == (
        "tarflow-scale: error: cannot read the configuration no/such.yaml (No such file or directory); check the path, "
        f"which is relative to {Path.cwd()}\n"
    )
    assert captured.out == ""


def test_the_path_of_a_configuration_may_have_an_equals_sign(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As folders and files of sweeps have; it is no override then, whether it is there or not."""
    monkeypatch.chdir(tmp_path)
    for path in ("runs/lr=3e-4/config.yaml", "lr=3e-4.yaml"):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text("registry: {path: nowhere, model: small}")
        assert cli.main(["models", "list", path, "registry.model=other"]) == 2
        assert "no registry at nowhere" in capsys.readouterr().err
    assert cli.main(["models", "list", "runs/lr=3e-5/config.yaml"]) == 2
    assert "cannot read the configuration runs/lr=3e-5/config.yaml (No such file" in capsys.readouterr().err
    assert cli.main(["models", "list", "registry={path: a/b=c, model: small}"]) == 2
    assert "no registry at a/b=c" in capsys.readouterr().err
    long = "x" * 5000  # longer than a file's name may be
    assert cli.main(["models", "list", f"registry={{path: nowhere/{long}, model: small}}"]) == 2
    assert "nowhere/x" in capsys.readouterr().err


def test_the_configuration_may_come_after_overrides(capsys: pytest.CaptureFixture[str]) -> None:
    file = str(TOP / "configs/models/digits.yaml")
    assert cli.main(["models", "list", "registry.path=nowhere", file]) == 2
    assert "no registry at nowhere" in capsys.readouterr().err
    assert cli.main(["models", "list", file, "registry.path"]) == 2
    assert f"a verb must get one configuration file (got {file} and registry.path); keep" in capsys.readouterr().err


def test_a_working_folder_that_was_removed_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert cli.main(["train", "config.yaml"]) == 2
    assert "which is relative to a folder that was removed" in capsys.readouterr().err


def test_a_relative_path_from_another_working_folder_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    digits = str(TOP / "configs/train/digits.yaml")
    where = f"relative to {tmp_path}\n"
    for arguments, path in (
        (["train", "configs/train/digits.yaml"], "configs/train/digits.yaml"),
        (["train", digits], "runs/demo/data/train"),
        (["models", "list", "registry.path=runs/registry", "registry.model=a"], "runs/registry"),
    ):
        assert cli.main([*arguments, "--dry-run"]) == 2
        error = capsys.readouterr().err
        assert path in error
        assert error.endswith(where), error
        assert error.count("relative to") == 1
    assert cli.main(["promote", str(TOP / "configs/promote/digits.yaml")]) == 2
    assert capsys.readouterr().err == (
        "tarflow-scale: error: gate.path: cannot read the gate file evals/gates/digits.yaml (No such file or "
        f"directory); check the path, which is {where}"
    )
    for data in (f"{tmp_path}/absent", "file:///absent", "."):
        assert cli.main(["train", digits, f"data.path={data}", "--dry-run"]) == 2
        assert "relative to" not in capsys.readouterr().err


def test_an_installed_wheel_says_where_the_files_of_the_repository_are(tmp_path: Path) -> None:
    """The package alone, as a wheel has it, run from an empty folder."""
    shutil.copytree(TOP / "tarflow_scale", tmp_path / "site/tarflow_scale")
    source = "the source code of tarflow-scale"

    def run(*arguments: str) -> str:
        result = subprocess.run(
            [sys.executable, "-m", "tarflow_scale", *arguments],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(tmp_path / "site")},
            capture_output=True,
            text=True,
            check=False,
        )
        return result.stdout + result.stderr

    without = f"an installed package does not contain configs/; copy configs/ from {source}"
    assert without in run("train", "configs/train/digits.yaml")
    assert without in run("promote", "--help")
    assert f"was given; pass one, such as configs/promote/digits.yaml in {source}; registry: required" in run("promote")
    manual = run("train", "--help")
    assert f"does not contain configs/ and launch/; copy configs/ and launch/ from {source}" in manual
    here = subprocess.run(
        [sys.executable, "-m", "tarflow_scale", "promote"], capture_output=True, text=True, check=False, cwd=TOP
    )
    assert f"was given; pass one, such as {TOP}/configs/promote/digits.yaml; registry: required" in here.stderr


def test_overrides_may_follow_flags(capsys: pytest.CaptureFixture[str]) -> None:
    """As one types who changes the last command; what is neither flag nor override is refused."""
    flags = ["--gpus", "64", "--gpu", "h100", "--image-size", "64", "--classes", "1000"]
    recipe = str(TOP / "configs/train/imagenet64-conditional.yaml")
    assert cli.main(["plan", recipe, *flags, "training.micro_batch_size=4"]) == 0
    assert "256 images = 4 x 64 GPUs x 1 (accumulation)" in capsys.readouterr().out
    for late in ("micro_batch_size", "--micro=4"):
        with pytest.raises(SystemExit):
            cli.main(["plan", recipe, *flags, late])
        assert f"unrecognized arguments: {late}" in capsys.readouterr().err


def test_a_warning_of_ours_is_one_line() -> None:
    ours, other = str(TOP / "tarflow_scale/verbs/score/driver.py"), "/elsewhere/library.py"
    line = cli._warning_line("use\x1b[2J less", UserWarning, ours, 7)  # pyright: ignore[reportPrivateUsage]
    assert line.startswith("tarflow-scale: warning: use")
    assert line.count("\n") == 1
    assert "\x1b" not in line
    assert "library.py:7: UserWarning: x" in cli._warning_line("x", UserWarning, other, 7)  # pyright: ignore[reportPrivateUsage]


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("tarflow_scale.verbs.models.commands.list_models", broken)
    with pytest.raises(ZeroDivisionError):
        cli.main(["models", "list", "registry.path=x", "registry.model=y"])


def test_the_module_and_the_console_script_are_the_same_program() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "tarflow_scale", "promote", "a=b"], capture_output=True, text=True, check=False, cwd=TOP
    )
    assert result.returncode == 2
    assert result.stderr.startswith("tarflow-scale: error: no configuration file was given; pass one, such as ")
    assert (
        "; registry: required section is missing; set its keys in the YAML or as registry.path=VALUE" in result.stderr
    )


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["--version"])
    assert (end.value.code, capsys.readouterr().out) == (0, f"tarflow-scale {__version__}\n")


@pytest.mark.parametrize("imported", ["tarflow_scale.config", "tarflow_scale.verbs.models.commands"])
def test_ctrl_c_during_an_import_ends_in_one_line(imported: str, tmp_path: Path) -> None:
    """Even in the callback of a weak reference, where Python drops exceptions."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, signal, sys, weakref\n"
        "class Finder:\n"
        "    def find_spec(name, path, target=None):\n"
        f"        if name == {imported!r}:\n"
        "            weakref.finalize(Finder(), os.kill, os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Finder)\n"
    )
    result = subprocess.run(
        [sys.executable, "-m", "tarflow_scale", "models", "list", "registry.path=absent"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (result.returncode, result.stderr) == (
        130,
        "tarflow-scale: interrupted; run the same command again to continue\n",
    )
