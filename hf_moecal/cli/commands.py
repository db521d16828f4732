"""`moecal`: check, train, predict, evaluate, calibrate, report, monitor and publish from the command line.

`moecal COMMAND --help` tells each command's options. Bad input ends with one sentence and exit code 2.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stdout
from typing import NoReturn

from .. import __version__
from .command import Command, Options, Outcome, nearest
from .interrupted import NoRoomError, is_no_room
from .model_commands import MODEL_COMMANDS
from .table_commands import TABLE_COMMANDS
from .watch import MONITOR


COMMANDS = (*TABLE_COMMANDS, *MODEL_COMMANDS, MONITOR)
_INTERRUPTED = 130  # 128 and the number of the signal, as shells have it


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code: 0 fine, 1 drift (`monitor`), 2 bad input, 130 stopped by Ctrl-C."""
    given, names = sys.argv[1:] if arguments is None else list(arguments), [command.name for command in COMMANDS]
    parser = _parser()
    first = next((word for word in given if not word.startswith("-")), names[0])
    if first not in names:
        parser.error(f"there is no command {first!r}; {nearest(first, names) or 'there are ' + ', '.join(names)}")
    _refuse_unknown(parser, given)
    options, rest = parser.parse_known_args(given)
    command: Command = options.chosen
    if rest and not command.overrides:
        options.parser.error(f"unknown: {' '.join(rest)}; {nearest(rest[0], _options_of(options.parser))}")
    options.overrides = rest
    try:
        with redirect_stdout(sys.stderr) if options.json else nullcontext():
            outcome = command.run(options)
    except KeyboardInterrupt:
        print(f"\nmoecal {command.name}: stopped. {command.kept(options)}", file=sys.stderr)
        return _INTERRUPTED
    except Exception as error:
        if not _is_said(error):
            raise  # not bad input: the traceback is what helps
        print(f"moecal {command.name}: {_sentence(error, command, options)}", file=sys.stderr)
        return 2
    _say(outcome, options)
    return outcome.exit_code


def _is_said(error: Exception) -> bool:
    known = isinstance(error, (ValueError, OSError)) or type(error).__name__ == "PublishError"
    return known or is_no_room(error)


def _sentence(error: Exception, command: Command, options: Options) -> str:
    """What went wrong; of a full disk or a folder that cannot be written to also what is kept."""
    if isinstance(error, NoRoomError):
        return str(error)
    if is_no_room(error):
        return f"the disk is full ({error}). {command.kept(options)}"
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}. {command.kept(options)}"
    return str(error)


def _say(outcome: Outcome, options: Options) -> None:
    accelerate = sys.modules.get("accelerate")
    if accelerate is not None and not accelerate.PartialState().is_main_process:
        return
    if options.json and outcome.data:
        from ..calibration.record import strict

        print(json.dumps(strict(outcome.data), indent=1, allow_nan=False))
    elif outcome.lines and not options.json:
        print("\n".join(outcome.lines))


class _Parser(argparse.ArgumentParser):
    """Says in one line what is wrong with a command line."""

    command: Command | None = None

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message.rstrip('; ')} (see {self.prog} --help)\n")

    def format_help(self) -> str:
        more = "" if self.command is None or self.command.more_help is None else f"\n{self.command.more_help()}\n"
        return super().format_help() + more


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="moecal", description="Confidence calibration for mixture-of-experts models.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"moecal {__version__}")
    parsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)
    for command in COMMANDS:
        added = parsers.add_parser(
            command.name,
            help=command.about,
            description=command.about,
            epilog=f"example:\n  {command.example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        added.command = command
        command.add(added)
        added.add_argument("--json", action="store_true", help="print everything as JSON, and all else to stderr")
        added.set_defaults(chosen=command, parser=added)
    return parser


def _refuse_unknown(parser: argparse.ArgumentParser, given: Sequence[str]) -> None:
    """Names an unknown option before one that is missing, which often is the same one."""
    own = next((action.choices[word] for action in parser._subparsers._group_actions for word in given
                if word in action.choices), None)  # fmt: skip
    known = [] if own is None else _options_of(own)
    wrong = [word for word in given if word.startswith("--") and word.partition("=")[0] not in (*known, "--")]
    if own is not None and wrong and not own.command.overrides:
        own.error(f"unknown: {' '.join(wrong)}; {nearest(wrong[0], known)}")


def _options_of(parser: argparse.ArgumentParser) -> list[str]:
    return [name for action in parser._actions for name in action.option_strings]
