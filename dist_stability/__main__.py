"""``python -m dist_stability`` is ``dist-stability``."""

from __future__ import annotations

import sys

from dist_stability.cli import main

if __name__ == "__main__":
    sys.exit(main())
