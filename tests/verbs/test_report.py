"""``report``: the page in a real browser, and what it refuses."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tarflow_scale import cli
from tarflow_scale.config.base import load_config
from tarflow_scale.config.protocols import load_protocol
from tarflow_scale.config.report import LeaderboardConfig
from tarflow_scale.registry import Registry
from tests.conftest import TOP, Trained
from tests.verbs.test_evaluate import PROTOCOLS, evaluate_arguments

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
HOSTILE = "<script>document.title='taken'</script>"


def leaderboard(folder: Path, name: str, protocol: Path, published: list[dict[str, Any]]) -> str:
    path = folder / f"{name}.yaml"
    facts = {"name": name, "title": name, "protocol": str(protocol), "published": published}
    path.write_text(yaml.safe_dump(facts))
    return str(path)


def report_arguments(folder: Path, registry: Path, run: Path) -> list[str]:
    published = [{"model": HOSTILE, "value": 3.0, "source": "a paper"}]
    boards = [leaderboard(folder, "bits", PROTOCOLS[0], published), leaderboard(folder, "pixels", PROTOCOLS[1], [])]
    generated = folder / "generated"
    lists = {"leaderboards": boards, "registries": [str(registry)], "runs": [str(run)], "generated": [str(generated)]}
    return ["report", f"report.path={folder}/out", *(f"report.{key}={json.dumps(v)}" for key, v in lists.items())]


@pytest.fixture(scope="module")
def reported(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path]:
    """Two versions with numbers, a calibrated one among them, and their page."""
    folder = tmp_path_factory.mktemp("report")
    shutil.copytree(trained.registry, folder / "registry")
    own = Trained(trained.data, trained.run, folder / "registry")
    registry = Registry(str(own.registry), "small")
    first = registry.resolve(1)
    facts = first.model_dump(mode="json", exclude={"version", "files"})
    registry.register(registry.read_files(first), facts | {"config_digest": "0" * 64}, HOSTILE)
    registry.promote("star", 1, None, {}, "shines")
    calibrate = ["generate", f"registry.path={own.registry}", "registry.model=small", "registry.version=1"]
    settings = ["shards.path=unused", "sampling.num_images=1", "sampling.batch_size=8", "--calibrate"]
    assert cli.main([*calibrate, *settings]) == 0
    for version, temperature in ((1, 1.0), (2, 0.9)):
        more = [f"registry.version={version}", f"sampling.temperature={temperature}", "cluster.executor=local"]
        assert cli.main(evaluate_arguments(own, *more)) == 0
    few = ["registry.version=1", f"shards.path={folder}/generated", "sampling.num_images=20", "cluster.executor=local"]
    assert cli.main(["generate", f"registry.path={own.registry}", "registry.model=small", *few]) == 0
    arguments = report_arguments(folder, own.registry, own.run)
    assert cli.main(arguments) == 0
    return arguments, folder / "out"


def test_markdown_has_the_numbers_of_the_registry(reported: tuple[list[str], Path]) -> None:
    text = (reported[1] / "leaderboard.md").read_text()
    registry = Registry(str(reported[1].parent / "registry"), "small")
    value = registry.state().reports[1][-1].metrics["bits_per_dim"].value
    assert f"| 1 | small@1 (star) | {value:.3f} |" in text
    assert "full-covariance Gaussian" in text


def test_the_page_is_one_file_that_names_no_other(reported: tuple[list[str], Path]) -> None:
    page = (reported[1] / "index.html").read_text()
    assert sorted(path.name for path in reported[1].iterdir()) == ["index.html", "leaderboard.md"]
    assert not re.search(r"""(?:src|href)=["'](?!data:|#)""", page)
    assert "url(" not in page
    assert HOSTILE not in page
    assert page.count("data:image/png;base64,") == 4  # of each version once, a preview, generated images


@pytest.fixture(scope="module")
def browser(reported: tuple[list[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    if CHROMIUM is None or DRIVER is None:
        pytest.skip("needs chromium and chromedriver")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    profile = tmp_path_factory.mktemp("profile")
    for flag in (
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
        "--disable-background-networking", "--disable-component-update", f"--user-data-dir={profile}",
    ):  # fmt: skip
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    try:
        driver.get((reported[1] / "index.html").as_uri())
        yield driver
    finally:
        driver.quit()


def column(browser: Any, number: int) -> list[str]:
    script = "return [...document.querySelector('table').tBodies[0].rows].map(r => r.cells[arguments[0]].textContent)"
    return browser.execute_script(script, number)


def test_it_opens_without_errors_and_requests(browser: Any, reported: tuple[list[str], Path]) -> None:
    assert browser.title == "Report"
    assert browser.get_log("browser") == []
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = {m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"}
    own = ("data:", "chrome://")  # what is in the page, and the browser's own first tab
    assert {url for url in asked if not url.startswith(own)} == {(reported[1] / "index.html").as_uri()}


def test_pictures_load_and_a_hostile_name_is_text(browser: Any) -> None:
    widths = browser.execute_script("return [...document.images].map(i => i.complete && i.naturalWidth)")
    assert len(widths) == 4
    assert all(width > 100 for width in widths)
    assert HOSTILE in browser.execute_script("return document.body.innerText")


def test_no_script_but_its_own_runs_on_the_page(browser: Any, reported: tuple[list[str], Path], tmp_path: Path) -> None:
    """Names are escaped; and if one were not, the page's policy would stop it."""
    page = (reported[1] / "index.html").read_text()
    assert page.count("<main>") == 1
    attack = "<main><script>document.title = 'script'</script><img src=x onerror=\"document.title = 'image'\">"
    (tmp_path / "attacked.html").write_text(page.replace("<main>", attack))
    try:
        browser.get((tmp_path / "attacked.html").as_uri())
        assert browser.title == "Report"
        assert sum("Content Security Policy" in entry["message"] for entry in browser.get_log("browser")) >= 2
    finally:
        browser.get((reported[1] / "index.html").as_uri())


def test_tables_sort_by_keyboard(browser: Any) -> None:
    from selenium.webdriver.common.keys import Keys

    heading = browser.find_elements("css selector", "table th button")[1]
    heading.send_keys(Keys.ENTER)
    names = column(browser, 1)
    heading.send_keys(Keys.ENTER)
    assert column(browser, 1) == names[::-1]
    heading = browser.find_elements("css selector", "table th button")[2]
    heading.send_keys(Keys.ENTER)
    values = [float(text.split()[0]) for text in column(browser, 2)]
    assert values == sorted(values)
    assert len(values) == 4  # two versions, a baseline, a published row
    assert heading.find_element("xpath", "..").get_attribute("aria-sort") == "ascending"


def test_protocol_and_iterations_open_on_demand(browser: Any) -> None:
    summary = browser.find_element("xpath", "//summary[.='How the number is measured']")
    panel = summary.find_element("xpath", "..")
    assert "num_draws" not in panel.text
    summary.click()
    assert "num_draws" in panel.text
    assert "block 1 on cpu" in browser.page_source


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_follows_the_readers_setting_with_enough_contrast(browser: Any, scheme: str) -> None:
    media = {"media": "", "features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    script = "const s = getComputedStyle(document.body); return [s.color, s.backgroundColor]"
    ink, paper = (list(map(int, re.findall(r"\d+", text)[:3])) for text in browser.execute_script(script))
    assert (sum(paper) > 600) == (scheme == "light")

    def luminance(colour: list[int]) -> float:
        linear = [c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    bright, dim = sorted(map(luminance, (ink, paper)), reverse=True)
    assert (bright + 0.05) / (dim + 0.05) > 7


def test_the_answer_comes_first(browser: Any, reported: tuple[list[str], Path]) -> None:
    """Before any table, in words: the best, the baseline, another version, and what the gate said; also as Markdown."""
    sentences = [one.text for one in browser.find_elements("css selector", ".answer p")]
    assert len(sentences) == 3  # two leaderboards and a run
    registry = Registry(str(reported[1].parent / "registry"), "small")
    value = registry.state().reports[1][-1].metrics["bits_per_dim"].value
    assert sentences[0].startswith(f"bits: small@1 and small@2 are best with {value:.3f} bits/dim (95 % interval ")
    assert "than the full-covariance Gaussian (" in sentences[0]
    assert re.search(r"better than the (champion|next best), small@[12]", sentences[1])
    assert "; a gate made it star." in " ".join(sentences)
    assert "(tarflow) has the lowest training loss: " in sentences[2]
    text = (reported[1] / "leaderboard.md").read_text()
    assert text.index(sentences[0]) < text.index("|")
    top = "return [...document.querySelectorAll('.answer, table')].map(e => e.getBoundingClientRect().top)"
    tops = browser.execute_script(top)
    assert tops[0] == min(tops)


@pytest.fixture
def phone(browser: Any) -> Iterator[Any]:
    size = {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    yield browser
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_it_fits_a_phone(phone: Any) -> None:
    widths = phone.execute_script("return [document.documentElement.scrollWidth, window.innerWidth]")
    assert widths[0] <= widths[1] == 390


def test_nothing_is_cut_off_on_a_phone(phone: Any) -> None:
    """Every cell, picture and chart that has something to show lies inside the screen, and no box hides a part."""
    outside = phone.execute_script("""
        const seen = 'td, .answer p, img, .keys li, .scale span, .chart text, figcaption';
        return [...document.querySelectorAll(seen)].map(e => [e, e.getBoundingClientRect()])
            .filter(([e, r]) => r.width && (r.left < 0 || r.right > window.innerWidth + 0.5))
            .map(([e]) => e.outerHTML.slice(0, 200));
    """)
    assert outside == []
    scrolled = "return [...document.querySelectorAll('.wide')].filter(e => e.scrollWidth > e.clientWidth).length"
    assert phone.execute_script(scrolled) == 0
    labels = "return getComputedStyle(document.querySelector('tbody td:nth-child(3)'), '::before').content"
    assert "value" in phone.execute_script(labels)


def test_charts_are_readable_on_a_phone_and_on_a_desktop(browser: Any, phone: Any) -> None:
    """Letters are about as tall as those of the text; 16 px text has letters of about 19 px, boxes included."""
    heights = """
        return [...document.querySelectorAll('.chart text')].map(e => e.getBoundingClientRect().height).filter(h => h)
    """
    small = phone.execute_script(heights)
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    large = browser.execute_script(heights)
    assert len(small) > 4
    assert len(large) > 4
    assert min(small + large) >= 12


def test_an_interval_has_a_scale(browser: Any) -> None:
    """Numbers stand under the bar, and each row's mark lies where its number is on them."""
    intervals = browser.execute_script("""
        return [...document.querySelectorAll('tr.ours')].filter(r => r.querySelector('.scale')).map(r => ({
            value: Number(r.cells[2].dataset.value),
            mark: parseFloat(r.querySelector('.bar b').style.left),
            ticks: [...r.querySelectorAll('.scale span')].map(
                s => [parseFloat(s.style.left), Number(s.textContent.replace(',', ''))])}))
    """)
    assert len(intervals) >= 2
    for one in intervals:
        (start, low), *_, (end, high) = one["ticks"]
        assert (start, end) == (0, 100)
        assert low + one["mark"] / 100 * (high - low) == pytest.approx(one["value"], abs=0.002 * (high - low))


def test_runs_alone_need_neither_leaderboard_nor_registry(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A page of the first training, before anything is evaluated; it says what it reads before it reads it."""
    assert cli.main(["report", f"report.path={tmp_path}/out", f"report.runs=[{trained.run}, {trained.run}/]"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"reading run {trained.run}\n")
    assert printed.count("reading run ") == 1
    assert f"{trained.run} (tarflow) has the lowest training loss: " in printed
    page = (tmp_path / "out/index.html").read_text()
    assert page.count("data:image/png;base64,") == 1  # the newest preview
    assert "after 1,280 images" in page
    assert "<polyline" in page
    assert "Registry history" not in page


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "a report needs runs, registries or generated (got none); set report.runs, for example"),
        (["report.leaderboards=[a.yaml]", "report.runs=[b]"], "leaderboards need registries (got none)"),
    ],
)
def test_a_report_of_nothing_is_refused(
    overrides: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["report", f"report.path={tmp_path}/out", *overrides]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_images_that_are_not_generated_yet_are_left_out_with_a_word(trained: Trained, tmp_path: Path) -> None:
    arguments = [f"report.path={tmp_path}/out", f"report.runs=[{trained.run}]", f"report.generated=[{tmp_path}/none]"]
    with pytest.warns(UserWarning, match=r"none has no samples to show \(no plan.json\); generate them"):
        assert cli.main(["report", *arguments]) == 0
    assert "Generated images" not in (tmp_path / "out/index.html").read_text()


def test_a_gate_is_asked_where_none_has_decided(
    trained: Trained, reported: tuple[list[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No gate moved an alias of this registry; the report's own is asked, and what it says is recorded nowhere."""
    before = Registry(str(reported[1].parent / "registry"), "small")
    registry = Registry(f"{tmp_path}/registry", "small")
    first = before.resolve(1)
    facts = first.model_dump(mode="json", exclude={"version", "files", "configuration"})
    registry.register(before.read_files(first), facts, "copied")
    newest = before.state().reports[1][-1]
    kept = {name: metric.model_copy(update={"per_image": None}) for name, metric in newest.metrics.items()}
    registry.attach_report(newest.model_copy(update={"grid": None, "metrics": kept}), "copied")
    events = registry.state().number
    swapped = [f"report.registries=[{tmp_path}/registry]", f"report.path={tmp_path}/out"]
    assert cli.main([*reported[0], *swapped]) == 0
    assert "; no gate has decided on small@1." in capsys.readouterr().out
    gate = tmp_path / "gate.yaml"
    gate.write_text(f"{{name: strict, requirements: [{{protocol: {PROTOCOLS[0]}, maximum: 0.5}}]}}")
    assert cli.main([*reported[0], *swapped, f"report.gate={gate}"]) == 0
    assert re.search(
        r"; gate strict refuses it: bits_per_dim ≤ 0\.5 bits/dim \(got \d\.\d{3}\)\.", capsys.readouterr().out
    )
    assert Registry(f"{tmp_path}/registry", "small").state().number == events


def test_numbers_on_different_images_are_refused_and_nothing_is_written(
    reported: tuple[list[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(reported[1].parent / "registry", tmp_path / "registry")
    registry = Registry(f"{tmp_path}/registry", "small")
    newest = registry.state().reports[2][-1]
    bits = newest.metrics["bits_per_dim"].model_copy(update={"protocol_id": "f" * 64})
    registry.attach_report(newest.model_copy(update={"metrics": {"bits_per_dim": bits}}), "other images")
    swapped = [f"report.registries=[{tmp_path}/registry]", f"report.path={tmp_path}/out"]
    assert cli.main([*reported[0], *swapped]) == 2
    assert "leaderboard bits would mix protocol ids (got small@" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_bad_input_is_one_line(
    reported: tuple[list[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "log.jsonl").write_text('{"images": 1}\nnot json\n')
    for override, message in (
        ("report.registries=[nowhere]", "no registry at nowhere"),
        (f"report.runs=[{tmp_path}]", "is not the folder of a training run"),
        (
            "report.leaderboards=[nothing.yaml]",
            "report.leaderboards: cannot read the leaderboard file nothing.yaml (No such file or directory); check the "
            "path, which is relative to ",
        ),
    ):
        assert cli.main([*reported[0], override]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1


def test_a_leaderboard_without_rows_says_so(trained: Trained, tmp_path: Path) -> None:
    protocol = tmp_path / "nobody.yaml"
    protocol.write_text("{name: nobody, metric: bits_per_dim, bit_depth: 4, seed: 77}")
    path = tmp_path / "board.yaml"
    path.write_text(f"{{name: empty, title: Empty, protocol: {protocol}}}")
    arguments = [f"report.leaderboards=[{path}]", f"report.registries=[{trained.registry}]", "report.title=x"]
    with pytest.warns(
        UserWarning, match="leaderboard empty has no row from report.registries: no version of small was evaluated by"
    ):
        assert cli.main(["report", *arguments, f"report.path={tmp_path}/out"]) == 0


@pytest.mark.parametrize("file", sorted((TOP / "evals/leaderboards").glob("*.yaml")), ids=lambda file: file.name)
def test_every_leaderboard_names_a_protocol_and_sources(file: Path) -> None:
    board = load_config(LeaderboardConfig, str(file), [])
    assert load_protocol(str(TOP / board.protocol)).digest
    assert all(row.source for row in board.published)
    values = [row.value for row in board.published]
    assert values == sorted(values)
