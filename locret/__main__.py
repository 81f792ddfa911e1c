"""`python -m locret ...`, and the command `locret`."""

import os
import sys

from locret.system.interrupts import ends_at_once


def main() -> int:
    """Run a command; returns the exit status."""
    # Before torch is imported: threads that wait for each other sleep. Where they spin, on cores
    # that are busy with something else, they take the time that the thread they wait for needs.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    with ends_at_once():
        from locret import cli
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
