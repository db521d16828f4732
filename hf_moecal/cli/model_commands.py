"""The commands about models and checkpoints: `train`, `plan`, `distill`, `bake`, `probe`, `push`."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from .command import Command, Options, Outcome, named_files
from .interrupted import kept_by_training
from .own_data import add_data_options, given_data_options, overridden, own_recipe
from .tables import add_reading, grouped_by, read_given


if TYPE_CHECKING:
    from .recipe import Recipe

_RECIPE = "recipe.yaml"


def _add_train(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", help="recipe, a YAML file; or give --model, --data and --output")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in the output folder")
    parser.add_argument("--model", help="instead of a recipe: Hub id or folder to start from")
    parser.add_argument("--data", metavar="FILE", help="training rows: a file, or ID:SPLIT of the Hub")
    parser.add_argument("--validation", metavar="FILE", help="rows on which the calibration is fitted at the end")
    parser.add_argument(
        "--eval", nargs="+", default=[], metavar="NAME=FILE", help="sets on which the result is judged"
    )
    parser.add_argument("--output", metavar="FOLDER", help="for the recipe, the model and how it was judged")
    add_data_options(parser)


def _train(options: Options) -> Outcome:
    from .runs import train_recipe

    recipe, overrides = _training(options)
    trainer = train_recipe(recipe, overrides=overrides, resume=options.resume)
    output = trainer.args.output_dir
    outcome = Outcome({"output": output, "log": trainer.state.log_history}, [f"model: {output}"])
    if options.config is None and recipe.groups:
        return _judged(recipe, output, outcome)
    return outcome


def _judged(recipe: Recipe, output: str, outcome: Outcome) -> Outcome:
    """The same with the figures of the trained model on the sets that were named."""
    from ..report import collect, format_table, write_report
    from .runs import predict_recipe
    from .verdict import verdict

    table = predict_recipe(recipe, model=output, output=Path(output) / "predictions.parquet")
    metrics = collect({"trained": table}, title="")
    found = verdict(metrics["rows"])
    report = write_report({"trained": table}, Path(output) / "report", title=f"{recipe.model} after training")
    rows = [{key: value for key, value in row.items() if key != "diagram"} for row in metrics["rows"]]
    lines = [format_table(metrics), f"\n{found['sentence']}", f"report: {report.with_name('report.html')}"]
    return Outcome({**outcome.data, **found, "rows": rows}, [*lines, *outcome.lines])


def _training(options: Options) -> tuple[Recipe, list[str]]:
    """The recipe that is to be carried out and what overrides it; of own data it is written first."""
    from .recipe import load_recipe, read_recipe

    given = [name for name in ("model", "data", "output", "validation") if getattr(options, name) is not None]
    given = [f"--{name}" for name in given] + given_data_options(options) + (["--eval"] if options.eval else [])
    if options.config is not None:
        if given:
            raise ValueError(f"{given[0]} goes without --config: the recipe says it; change it there.")
        task = [] if options.task is None else ["--task", options.task]
        return load_recipe(options.config), [*task, *options.overrides]
    missing = [f"--{name}" for name in ("model", "data", "output") if getattr(options, name) is None]
    if missing:
        raise ValueError(f"give a recipe (--config FILE), or --model, --data and --output; {missing[0]} is missing.")
    if any(item.startswith("--output_dir") for item in options.overrides):
        raise ValueError("the output folder is named by --output; leave --output_dir out.")
    groups = named_files(options.eval, "shifted=other.csv")
    content = own_recipe(options, groups=groups, train=options.data) | {"output_dir": options.output}
    content |= overridden(read_recipe("the command line", content), options.overrides)
    return load_recipe(_written(content, Path(options.output))), []


def _written(content: dict[str, Any], folder: Path) -> Path:
    """The recipe as a file in the output folder, so that the run can be repeated."""
    path, text = folder / _RECIPE, yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    if path.is_file() and path.read_text(encoding="utf-8") != text:
        raise ValueError(
            f"{path} is the recipe of another run, with other settings; choose another --output, or delete it first."
        )
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def _kept_by_train(options: Options) -> str:
    output = options.output
    if options.config is not None:
        from .recipe import load_recipe
        from .runs import parse_arguments

        output = parse_arguments(load_recipe(options.config), options.overrides).output_dir
    return "Nothing was written yet." if output is None else kept_by_training(output)


def _fields() -> str:
    """The fields of a recipe that a command line can override."""
    from transformers import TrainingArguments

    from ..training.arguments import MoECalArguments

    inherited = {field.name for field in dataclasses.fields(TrainingArguments)}
    own = [field.name for field in dataclasses.fields(MoECalArguments) if field.init and field.name not in inherited]
    names = ", ".join(f"--{name}" for name in own)
    return (
        f"fields of a recipe that can be overridden, as in --eta 1.0: {names}; and those of transformers' "
        "TrainingArguments, such as --learning_rate, --num_train_epochs, --per_device_train_batch_size, --save_steps."
    )


def _add_plan(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, help="recipe; any field can be overridden, as in train")
    parser.add_argument(
        "--accelerate", metavar="FILE", help="configuration for accelerate launch (default: one device)"
    )
    parser.add_argument("--rows", type=int, help="training rows (default: those of a local file)")
    parser.add_argument(
        "--judged", type=int, help="labelled positions per sequence of a language model (default: all)"
    )


def _plan(options: Options) -> Outcome:
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
    return Outcome(plan.to_dict(), plan.lines())


def _add_distill(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="folder of a classifier; calibration.json names the readout")
    parser.add_argument("--data", required=True, help="rows to match it on: .parquet, .jsonl, .csv or .tsv")
    parser.add_argument("--test", help="labelled rows on which to say how much survives")
    parser.add_argument("--output", required=True, help="folder to write")
    parser.add_argument("--text", default="text", help="column to tokenize (default: text)")
    parser.add_argument("--max-length", type=int, help="tokens after which a text is cut")
    parser.add_argument("--readout", help="the teacher, where calibration.json names none")
    for name, default in {"epochs": 3, "learning-rate": 1e-4, "batch-size": 32, "seed": 0}.items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    parser.add_argument("--prefix-cache", metavar="FOLDER", help="for the states of the frozen layers")


def _distill(options: Options) -> Outcome:
    from ..files import read_rows
    from ..training.distillation import distill_checkpoint

    settings = {name: getattr(options, name) for name in ("epochs", "learning_rate", "batch_size", "seed")}
    found = distill_checkpoint(
        options.model,
        read_rows(options.data),
        output_dir=options.output,
        test=None if options.test is None else read_rows(options.test),
        readout=options.readout,
        text_column=options.text,
        max_length=options.max_length,
        prefix_cache=options.prefix_cache,
        **settings,
    )
    lines = [*found.lines(), f"distilled checkpoint: {options.output}"]
    return Outcome({"output": options.output, **dataclasses.asdict(found)}, lines)


def _add_bake(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="folder with calibration.json")
    parser.add_argument("--output", required=True, help="folder to write")


def _bake(options: Options) -> Outcome:
    from ..hub.bake import bake

    written = bake(options.model, output_dir=options.output)
    return Outcome({"output": str(written)}, [f"calibrated checkpoint: {written}"])


def _add_probe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="Hub id or folder")
    parser.add_argument("--text", required=True)
    parser.add_argument("--label", type=int, help="the true class, for the regret of a classifier")


def _probe(options: Options) -> Outcome:
    from accelerate import PartialState

    from ..model.loading import load_classifier, load_language_model, own_labels
    from ..probes.inspection import format_probe, probe_text

    load = load_language_model if own_labels(options.model) is None else load_classifier
    model, tokenizer = load(options.model)
    model.eval().to(PartialState().device)
    found = probe_text(model, tokenizer, options.text, label=options.label)
    return Outcome(found, [format_probe(found)])


def _add_push(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="folder of the checkpoint")
    parser.add_argument("--repo-id", required=True, help="ORG/NAME")
    parser.add_argument("--table", help="predictions table whose figures go into the card, per group")
    parser.add_argument("--license", help="the model's license, as the Hub names them (default: the base model's)")
    parser.add_argument("--private", action="store_true", default=None)
    parser.add_argument("--revision", help="branch")
    add_reading(parser)


def _push(options: Options) -> Outcome:
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
    return Outcome({"url": url}, [url])


MODEL_COMMANDS = (
    Command(
        "train",
        "Fine-tune on your data or as a recipe says, and calibrate; any field can be overridden.",
        "moecal train --model allenai/OLMoE-1B-7B-0924 --task choice --data train.csv --prompt '{review}\\nMood:' "
        "--options ' bad' ' good' --eval tweets=tweets.csv --output out --eta 1.0",
        _add_train,
        _train,
        _kept_by_train,
        overrides=True,
        more_help=_fields,
    ),
    Command(
        "plan",
        "Say what a recipe trains, the memory it needs and what a step costs, without the weights.",
        "moecal plan --config recipe.yaml --accelerate recipes/accelerate/fsdp2_lora.yaml",
        _add_plan,
        _plan,
        overrides=True,
    ),
    Command(
        "distill",
        "Train a model's native readout to match its mixture or committee, without labels.",
        "moecal distill --model my-checkpoint --data texts.csv --output distilled",
        _add_distill,
        _distill,
        lambda options: "Nothing was written yet; run it again.",
    ),
    Command(
        "bake",
        "Copy a checkpoint with its temperature inside the weights, for any runtime.",
        "moecal bake --model my-checkpoint --output my-checkpoint-baked",
        _add_bake,
        _bake,
        lambda options: f"{options.output} may hold a part of the copy: delete it and run it again.",
    ),
    Command(
        "probe",
        "Show the routing of a text and what each expert alone would predict.",
        "moecal probe --model my-checkpoint --text 'not bad at all'",
        _add_probe,
        _probe,
    ),
    Command(
        "push",
        "Publish a checkpoint with its calibration, diagrams and model card.",
        "moecal push --model my-checkpoint --repo-id me/my-model --table test.parquet",
        _add_push,
        _push,
        lambda options: "One commit holds everything, so nothing was published; run it again.",
    ),
)
