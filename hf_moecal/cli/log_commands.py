"""The command about logs of a model in production: `monitor`."""

from __future__ import annotations

import argparse

from .command import Command, Options, Outcome


def _add_monitor(monitor: argparse.ArgumentParser) -> None:
    monitor.add_argument("--reference", required=True, help="predictions table of a time when all was well")
    monitor.add_argument("--current", required=True, help="log: a file, a folder that grows, or - for JSON lines")
    monitor.add_argument("--window", type=int, help="sequences per window (default: the whole log)")
    monitor.add_argument("--features", nargs="*", default=(), help="further columns to watch")
    monitor.add_argument("--sequence", help="column that names the sequence, where a row is a token")
    monitor.add_argument("--num-experts", type=int, help="experts per layer (default: as the reference shows)")
    monitor.add_argument("--correction", default="holm", choices=["holm", "benjamini-hochberg"])
    monitor.add_argument("--alpha", type=float, default=0.01, help="chance of a false alarm per window")
    monitor.add_argument("--minimum-effect", type=float, default=0.1, help="least difference that counts as drift")
    monitor.add_argument("--labels", help="table with id and label, once labels are known")
    monitor.add_argument("--output", help="folder for windows.jsonl, rejected.jsonl and metrics.prom")
    monitor.add_argument("--state", help="file from which a later call goes on")
    monitor.add_argument("--follow", type=float, metavar="SECONDS", help="keep looking, this often")


def _monitor(options: Options) -> Outcome:
    from ..drift.monitor import monitor

    result = monitor(
        options.reference,
        options.current,
        window=options.window,
        features=options.features,
        sequence=options.sequence,
        num_experts=options.num_experts,
        correction=options.correction,
        alpha=options.alpha,
        minimum_effect=options.minimum_effect,
        labels=options.labels,
        output_dir=options.output,
        state=options.state,
        follow=options.follow,
        on_window=None if options.json else print,
    )
    return Outcome(result.to_dict(), exit_code=result.exit_code)


def _kept_by_monitor(options: Options) -> str:
    if options.state is None:
        return "No --state was named, so the next call reads the log from its beginning."
    return f"{options.state} keeps what was read; go on with the same command."


LOG_COMMANDS = (
    Command(
        "monitor",
        "Compare a log with a reference; exit code 1 on drift.",
        "moecal monitor --reference predictions.parquet --current logs/ --window 1000 --state watch.json",
        _add_monitor,
        _monitor,
        _kept_by_monitor,
    ),
)
