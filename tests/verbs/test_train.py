"""``train`` from the command line: what a run leaves, and that killing it loses nothing."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import psutil
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tarflow_scale import cli
from tarflow_scale.capacity.flops import training_flops
from tarflow_scale.config.base import load_config
from tarflow_scale.config.model import TarFlowConfig
from tarflow_scale.config.protocols import BitsPerDimProtocol, load_protocol
from tarflow_scale.config.train import TrainConfig
from tarflow_scale.errors import ConfigError
from tarflow_scale.flows import load_flow
from tarflow_scale.flows.likelihood import bits_per_dim
from tarflow_scale.metrics.bits import dequantized_draws
from tarflow_scale.registry import Registry
from tarflow_scale.runtime.processes import exclusive
from tarflow_scale.shards.reader import ShardSet
from tarflow_scale.training.noise import model_input
from tarflow_scale.training.validation import NOISE_SEED
from tarflow_scale.verbs.evaluate import worker
from tarflow_scale.verbs.train.identity import batch_statistics
from tests import forking
from tests.conftest import TOP, Trained, command, train_arguments
from tests.forking import HANG_SECONDS

VOLATILE = {
    "images_per_second", "tokens_per_second", "mfu", "data_wait_fraction", "seconds", "peak_memory_bytes",
    "checkpoint_seconds", "validation_seconds", "preview_seconds",
}  # fmt: skip


def curve(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in VOLATILE} for line in lines]


def weights(run: Path) -> bytes:
    return (run / "model/model.safetensors").read_bytes()


def test_a_run_explains_itself_and_learns(trained: Trained) -> None:
    log = curve(trained.run)
    assert [line["images"] for line in log] == list(range(64, 1281, 64))
    assert log[-1]["bits_per_dim"] < log[0]["bits_per_dim"] - 0.3
    names = {path.name for path in trained.run.iterdir()}
    assert names == {
        "checkpoints", "config.yaml", "curve.png", "environment.json", "log.jsonl", "model", "previews", "status.json",
    }  # fmt: skip
    status = json.loads((trained.run / "status.json").read_text())
    assert (status["state"], status["images_seen"], status["total_images"]) == ("finished", 1280, 1280)
    line = json.loads((trained.run / "log.jsonl").read_text().splitlines()[-1])
    assert line["tokens_per_second"] == pytest.approx(16 * line["images_per_second"])
    assert 0 <= line["data_wait_fraction"] < 1
    assert line["mfu"] is None  # no peak is known of a CPU
    assert line["checkpoint_seconds"] == 0  # saved after it was written
    environment = json.loads((trained.run / "environment.json").read_text())
    assert environment["packages"]["torch"] != "not installed"
    previews = sorted(path.name for path in (trained.run / "previews").iterdir())
    assert previews == ["curve.png", "images-000000000640.png", "images-000000001280.png"]
    version = Registry(str(trained.registry), "small").resolve("latest")
    assert version.images_seen == 1280
    assert version.config_digest == environment["config_digest"]
    assert load_flow(str(trained.run / "model")).pixels == version.pixels


def test_a_first_run_can_be_watched(digits: Path, tmp_path: Path) -> None:
    """It says what it is doing before its first step, and from the first step on how it goes; the loss is a picture."""
    arguments = train_arguments(digits, tmp_path / "run", tmp_path / "registry", "training.total_images=96")
    (tmp_path / "watched.py").write_text(
        "from tarflow_scale import cli; from tarflow_scale.runtime import console\n"
        "console._FIRST_LINE_SECONDS = 0.0; cli.main()"
    )
    result = command(*arguments, module="watched", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    said = [
        "importing PyTorch",
        "initializing the model",
        "starting DeepSpeed",
        "training begins: up to 96; figures every",
    ]
    places = [result.stdout.index(text) for text in said]
    assert places == sorted(places)
    lines = [line for line in result.stderr.splitlines() if line.startswith("train: ")]
    assert [line.split(" (")[0] for line in lines] == [f"train: {images} of 96 images" for images in (32, 64, 96)]
    for line in lines:
        assert re.search(
            r"; \d\.\d{3} bits/dim, learning rate [\de.-]+, gradient norm [\d.]+, waiting for data \d+%, "
            r"\d\.\d\d GiB per rank$",
            line,
        )
    curves = [tmp_path / "run/curve.png", tmp_path / "run/previews/curve.png"]
    assert len({path.read_bytes() for path in curves}) == 1
    assert curves[0].read_bytes().startswith(b"\x89PNG")


def test_lines_reach_a_log_file_as_they_are_printed(digits: Path, tmp_path: Path) -> None:
    """Python would keep them until the end where standard output is no terminal."""
    arguments = train_arguments(digits, tmp_path / "run", tmp_path / "registry", "training.total_images=100000")
    process = start(arguments)
    assert process.stdout is not None
    for line in process.stdout:  # ends, and fails below, if nothing comes before the process ends
        if line.startswith("training begins"):
            break
    else:
        pytest.fail("nothing was printed before the end")
    assert process.poll() is None
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def start(arguments: list[str], ranks: int = 0) -> "subprocess.Popen[str]":
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return forking.start(*arguments, ranks=ranks, start_new_session=True, **streams)


def wait_for_checkpoint(run: Path, images: int, process: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + HANG_SECONDS
    while not (run / f"checkpoints/images-{images:012d}/manifest.json").exists():
        assert process.poll() is None, process.stdout.read() if process.stdout else ""
        assert time.monotonic() < deadline
        time.sleep(0.02)


def kill_after_checkpoint(process: "subprocess.Popen[str]", run: Path, images: int) -> None:
    """``kill -9`` of the launcher and all ranks, once a checkpoint is complete."""
    wait_for_checkpoint(run, images, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def test_kill_dash_nine_and_the_same_command_again_equals_never_stopping(trained: Trained, tmp_path: Path) -> None:
    arguments = train_arguments(trained.data, tmp_path / "run", tmp_path / "registry")
    kill_after_checkpoint(start(arguments), tmp_path / "run", 640)
    assert not (tmp_path / "run/model").exists()
    result = command(*arguments)
    assert result.returncode == 0, result.stderr
    assert curve(tmp_path / "run") == curve(trained.run)
    assert weights(tmp_path / "run") == weights(trained.run)


def check_two_ranks_survive_a_kill(trained: Trained, tmp_path: Path, *more: str) -> None:
    """A run on two ranks that was killed and resumed, ``broken``, equals one that was not, ``whole``, to the bit."""
    whole = train_arguments(trained.data, tmp_path / "whole", tmp_path / "registry", *more)
    broken = train_arguments(trained.data, tmp_path / "broken", tmp_path / "registry", *more)
    result = command(*whole, ranks=2)
    assert result.returncode == 0, result.stderr
    kill_after_checkpoint(start(broken, ranks=2), tmp_path / "broken", 320)
    time.sleep(0.5)
    result = command(*broken, ranks=2)
    assert result.returncode == 0, result.stderr
    assert curve(tmp_path / "broken") == curve(tmp_path / "whole")
    assert weights(tmp_path / "broken") == weights(tmp_path / "whole")


@pytest.mark.distributed
def test_a_glow_passes_all_verbs_and_survives_kill_dash_nine(trained: Trained, tmp_path: Path) -> None:
    """Two ranks, ZeRO-3, activations rebuilt: ActNorm's buffers and statistics come back with the checkpoint."""
    model = "model={kind: glow, levels: 2, steps_per_level: 1, width: 16}"
    more = [model, "parallelism.zero_stage=3", "parallelism.activations=rebuild", "training.total_images=640"]
    check_two_ranks_survive_a_kill(trained, tmp_path, *more)
    log = curve(tmp_path / "whole")
    assert log[-1]["bits_per_dim"] < log[0]["bits_per_dim"]

    registry = [f"registry.path={tmp_path}/registry", "registry.model=small", "cluster.executor=local"]
    protocols = [f"{TOP}/evals/protocols/digits-{name}.yaml" for name in ("bits-per-dim", "frechet-pixels")]
    data = [f"data.path={trained.data}/test", f"reference.path={trained.data}/train"]
    more = [f"reference.cache={tmp_path}/cache", f"metrics.protocols={json.dumps(protocols)}"]
    assert cli.main(["evaluate", *registry, *data, *more, "sampling.guidance.scale=0.5"]) == 0
    report = Registry(f"{tmp_path}/registry", "small").state().reports[2][-1]
    assert report.metrics["bits_per_dim"].value == pytest.approx(log[-1]["bits_per_dim"], abs=1.0)
    arguments = ["sampling.num_images=20", f"shards.path={tmp_path}/out", "sampling.guidance.scale=0.5"]
    assert cli.main(["generate", *registry, *arguments]) == 0
    assert (tmp_path / "out/manifest.json").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_says_so(trained: Trained, tmp_path: Path, number: signal.Signals) -> None:
    arguments = train_arguments(trained.data, tmp_path / "run", tmp_path / "registry", "training.total_images=100000")
    process = start(arguments)
    wait_for_checkpoint(tmp_path / "run", 320, process)
    process.send_signal(number)
    output, _ = process.communicate(timeout=HANG_SECONDS)
    assert process.returncode == 75
    assert f"stopped by {number.name}" in output
    assert "images; a checkpoint is saved, and the same command continues" in output
    newest = sorted((tmp_path / "run/checkpoints").iterdir())[-1]
    assert (newest / "manifest.json").exists()
    assert not (tmp_path / "registry").exists()


def test_a_finished_run_does_nothing_and_registers_nothing_twice(trained: Trained) -> None:
    before = curve(trained.run)
    result = command(*train_arguments(trained.data, trained.run, trained.registry))
    assert result.returncode == 0, result.stderr
    assert "nothing to train" in result.stdout
    assert f"the model is already registered as small@1 in {trained.registry}" in result.stdout
    assert "next:" not in result.stdout
    assert curve(trained.run) == before
    assert len(Registry(str(trained.registry), "small").state().versions) == 1


def test_a_damaged_checkpoint_is_passed_over(trained: Trained, tmp_path: Path) -> None:
    arguments = train_arguments(trained.data, tmp_path / "run", tmp_path / "registry")
    kill_after_checkpoint(start(arguments), tmp_path / "run", 640)
    newest = max(p for p in (tmp_path / "run/checkpoints").iterdir() if (p / "manifest.json").exists())
    part = next(newest.glob("part-*.safetensors"))
    content = bytearray(part.read_bytes())
    content[-1] ^= 1
    part.write_bytes(bytes(content))
    result = command(*arguments)
    assert result.returncode == 0, result.stderr
    assert "skipping a damaged checkpoint" in result.stderr
    assert curve(tmp_path / "run") == curve(trained.run)
    assert weights(tmp_path / "run") == weights(trained.run)


def test_a_run_folder_of_another_run_is_refused(trained: Trained) -> None:
    records = {name: (trained.run / name).read_bytes() for name in ("config.yaml", "environment.json", "log.jsonl")}
    result = command(*train_arguments(trained.data, trained.run, trained.registry, "training.seed=1"))
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1] == (
        f"tarflow-scale: error: the run folder {trained.run} holds another run (training.seed was 0, is 1); "
        f"choose another logging.path or delete the folder"
    )
    assert {name: (trained.run / name).read_bytes() for name in records} == records


def test_statistics_of_batches_make_the_division_of_a_batch_part_of_a_run(digits: Path, tmp_path: Path) -> None:
    def trained_by(micro: int, ranks: int, total: int) -> "subprocess.CompletedProcess[str]":
        plain = train_arguments(digits, tmp_path / "batch", tmp_path / "registry")
        model = ["kind=realnvp", "levels=2", "width=4", "residual_blocks=1", "normalization=batch"]
        more = [f"training.micro_batch_size={micro}", f"training.total_images={total}"]
        return command(
            *(one for one in plain if not one.startswith("model.")),
            *(f"model.{one}" for one in model),
            *more,
            ranks=ranks,
        )

    assert trained_by(32, 0, 64).returncode == 0
    refused = trained_by(16, 0, 96)
    assert refused.returncode == 2
    assert refused.stderr.splitlines()[-1] == (
        f"tarflow-scale: error: the run folder {tmp_path}/batch holds another run (training.micro_batch_size x ranks "
        f"was 32, is [16, 1]); choose another logging.path or delete the folder"
    )
    assert trained_by(16, 2, 96).returncode == 0  # a whole batch again, so its statistics are the same


def test_no_other_run_depends_on_how_a_batch_is_divided(monkeypatch: pytest.MonkeyPatch) -> None:
    def facts(*overrides: str, ranks: int = 2) -> dict[str, Any]:
        monkeypatch.setenv("WORLD_SIZE", str(ranks))
        config = load_config(TrainConfig, TOP / "configs/train/digits-realnvp.yaml", list(overrides))
        return batch_statistics(config.model, config.training)

    batch, micro = "model.normalization=batch", "training.micro_batch_size="
    assert facts() == facts(f"{micro}16") == facts(ranks=1) == {}
    assert facts(batch) == facts(batch, f"{micro}64", ranks=1)  # the whole batch of 64 at once
    divided = [facts(batch, ranks=1), facts(batch, f"{micro}16"), facts(batch, f"{micro}16", ranks=1)]
    found = [*divided, facts(batch)]
    assert all(found.count(one) == 1 for one in found)


def test_a_total_before_the_checkpoint_is_refused(trained: Trained) -> None:
    """Before anything is started, so in a dry run too."""
    arguments = train_arguments(trained.data, trained.run, trained.registry, "training.total_images=640")
    for more in ([], ["--dry-run"]):
        result = command(*arguments, *more)
        assert result.returncode == 2
        assert (
            "training.total_images must be at least the number of images that the checkpoint has seen (got 640 and "
            "1280)" in result.stderr
        )
        assert "initializing" not in result.stdout
        assert "operations" not in result.stdout


def test_a_loss_that_stays_nan_stops_the_run(digits: Path, tmp_path: Path) -> None:
    more = ["optimizer.peak_lr=1e6", "optimizer.gradient_clip_norm=1e9", "training.max_skipped_steps=3"]
    result = command(*train_arguments(digits, tmp_path / "run", tmp_path / "registry", *more))
    assert result.returncode == 2
    assert "loss or gradient was not finite in 4 steps in a row" in result.stderr.splitlines()[-1]


def test_dry_run_prints_the_arithmetic_and_starts_nothing(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*train_arguments(digits, tmp_path / "run", tmp_path / "registry"), "--dry-run"]) == 0
    plan = capsys.readouterr().out
    assert "32 = 16 x 1 ranks x 2 accumulated" in plan
    assert "40 steps = 1,280 images" in plan
    assert "parameters" in plan
    assert "GiB per rank" in plan
    assert "at the first image, because the run folder has no checkpoint" in plan
    assert list(tmp_path.iterdir()) == []


def test_validation_on_other_images_names_both_data_sets(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As where the recipe was for another data set, and data.path alone was changed."""
    manifest = json.loads((digits / "test/manifest.json").read_text())
    other = tmp_path / "other"
    shutil.copytree(digits / "test", other)
    (other / "manifest.json").write_text(json.dumps(manifest | {"bit_depth": 3}))
    more = [f"validation={{path: {other}, every_images: 64}}", "--dry-run"]
    assert cli.main([*train_arguments(digits, tmp_path / "run", tmp_path / "registry"), *more]) == 2
    assert capsys.readouterr().err == (
        f"tarflow-scale: error: validation.path and data.path must have samples of the same kind (got 1x8x8 images, "
        f"3 bit in {other}, and 1x8x8 images, 4 bit in {digits}/train); set validation.path to a held-out split of the "
        f"same data set\n"
    )


def test_dry_run_says_which_block_suits_a_store(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = fsspec.filesystem("memory")
    store.put(str(digits), "/dry-run", recursive=True)
    arguments = train_arguments(digits, tmp_path / "run", tmp_path / "registry", "data.path=memory://dry-run/train")
    assert cli.main([*arguments, "--dry-run"]) == 0
    small = re.search(
        r"reads .*; too small for fast reads from a store: raise data.shuffle_block to (\d+)", capsys.readouterr().out
    )
    assert small is not None
    assert cli.main([*arguments, f"data.shuffle_block={small[1]}", "--dry-run"]) == 0
    store.rm("/dry-run", recursive=True)
    assert f"2 MB, a block of {small[1]} samples" in capsys.readouterr().out


def test_too_many_corrupt_samples_stop_the_run_with_the_counts(digits: Path, tmp_path: Path) -> None:
    shutil.copytree(digits / "train", tmp_path / "train")
    (first, *_) = sorted((tmp_path / "train").glob("*.tar"))
    content = bytearray(first.read_bytes())
    for sample in range(40):
        content[int(ShardSet(str(tmp_path / "train"))._index(0).offsets[sample]) + 3] ^= 1
    first.write_bytes(bytes(content))
    arguments = train_arguments(digits, tmp_path / "run", tmp_path / "registry", f"data.path={tmp_path}/train")
    result = command(*arguments, "data.num_workers=1")
    assert result.returncode == 2
    assert re.search(
        r"error: too many corrupt samples \(got 1[1-9] among \d+ read, allowed: data.max_corrupt_fraction=0.001\)",
        result.stderr.splitlines()[-1],
    )
    listed = (tmp_path / "run/quarantine-00000.jsonl").read_text().splitlines()
    assert all(json.loads(line)["reason"] == "does not match its checksum" for line in listed)
    assert len(listed) >= 11
    result = command(*arguments, "data.max_corrupt_fraction=0.004")
    assert result.returncode == 0, result.stderr
    assert curve(tmp_path / "run")[-1]["replaced_samples"] >= 30


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGINT])
def test_torchrun_sh_passes_a_signal_on_and_two_ranks_save(
    trained: Trained, tmp_path: Path, number: signal.Signals
) -> None:
    """What a scheduler sends before it takes the machine, and Ctrl-C, which a terminal sends to all processes."""
    more = ["training.total_images=100000", "data.num_workers=1"]  # a launcher signals the loader's processes too
    _, *arguments = train_arguments(trained.data, tmp_path / "run", tmp_path / "registry", *more)
    process = torchrun_sh(tmp_path, arguments)
    wait_for_checkpoint(tmp_path / "run", 320, process)
    os.killpg(process.pid, number)
    output, _ = process.communicate(timeout=HANG_SECONDS)
    assert process.returncode == 75, output
    assert re.search(r"checking the configuration \(.*empty\.yaml\)\nstarting 2 ranks\n", output)
    assert "waiting for all 2 ranks" in output
    assert not re.search("SignalException|ChildFailedError|closing signal|Traceback|Warning", output), output
    said = rf"^tarflow-scale: stopped by {number.name} after [\d,]+ of [\d,]+ images; a checkpoint is saved"
    assert re.search(said, output, re.M)
    newest = sorted((tmp_path / "run/checkpoints").iterdir())[-1]
    assert (newest / "manifest.json").exists()
    status = json.loads((tmp_path / "run/status.json").read_text())
    assert status["state"] == "stopped"
    assert f"{status['images_seen']:012d}" in newest.name


@pytest.mark.slow
@pytest.mark.distributed
def test_torchrun_sh_ends_with_2_where_a_rank_does(trained: Trained, tmp_path: Path) -> None:
    """Of a mistake that the dry run cannot see."""
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    (tmp_path / "run/.lock").mkdir()
    process = torchrun_sh(tmp_path, train_arguments(trained.data, tmp_path / "run", tmp_path / "registry")[1:])
    output, _ = process.communicate(timeout=HANG_SECONDS)
    assert process.returncode == 2, output
    assert "Traceback" not in output
    assert f"tarflow-scale: error: cannot write {tmp_path}/run (Is a directory)" in output


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("begun", ["--dry-run", "launch/ranks.py"])
def test_torchrun_sh_told_to_stop_before_there_are_ranks(trained: Trained, tmp_path: Path, begun: str) -> None:
    """There is nothing to save, and the run is to be started again all the same."""
    process = torchrun_sh(tmp_path, train_arguments(trained.data, tmp_path / "run", tmp_path / "registry")[1:])
    own = psutil.Process(process.pid)

    def listens() -> bool:
        """Whether the launcher, which is a shell first, is at this stage and has a handler for the signal."""
        with contextlib.suppress(psutil.NoSuchProcess):
            stages = " ".join(word for one in [own, *own.children()] for word in one.cmdline())
            if begun in stages:  # looked at first, for the shell has a handler too
                caught = re.search(r"SigCgt:\s*(\w+)", Path(f"/proc/{process.pid}/status").read_text())
                return caught is not None and bool(int(caught[1], 16) >> signal.SIGTERM - 1 & 1)
        return False

    while not listens():
        assert process.poll() is None
    os.killpg(process.pid, signal.SIGTERM)
    output, _ = process.communicate(timeout=HANG_SECONDS)
    assert process.returncode == 75, output
    assert "Traceback" not in output
    assert not (tmp_path / "run/checkpoints").exists()


def torchrun_sh(folder: Path, arguments: list[str]) -> "subprocess.Popen[str]":
    (folder / "empty.yaml").write_text("{}")
    return subprocess.Popen(
        ["bash", "launch/torchrun.sh", "2", str(folder / "empty.yaml"), *arguments],
        cwd=TOP,
        env=os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(("end", "code"), [("limit", 75), ("ctrl_c", 75), ("mistake", 2)])
def test_torchrun_sh_adds_no_errors_of_torchrun(end: str, code: int, trained: Trained, tmp_path: Path) -> None:
    more = {"limit": ["training.max_seconds=0.001"], "mistake": []}.get(end, ["training.total_images=1000000"])
    data = trained.data
    if end == "mistake":  # that the ranks alone can see, because the check before them reads no images
        data = tmp_path / "data"
        shutil.copytree(trained.data, data)
        for shard in (data / "train").glob("*.tar"):
            shard.write_bytes(bytes(shard.stat().st_size))
    process = torchrun_sh(tmp_path, train_arguments(data, tmp_path / "run", tmp_path / "registry", *more)[1:])
    if end == "ctrl_c":
        wait_for_checkpoint(tmp_path / "run", 320, process)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    output, _ = process.communicate(timeout=HANG_SECONDS)
    assert process.returncode == code, output
    assert "tarflow-scale: " in output  # each rank may meet a mistake of its own
    assert not re.search(r"Traceback|torch/distributed|ChildFailedError|exitcode|death signal", output), output


def test_a_time_limit_saves_and_the_run_goes_on(trained: Trained, tmp_path: Path) -> None:
    arguments = train_arguments(trained.data, tmp_path / "run", tmp_path / "registry")
    result = command(*arguments, "training.max_seconds=0.001")
    assert result.returncode == 75
    assert "stopped by training.max_seconds after 32 of " in result.stderr.splitlines()[-1]
    again = command(*arguments)
    assert again.returncode == 0
    earlier = tmp_path / "run/config-until-000000000032.yaml"
    said = f"other settings: training.max_seconds was 0.001, is none (the earlier settings are in {earlier})"
    assert said in again.stdout
    assert "max_seconds: 0.001" in earlier.read_text()
    assert curve(tmp_path / "run") == curve(trained.run)
    assert weights(tmp_path / "run") == weights(trained.run)


def test_a_run_folder_takes_one_run_at_a_time(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tarflow_scale.verbs.train.driver.STOP_SECONDS", 0.0)
    arguments = train_arguments(trained.data, tmp_path / "run", tmp_path / "registry")
    with exclusive(tmp_path / "run"):
        assert cli.main(arguments) == 2
    assert (
        f"{tmp_path}/run must have one writer at a time (in use by process {os.getpid()} on " in capsys.readouterr().err
    )


@pytest.mark.slow
@pytest.mark.distributed
def test_validation_and_several_averages(trained: Trained, tmp_path: Path) -> None:
    """Validation on two ranks, with images that do not divide; it must not be seen by training."""
    more = [f"validation.path={trained.data}/test", "validation.every_images=640", "validation.num_images=101"]
    halves = ["training.ema_half_life_images=[20,60]", "model.dropout=0"]
    runs = {}
    for name, extra, ranks in (("plain", [], 1), ("looks", more, 1), ("two", more, 2)):
        arguments = train_arguments(trained.data, tmp_path / name, tmp_path / f"registry-{name}", *halves, *extra)
        result = command(*arguments, ranks=ranks if ranks > 1 else 0)
        assert result.returncode == 0, result.stderr
        runs[name] = curve(tmp_path / name)
    assert weights(tmp_path / "looks") == weights(tmp_path / "plain")
    seen = {name: [line for line in runs[name] if "validation_bits_per_dim" in line] for name in ("looks", "two")}
    assert [line["images"] for line in seen["looks"]] == [640, 1280]
    for one, two in zip(seen["looks"], seen["two"], strict=True):
        assert two["validation_bits_per_dim"] == pytest.approx(one["validation_bits_per_dim"], abs=1e-4)
    flow = load_flow(str(tmp_path / "looks/model"))
    batch = ShardSet(f"{trained.data}/test").take(np.arange(101))
    assert flow.pixels is not None
    x = model_input(batch, flow.pixels, NOISE_SEED, torch.device("cpu"))
    bits = bits_per_dim(flow.log_prob(x, torch.from_numpy(batch.labels)), 64, 4).mean()
    assert seen["looks"][-1]["validation_bits_per_dim"] == pytest.approx(bits.item(), abs=1e-4)
    registry = Registry(str(tmp_path / "registry-plain"), "small")
    assert [registry.resolve(number).ema_half_life_images for number in (1, 2)] == [60, 20]
    assert weights(tmp_path / "plain") != (tmp_path / "plain/model-ema-60/model.safetensors").read_bytes()


@pytest.mark.slow
def test_learned_noise_passes_all_verbs(trained: Trained, tmp_path: Path) -> None:
    """Training learns it; validation, evaluation and scores are the bound that it gives, not the density."""
    noise = ["model.dequantization={couplings: 2, width: 8}", "model.dropout=0", "training.ema_half_life_images=20"]
    held_out = [f"validation.path={trained.data}/test", "validation.every_images=640", "validation.num_images=101"]
    more = [*noise, *held_out, "training.total_images=640", "optimizer.peak_lr=2e-2"]
    result = command(*train_arguments(trained.data, tmp_path / "run", tmp_path / "registry", *more))
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "run/previews/images-000000000640.png").exists()
    flow = load_flow(str(tmp_path / "run/model"))
    assert flow.dequantizer is not None
    assert flow.pixels is not None
    assert all(float(one.detach().abs().max()) > 0 for one in flow.dequantizer.parameters())
    shards = ShardSet(f"{trained.data}/test")
    batch = shards.take(np.arange(101))
    x, y = model_input(batch, flow.pixels, NOISE_SEED, torch.device("cpu")), torch.from_numpy(batch.labels)
    bound, density = (float(bits_per_dim(of(x, y), 64, 4).mean()) for of in (flow.log_prob_of_images, flow.log_prob))
    seen = curve(tmp_path / "run")[-1]["validation_bits_per_dim"]
    assert seen == pytest.approx(bound, abs=1e-4)
    assert abs(bound - density) > 1e-3

    registry = [f"registry.path={tmp_path}/registry", "registry.model=small", "cluster.executor=local"]
    name = f"{TOP}/evals/protocols/digits-bits-per-dim.yaml"
    data = [f"data.path={trained.data}/test", f"reference.path={trained.data}/train"]
    more = [f"reference.cache={tmp_path}/cache", f"metrics.protocols={json.dumps([name])}"]
    assert cli.main(["evaluate", *registry, *data, *more]) == 0
    protocol = load_protocol(name)
    assert isinstance(protocol, BitsPerDimProtocol)
    batch = shards.take(np.arange(shards.manifest.num_images))
    y = torch.from_numpy(batch.labels)
    draws = torch.stack([flow.log_prob_of_images(x, y) for x in dequantized_draws(batch, protocol)])
    report = Registry(f"{tmp_path}/registry", "small").state().reports[1][-1]
    expected = float(bits_per_dim(draws.mean(dim=0), 64, 4).mean())
    assert report.metrics["bits_per_dim"].value == pytest.approx(expected, abs=1e-4)

    worker._check_fits(flow, protocol)
    with pytest.raises(ConfigError, match=r"learned its dequantization on 8-bit data \(got 4-bit data\)"):
        worker._check_fits(flow, protocol.model_copy(update={"bit_depth": 8}))

    more = [f"calibration.path={trained.data}/train", f"scoring.path={tmp_path}/scores", "scoring.maps=4"]
    assert cli.main(["score", *registry, f"data.path={trained.data}/test", *more, "scoring.num_draws=2"]) == 0
    assert (tmp_path / "scores/maps.png").exists()


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["skip", "roll_back"])
def test_jumps_of_the_loss(trained: Trained, tmp_path: Path, rule: str) -> None:
    """A rule so strict that ordinary steps count as jumps; killed and resumed it decides alike."""
    more = [f"training.spike={{rule: {rule}, above_nats_per_dim: 0.02, window_steps: 4, max_roll_backs: 1000}}"]
    whole = train_arguments(trained.data, tmp_path / "whole", tmp_path / "registry", *more)
    result = command(*whole)
    assert result.returncode == 0, result.stderr
    assert f"images (training.spike.rule={rule})" in result.stderr
    last = curve(tmp_path / "whole")[-1]
    assert 0 < last["skipped_steps"] < 40
    assert last["roll_backs"] == (last["skipped_steps"] if rule == "roll_back" else 0)
    if rule == "roll_back":  # what a checkpoint holds of it is the same for both rules
        broken = train_arguments(trained.data, tmp_path / "broken", tmp_path / "registry", *more)
        kill_after_checkpoint(start(broken), tmp_path / "broken", 640)
        assert command(*broken).returncode == 0
        assert weights(tmp_path / "broken") == weights(tmp_path / "whole")
        few = [*whole, f"logging.path={tmp_path}/few", "training.spike.max_roll_backs=1"]
        result = command(*few)
        assert result.returncode == 2
        assert (
            "must not roll back more often than training.spike.max_roll_backs (got 2 jumps of the loss, and 1 allowed)"
            in result.stderr
        )


def test_tensorboard_and_weights_and_biases(trained: Trained, tmp_path: Path) -> None:
    """TensorBoard for real; of Weights & Biases, which needs an account, what it is told."""
    (tmp_path / "work").mkdir()
    (tmp_path / "work/wandb.py").write_text(
        "import json, pathlib\n"
        "class Run:\n"
        "    def __init__(self, facts): self.lines = [facts]\n"
        "    def log(self, record, step): self.lines.append([step, record['bits_per_dim']])\n"
        "    def finish(self): pathlib.Path(self.lines[0]['dir'], 'told.json').write_text(json.dumps(self.lines))\n"
        "def init(**facts): return Run(facts)\n"
    )
    more = ["logging.tensorboard=true", "logging.wandb_project=flows", "logging.peak_flops=1e12"]
    arguments = train_arguments(trained.data, Path("~/run"), tmp_path / "registry", *more)
    result = command(*arguments, cwd=tmp_path / "work", environment={"HOME": str(tmp_path)})
    assert result.returncode == 0, result.stderr
    log = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    events = EventAccumulator(str(tmp_path / "run/tensorboard"))
    events.Reload()
    found = [(event.step, event.value) for event in events.Scalars("bits_per_dim")]
    assert [step for step, _ in found] == [line["images"] for line in log]
    assert [value for _, value in found] == pytest.approx([line["bits_per_dim"] for line in log])
    told = json.loads((tmp_path / "run/told.json").read_text())
    assert (told[0]["project"], told[0]["name"], told[0]["resume"]) == ("flows", "run", "allow")
    assert told[0]["config"]["training"]["total_images"] == 1280
    assert told[0]["id"] == json.loads((tmp_path / "run/wandb-id.json").read_text())["id"]
    assert told[1:] == [[line["images"], line["bits_per_dim"]] for line in log]
    flops = training_flops(TarFlowConfig(patch_size=2, width=32, head_width=16, layers_per_block=(1, 1)), (1, 8, 8))
    work = {path.name for path in (tmp_path / "work").iterdir()}
    assert work <= {"wandb.py", "__pycache__"}  # everything of the run is below the home folder
    assert log[-1]["mfu"] == pytest.approx(log[-1]["images_per_second"] * flops / 1e12)


def test_what_is_logged_to_must_be_installed(digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = train_arguments(digits, tmp_path / "run", tmp_path / "registry", "logging.wandb_project=flows")
    assert cli.main(arguments) == 2
    message = "logging.wandb_project needs the package wandb (it is not installed); run: pip install wandb"
    assert message in capsys.readouterr().err


@pytest.mark.gpu
def test_bf16_on_a_gpu(digits: Path, tmp_path: Path) -> None:
    arguments = train_arguments(digits, tmp_path / "run", tmp_path / "registry", "parallelism.precision=bf16")
    result = command(*arguments)
    assert result.returncode == 0, result.stderr
    log = curve(tmp_path / "run")
    assert log[-1]["bits_per_dim"] < log[0]["bits_per_dim"] - 0.3


def test_bf16_and_gaussian_noise_on_the_cpu(digits: Path, tmp_path: Path) -> None:
    noise = "training.noise={kind: gaussian, std: 0.1}"
    more = ["parallelism.precision=bf16", noise, "model.class_conditional=false"]
    result = command(*train_arguments(digits, tmp_path / "run", tmp_path / "registry", *more))
    assert result.returncode == 0, result.stderr
    log = curve(tmp_path / "run")
    assert log[-1]["nats_per_dim"] < log[0]["nats_per_dim"] - 0.2
    assert log[-1]["bits_per_dim"] is None


def longer(trained: Trained, tmp_path: Path, *more: str) -> tuple[list[str], str]:
    """Arguments of a run of 640 images that is finished, and the line of it when it is extended to 1280."""
    arguments = train_arguments(trained.data, tmp_path / "run", tmp_path / "registry", *more)
    result = command(*arguments, "training.total_images=640")
    assert result.returncode == 0, result.stderr
    assert "another schedule" not in result.stdout
    told: list[str] = []
    for flag in (["--dry-run"], []):
        result = command(*arguments, *flag)
        assert result.returncode == 0, result.stderr
        assert f"after 640 images, from {tmp_path}/run/checkpoints/images-000000000640\n" in result.stdout
        told += [line for line in result.stdout.splitlines() if "another schedule" in line]
    assert told[0] == told[1]
    return arguments, told[0]


@pytest.mark.slow
def test_a_run_that_is_extended_tells_the_rate_before_and_after(trained: Trained, tmp_path: Path) -> None:
    arguments, told = longer(trained, tmp_path)
    # cosine to 1% of 5e-3 at 640 images; of 1280 images, 640 are half way: 0.01 + 0.99 / 2 of it
    assert told == (
        "continuing with another schedule: the learning rate at 640 images was 5e-05, now 0.00252; a higher rate makes "
        "the model worse at first (for runs that will be extended, use schedule.kind=wsd)"
    )
    result = command(*arguments, "training.total_images=1600", "optimizer.peak_lr=1e-5")
    assert result.returncode == 0, result.stderr
    (told,) = [line for line in result.stdout.splitlines() if "another schedule" in line]
    assert told == "continuing with another schedule: the learning rate at 1,280 images was 5e-05, now 1.05e-06"


@pytest.mark.slow
def test_a_wsd_run_extended_from_before_its_decay_equals_a_longer_one(trained: Trained, tmp_path: Path) -> None:
    arguments, told = longer(trained, tmp_path, "schedule={kind: wsd, decay_images: 320}")
    assert told.endswith(
        "at 640 images was 5e-05, now 0.005; a higher rate makes the model worse at first (delete all checkpoints "
        f"newer than images-000000000320 in {tmp_path}/run/checkpoints to continue without the jump)"
    )
    for images in range(640, 1281, 320):
        shutil.rmtree(tmp_path / f"run/checkpoints/images-{images:012d}")
    result = command(*arguments)
    assert result.returncode == 0, result.stderr
    assert "another schedule" not in result.stdout
    planned = [part.replace(f"{tmp_path}/run", f"{tmp_path}/planned") for part in arguments]
    result = command(*planned)
    assert result.returncode == 0, result.stderr
    assert curve(tmp_path / "run") == curve(tmp_path / "planned")
    assert weights(tmp_path / "run") == weights(tmp_path / "planned")
