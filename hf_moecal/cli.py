"""`moecal`: train, predict, evaluate, calibrate, report, monitor and push from the command line.

`moecal COMMAND --help` tells each command's options. Bad input ends with one sentence and exit code 2.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code (0 fine, 1 an alarm of `monitor`, 2 bad input)."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if rest and options.command != "train":
        parser.error(f"unknown arguments: {' '.join(rest)}; see moecal {options.command} --help")
    try:
        return options.run(options, rest) or 0
    except ValueError as error:
        print(f"moecal {options.command}: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="moecal", description="Confidence calibration for mixture-of-experts models."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="fine-tune as a recipe says; any field can be overridden: --eta 1.0")
    train.add_argument("--config", required=True, help="recipe, a YAML file")
    train.add_argument("--resume", action="store_true", help="go on from the last checkpoint in the output folder")
    train.set_defaults(run=_train)

    predict = commands.add_parser("predict", help="model + data -> predictions table")
    predict.add_argument("--model", required=True, help="Hub id or folder")
    predict.add_argument("--config", required=True, help="recipe whose `groups` (or --sets) are predicted")
    predict.add_argument("--sets", nargs="+", help="names: groups of the recipe, or validation")
    predict.add_argument("--output", required=True, help="Parquet file to write")
    predict.add_argument("--batch-size", type=int, default=32)
    predict.set_defaults(run=_predict)

    evaluate = commands.add_parser("evaluate", help="calibration figures of a predictions table, per group")
    evaluate.add_argument("table", nargs="?", help="predictions table: .parquet, .jsonl or .csv")
    evaluate.add_argument("--lm-eval-samples", help="a --log_samples file of lm-evaluation-harness instead")
    evaluate.add_argument("--group", default="group", help="column that names the group (default: group)")
    evaluate.add_argument("--bins", type=int, default=15)
    evaluate.add_argument("--json", action="store_true", help="print JSON")
    evaluate.set_defaults(run=_evaluate)
    return parser


def _train(options: argparse.Namespace, rest: list[str]) -> None:
    from .recipe import load_recipe
    from .runs import train_recipe

    train_recipe(load_recipe(options.config), overrides=rest, resume=options.resume)


def _predict(options: argparse.Namespace, rest: list[str]) -> None:
    from .recipe import load_recipe
    from .runs import predict_recipe

    recipe = load_recipe(options.config)
    table = predict_recipe(recipe, model=options.model, sets=options.sets, batch_size=options.batch_size)
    table.to_parquet(options.output)
    print(f"{len(table)} rows, {len(table.column_names)} columns -> {options.output}")


def _evaluate(options: argparse.Namespace, rest: list[str]) -> None:
    from .metrics import table_report
    from .report import collect, format_table
    from .table import read_table

    if (options.table is None) == (options.lm_eval_samples is None):
        raise ValueError("Give either a predictions table or --lm-eval-samples FILE.")
    if options.table is not None:
        table = read_table(options.table)
    else:
        from .lm_eval import read_lm_eval_samples

        table = read_lm_eval_samples(options.lm_eval_samples)
    if options.json:
        groups = options.group if options.group in table.column_names else None
        print(json.dumps(table_report(table, groups=groups, bins=options.bins), indent=1))
        return
    if options.group != "group":
        if options.group not in table.column_names:
            raise ValueError(f"The table has no column {options.group!r}; it has {table.column_names}.")
        table = table.remove_columns("group") if "group" in table.column_names else table
        table = table.rename_column(options.group, "group")
    print(format_table(collect({"": table}, title="", bins=options.bins)))


if __name__ == "__main__":
    sys.exit(main())
