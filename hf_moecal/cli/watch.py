"""`moecal monitor`: its options, and its exit code."""

from __future__ import annotations

import argparse
import traceback

from .command import Command, Options, Outcome


def _add(monitor: argparse.ArgumentParser) -> None:
    """Adds the options of the command."""
    monitor.add_argument("--reference", required=True, help="predictions table of a time when all was well")
    monitor.add_argument("--current", required=True, help="log: a file, a folder that grows, or - for JSON lines")
    monitor.add_argument(
        "--window", help="sequences per window, or a time as in 15min, 1h, 1d (default: the whole log)"
    )
    monitor.add_argument("--features", nargs="*", default=(), help="further columns to watch")
    monitor.add_argument("--sequence", help="column of the request, conversation or user, where it has several rows")
    monitor.add_argument("--sequence-span", type=int, default=10_000, help="rows within which a sequence is gathered")
    monitor.add_argument("--num-experts", type=int, help="experts per layer (default: as the reference shows)")
    monitor.add_argument("--correction", default="holm", choices=["holm", "benjamini-hochberg"])
    monitor.add_argument("--alpha", type=float, default=0.01, help="chance of a false alarm per window")
    monitor.add_argument("--minimum-effect", type=float, default=0.1, help="least difference that counts as drift")
    monitor.add_argument("--labels", help="table with id and label, once labels are known")
    monitor.add_argument("--output", help="folder for windows.jsonl, rejected.jsonl and metrics.prom")
    monitor.add_argument("--state", help="file from which a later call goes on")
    monitor.add_argument("--follow", type=float, metavar="SECONDS", help="keep looking, this often")


def _run(options: Options) -> Outcome:
    """The monitor's result; its exit code is 0 if all is well, 1 on drift, 2 if it broke."""
    try:
        return _watch(options)
    except (ValueError, OSError):
        raise
    except Exception:  # 1 means drift: what broke must not be taken for it
        traceback.print_exc()
        return Outcome({}, exit_code=2)


def _watch(options: Options) -> Outcome:
    from ..drift.late_labels import label_line
    from ..drift.monitor import monitor

    window = options.window
    result = monitor(
        options.reference,
        options.current,
        window=int(window) if window and window.isdigit() else window,
        features=options.features,
        sequence=options.sequence,
        sequence_span=options.sequence_span,
        num_experts=options.num_experts,
        correction=options.correction,
        alpha=options.alpha,
        minimum_effect=options.minimum_effect,
        labels=options.labels,
        output_dir=options.output,
        state=options.state,
        follow=options.follow,
        on_window=None if options.json else lambda found: print(found, flush=True),
    )
    lines = [label_line(result.labelled)] if result.labelled else []
    return Outcome(result.to_dict(), lines, exit_code=result.exit_code)


def _kept(options: Options) -> str:
    if options.state is None:
        return "No --state was named, so the next call reads the log from its beginning."
    return f"{options.state} keeps what was read; go on with the same command."


MONITOR = Command(
    "monitor",
    "Compare a log with a reference; exit code 1 on drift.",
    "moecal monitor --reference predictions.parquet --current logs/ --window 1000 --state watch.json",
    _add,
    _run,
    _kept,
)
