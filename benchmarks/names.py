"""Lists of names on a command line."""

import argparse
from collections.abc import Callable, Collection


def some_of(known: Collection[str]) -> Callable[[str], list[str]]:
    """What reads "a,b" as names, all of which are known."""

    def names(text: str) -> list[str]:
        given = text.split(",")
        unknown = sorted({*given} - {*known})
        if unknown:
            raise argparse.ArgumentTypeError(
                f"{', '.join(unknown)}: expected some of {', '.join(known)}"
            )
        return given

    return names
