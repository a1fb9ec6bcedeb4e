"""Tables for people: columns as wide as what is in them, as df(1) prints them; never cut, never wrapped.

Who has a narrow terminal, or a pipe, reads whole paths and numbers all the same.
"""

from collections.abc import Sequence

import click


def echo_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Numbers to the right."""
    lines = [list(head), *map(list, rows)]
    for column in range(len(head)):
        width = max(len(line[column]) for line in lines)
        numbers = all(line[column][:1].isdigit() for line in lines[1:])
        for line in lines:
            line[column] = line[column].rjust(width) if numbers else line[column].ljust(width)
    for line in lines:
        click.echo("  ".join(line).rstrip())
