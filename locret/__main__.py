"""`python -m locret ...`, and the command `locret`."""

import os
import sys

from locret.system.interrupts import ends_at_once
from locret.system.memory import keep_freed_memory


def main() -> int:
    """Run a command; returns the exit status."""
    # Before torch is imported: threads that wait for each other soon sleep. Where they spin as long
    # as libgomp lets them, on cores that are busy with something else, they take the time that the
    # thread they wait for needs; where they sleep at once, an idle machine is much slower.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    keep_freed_memory()
    with ends_at_once():
        from locret import cli
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
