"""Options of the training program, checked before any process group is started."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NoReturn

import torch

from dist_stability.experiments import text
from dist_stability.experiments.rivals import FEWEST_LOSSES
from dist_stability.experiments.tasks import TASKS, TEXT_TASKS
from dist_stability.submission.preemption import named
from dist_stability.testing import FaultInjector

PARALLEL = ("single", "ddp", "fsdp1", "fsdp2", "hsdp")
PERSIST = ("no", "shm", "disk", "shm,disk", "shm,peers", "shm,peers,disk")
RESUME = ("no", "auto")
RULES = ("predictive", "fixed", "loss-rollback", "off")
ADAPTIVE = "adaptive"


@dataclass(frozen=True)
class Options:
    """What one training run is; see the help of the command line for each field."""

    task: str
    parallel: str
    rule: str
    epsilon: float
    alpha: float
    false_reject_rate: float
    loss_sigmas: float
    loss_window: int
    inject: tuple[str, ...]
    skip_batches: tuple[int, ...]
    steps: int
    batch_size: int
    accumulate: int
    lr: float
    weight_decay: float
    warmup: int
    schedule: str
    optimizer: str
    implementation: str
    clip_grad_norm: float
    zclip: bool
    dtype: str
    compile: bool
    dropout: float
    width: int
    layers: int
    every: int | str
    decision: str
    preflight: bool
    shaping: bool
    update_signals: bool
    edge: bool
    edge_cuts: bool
    observe: bool
    probe_on: str
    probe_size: int
    probe_batch_statistics: bool
    seed: int
    device: str
    data: Path | None
    out: Path
    timeout: float
    persist: str
    peer_every: int
    checkpoint_every: int
    checkpoint_keep: int
    resume: str
    preempt_signal: str | None
    preempt_grace: float
    state_digest: bool
    parameter_norm: bool

    def settings(self) -> dict[str, Any]:
        """Everything that determines the run, as plain data: all but where it is written."""
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "out"}
        return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}


class _Parser(argparse.ArgumentParser):
    """Says what is wrong once, not once per rank."""

    def error(self, message: str) -> NoReturn:
        if int(os.environ.get("RANK", "0")) == 0:
            self.print_usage(sys.stderr)
            print(f"{self.prog}: error: {message}", file=sys.stderr, flush=True)
        raise SystemExit(2)


def parse_options(arguments: Sequence[str] | None = None, world_size: int | None = None) -> Options:
    """Read and check the command line.

    Args:
        arguments: The words after the program's name; default ``sys.argv``.
        world_size: Number of processes; default from the environment torchrun sets, 1 without it.

    Raises:
        SystemExit: With status 2 after naming the option that is wrong, and what is allowed.
    """
    parser = _parser()
    values = parser.parse_args(arguments)
    launched = world_size is not None or "WORLD_SIZE" in os.environ
    world = int(os.environ.get("WORLD_SIZE", "1")) if world_size is None else world_size
    if values.parallel is None:
        values.parallel = "ddp" if world > 1 else "single"
    if values.device == "auto":
        values.device = "cuda" if torch.cuda.is_available() else "cpu"
    if values.warmup is None:
        values.warmup = min(20, values.steps)
    for problem in _problems(values, world, launched):
        parser.error(problem)
    values.epsilon = 0.5 if values.epsilon is None else values.epsilon
    values.alpha = 0.1 if values.alpha is None else values.alpha
    values.false_reject_rate = 5e-4 if values.false_reject_rate is None else values.false_reject_rate
    values.loss_sigmas = 6.0 if values.loss_sigmas is None else values.loss_sigmas
    values.loss_window = 128 if values.loss_window is None else values.loss_window
    values.inject = tuple(values.inject)
    return Options(**vars(values))


def batch_ranges(text: str) -> tuple[int, ...]:
    """Batch numbers from ``"7,120-129"``: ranges include both ends.

    Raises:
        argparse.ArgumentTypeError: Anything else.
    """
    numbers: set[int] = set()
    for part in filter(None, text.split(",")):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part.strip())
        low, high = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if low > high:
            raise argparse.ArgumentTypeError(f"{part!r} is neither a number nor a range a-b with a <= b")
        numbers.update(range(low, high + 1))
    return tuple(sorted(numbers))


def show_ranges(numbers: Sequence[int]) -> str:
    """The shortest text :func:`batch_ranges` reads back: ``(3, 4, 5, 9)`` becomes ``"3-5,9"``."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in parts)


def _problems(v: argparse.Namespace, world: int, launched: bool) -> list[str]:
    """What is wrong with the values taken together, each naming its option; the first one is reported."""
    said: list[str] = []

    def refuse(wrong: bool, message: str) -> None:
        if wrong:
            said.append(message)

    refuse(
        v.parallel != "single" and not launched,
        f"--parallel {v.parallel} needs torchrun: torchrun --nproc_per_node=N launch/train.py ...",
    )
    refuse(v.parallel == "single" and world > 1, f"--parallel single: {world} processes were started; choose another")
    refuse(
        v.parallel == "hsdp" and world % 2 == 1,
        f"--parallel hsdp: needs an even number of processes (two replicas of world/2 shards), got {world}",
    )
    shares = world * v.accumulate
    refuse(
        v.batch_size % shares != 0,
        f"--batch-size {v.batch_size}: not divisible by {world} processes x --accumulate {v.accumulate}",
    )
    refuse(v.warmup > v.steps, f"--warmup {v.warmup}: longer than --steps {v.steps}")
    refuse(
        v.every != ADAPTIVE and v.every > v.steps,
        f"--every {v.every}: larger than --steps {v.steps}, nothing would ever be judged",
    )
    refuse(v.every == ADAPTIVE and v.rule == "off", f"--every {ADAPTIVE}: needs a rule, whose verdicts it adapts to")
    refuse(
        v.probe_on == "mean" and v.probe_size % world != 0,
        f"--probe-size {v.probe_size}: --probe-on mean needs a multiple of the {world} processes",
    )
    belongs = {"epsilon": "fixed", "alpha": "fixed", "false_reject_rate": "predictive"}
    for option, rule in {**belongs, "loss_sigmas": "loss-rollback", "loss_window": "loss-rollback"}.items():
        given = getattr(v, option) is not None
        refuse(given and v.rule != rule, f"--{option.replace('_', '-')}: belongs to --rule {rule}, not to {v.rule}")
    refuse(v.alpha is not None and v.alpha > 1, f"--alpha {v.alpha}: must be in (0, 1]")
    refuse(
        v.false_reject_rate is not None and not 1e-12 <= v.false_reject_rate < 0.5,
        f"--false-reject-rate {v.false_reject_rate}: must be in [1e-12, 0.5)",
    )
    refuse(v.preflight and v.rule == "off", "--preflight: needs a controller, and --rule off has none")
    refuse(v.shaping and not v.preflight, "--shaping: needs --preflight, which says whether the risk is high")
    refuse(
        v.shaping and (v.rule != "predictive" or v.observe),
        "--shaping: needs --rule predictive, and not --observe: the others have no ladder that could switch it on",
    )
    refuse(v.shaping and v.parallel == "fsdp1", "--shaping: does not go with --parallel fsdp1; use fsdp2")
    refuse(v.shaping and v.compile, "--shaping: does not go with --compile; its hooks come and go")
    refuse(v.shaping and v.task not in TEXT_TASKS, f"--shaping: the blocks of --task {v.task} change their width")
    refuse(v.decision == "deferred" and v.rule == "off", "--decision deferred: needs a rule that decides")
    refuse(v.edge_cuts and not v.edge, "--edge-cuts: needs --edge, whose monitor says when")
    refuse(v.edge and v.rule == "off", "--edge: the controller asks the monitor; needs a rule, not --rule off")
    refuse(v.edge and v.decision == "deferred", "--edge: measures what is decided on; not with --decision deferred")
    refuse(v.edge and v.parallel == "fsdp1", "--edge: not with --parallel fsdp1; use fsdp2")
    refuse(v.observe and v.rule == "off", "--observe: needs a rule to observe with, not --rule off")
    refuse(
        v.persist != "no" and (v.rule == "off" or v.observe),
        f"--persist {v.persist}: needs a rule that takes snapshots, not --rule off or --observe",
    )
    refuse(v.resume != "no" and v.persist == "no", f"--resume {v.resume}: needs --persist, in every start")
    refuse(
        "disk" in v.persist and v.parallel == "fsdp1",
        f"--persist {v.persist}: checkpoints cannot be written of --parallel fsdp1; use fsdp2, or --persist shm",
    )
    refuse(
        bool(v.preempt_signal) and v.persist == "no",
        f"--preempt-signal {v.preempt_signal}: needs --persist, or the job that comes back starts anew",
    )
    try:
        named(v.preempt_signal or "USR2")
    except ValueError as error:
        said.append(f"--preempt-signal: {error}")
    refuse(v.zclip and v.clip_grad_norm > 0, "--zclip: excludes --clip-grad-norm, which clips the same gradients")
    refuse(v.zclip and v.rule != "off", f"--zclip: clips instead of refusing, so it needs --rule off, not {v.rule}")
    refuse(v.dropout > 0 and v.task not in TEXT_TASKS, f"--dropout: the model of --task {v.task} has none")
    sized = (v.width, v.layers) != (text.WIDTH, text.LAYERS)
    refuse(sized and v.task not in TEXT_TASKS, f"--width, --layers: the model of --task {v.task} has its own")
    refuse(v.width % text.HEADS != 0, f"--width {v.width}: must be a multiple of {text.HEADS}, the heads")
    refuse(v.dropout >= 1, f"--dropout {v.dropout}: must be below 1")
    refuse(v.data is not None and v.task != "cifar10", f"--data: --task {v.task} brings its own data")
    refuse(
        bool(v.skip_batches) and len(v.skip_batches) >= v.steps,
        f"--skip-batches: drops all of the --steps {v.steps} batches",
    )
    refuse(
        any(number >= v.steps for number in v.skip_batches),
        f"--skip-batches: batches are numbered 0 to {v.steps - 1} (--steps {v.steps})",
    )
    refuse(v.device == "cuda" and not torch.cuda.is_available(), "--device cuda: this torch sees no CUDA device")
    try:
        for fault in FaultInjector.parse(v.inject).faults:
            refuse(fault.step >= v.steps, f"--inject {fault}: never acts in --steps {v.steps}")
            refuse(
                fault.rank is not None and not 0 <= fault.rank < world,
                f"--inject {fault}: there are ranks 0 to {world - 1}",
            )
    except ValueError as error:
        said.append(f"--inject: {error}")
    return said


def _number(kind: type, low: float, *, open_end: bool = False) -> Any:
    """An argparse type: a finite number not below (or, open, above) ``low``."""

    def convert(text: str) -> Any:
        value = kind(text)
        if not (value > low if open_end else value >= low) or value == float("inf"):
            raise argparse.ArgumentTypeError(f"{text}: must be {'above' if open_end else 'at least'} {low}")
        return value

    convert.__name__ = "number" if kind is float else "whole number"
    return convert


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="train.py",
        description="Guarded training on real data. Start it with torchrun --nproc_per_node=N, or alone.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    whole, real = _number(int, 0), _number(float, 0.0)
    at_least_one, positive = _number(int, 1), _number(float, 0.0, open_end=True)

    what = parser.add_argument_group("what is trained")
    what.add_argument("--task", choices=TASKS, default="text", help="data and model")
    what.add_argument("--data", type=Path, metavar="DIR", help="folder that holds the data set (cifar10)")
    what.add_argument("--steps", type=at_least_one, default=300, help="batches to fetch; refused ones count")
    what.add_argument("--batch-size", type=at_least_one, default=64, help="examples per step, over all processes")
    what.add_argument("--accumulate", type=at_least_one, default=1, help="micro-batches per step")
    what.add_argument("--dropout", type=real, default=0.0, help="dropout of the Transformer")
    what.add_argument("--width", type=at_least_one, default=text.WIDTH, help="of the Transformer's residual stream")
    what.add_argument("--layers", type=at_least_one, default=text.LAYERS, help="of the Transformer")
    what.add_argument("--seed", type=whole, default=0, help="of the initial weights, the batch order and dropout")

    how = parser.add_argument_group("optimizer")
    how.add_argument("--optimizer", choices=("adamw", "adam", "sgd"), default="adamw", help="sgd has momentum 0.9")
    how.add_argument(
        "--implementation", choices=("foreach", "fused", "for-loop"), default="foreach", help="kernel of the optimizer"
    )
    how.add_argument("--lr", type=positive, default=2e-3, help="peak learning rate")
    how.add_argument("--weight-decay", type=real, default=0.01, help="weight decay")
    how.add_argument("--warmup", type=whole, help="accepted steps of linear warm-up (default: 20, or all if fewer)")
    how.add_argument("--schedule", choices=("constant", "cosine"), default="cosine", help="after the warm-up")
    how.add_argument("--clip-grad-norm", type=real, default=0.0, metavar="NORM", help="global norm; 0 is off")
    how.add_argument("--zclip", action="store_true", help="clip to a norm that adapts to recent ones (ZClip)")

    where = parser.add_argument_group("machine")
    where.add_argument("--parallel", choices=PARALLEL, help="default: ddp with several processes, else single")
    where.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="cpu uses gloo, cuda NCCL")
    where.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of the computation; weights stay float32. bfloat16 is the mixed-precision policy of FSDP, else autocast",
    )
    where.add_argument("--compile", action="store_true", help="torch.compile the model, outside of its wrapper")

    guard = parser.add_argument_group("guard")
    guard.add_argument(
        "--rule",
        choices=RULES,
        default="predictive",
        help="off measures and refuses nothing; fixed and loss-rollback judge alone: no trend, no ladder",
    )
    guard.add_argument("--epsilon", type=real, help="of --rule fixed (default 0.5)")
    guard.add_argument("--alpha", type=positive, help="of --rule fixed (default 0.1)")
    guard.add_argument(
        "--loss-sigmas", type=positive, help="of --rule loss-rollback: deviations that make a spike (default 6)"
    )
    guard.add_argument(
        "--loss-window",
        type=_number(int, FEWEST_LOSSES),
        help="of --rule loss-rollback: losses they are of (default 128)",
    )
    guard.add_argument("--false-reject-rate", type=positive, help="of --rule predictive (default 5e-4)")
    guard.add_argument(
        "--every",
        type=lambda text: ADAPTIVE if text == ADAPTIVE else at_least_one(text),
        default=1,
        metavar="K",
        help=f"judge every so many steps, or '{ADAPTIVE}': every step while restless, up to every 16th while calm",
    )
    guard.add_argument(
        "--decision",
        choices=("immediate", "deferred"),
        default="immediate",
        help="deferred: a verdict is read at the next step, so that the host never waits for it",
    )
    guard.add_argument(
        "--preflight",
        action="store_true",
        help="say before the first step whether the rate is likely to diverge",
    )
    guard.add_argument(
        "--shaping",
        action="store_true",
        help="spectral shaping, which the ladder switches on if the preflight says that the risk is high and refusals "
        "repeat; hardly better than nothing in what was measured (docs/rksp.md)",
    )
    guard.add_argument(
        "--update-signals", action="store_true", help="log update RMS, update ratio and gradient norms by group, too"
    )
    guard.add_argument(
        "--edge",
        action="store_true",
        help="watch how far the run is from the edge of stability, and go back behind what poisons the optimizer",
    )
    guard.add_argument("--edge-cuts", action="store_true", help="with --edge: cut the learning rate past the edge")
    guard.add_argument("--observe", action="store_true", help="log what would be refused, refuse nothing")
    guard.add_argument("--probe-on", choices=("rank0", "mean"), default="rank0", help="whose probe loss counts")
    guard.add_argument("--probe-size", type=at_least_one, default=64, help="held-out examples in the probe")
    guard.add_argument(
        "--probe-batch-statistics",
        action="store_true",
        help="BatchNorm in the probe uses the probe's own statistics, not the running ones",
    )
    guard.add_argument("--timeout", type=positive, default=60.0, metavar="SECONDS", help="longest wait for a rank")
    guard.add_argument(
        "--persist",
        choices=PERSIST,
        default="no",
        help="shm: keep the snapshots in shared memory, where a restarted process finds them; peers: some of them also "
        "in that of another host; disk: write checkpoints to OUT/checkpoints beside the training, also for other "
        "numbers of ranks and kinds of parallelism",
    )
    guard.add_argument(
        "--peer-every",
        type=at_least_one,
        default=10,
        metavar="STEPS",
        help="steps from one copy on another host to the next",
    )
    guard.add_argument(
        "--checkpoint-every",
        type=at_least_one,
        default=100,
        metavar="STEPS",
        help="steps from one checkpoint to the next",
    )
    guard.add_argument("--checkpoint-keep", type=at_least_one, default=3, metavar="N", help="checkpoints that stay")
    guard.add_argument(
        "--resume",
        choices=RESUME,
        default="no",
        help="auto: go on from the newest state that all ranks find there; from the start if there is none",
    )
    guard.add_argument(
        "--preempt-signal",
        metavar="NAME",
        help="with --persist: after this signal all ranks leave at the next step boundary, such that the job comes "
        "back; '' for none (default: submitit's, else USR2)",
    )
    guard.add_argument(
        "--preempt-grace",
        type=positive,
        default=60.0,
        metavar="SECONDS",
        help="a process that has not left this long after the signal is ended; what it has kept stays",
    )

    trial = parser.add_argument_group("trials")
    trial.add_argument(
        "--inject",
        action="append",
        default=[],
        metavar="FAULT",
        help="a fault on purpose, e.g. gradient-scale:step=120,factor=300,length=10; may be repeated",
    )
    trial.add_argument(
        "--skip-batches",
        type=batch_ranges,
        default=(),
        metavar="A,B-C",
        help="fetch these batches and drop them before forward: the golden twin of a run that refused them",
    )
    trial.add_argument(
        "--state-digest", action="store_true", help="write digests of every bit of the final state of each rank"
    )
    trial.add_argument(
        "--parameter-norm", action="store_true", help="log the global norm of the weights that stand after each attempt"
    )
    parser.add_argument("--out", type=Path, default=Path("out/train"), metavar="DIR", help="events.jsonl, summary.json")
    return parser
