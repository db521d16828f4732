"""The commands that make predictions tables and read them: `check`, `predict`, `evaluate`, `calibrate`, `report`."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .command import Command, Options, Outcome, named_files
from .interrupted import kept_by_predicting
from .own_data import add_data_options, given_data_options, own_recipe, set_name
from .tables import add_reading, add_samples, given, grouped_by, judged_by, read_given, without_calibration
from .verdict import verdict


if TYPE_CHECKING:
    from datasets import Dataset

    from .recipe import Recipe

_TABLE = "predictions.parquet"
_DATA_HELP = "a .csv, .tsv, .jsonl, .json or .parquet file, or ID:SPLIT of the Hub"


def _add_check(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="Hub id or folder")
    parser.add_argument("--data", required=True, help=_DATA_HELP)
    parser.add_argument(
        "--group", metavar="COLUMN", help="column whose values are judged one by one, such as language"
    )
    parser.add_argument("--output", default="moecal-check", help="folder for the report (default: moecal-check)")
    _add_running(parser)
    add_data_options(parser)


def _add_running(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--resume", action="store_true", help="go on where a run that was killed stopped")
    parser.add_argument("--raw", action="store_true", help="leave the calibration out that the checkpoint carries")


def _check(options: Options) -> Outcome:
    from ..report import collect, format_table, write_report
    from .recipe import read_recipe
    from .runs import predict_recipe

    folder, name = Path(options.output), set_name(options.data)
    recipe = read_recipe("the command line", own_recipe(options, groups={name: options.data}))
    folder.mkdir(parents=True, exist_ok=True)
    table = predict_recipe(
        recipe,
        model=options.model,
        batch_size=options.batch_size,
        output=folder / _TABLE,
        resume=options.resume,
        raw=options.raw,
    )
    tables = {"as it is": table}
    if "calibration" in table.column_names:
        tables = {"without calibration": without_calibration(table), "calibrated": table}
    title = f"{options.model} on {options.data}"
    metrics = collect(tables, title=title)
    last = list(tables)[-1]
    found = verdict([row for row in metrics["rows"] if row["method"] == last])
    write_report(tables, folder, title=title)
    notes = [*_notes(table, recipe), *_next_step(table, options, folder)]
    rows = [{key: value for key, value in row.items() if key != "diagram"} for row in metrics["rows"]]
    files = {"report": str(folder / "report.html"), "predictions": str(folder / _TABLE)}
    written = f"\nreport: {files['report']}\npredictions: {files['predictions']}"
    lines = [format_table(metrics), f"\n{found['sentence']}", *notes, written]
    return Outcome({**found, "notes": notes, "rows": rows, **files}, lines)


def _notes(table: Dataset, recipe: Recipe) -> list[str]:
    """What a person has to know about a table that was just made."""
    from .runs import truncated_line

    notes = []
    if "calibration" in table.column_names:
        method = table[0]["calibration"]
        notes.append(f"Calibrated by {method}, which the checkpoint carries (--raw leaves it out).")
    cut = sum(table["truncated"][:]) if "truncated" in table.column_names else 0
    if cut:
        notes.append(truncated_line("", cut, len(table), recipe.max_length) + " (column truncated).")
    return notes


def _next_step(table: Dataset, options: Options, folder: Path) -> list[str]:
    """What a calibration would do, judged on held-out rows, and how to have it."""
    from ..calibration.selection import calibrate_table

    if "calibration" in table.column_names:
        from ..hub import find_record

        record = find_record(options.model)
        same = record is not None and record.data.get("name") == Path(options.data).name
        return ["It was fitted on data of this name: see what it does on rows that it has not seen."] if same else []
    if not {"probs", "logits"} & set(table.column_names):
        return []
    try:
        result = calibrate_table(table)
    except ValueError as error:
        return [f"No calibration can be fitted on these rows: {error}"]
    if result.calibrator.method == "none":
        return ["No calibration does better on held-out rows than none."]
    before, after = (f"{figures['ece']:.3f}" for figures in (result.before, result.after))
    words = ["moecal", "calibrate", str(folder / _TABLE), "--model", options.model]
    words += ["--data-name", Path(options.data).name]
    gain = f"A calibration ({result.calibrator.method}) takes the ECE of held-out rows from {before} to {after}"
    if not Path(options.model).is_dir():
        return [f"{gain}. It is written into a folder of weights: hf download {options.model} --local-dir FOLDER"]
    return [f"{gain}:\n  {shlex.join(words)}"]


def _kept_by_check(options: Options) -> str:
    return kept_by_predicting(Path(options.output) / _TABLE)


def _add_predict(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="Hub id or folder")
    parser.add_argument("--config", help="recipe that names the sets; or give --data")
    parser.add_argument("--data", nargs="+", help=f"instead of a recipe: {_DATA_HELP}; or NAME=FILE")
    parser.add_argument("--group", metavar="COLUMN", help="with --data: column whose values are the groups")
    parser.add_argument("--sets", nargs="+", help="groups of the recipe, train or validation (default: all groups)")
    parser.add_argument("--output", required=True, help="Parquet file to write")
    _add_running(parser)
    parser.add_argument("--hard-routing", type=int, metavar="K", help="keep only the K strongest experts per token")
    parser.add_argument("--readout", help="native, mixture or soft_mixture (default: the checkpoint's or recipe's)")
    parser.add_argument("--readout-experts", metavar="K", help="experts of a soft mixture, or auto (default: all)")
    add_data_options(parser)


def _predict(options: Options) -> Outcome:
    from ..readouts.mixture import parse_experts
    from .runs import predict_recipe

    recipe = _recipe(options)
    table = predict_recipe(
        recipe,
        model=options.model,
        sets=options.sets,
        batch_size=options.batch_size,
        hard_top_k=options.hard_routing,
        readout=options.readout,
        readout_experts=parse_experts(options.readout_experts),
        output=options.output,
        resume=options.resume,
        raw=options.raw,
    )
    notes = _notes(table, recipe)
    lines = [*notes, f"{len(table):,} rows, {len(table.column_names)} columns: {options.output}"]
    data = {"output": options.output, "rows": len(table), "columns": table.column_names, "notes": notes}
    return Outcome(data, lines)


def _recipe(options: Options) -> Recipe:
    """The recipe that is named, or that the options say."""
    from .recipe import load_recipe, read_recipe

    if (options.config is None) == (options.data is None):
        raise ValueError("give either a recipe (--config FILE) or data (--data FILE --text COLUMN --label COLUMN).")
    if options.config is not None:
        given = given_data_options(options) + (["--group"] if options.group is not None else [])
        if given or options.task is not None:
            raise ValueError(
                f"the recipe says what is in the data, so {(given or ['--task'])[0]} goes with --data only."
            )
        return load_recipe(options.config)
    if options.sets is not None:
        raise ValueError("--sets names sets of a recipe; with --data name files.")
    return read_recipe("the command line", own_recipe(options, groups=_given_sets(options.data)))


def _given_sets(given: list[str]) -> dict[str, str]:
    named = [item if "=" in item and not Path(item).exists() else f"{set_name(item)}={item}" for item in given]
    return named_files(named, "tweets=tweets.csv")


def _kept_by_predict(options: Options) -> str:
    return kept_by_predicting(options.output)


def _add_evaluate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("table", nargs="?", help="predictions table: .parquet, .jsonl, .csv or .tsv")
    add_samples(parser)
    parser.add_argument("--group", default="group", help="column that names the group (default: group)")
    parser.add_argument("--confidence", metavar="COLUMN", help="judge this confidence, with --correct")
    parser.add_argument("--correct", metavar="COLUMN", help="column that says whether, or how far, a row is right")
    parser.add_argument("--bins", type=int, default=15)
    add_reading(parser)


def _evaluate(options: Options) -> Outcome:
    from ..metrics import table_report
    from ..report import collect, format_table

    table = judged_by(grouped_by(given(options), options.group), options.confidence, options.correct)
    if options.json:
        return Outcome(table_report(table, bins=options.bins))
    note = []
    if "calibration" in table.column_names:
        note = [f"These are calibrated figures ({table[0]['calibration']}); for those without: moecal predict --raw."]
    return Outcome({}, [format_table(collect({"": table}, title="", bins=options.bins)), *note])


def _add_calibrate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("table", nargs="?", help="predictions on labelled data that the model was not trained on")
    add_samples(parser)
    parser.add_argument("--model", required=True, help="folder of the checkpoint")
    parser.add_argument("--method", default="auto", help="auto (cross-validated choice) or a method's name")
    parser.add_argument("--data-name", help="name of the data, for the record")
    add_reading(parser)


def _calibrate(options: Options) -> Outcome:
    from ..hub import calibrate

    table = given(options)
    data = {"name": options.data_name or Path(options.table or options.lm_eval_samples).name}
    result = calibrate(options.model, table, method=options.method, data=data, progress=True)
    file = str(Path(options.model) / "calibration.json")
    held_out = [f"Held out, ECE {result.before['ece']:.3f} becomes {result.after['ece']:.3f}. Written: {file}"]
    found: dict[str, Any] = {"method": result.calibrator.method, "comparison": result.comparison, "data": result.data}
    found |= {"before": result.before, "after": result.after, "warnings": result.warnings, "file": file}
    return Outcome(found, [*result.lines(), *held_out])


def _add_report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("tables", nargs="+", metavar="NAME=TABLE", help="method and its predictions table")
    parser.add_argument("--output", required=True, help="folder to write")
    parser.add_argument("--title", default="Calibration report")
    parser.add_argument(
        "--hard-routed", nargs="+", default=(), metavar="NAME=TABLE", help="the same methods' predict --hard-routing 1"
    )
    parser.add_argument("--hard", help="boolean column that marks the hard subset")
    add_reading(parser)


def _report(options: Options) -> Outcome:
    from ..report import write_report

    def read(items: list[str]) -> dict[str, Dataset]:
        files = named_files(items, "ERM=erm.parquet")
        return {name: read_given(path, options) for name, path in files.items()}

    tables, hard_routed = read(options.tables), read(options.hard_routed)
    written = write_report(
        tables, options.output, title=options.title, hard=options.hard, hard_routed=hard_routed or None
    )
    return Outcome({"report": str(written)}, [f"report: {written}"])


TABLE_COMMANDS = (
    Command(
        "check",
        "Say whether a model's confidence can be trusted on your data, and for whom not.",
        "moecal check --model my-checkpoint --data reviews.csv --text review --label stars --group language",
        _add_check,
        _check,
        _kept_by_check,
    ),
    Command(
        "predict",
        "Write the predictions table of a model on your data or a recipe's sets, as calibrated as the checkpoint is.",
        "moecal predict --model my-checkpoint --data tweets.csv --text tweet --label mood --output tweets.parquet",
        _add_predict,
        _predict,
        _kept_by_predict,
    ),
    Command(
        "evaluate",
        "Print the calibration figures of a predictions table, per group.",
        "moecal evaluate tweets.parquet --group language",
        _add_evaluate,
        _evaluate,
    ),
    Command(
        "calibrate",
        "Fit a post-hoc calibration and write calibration.json.",
        "moecal calibrate validation.parquet --model my-checkpoint",
        _add_calibrate,
        _calibrate,
    ),
    Command(
        "report",
        "Write an HTML and Markdown report with reliability diagrams.",
        "moecal report before=raw.parquet after=calibrated.parquet --output report",
        _add_report,
        _report,
        lambda options: f"{options.output} may hold a part of the report; run it again.",
    ),
)
