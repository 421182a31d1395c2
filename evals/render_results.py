"""Write the measurements of README.md and evals/README.md from `evals/results/`; ``--check`` only compares.

    python evals/render_results.py [--check]

A page marks where they go with a pair of comments, ``<!-- results KIND ARGUMENTS -->`` and ``<!-- end -->``; the text
between them is replaced. FILE is a name in `evals/results/` without ``.json``; ``=LABEL`` may follow a NAME or COLUMN.

    figures FILE [NAME ..]      how FILE was measured, and its figures: all, or those that are named
    compare FILE .. : COLUMN .. a row for each model, from the figures MODEL_COLUMN; the lowest first
    files FILE .. : NAME ..     a row for each file
    champions FILE ..           the numbers of champions, as `evals/benchmarks/champion_report.py` wrote them
    text FILE                   what a command printed (FILE with its suffix)
"""

import argparse
import json
import os
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

TOP = Path(__file__).resolve().parents[1]
RESULTS = TOP / "evals/results"
PAGES = (TOP / "README.md", TOP / "evals/README.md")
_BLOCK = re.compile(r"(<!-- results (.*?) -->\n).*?(<!-- end -->)", re.DOTALL)
_MODELS = {
    "tarflow": "TarFlow", "glow": "Glow", "realnvp": "RealNVP", "nice": "NICE", "maf": "MAF", "iaf": "IAF",
    "gaussian": "full-covariance Gaussian",
}  # fmt: skip


def rendered(path: Path) -> str:
    """A page with its measurements."""
    return _BLOCK.sub(lambda block: f"{block[1]}{_block(block[2], path.parent)}\n{block[3]}", path.read_text("utf-8"))


def _block(arguments: str, folder: Path) -> str:
    kind, *words = shlex.split(arguments)
    if kind == "text":
        return f"```\n{(RESULTS / words[0]).read_text(encoding='utf-8').rstrip()}\n```"
    if kind == "figures":
        return _figures(words[0], words[1:], folder)
    files = words[: words.index(":")] if ":" in words else words
    columns = [_name_and_label(column) for column in words[len(files) + 1 :]]
    if kind == "compare":
        return _compare(files, columns, folder)
    return _champions(files, folder) if kind == "champions" else _files(files, columns, folder)


def _figures(name: str, chosen: Sequence[str], folder: Path) -> str:
    """Those that were asked for; others are folded. Faults are named by their descriptions."""
    results = _read(name)
    figures, faults = results["figures"], results.get("faults", {})
    if chosen:
        labels = dict(map(_name_and_label, chosen))
        return _table(("figure", "got", "asked"), [_row(label, figures[key]) for key, label in labels.items()])
    asked, others = list[list[str]](), list[list[str]]()
    for key, figure in figures.items():
        cases = figures.get(f"{key}_cases")
        label = faults.get(key, _words(key)).rstrip(".") + (f" ({cases['got']:.0f} cases)" if cases else "")
        if not (key.endswith("_cases") and faults):
            (asked if figure["asked"] else others).append(_row(label, figure))
    parts = [_measured(name, results, folder)]
    parts += [_table(("figure", "got", "asked"), asked)] if asked else []
    if others and not asked:
        parts.append(_table(("figure", "got"), [row[:2] for row in others]))
    elif others:
        table = _table(("figure", "got"), [row[:2] for row in others])
        parts.append(f"<details><summary>others</summary>\n\n{table}\n\n</details>")
    return "\n\n".join(parts)


def _compare(files: Sequence[str], columns: Sequence[tuple[str, str]], folder: Path) -> str:
    """Models side by side; ``±`` is a standard error."""
    rows: list[tuple[float, list[str]]] = []
    sources: list[str] = []
    for name in files:
        results = _read(name)
        figures, first = results["figures"], f"_{columns[0][0]}"
        sources.append(_measured(name, results, folder))
        for model in (key.removesuffix(first) for key in figures if key.endswith(first)):
            keys = [f"{model}_{column}" for column, _ in columns]
            cells = [_with_error(figures, key) if key in figures else "" for key in keys]
            rows.append((figures[keys[0]]["got"], [_MODELS.get(model, _words(model)), *cells]))
    heads = ["", *(label for _, label in columns)]
    return "\n\n".join([*sources, _table(heads, [row for _, row in sorted(rows)])])


def _files(files: Sequence[str], columns: Sequence[tuple[str, str]], folder: Path) -> str:
    rows = [
        [_link(name, folder), *(_number(_read(name)["figures"][column]["got"]) for column, _ in columns)]
        for name in files
    ]
    return _table(["results", *(label for _, label in columns)], rows)


def _champions(files: Sequence[str], folder: Path) -> str:
    rows: list[list[str]] = []
    for name in files:
        results = _read(name)
        version, report = results["version"], results["report"]
        model = f"{report['model']}@{version['version']}, {version['parameters'] / 1e6:.2f} M parameters"
        for metric in report["metrics"].values():
            value = f"{metric['value']:.4f} ± {metric['standard_error']:.4f} {metric['unit']}"
            measure = f"{metric['protocol']} `{metric['protocol_id'][:12]}`"
            seen = f"{version['images_seen']:,}"
            rows.append([model, seen, measure, value, f"{metric['num_images']:,}", _link(name, folder)])
    return _table(("champion", "images seen", "protocol and id", "value", "images", "report"), rows)


def _read(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def _measured(name: str, results: dict[str, Any], folder: Path) -> str:
    """When, where and how; models of one file may have been measured apart."""
    places: dict[str, list[str]] = {}
    sources: dict[str, dict[str, Any]] = results.get("measured", {"": results})
    for model, source in sources.items():
        place = f"{source['date']}, {source['device']}, commit {source['git_commit'][:12]}"
        places.setdefault(place, []).append(_MODELS.get(model, model))
    text = "; ".join(", ".join(filter(None, [place, *models])) for place, models in places.items())
    return f"{_link(name, folder)}: {text}; torch {results['versions']['torch']}. `{results['command']}`"


def _link(name: str, folder: Path) -> str:
    return f"[{name}]({os.path.relpath(RESULTS / f'{name}.json', folder)})"


def _row(label: str, figure: dict[str, Any]) -> list[str]:
    got, unit = figure["got"], figure["unit"]
    share = f"{got:.1%}{unit.removeprefix('fraction')}" if unit.startswith("fraction") else ""
    return [label, share or f"{_number(got)} {unit}".rstrip(), figure["asked"]]


def _number(value: float) -> str:
    """Four digits."""
    if value == int(value) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.1e}" if abs(value) < 0.001 else f"{value:#.4g}"


def _with_error(figures: dict[str, Any], key: str) -> str:
    error = figures.get(f"{key}_standard_error")
    return _number(figures[key]["got"]) + (f" ± {error['got']:.3f}" if error else "")


def _name_and_label(word: str) -> tuple[str, str]:
    name, _, label = word.partition("=")
    return name, label or _words(name)


def _words(name: str) -> str:
    return name.replace("_", " ")


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (heads, ["---"] * len(heads), *rows))


def main() -> None:
    """Render or compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="exit with 1 when a page differs from the results")
    check = parser.parse_args().check
    for page in PAGES:
        text = rendered(page)
        if check and text != page.read_text("utf-8"):
            sys.exit(f"{page.relative_to(TOP)} differs from evals/results; run: python evals/render_results.py")
        if not check:
            page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
