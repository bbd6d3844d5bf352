"""Print what the package says of the options, from the program's own table of them: manual, defaults or completion."""

from __future__ import annotations

import os
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

from cassbackup import COMMANDS, Command, Option, __version__

DEBIAN = Path(__file__).resolve().parent
FILES = {"DIR", "FILE", "PATH", "[OLD=]NEW"}


Groups = list[tuple[str, tuple[Option, ...]]]


def shown(command: Command) -> Groups:
    """Return the groups of a command's options; one without a help is for our own use."""
    return [(title, tuple(one for one in options if one.help)) for title, options in command.groups]


def default(option: Option) -> str:
    """Return an option's default as it would be written, "" where it has none."""
    return option.default if isinstance(option.default, str) else ""


def explained(option: Option) -> str:
    """Return an option's help as a sentence or two."""
    text = option.help.replace("%%", "%")
    return f"{text if '://' in text.split()[0] else text[0].upper() + text[1:]}."


# The manual


def roff(text: str) -> str:
    """Return text for troff: nothing in it is a request, and a dash is the one that is typed."""
    text = text.replace("\\", "\\e").replace("-", "\\-")
    return "\\&" + text if text.startswith((".", "'")) else text


def option_lines(option: Option) -> Iterator[str]:
    """Yield an entry of the manual."""
    flags = [f"\\fB{roff(flag)}\\fR" for flag in option.flags.split()] if option.flags.startswith("-") else []
    value = f"\\fI{roff(option.metavar)}\\fR" if option.metavar else ""
    yield ".TP"
    yield " ".join(filter(None, [", ".join(flags), value]))
    notes = [f"Environment: {option.variable}."] if option.variable else []
    notes += [f"Default: {default(option)}."] if default(option) else []
    yield roff(" ".join([explained(option), *notes]))


def manual() -> Iterator[str]:
    """Yield the lines of the manual page."""
    text = (DEBIAN / "manual.in").read_text(encoding="utf-8").replace("@VERSION@", __version__)
    before, after = text.split("@COMMANDS@\n")
    yield before.rstrip("\n")
    told: dict[tuple[Option, ...], str] = {}  # what several commands take is explained once
    for name, command in COMMANDS.items():
        yield f".SH {roff(name.upper())}"
        yield f".B cassbackup {name}"
        yield roff(f"- {command.summary}. Example:")
        yield from [".PP", ".RS", roff(f"cassbackup {command.example}"), ".RE"]
        for title, options in shown(command):
            if options in told:
                yield from [".PP", roff(f"And the options of {told[options]}: {title}.")]
                continue
            told[options] = name
            yield f".SS {roff(title.capitalize())}"
            for option in options:
                yield from option_lines(option)
    yield after.rstrip("\n")


# /etc/default/cassbackup


def defaults() -> Iterator[str]:
    """Yield the lines of the settings file: every setting, none of them set."""
    yield from (DEBIAN / "defaults.in").read_text(encoding="utf-8").splitlines()
    seen: set[str] = set()
    for name, command in COMMANDS.items():
        # What everybody has to set stands first.
        for title, options in sorted(shown(command), key=lambda group: all(one.key != "bucket" for one in group[1])):
            fresh = [one for one in options if one.variable and one.variable not in seen and one.key != "config"]
            seen |= {one.variable for one in fresh}
            if fresh:
                yield from ["", f"## {title}" if name == "watch" else f"## {name}: {title}"]
            for option in fresh:
                yield from textwrap.wrap(explained(option), 110, initial_indent="# ", subsequent_indent="# ")
                if not option.metavar:
                    yield "# yes or no."
                yield f"#{option.variable}={default(option)}"


# Completion for bash


def completion() -> Iterator[str]:
    """Yield a completion for bash that starts no Python."""
    yield "# bash completion for cassbackup"
    yield "_cassbackup()"
    yield "{"
    yield "    local current=$2 previous=$3 word command=watch options files="
    yield '    for word in "${COMP_WORDS[@]:1:COMP_CWORD-1}"; do'
    yield f"        case $word in {' | '.join(COMMANDS)}) command=$word && break ;; esac"
    yield "    done"
    yield "    case $command in"
    for name, command in COMMANDS.items():
        options = [option for _, group in shown(command) for option in group if option.flags.startswith("-")]
        files = {flag for option in options if option.metavar in FILES for flag in option.flags.split()}
        values = {flag for option in options if option.metavar for flag in option.flags.split()} - files
        flags = sorted(flag for option in options for flag in option.flags.split() if flag.startswith("--"))
        yield f"    {name})"
        yield f"        options='{' '.join([*flags, '--help'])}'"
        yield f"        case $previous in {' | '.join(sorted(files))}) files=yes ;;"
        yield f"            {' | '.join(sorted(values)) or '-'}) return ;; esac"
        yield "        ;;"
    yield "    esac"
    yield "    if [[ $files ]]; then"
    yield '        mapfile -t COMPREPLY < <(compgen -f -- "$current")'
    yield "        compopt -o filenames"
    yield "    elif [[ $current == -* ]]; then"
    yield '        mapfile -t COMPREPLY < <(compgen -W "$options --version" -- "$current")'
    yield "    elif ((COMP_CWORD == 1)) && [[ $current != */* ]]; then"
    yield f"        mapfile -t COMPREPLY < <(compgen -W '{' '.join(COMMANDS)}' -- \"$current\")"
    yield "    else"
    yield '        mapfile -t COMPREPLY < <(compgen -f -- "$current")'
    yield "        compopt -o filenames"
    yield "    fi"
    yield "}"
    yield "complete -F _cassbackup cassbackup"


if __name__ == "__main__":
    what = {"manual": manual, "defaults": defaults, "completion": completion}[sys.argv[1]]
    sys.stdout.write("".join(f"{line}{os.linesep}" for line in what()))
