"""The command line: light where it can be, one line and exit code 2 where the user erred."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tarflow_scale import cli
from tests.conftest import TOP, Trained

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
    "verb", ["", "prepare", "train", "evaluate", "promote", "generate", "score", "doctor", "models", "models show"]
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
        "tarflow-scale: error: cannot read the configuration no/such.yaml (No such file or directory); check the path\n"
    )
    assert captured.out == ""


def test_overrides_may_follow_flags(capsys: pytest.CaptureFixture[str]) -> None:
    """As one types who changes the last command; what is neither flag nor override is refused."""
    flags = ["--plan", "--gpus", "64", "--gpu", "h100", "--image-size", "64", "--classes", "1000"]
    recipe = str(TOP / "configs/train/imagenet64-conditional.yaml")
    assert cli.main(["train", recipe, *flags, "training.micro_batch_size=4"]) == 0
    assert "256 = 4 x 64 GPUs x 1 accumulated" in capsys.readouterr().out
    for late in ("micro_batch_size", "--micro=4"):
        with pytest.raises(SystemExit):
            cli.main(["train", recipe, *flags, late])
        assert f"unrecognized arguments: {late}" in capsys.readouterr().err


def test_a_warning_of_ours_is_one_line() -> None:
    ours, other = str(TOP / "tarflow_scale/score.py"), "/elsewhere/library.py"
    line = cli._warning_line("use\x1b[2J less", UserWarning, ours, 7)  # pyright: ignore[reportPrivateUsage]
    assert line.startswith("tarflow-scale: warning: use")
    assert line.count("\n") == 1
    assert "\x1b" not in line
    assert "library.py:7: UserWarning: x" in cli._warning_line("x", UserWarning, other, 7)  # pyright: ignore[reportPrivateUsage]


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("tarflow_scale.models.list_models", broken)
    with pytest.raises(ZeroDivisionError):
        cli.main(["models", "list", "registry.path=x", "registry.model=y"])


def test_the_module_and_the_console_script_are_the_same_program() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "tarflow_scale", "promote", "a=b"], capture_output=True, text=True, check=False, cwd=TOP
    )
    assert result.returncode == 2
    assert result.stderr.startswith("tarflow-scale: error: registry: required key is missing")


def test_a_reader_that_goes_away_ends_it_without_a_traceback(trained: Trained) -> None:
    """As ``| head`` does; lines are written as they are printed, so it is noticed in the middle of a verb."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tarflow_scale", "models", "list", f"registry.path={trained.registry}"],
        cwd=TOP,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() == 128 + signal.SIGPIPE
