"""The training program: real data, a wrapped model, and a guarded loop.

Run it as ``torchrun --nproc_per_node=N launch/train.py``, as ``python launch/train.py`` in a single process, or, from
an installed package, as ``torchrun ... -m dist_stability.experiments.training``. :func:`train` is the loop; the rest
builds what it needs and writes down what it did.

A run writes into its folder: ``events.jsonl`` (rank 0; one event per attempt, as it happens), ``summary.json``, and
with ``--state-digest`` one ``state-rank<r>.json`` per rank. It exits with 0 only if it ran to its end.

With ``--persist``, a signal of the cluster ends it at a step boundary, on all ranks together and such that the job
comes back: see docs/slurm.md. Started again with ``--resume auto`` it goes on there.
"""

from __future__ import annotations

import json
import math
import os
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from dist_stability import (
    AdaptiveCadence,
    Checkpoints,
    Escalation,
    FixedInnovation,
    LossProbe,
    NonFiniteGuard,
    PeerCopies,
    PredictiveInnovation,
    Resumed,
    SharedMemory,
    StabilityController,
)
from dist_stability.diagnostics.kss import SpectralShaping
from dist_stability.diagnostics.monitor import EdgeOfStabilityMonitor
from dist_stability.diagnostics.preflight import Preflight
from dist_stability.errors import LockstepError, StabilityError
from dist_stability.experiments.data import Batch, BatchOrder
from dist_stability.experiments.digests import digests
from dist_stability.experiments.edge import SHARE, edge_monitor
from dist_stability.experiments.norms import GlobalNorm
from dist_stability.experiments.options import ADAPTIVE, Options, parse_options
from dist_stability.experiments.progress import Progress
from dist_stability.experiments.record import RunRecorder
from dist_stability.experiments.rivals import LossRollback, ZClipper
from dist_stability.experiments.tasks import Task, cross_entropy, make_task
from dist_stability.experiments.text import TextUnavailable
from dist_stability.experiments.unguarded import Unguarded
from dist_stability.experiments.vision import DataMissing
from dist_stability.experiments.wrapping import Processes, autocast, processes, wrap
from dist_stability.parallel import clip_grad_norm_, data_replica, forward_module
from dist_stability.persistence import Setting
from dist_stability.report.extras import MissingExtra
from dist_stability.rules import Rule
from dist_stability.signals import GroupNorms, Signal, UpdateRatio, UpdateRms
from dist_stability.snapshot.rng import forked
from dist_stability.submission import Preemption
from dist_stability.testing import LOSS_PHASES, FaultInjector, capture_state

STARTED_AGAIN = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT", "SLURM_STEP_ID")
"""Not 0 in a process that torchrun, a requeue, or a template's second srun has started again."""

PREFLIGHT_BATCHES = 4

LossFn = Callable[[nn.Module, Batch], Tensor]
Controller = StabilityController | Unguarded

ALONE: dict[str, Any] = {
    "trend": None,
    "escalation": Escalation(attenuate_after=0, max_cuts=0, trend_after=0, deep_after=0, reload_after=0),
}
"""A controller that does what its rule says and nothing else: for rules that others have published without a ladder."""


@dataclass
class Job:
    """Everything one process trains with; ``parameters`` is what the optimizer owns, ``present`` the step's batches."""

    options: Options
    here: Processes
    model: nn.Module
    optimizer: Optimizer
    parameters: list[nn.Parameter]
    scheduler: LambdaLR
    loss_fn: LossFn
    batches: Callable[[int], Iterator[tuple[int, list[Batch]]]]
    clip: Callable[[], float | Tensor | None]
    injector: FaultInjector
    preemption: Preemption | None = None
    shaping: SpectralShaping | None = None
    present: Sequence[Batch] = ()

    def loss(self, batch: Batch) -> Tensor:
        """The training loss, with what the ladder may have added to it."""
        return self.loss_fn(self.model, batch) if self.shaping is None else self.shaping(self.loss_fn, batch)


def train(job: Job, controller: Controller, record: RunRecorder, progress: Progress) -> None:
    """The loop. Everything a guarded loop needs is the line with ``controller.step``."""
    optimizer, scheduler = job.optimizer, job.scheduler
    start = Resumed(0, 0, "", "")
    if job.options.resume != "no" and isinstance(controller, StabilityController):
        start = controller.resume()
        record.resume(start.attempt)
        progress.note(start.line)
    leave_if_told(job, controller, progress)  # while it started
    if job.options.preflight and isinstance(controller, StabilityController) and not start.attempt:
        progress.note(preflight(job, controller).verdict)
    for attempt, (number, micro_batches) in enumerate(controller.batches(job.batches(start.batches)), start.attempt):
        record.begin_batch(number, attempt)
        job.present = micro_batches
        for batch in micro_batches:
            loss = job.loss(job.injector.batch(attempt, batch)) / len(micro_batches)
            loss.backward()
        job.injector.gradients(attempt, job.parameters)  # a bad batch shows before clipping
        verdict = controller.step(grad_norm=job.clip(), loss=loss.detach() * len(micro_batches))
        optimizer.zero_grad()
        if verdict.accepted:
            scheduler.step()
        else:
            progress.note(f"  batch {number}: {verdict.action} ({verdict.reason})")
        if progress.wants_numbers(number + 1):
            progress.advance(number + 1, f"loss {loss.item() * len(micro_batches):.4f}  probe {record.probe:.4f}")
        leave_if_told(job, controller, progress)


def preflight(job: Job, controller: StabilityController) -> Preflight:
    """Look ahead with the first batches of the run, which are fetched again when it begins."""
    with forked(job.options.seed):  # a data set may draw from the global streams
        first = [micro_batches[0] for _, micro_batches in islice(job.batches(0), PREFLIGHT_BATCHES)]
    return controller.preflight(first, loss_fn=job.loss_fn)


def leave_if_told(job: Job, controller: Controller, progress: Progress) -> None:
    """End this process if some rank was told to stop: all ranks at the same step boundary, with that state sealed.

    Collectives: none as long as nobody was; else those of ``leave()`` and ``hand_over()``.
    """
    if job.preemption is None or not isinstance(controller, StabilityController) or not controller.stopping:
        return
    controller.leave()
    progress.note(f"told to stop by {job.preemption.signal.name}: this state is kept")
    job.preemption.hand_over()


def run(options: Options, task: Task, here: Processes, preemption: Preemption | None = None) -> int:
    """Train one job from its options; returns the exit status.

    Collectives: those of wrapping, training and measuring the model; all ranks call it together.
    """
    _seed(options.seed)
    model = task.build().to(here.device)
    model = wrap(model, task.blocks(model), options.parallel, dtype=_dtype(options), here=here)
    if options.compile:
        model = torch.compile(model)  # type: ignore[assignment]
    index, count = data_replica(model)
    _seed(options.seed + 1 + index)  # dropout differs between replicas, not between runs
    optimizer = _optimizer(options, model)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    job = Job(
        options=options,
        here=here,
        model=model,
        optimizer=optimizer,
        parameters=parameters,
        scheduler=LambdaLR(optimizer, _factor(options)),
        loss_fn=autocast(cross_entropy, options.parallel, dtype=_dtype(options), device=here.device),
        batches=_batches(options, task, here.device, index, count),
        clip=_clip(options, model, parameters),
        injector=_injector(options),
        preemption=preemption,
        shaping=SpectralShaping(model) if options.shaping else None,
    )
    norm = GlobalNorm(model, parameters).of_parameters if options.parameter_norm else None
    record = RunRecorder(options, task, here, model, norm)
    title = f"{task.name}: {options.parallel} x {here.world_size}, rule {options.rule}"
    try:
        with ExitStack() as stack:
            stack.enter_context(record)
            progress = stack.enter_context(Progress(options.steps, title, shown=here.rank == 0))
            controller = _controller(job, task, record)
            stack.enter_context(controller)
            train(job, controller, record, progress)
            evaluation = _probe(job, task.evaluation_batches()).measure(forward_module(model))
            if evaluation.error is not None:
                raise evaluation.error
            if options.state_digest:
                image = capture_state(model, optimizer, {"scheduler": job.scheduler})
                path = options.out / f"state-rank{here.rank}.json"
                path.write_text(json.dumps(digests(image), indent=1) + "\n", encoding="utf-8")
    except StabilityError as error:
        record.finish(error=error)
        print(f"rank {here.rank}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        if isinstance(error, LockstepError):
            if preemption is not None and preemption.raised:
                preemption.force()  # a rank ran out of time: the job is to come back all the same
            # The process groups are unusable: their destructors may wait for ranks that will not come.
            sys.stdout.flush()
            os._exit(1)
        return 1
    except SystemExit as left:  # told to stop, and nobody brings the job back
        return int(left.code or 0)
    except Exception as error:
        record.finish(error=error)
        raise
    record.finish(evaluation=float(evaluation.value) if evaluation.value is not None else math.nan)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status (2: nothing was started)."""
    options = parse_options(arguments)
    with _preemption(options) as preemption:
        return _main(options, preemption)


def _main(options: Options, preemption: Preemption | None) -> int:
    try:
        task = make_task(
            options.task, data=options.data, dropout=options.dropout, width=options.width, layers=options.layers
        )
        task.probe_batches(options.probe_size)
        BatchOrder(len(task.train), options.batch_size, seed=options.seed)
    except (DataMissing, MissingExtra, TextUnavailable, ValueError) as error:
        if int(os.environ.get("RANK", "0")) == 0:
            print(f"train.py: error: {error}", file=sys.stderr, flush=True)
        return 2
    with processes(options.parallel, options.device, int(os.environ.get("LOCAL_RANK", "0"))) as here:
        return run(options, task, here, preemption)


def _preemption(options: Options) -> AbstractContextManager[Preemption | None]:
    """From the very start on: a signal that finds no handler would end the process."""
    if options.persist == "no" or options.preempt_signal == "":
        return nullcontext()
    return Preemption(options.preempt_signal, grace=options.preempt_grace)


def _controller(job: Job, task: Task, record: RunRecorder) -> Controller:
    """The guard, or what takes its place in a run without one."""
    options = job.options
    probe = _probe(job, task.probe_batches(options.probe_size))
    if options.rule == "off":
        job.injector.hook(job.optimizer)
        return Unguarded(
            job.model,
            job.optimizer,
            probe,
            every=int(options.every),
            probe_on=options.probe_on,
            on_event=record.event,
            after_step=lambda attempt: job.injector.weights(attempt, job.parameters),
        )
    if any(fault.phase in LOSS_PHASES for fault in job.injector.faults):
        wrapped = job.injector.wrap_loss(probe.loss_fn)
        probe = LossProbe(wrapped, probe.batches, batch_statistics=probe.batch_statistics)
    controller = StabilityController(
        job.model,
        job.optimizer,
        probe,
        rule=_rule(options),
        guards=(NonFiniteGuard(),),
        extra_state={"scheduler": job.scheduler},
        every=AdaptiveCadence() if options.every == ADAPTIVE else int(options.every),
        signals=_signals(options),
        edge=_edge(job, task) if options.edge else None,
        mode="observe" if options.observe else "enforce",
        decision=options.decision,
        probe_on=options.probe_on,
        timeout=options.timeout,
        persist=_persist(options),
        asked_to_stop=_asked(job.preemption),
        shaping=job.shaping,
        on_event=record.event,
        **(ALONE if options.rule in ("fixed", "loss-rollback") else {}),
    )
    job.injector.attach(controller)
    return controller


def _signals(options: Options) -> tuple[Signal, ...]:
    if not options.update_signals:
        return ()
    own = () if options.edge else (UpdateRms(),)  # the monitor brings one
    return (*own, UpdateRatio(), GroupNorms())


def _edge(job: Job, task: Task) -> EdgeOfStabilityMonitor:
    """On examples of this replica's own: every rank takes as many, spread over all."""
    options = job.options
    index, count = data_replica(job.model)
    size = max(1, options.batch_size // count // SHARE)
    batch = task.train.batch(torch.linspace(0, len(task.train) - 1, size * count).long()[index::count])
    return edge_monitor(
        job.model,
        job.optimizer,
        job.loss_fn,
        _to(batch, job.here.device),
        lambda: job.present,
        dtype=_dtype(options),
        reuse_loss=options.accumulate == 1 and options.dropout == 0.0,
        cuts=options.edge_cuts,
    )


def _asked(preemption: Preemption | None) -> Callable[[], bool] | None:
    return None if preemption is None else lambda: preemption.raised


def _persist(options: Options) -> list[Setting]:
    """Where states outlive the process; nowhere if the list is empty."""
    kept: list[Setting] = []
    if "shm" in options.persist:
        kept.append(SharedMemory())
    if "peers" in options.persist:
        kept.append(PeerCopies(options.peer_every))
    if "disk" in options.persist:
        kept.append(Checkpoints(options.out / "checkpoints", options.checkpoint_every, options.checkpoint_keep))
    return kept


def _injector(options: Options) -> FaultInjector:
    """The faults; what killed or held a process once does not do so to the one that is started in its place."""
    injector = FaultInjector.parse(options.inject)
    counts = (os.environ.get(name) or "0" for name in STARTED_AGAIN)
    return injector.spare_the_process() if any(int(count) for count in counts) else injector


def _rule(options: Options) -> Rule:
    if options.rule == "fixed":
        return FixedInnovation(options.epsilon, options.alpha)
    if options.rule == "loss-rollback":
        return LossRollback(options.loss_sigmas, options.loss_window)
    return PredictiveInnovation(options.false_reject_rate)


def _clip(options: Options, model: nn.Module, parameters: list[nn.Parameter]) -> Callable[[], float | Tensor | None]:
    """Clips the gradients in place and returns their norm before; None where they are left alone."""
    if options.zclip:
        return ZClipper(model, parameters)
    if options.clip_grad_norm:
        return partial(clip_grad_norm_, model, parameters, options.clip_grad_norm)
    return lambda: None


def _probe(job: Job, batches: list[Batch]) -> LossProbe:
    held_out = [_to(batch, job.here.device) for batch in batches]
    return LossProbe(job.loss_fn, held_out, batch_statistics=job.options.probe_batch_statistics)


def _batches(
    options: Options, task: Task, device: torch.device, index: int, count: int
) -> Callable[[int], Iterator[tuple[int, list[Batch]]]]:
    """The batches of the run after the first so many, numbered, each as the micro-batches of this data replica."""
    order = BatchOrder(
        len(task.train), options.batch_size, seed=options.seed, index=index, count=count, accumulate=options.accumulate
    )

    def batches(seen: int) -> Iterator[tuple[int, list[Batch]]]:
        for number in range(options.steps):
            if number not in options.skip_batches and seen:
                seen -= 1
                continue
            micro_batches = [_to(task.train.batch(indices), device) for indices in order.micro_batches(number)]
            if number not in options.skip_batches:  # else fetched and dropped: what the golden twin does
                yield number, micro_batches

    return batches


def _to(batch: Batch, device: torch.device) -> Batch:
    inputs, targets = batch
    return inputs.to(device), targets.to(device)


def _optimizer(options: Options, model: nn.Module) -> Optimizer:
    """Made after the model was wrapped, so that it owns the parameters that are trained."""
    kernel: dict[str, Any] = {
        "foreach": options.implementation == "foreach",
        "fused": options.implementation == "fused",
    }
    common: dict[str, Any] = {"lr": options.lr, "weight_decay": options.weight_decay, **kernel}
    if options.optimizer == "sgd":
        return torch.optim.SGD(model.parameters(), momentum=0.9, **common)
    kind = torch.optim.AdamW if options.optimizer == "adamw" else torch.optim.Adam
    return kind(model.parameters(), **common)


def _factor(options: Options) -> Callable[[int], float]:
    """Learning rate over ``--lr`` after so many accepted steps."""
    warmup, steps = options.warmup, options.steps

    def factor(accepted: int) -> float:
        if accepted < warmup:
            return (accepted + 1) / warmup
        if options.schedule == "constant" or steps <= warmup:
            return 1.0
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (accepted - warmup) / (steps - warmup))))

    return factor


def _seed(seed: int) -> None:
    """Seed every random stream that belongs to the state of a run, whether the task draws from it or not."""
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed)
    torch.manual_seed(seed)


def _dtype(options: Options) -> torch.dtype:
    return torch.bfloat16 if options.dtype == "bfloat16" else torch.float32


if __name__ == "__main__":
    sys.exit(main())
