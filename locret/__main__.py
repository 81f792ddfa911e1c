"""`python -m locret ...`, and the command `locret`."""

import sys

from locret.system.interrupts import ends_at_once


def main() -> int:
    """Run a command; returns the exit status."""
    with ends_at_once():
        from locret import cli
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
