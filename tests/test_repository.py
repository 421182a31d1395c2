"""The repository itself: layout, figures that come from results, commands that exist, scripts that lint."""

import ast
import re
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from evals.benchmarks.mutations import MUTATIONS, Mutation
from tarflow_scale.cli import _VERBS, main  # pyright: ignore[reportPrivateUsage]
from tarflow_scale.config.base import Root
from tests.conftest import TOP, Trained

TRACKED = subprocess.run(["git", "ls-files"], cwd=TOP, capture_output=True, text=True, check=False).stdout.split()
README = TOP / "README.md"
PAGES = [TOP / name for name in TRACKED if name.endswith(".md")] or [README]


@pytest.mark.skipif(not TRACKED, reason="not a git checkout")
def test_the_top_level_is_the_agreed_one() -> None:
    allowed = {"pyproject.toml", "README.md", "tarflow_scale", "launch", "configs", "evals", "tests", "docker"}
    found = {name.split("/")[0] for name in TRACKED}
    assert {name for name in found if not name.startswith(".")} - allowed == {"LICENSE", "Makefile"}


def test_no_module_is_longer_than_400_lines() -> None:
    lengths = {path: path.read_text().count("\n") for path in (TOP / "tarflow_scale").rglob("*.py")}
    assert {str(path): length for path, length in lengths.items() if length > 400} == {}


def test_no_two_modules_and_no_two_classes_share_a_name() -> None:
    """A verb's folder has a driver, and maybe a job and a worker; a verb and its configuration share its name."""
    modules, classes = Counter[str](), Counter[str]()
    for path in (TOP / "tarflow_scale").rglob("*.py"):
        name = f"{path.parent.name}.{path.stem}" if path.parents[1].name == "verbs" else path.stem
        is_configuration = path.parent.name == "config" and (TOP / "tarflow_scale/verbs" / path.name).exists()
        modules[f"config.{name}" if is_configuration else name] += path.stem != "__init__"
        classes.update(node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ClassDef))
    assert [name for name, count in (modules + classes).items() if count > 1] == []


def roots(kind: type[Root] = Root) -> set[str]:
    """Names of the configurations of verbs."""
    return {kind.__name__}.union(*map(roots, kind.__subclasses__()))


def annotations(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Names of functions and classes, each with the annotation of one of its parameters or attributes."""
    for node in ast.walk(tree):
        annotated: list[ast.AST] = []
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            annotated = [child for child in ast.walk(node.args) if isinstance(child, ast.arg) and child.annotation]
        elif isinstance(node, ast.ClassDef):
            annotated = [child for child in node.body if isinstance(child, ast.AnnAssign)]
        for child in annotated:
            yield node.name, ast.unparse(child.annotation)  # type: ignore[attr-defined]


def test_only_entry_functions_take_a_whole_configuration() -> None:
    """A verb's entry function takes the configuration apart; all other functions and classes get their sections."""
    entries = {
        (f"{verb.module.replace('.', '/')}.py", function)
        for verb in _VERBS.values()
        for function in (verb.function, *(flag.function for flag in verb.flags))
    }
    package, whole = TOP / "tarflow_scale", roots()
    assert {"Root", "TrainConfig", "PlanConfig", "DoctorConfig"} <= whole
    takers: set[tuple[str, str]] = set()
    for path in package.rglob("*.py"):
        module = str(path.relative_to(package))
        if module != "cli.py" and not module.startswith("config/"):  # where configurations are read and declared
            tree = ast.parse(path.read_text())
            takers |= {(module, name) for name, text in annotations(tree) if whole & set(re.findall(r"\w+", text))}
    assert sorted(takers - entries) == []


def test_tests_mirror_the_package() -> None:
    modules = {path.relative_to(TOP / "tarflow_scale") for path in (TOP / "tarflow_scale").rglob("*.py")}
    for test in (TOP / "tests").rglob("test_*.py"):
        folder = test.relative_to(TOP / "tests").parent
        assert folder == Path() or any(module.parent == folder for module in modules), test


def test_pages_show_what_the_results_files_say() -> None:
    result = subprocess.run(
        [sys.executable, "evals/render_results.py", "--check"], cwd=TOP, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


def test_every_results_file_is_shown() -> None:
    shown = {name for page in PAGES for name in re.findall(r"results/([\w.-]+)\b", page.read_text())}
    assert {path.name for path in (TOP / "evals/results").iterdir()} - {"models-show.txt"} <= shown


def test_the_readme_is_short() -> None:
    assert README.read_text().count("\n") <= 260


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(TOP)))
def test_every_file_that_a_page_names_exists(page: Path) -> None:
    named = re.findall(r"(?<![\w/.])(?:configs|evals|launch|docker|tests|tarflow_scale)/[\w./-]+\w", page.read_text())
    assert {name for name in named if not (TOP / name).exists() and "*" not in name} == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(TOP)))
def test_every_link_leads_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)|<img src=\"([^\"]+)\"", page.read_text()):
        path, _, anchor = "".join(link).partition("#")
        if not path.startswith(("http:", "https:")):
            target = (page.parent / path) if path else page
            assert target.exists(), path
            assert not anchor or anchor in anchors(target), f"{path}#{anchor}"


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands(page: Path) -> list[str]:
    """Of the shell blocks of a page: those of ours, without a launcher before them; a file of runs is no command."""
    blocks = re.findall(r"```sh\n(.*?)```", page.read_text(), flags=re.DOTALL)
    lines = [line.split("   #")[0].strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    found: list[str] = []
    for line in lines:
        words = shlex.split(line)
        first = next((i for i, word in enumerate(words) if "/" in word or word == "tarflow-scale"), 0)
        rest = words[first + 1 :]
        match words[first].rpartition("/")[2] if words else "":
            case "torchrun.sh" | "hostfile.sh":
                found.append(shlex.join(["train", *rest[1:]]))
            case "train.sbatch":
                found.append(shlex.join(["train", *rest]))
            case "ray.sbatch" | "tarflow-scale":
                found.append(shlex.join(rest))
            case _:
                pass
    return [line for line in dict.fromkeys(found) if not line.endswith(".txt")]


@pytest.mark.parametrize("line", list(dict.fromkeys(line for page in PAGES for line in commands(page))))
def test_every_command_that_is_shown_is_understood(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Run with --dry-run in an empty folder: what is missing may be data or models, never a key or a file of ours."""
    for name in ("configs", "evals", "launch"):
        (tmp_path / name).symlink_to(TOP / name)
    monkeypatch.chdir(tmp_path)
    assert main([*shlex.split(line), "--dry-run"]) in (0, 2)  # SystemExit is a flag that there is not
    assert not re.search(r"unknown key|required key|Input should|cannot read the configuration", capfd.readouterr().err)


def python_blocks() -> list[str]:
    return [block for page in PAGES for block in re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)]


def test_python_of_the_pages_runs(trained: Trained) -> None:
    for block in python_blocks():
        names: dict[str, object] = {}
        exec(block.replace("digits@champion", "small@1").replace("runs/demo/registry", str(trained.registry)), names)
        (result, shape) = (names["nats"], (10,)) if "runs/demo" in block else (names["samples"], (64, 3))
        assert tuple(result.shape) == shape  # type: ignore[attr-defined]
        assert result.isfinite().all()  # type: ignore[attr-defined]


def test_the_makefile_and_ci_say_the_same() -> None:
    ci = (TOP / ".ci/run").read_text()
    assert all(f"make {target}" in ci for target in ("test", "lint", "demo"))
    assert "bash .ci/run" in (TOP / ".github/workflows/ci.yml").read_text()


SCRIPTS = sorted([*(TOP / "launch").rglob("*.sh"), *(TOP / "launch").rglob("*.sbatch"), TOP / ".ci/run"])


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shell_scripts_pass_shellcheck(script: Path) -> None:
    result = subprocess.run(
        ["shellcheck", "--external-sources", str(script)], cwd=TOP, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout


def test_torchrun_sh_finds_a_mistake_before_it_starts(tmp_path: Path) -> None:
    result = subprocess.run(
        ["bash", "launch/torchrun.sh", "2", "configs/train/digits.yaml", "optimizer.lr=1"],
        cwd=TOP,
        env={"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    assert result.stderr == "tarflow-scale: error: optimizer.lr: unknown key; check the spelling against --help\n"


def test_no_machine_or_registry_host_is_named() -> None:
    pattern = re.compile(r"/(?:work|farm|root)/|pypi\.org|pythonhosted|registry\.npmjs|deb\.debian\.org")
    for name in TRACKED:
        path = TOP / name
        if path.is_file() and path != Path(__file__):
            text = path.read_text(errors="ignore").replace("target=/root/.cache/pip", "")  # inside an image
            assert not pattern.search(text), name


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_the_line_of_every_mutation_is_in_the_package(mutation: Mutation) -> None:
    """So that `evals/benchmarks/mutations.py` still works after a change of that line."""
    assert (TOP / "tarflow_scale" / mutation.file).read_text().count(mutation.right) == 1
