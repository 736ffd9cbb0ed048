"""Guarded training on real data.

    torchrun --nproc_per_node=2 launch/train.py --task text --parallel fsdp2 --out out/guarded
    python launch/train.py --task digits --steps 100 --out out/digits

The loop is in :mod:`dist_stability.experiments.training`; ``--help`` lists the options.
"""

from __future__ import annotations

import sys

from dist_stability.experiments.training import main

if __name__ == "__main__":
    sys.exit(main())
