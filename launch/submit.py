"""Submit a training script to Slurm, or to processes of this machine, through submitit.

    python launch/submit.py --nnodes=2 --nproc_per_node=8 --gpus_per_node=8 --partition=gpu --time=8:00:00 \
        launch/train.py --task text --parallel fsdp2 --out out/guarded
    python launch/submit.py --executor=local --nproc_per_node=2 --wait launch/train.py --parallel fsdp2

The work is in :mod:`dist_stability.submission`; ``--help`` lists the options, docs/slurm.md says what happens when.
"""

from __future__ import annotations

import sys

from dist_stability.submission.command import main

if __name__ == "__main__":
    sys.exit(main())
