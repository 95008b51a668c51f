"""Results files: the settings of an experiment and every run, each with the machine, the versions and the commit that made it."""

import json
from collections.abc import Callable, Hashable, Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.machine import machine

DIRECTORY = Path(__file__).parent / "results"


def read(path: Path) -> list[dict]:
    """Return the runs of a results file; none if there is no such file."""
    return json.loads(path.read_text())["runs"] if path.exists() else []


def complete(
    path: Path,
    settings: Mapping[str, Any],
    cases: Iterable[Hashable],
    case_of: Callable[[dict], Hashable],
    run: Callable[[Any], dict],
) -> None:
    """Run the cases that a results file lacks, and add each run to the file when it ends.

    Args:
        path: of the results file.
        settings: what all runs have in common; written into the file.
        cases: in the order in which to run them.
        case_of: returns the case of a run that is in the file.
        run: returns the run of a case.
    """
    for case in cases:
        if case in map(case_of, read(path)):
            continue
        made_on, found = machine(), run(case)
        made_on["load_after"] = machine()["load_before"]
        write(path, settings, [*read(path), found | {"made_on": made_on}])


def write(path: Path, settings: Mapping[str, Any], runs: list[dict]) -> None:
    """Write a results file with one line per run, so that a difference shows which run changed."""
    lines = ",\n".join(json.dumps(run, allow_nan=False) for run in runs)
    path.parent.mkdir(exist_ok=True)
    path.write_text(f'{{"settings": {json.dumps(settings, allow_nan=False)},\n"runs": [\n{lines}\n]}}\n')
