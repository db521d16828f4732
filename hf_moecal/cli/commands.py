"""`moecal`: plan, train, predict, evaluate, calibrate, report, monitor and publish from the command line.

`moecal COMMAND --help` tells each command's options. Bad input ends with one sentence and exit code 2.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .tables import add_samples, given, grouped_by, judged_by, read_given
from .watch import add_monitor, run_monitor


if TYPE_CHECKING:
    from datasets import Dataset

Options = argparse.Namespace


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code: 0 fine, 1 drift (`monitor`), 2 bad input."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if rest and options.command not in ("train", "plan"):
        parser.error(f"unknown arguments: {' '.join(rest)}; see moecal {options.command} --help")
    options.overrides = rest
    try:
        return options.run(options) or 0
    except (ValueError, OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and type(error).__name__ != "PublishError":
            raise  # not bad input: the traceback is what helps
        print(f"moecal {options.command}: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="moecal", description="Confidence calibration for mixture-of-experts models."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[Options], int | None], about: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=about, description=about)
        added.set_defaults(run=run)
        return added

    train = command("train", _train, "Fine-tune as a recipe says; any field can be overridden, as in --eta 1.0.")
    train.add_argument("--config", required=True, help="recipe, a YAML file")
    train.add_argument("--resume", action="store_true", help="go on from the last checkpoint in the output folder")

    plan = command(
        "plan", _plan, "Say what a recipe trains, the memory it needs and what a step costs, without the weights."
    )
    plan.add_argument("--config", required=True, help="recipe; any field can be overridden, as in train")
    plan.add_argument("--accelerate", metavar="FILE", help="configuration for accelerate launch (default: one device)")
    plan.add_argument("--rows", type=int, help="training rows (default: those of a local file)")
    plan.add_argument("--judged", type=int, help="labelled positions per sequence of a language model (default: all)")
    plan.add_argument("--json", action="store_true", help="print JSON, memory in bytes")

    predict = command(
        "predict", _predict, "Write the (uncalibrated) predictions table of a model on the sets of a recipe."
    )
    predict.add_argument("--model", required=True, help="Hub id or folder")
    predict.add_argument("--config", required=True, help="recipe that names the sets")
    predict.add_argument("--sets", nargs="+", help="groups of the recipe, train or validation (default: all groups)")
    predict.add_argument("--output", required=True, help="Parquet file to write")
    predict.add_argument("--batch-size", type=int, default=32)
    predict.add_argument("--hard-routing", type=int, metavar="K", help="keep only the K strongest experts per token")
    predict.add_argument("--resume", action="store_true", help="go on where a run that was killed stopped")
    predict.add_argument("--readout", help="native, mixture or soft_mixture (default: the recipe's)")
    predict.add_argument("--readout-experts", metavar="K", help="experts of a soft mixture, or auto (default: all)")

    evaluate = command("evaluate", _evaluate, "Print the calibration figures of a predictions table, per group.")
    evaluate.add_argument("table", nargs="?", help="predictions table: .parquet, .jsonl or .csv")
    add_samples(evaluate)
    evaluate.add_argument("--group", default="group", help="column that names the group (default: group)")
    evaluate.add_argument("--confidence", metavar="COLUMN", help="judge this confidence, with --correct")
    evaluate.add_argument("--correct", metavar="COLUMN", help="column that says whether, or how far, a row is right")
    evaluate.add_argument("--bins", type=int, default=15)
    evaluate.add_argument("--json", action="store_true", help="print every figure as JSON")

    calibrate = command("calibrate", _calibrate, "Fit a post-hoc calibration and write calibration.json.")
    calibrate.add_argument("table", nargs="?", help="predictions on labelled data that the model was not trained on")
    add_samples(calibrate)
    calibrate.add_argument("--model", required=True, help="folder of the checkpoint")
    calibrate.add_argument("--method", default="auto", help="auto (cross-validated choice) or a method's name")
    calibrate.add_argument("--data-name", help="name of the data, for the record")

    bake = command("bake", _bake, "Copy a checkpoint with its temperature inside the weights, for any runtime.")
    bake.add_argument("--model", required=True, help="folder with calibration.json")
    bake.add_argument("--output", required=True, help="folder to write")

    distill = command(
        "distill", _distill, "Train a model's native readout to match its mixture or committee, without labels."
    )
    distill.add_argument(
        "--model", required=True, help="folder of a classifier; its calibration.json names the readout"
    )
    distill.add_argument("--data", required=True, help="rows to match it on: .parquet, .jsonl or .csv")
    distill.add_argument("--test", help="labelled rows on which to say how much survives")
    distill.add_argument("--output", required=True, help="folder to write")
    distill.add_argument("--text", default="text", help="column to tokenize (default: text)")
    distill.add_argument("--max-length", type=int, help="tokens after which a text is cut")
    distill.add_argument("--readout", help="the teacher, where calibration.json names none")
    for name, default in {"epochs": 3, "learning-rate": 1e-4, "batch-size": 32, "seed": 0}.items():
        distill.add_argument(f"--{name}", type=type(default), default=default)
    distill.add_argument("--prefix-cache", metavar="FOLDER", help="for the states of the frozen layers")

    report = command("report", _report, "Write an HTML and Markdown report with reliability diagrams.")
    report.add_argument("tables", nargs="+", metavar="NAME=TABLE", help="method and its predictions table")
    report.add_argument("--output", required=True, help="folder to write")
    report.add_argument("--title", default="Calibration report")
    report.add_argument(
        "--hard-routed", nargs="+", default=(), metavar="NAME=TABLE", help="the same methods' predict --hard-routing 1"
    )
    report.add_argument("--hard", help="boolean column that marks the hard subset")

    add_monitor(command("monitor", run_monitor, "Compare a log with a reference; exit code 1 on drift."))

    probe = command("probe", _probe, "Show the routing of a text and what each expert alone would predict.")
    probe.add_argument("--model", required=True, help="Hub id or folder")
    probe.add_argument("--text", required=True)
    probe.add_argument("--label", type=int, help="the true class, for the regret of a classifier")
    probe.add_argument("--json", action="store_true", help="print JSON")

    push = command("push", _push, "Publish a checkpoint with its calibration, diagrams and model card.")
    push.add_argument("--model", required=True, help="folder of the checkpoint")
    push.add_argument("--repo-id", required=True, help="ORG/NAME")
    push.add_argument("--table", help="predictions table whose figures go into the card, per group")
    push.add_argument("--license", help="the model's license, as the Hub names them (default: the base model's)")
    push.add_argument("--private", action="store_true", default=None)
    push.add_argument("--revision", help="branch")
    for added in (evaluate, calibrate, report, push):
        added.add_argument("--renormalize", action="store_true", help="divide each row of rounded probs by its sum")
        added.add_argument(
            "--labels", metavar="NAMES", help="classes in order, as in negative,positive, if not numbers"
        )
    return parser


def _train(options: Options) -> None:
    from .recipe import load_recipe
    from .runs import train_recipe

    train_recipe(load_recipe(options.config), overrides=options.overrides, resume=options.resume)


def _plan(options: Options) -> None:
    from .plan import make_plan, read_launch
    from .recipe import load_recipe

    launch = None if options.accelerate is None else read_launch(options.accelerate)
    plan = make_plan(
        load_recipe(options.config),
        overrides=options.overrides,
        launch=launch,
        rows=options.rows,
        judged=options.judged,
    )
    print(json.dumps(plan.to_dict(), indent=1) if options.json else "\n".join(plan.lines()))


def _predict(options: Options) -> None:
    from accelerate import PartialState

    from ..readouts.mixture import parse_experts
    from .recipe import load_recipe
    from .runs import predict_recipe

    recipe = load_recipe(options.config)
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
    )
    PartialState().print(f"{len(table):,} rows, {len(table.column_names)} columns: {options.output}")


def _evaluate(options: Options) -> None:
    from ..metrics import table_report
    from ..report import collect, format_table
    from ..report.data import plain

    table = judged_by(grouped_by(given(options), options.group), options.confidence, options.correct)
    if options.json:
        print(json.dumps(plain(table_report(table, bins=options.bins)), indent=1, allow_nan=False))
    else:
        print(format_table(collect({"": table}, title="", bins=options.bins)))


def _calibrate(options: Options) -> None:
    from ..hub import calibrate

    table = given(options)
    data = {"name": options.data_name or Path(options.table or options.lm_eval_samples).name}
    result = calibrate(options.model, table, method=options.method, data=data, progress=True)
    print("\n".join(result.lines()))


def _bake(options: Options) -> None:
    from ..hub.bake import bake

    print(f"calibrated checkpoint: {bake(options.model, output_dir=options.output)}")


def _distill(options: Options) -> None:
    from ..table import read_table
    from ..training.distillation import distill_checkpoint

    settings = {name: getattr(options, name) for name in ("epochs", "learning_rate", "batch_size", "seed")}
    found = distill_checkpoint(
        options.model,
        read_table(options.data),
        output_dir=options.output,
        test=None if options.test is None else read_table(options.test),
        readout=options.readout,
        text_column=options.text,
        max_length=options.max_length,
        prefix_cache=options.prefix_cache,
        **settings,
    )
    print("\n".join([*found.lines(), f"distilled checkpoint: {options.output}"]))


def _report(options: Options) -> None:
    from ..report import write_report

    def named(items: Sequence[str]) -> dict[str, Dataset]:
        pairs = [item.partition("=") for item in items]
        wrong = [name for name, sign, path in pairs if not sign or not path]
        if wrong:
            raise ValueError(f"tables are given as NAME=FILE, as in ERM=erm.parquet; got {wrong[0]!r}.")
        return {name: read_given(path, options) for name, _, path in pairs}

    tables, hard_routed = named(options.tables), named(options.hard_routed)
    written = write_report(
        tables, options.output, title=options.title, hard=options.hard, hard_routed=hard_routed or None
    )
    print(f"report: {written}")


def _probe(options: Options) -> None:
    from accelerate import PartialState
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    from ..model.classifier import HEAD, register_classifier
    from ..probes.inspection import format_probe, probe_text

    config = AutoConfig.from_pretrained(options.model)
    classifier = HEAD in (config.architectures or [""])[0]
    if classifier:
        register_classifier(config)
    kind = AutoModelForSequenceClassification if classifier else AutoModelForCausalLM
    model, tokenizer = kind.from_pretrained(options.model), AutoTokenizer.from_pretrained(options.model)
    model.to(PartialState().device)
    found = probe_text(model, tokenizer, options.text, label=options.label)
    print(json.dumps(found, indent=1) if options.json else format_probe(found))


def _push(options: Options) -> None:
    from ..hub import before_and_after, push
    from ..metrics import table_report

    evaluation = calibrated = None
    if options.table is not None:
        table = grouped_by(read_given(options.table, options), "group")
        raw, applied = before_and_after(options.model, table)
        evaluation = table_report(raw)["groups"]
        calibrated = None if applied is None else table_report(applied)["groups"]
    url = push(
        options.model,
        repo_id=options.repo_id,
        evaluation=evaluation,
        calibrated=calibrated,
        license=options.license,
        private=options.private,
        revision=options.revision,
    )
    print(url)
