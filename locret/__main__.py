"""`python -m locret ...`."""

import sys

from locret.cli import main

sys.exit(main())
