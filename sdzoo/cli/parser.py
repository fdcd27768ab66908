"""How the command line is read: commands with an example each, and the kinds of their arguments."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """A parser that says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        """Exit with code 2."""
        self.exit(2, f"sdzoo: {message} (see {self.prog} --help)\n")


class Commands:
    """The commands of a parser, to which each part of the command line adds its own."""

    def __init__(self, parser: Parser) -> None:
        self._added = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def add(
        self, name: str, run: Callable[[argparse.Namespace], None] | None, help: str, example: str
    ) -> argparse.ArgumentParser:
        """Return the parser of a new command, which calls ``run`` with what was given."""
        added = self._added.add_parser(
            name,
            help=help,
            description=help[0].upper() + help[1:] + ".",
            epilog=f"example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        added.set_defaults(run=run)
        return added


def positive(text: str) -> int:
    """Return the whole number that ``text`` is, at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number of at least 1")
    return int(text)


def seconds(text: str) -> float:
    """Return the seconds that ``text`` says."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number of seconds")
    return value


def numbers(text: str) -> tuple[int, ...]:
    """Return the whole numbers, each at least 1, that commas separate in ``text``."""
    return tuple(positive(part) for part in text.split(","))


def words(text: str) -> tuple[str, ...]:
    """Return the words that commas separate in ``text``."""
    return tuple(part.strip() for part in text.split(",") if part.strip())
