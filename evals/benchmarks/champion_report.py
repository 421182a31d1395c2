"""Write the report of a champion, with the origin of the version, as a committed results file.

python evals/benchmarks/champion_report.py runs/demo/registry digits --output evals/results/champion-digits.json
"""

import argparse
import json
from pathlib import Path

from evals.benchmarks.measuring import device_name
from tarflow_scale.registry import Registry


def main() -> None:
    """Read and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("registry")
    parser.add_argument("model")
    parser.add_argument("--alias", default="champion")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    arguments = parser.parse_args()
    registry = Registry(arguments.registry, arguments.model)
    state, version = registry.state(), registry.resolve(arguments.alias)
    promotions = [fact.number for fact in state.history if fact.kind == "promote" and fact.version == version.version]
    evaluated = [fact.time for fact in state.history if fact.kind == "evaluate" and fact.version == version.version]
    content = {
        "command": f"python evals/benchmarks/champion_report.py {arguments.registry} {arguments.model}",
        "date": evaluated[-1][:10],
        "device": device_name("cpu"),
        "alias": arguments.alias,
        "version": version.model_dump(mode="json"),
        "report": state.reports[version.version][-1].model_dump(mode="json"),
        "decision": registry.log.read(promotions[-1]).payload["decision"],
    }
    arguments.output.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
