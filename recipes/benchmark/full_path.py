"""What came of the full path: predictions tables of `lora.yaml` become a table, and rows of figures.

    python recipes/benchmark/full_path.py erm=runs/lora/erm.parquet robust_filtered=runs/lora/robust_filtered.parquet

Each is judged as it is, with the best and with the conservative temperature of its validation rows.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
from datasets import Dataset


ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "recipes"))

from benchmark import scoring  # noqa: E402
from benchmark.report import CELL_FIGURES, cell_text, markdown, name_of  # noqa: E402
from benchmark.settings import HARD_BELOW  # noqa: E402


POSTHOC = ("none", "temperature", "conservative_temperature")


def read(path: str) -> scoring.Table:
    """A predictions table as the benchmark scores it: rows on which the raters disagree are hard."""
    table = Dataset.from_parquet(path)
    agreement = np.asarray(table["agreement"], dtype=float)
    return scoring.read(table.add_column("hard", (agreement < HARD_BELOW).tolist()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tables", nargs="+", metavar="METHOD=TABLE")
    parser.add_argument("--output", type=Path, default=ROOT / "recipes" / "results" / "full_path.parquet")
    options = parser.parse_args()
    rows = []
    for name, _, path in (argument.partition("=") for argument in options.tables):
        table = read(path)
        for posthoc in POSTHOC:
            rows += scoring.score(scoring.calibrated(table, posthoc), {"method": name, "posthoc": posthoc})
    scoring.write_rows(rows, options.output)
    sets = list(dict.fromkeys((row["test"], row["subset"]) for row in rows))
    lines = []
    for name, posthoc in dict.fromkeys((row["method"], row["posthoc"]) for row in rows):
        judged = [row for row in rows if (row["method"], row["posthoc"]) == (name, posthoc)]
        cells = [cell_text([row[figure] for figure in CELL_FIGURES]) for row in judged]
        lines.append([name_of((name, "native", 1, posthoc)), *cells])
    print(markdown(["method", *(test + ", hard" * (subset == "hard") for test, subset in sets)], lines))


if __name__ == "__main__":
    main()
