"""What the tests ask of the Slurm on this machine."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from programs import environment, until

ROOT = Path(__file__).resolve().parents[2]
TEMPLATES = ROOT / "slurm"


class Testbed:
    """A running Slurm, by its folder."""

    __test__ = False

    def __init__(self, state: Path) -> None:
        self.state = state
        settings = dict(
            line.removeprefix("export ").split("=", 1) for line in (state / "environment").read_text().splitlines()
        )
        here = environment()
        self.environment = {**here, **settings, "PATH": f"{Path(sys.executable).parent}:{here['PATH']}"}

    def ask(self, *command: str | Path, folder: Path | None = None, **variables: str) -> str:
        """What a command prints; it must succeed."""
        ended = subprocess.run(
            [str(word) for word in command],
            env={**self.environment, **variables},
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert ended.returncode == 0, ended.stderr
        return ended.stdout

    def submit(self, *command: str | Path, folder: Path, **variables: str) -> str:
        """``sbatch``; returns the job's id. The job's log goes where the template says, in ``folder``."""
        return self.ask("sbatch", "--parsable", *command, folder=folder, **variables).strip()

    def job(self, job: str) -> dict[str, str]:
        """What ``scontrol`` knows about a job."""
        return dict(re.findall(r"(\w+)=(\S*)", self.ask("scontrol", "show", "job", job)))

    def until_state(self, job: str, state: str, seconds: float, log: Path | None = None) -> None:
        """Wait for a job's state; a job that fails in the meantime fails the test at once."""

        def reached() -> bool:
            now = self.job(job)["JobState"]
            assert now == state or now not in ("FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"), (
                now,
                self.told(job, log),
            )
            return now == state

        until(f"job {job} to be {state}", reached, seconds, lambda: self.told(job, log))

    def told(self, job: str, log: Path | None) -> str:
        """For the message of a failure."""
        return f"{self.job(job)}\n{log.read_text() if log is not None and log.exists() else ''}"
