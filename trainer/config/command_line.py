"""The command line: words into flags, for all commands. Does not import torch."""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from trainer.config.flags import Key, all_keys, convert, find_key
from trainer.console import answered, guard_output, report, to_stderr, use_utf8
from trainer.errors import STOPPED, RunError, script_line
from trainer.system import user

WHERE = "command line"
LAUNCHER_HOSTFILE = "launcher_hostfile"  # a rank's flag: of the file that named the machines


def command(function: Callable[..., int]) -> Callable[..., int]:
    """Return the main function of a command: it prints a RunError and returns its code.

    Ctrl-C ends it with a word, and STOPPED.
    """

    def main(*argv: Any) -> int:
        if not argv:  # else it is called by a program
            use_utf8()
        guard_output()
        try:
            user.prepare()
            return function(*argv)
        except RunError as error:
            report(error)
            return error.code
        except KeyboardInterrupt:
            to_stderr("\nstopped")
            return STOPPED

    return main


class Parser(argparse.ArgumentParser):
    """The flags of a command that has few of its own. What is wrong with them is a RunError.

    A flag is written out: --lora_rank is no --local_rank.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **options})

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        """End the command after --help, with FAILED where that could not be printed."""
        raise SystemExit(answered(status))

    def error(self, message: str) -> NoReturn:
        """Raise RunError with the message of argparse."""
        raise RunError(
            f"{WHERE}: {message}",
            fix=f"{script_line(Path(self.prog).stem, '--help')} lists the flags",
        )


@dataclass
class Word:
    """A flag as it was typed, and the values after it. name: None for a value without a flag."""

    name: str | None
    typed: str
    values: list[str]


def words(argv: Sequence[str]) -> list[Word]:
    """Split a command line into flags with their values. Dashes and underscores are the same."""
    found: list[Word] = []
    open_word: Word | None = None  # a flag that takes the values that follow
    for text in argv:
        if text.startswith("--"):
            typed, equals, value = text.partition("=")
            word = Word(typed[2:].replace("-", "_"), typed, [value] if equals else [])
            found.append(word)
            open_word = None if equals else word
        elif open_word is not None:
            open_word.values.append(text)
        else:
            found.append(Word(None, text, [text]))
    return found


def split_own(argv: Sequence[str], own: dict[str, str | None]) -> tuple[dict[str, Any], list[str]]:
    """Separate a command's own flags from those of launch/train.py: (own values, the rest).

    own: {flag: default}; a default of None makes it a switch, which is then True.
    """
    values: dict[str, Any] = dict(own)
    rest = []
    pending = iter(argv)
    for text in pending:
        typed, equals, value = text.partition("=")
        name = typed[2:].replace("-", "_") if typed.startswith("--") else ""
        if name not in own:
            rest.append(text)
        elif own[name] is None:
            if equals:
                raise RunError(f"{WHERE}: {typed} takes no value", found=value)
            values[name] = True
        else:
            values[name] = value if equals else next(pending, "")
            if not values[name]:
                raise RunError(f"{WHERE}: {typed} needs a value")
    return values, rest


def parse_training_flags(argv: Sequence[str]) -> dict[str, Any]:
    """Return {key: value} of what the user typed, and the recipe under "config"."""
    values: dict[str, Any] = {}
    for word in words(argv):
        if word.name is None:
            if not word.typed.endswith((".yaml", ".yml")) or "config" in values:
                raise RunError(
                    f"{WHERE}: unexpected argument {word.typed!r}", needed="--flag value"
                )
            values["config"] = word.typed
        elif word.name == "config":
            if not word.values:
                raise RunError(
                    f"{WHERE}: --config needs a recipe", needed="--config launch/recipes/NAME.yaml"
                )
            values["config"] = word.values[0]
        elif word.name in ("local_rank", LAUNCHER_HOSTFILE):  # of the launchers, for themselves
            continue
        elif (key := _negated(word.name)) is not None:
            values[key.name] = False
        else:
            key = find_key(word.name, WHERE, word.typed)
            values[key.name] = _value(key, word.values)
    return values


def _negated(name: str) -> Key | None:
    """Return the boolean flag that --no_<flag> switches off."""
    keys = all_keys()
    key = keys.get(name.removeprefix("no_"))
    return key if name not in keys and key is not None and key.type == "bool" else None


def _value(key: Key, values: list[str]) -> Any:
    if not values:
        if key.type != "bool":
            raise RunError(
                f"{WHERE}: --{key.name} needs a value", needed=f"--{key.name} {key.type.upper()}"
            )
        return True
    if key.type == "list" or key.name == "lora_target_modules":
        return convert(key, values, WHERE)
    if len(values) > 1:
        raise RunError(f"{WHERE}: unexpected argument {values[1]!r} after --{key.name} {values[0]}")
    return convert(key, values[0], WHERE)
