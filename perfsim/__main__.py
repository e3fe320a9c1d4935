"""`python -m perfsim` is the `perfsim` command."""

from __future__ import annotations

import sys

from perfsim.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
