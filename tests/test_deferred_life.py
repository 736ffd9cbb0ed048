"""The deferred verdict at the ends of things: the last step, checkpoints, other rungs, ranks that die; and its cost."""

from __future__ import annotations

import copy
import gc
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import harness
import pytest
import test_lockstep
import torch
import zoo
from harness import RankError
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from zoo import Case

from dist_stability import (
    Escalation,
    FixedInnovation,
    GradientNormGuard,
    LossProbe,
    NonFiniteGuard,
    StabilityController,
    StabilityStop,
    Verdict,
)
from dist_stability.signals.sums import nothing_on_host
from dist_stability.snapshot import RandomState
from dist_stability.testing import FaultInjector, StateImage, capture_state, compare
from dist_stability.verdict import Action


class Small:
    """0.5 |w|^2, trained by plain SGD: with a learning rate above 2 every step does harm, and half of it may not."""

    def __init__(self, **options: Any) -> None:
        torch.manual_seed(0)
        self.model = nn.Linear(4, 1, bias=False)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 1.0)
        self.events: list[dict[str, Any]] = []
        rows = torch.eye(4)
        self.controller = StabilityController(
            self.model,
            self.optimizer,
            LossProbe(lambda model, batch: model(batch).square().sum() / 2, [rows]),
            rule=FixedInnovation(1e-3),
            extra_state={"scheduler": self.scheduler},
            on_event=self.events.append,
            **{"decision": "deferred", "trend": None, **options},
        )

    def forward(self) -> Tensor:
        self.optimizer.zero_grad()
        return self.model(torch.eye(4)).square().sum() / 2

    def step(self, lr: float = 0.1) -> Verdict:
        self.forward().backward()
        self.optimizer.param_groups[0]["lr"] = lr
        verdict = self.controller.step()
        if verdict.accepted:
            self.scheduler.step()
        return verdict

    @property
    def weight(self) -> Tensor:
        return self.model.weight.detach().clone()


BAD = 2.5


def test_a_provisional_verdict_says_so() -> None:
    run = Small()
    first = run.step()
    assert first == Verdict(Action.COMMIT, 0, final=False, reason=first.reason)
    assert run.controller.verdict is first and not run.events
    assert run.step().step == 1 and [event["attempt"] for event in run.events] == [0]
    assert run.events[0]["action"] == "commit" and run.events[0]["measurement"] is not None
    assert run.events[0]["step"] == 1, "accepted steps, that one included"


def test_finish_reads_the_last_verdict_once() -> None:
    run = Small()
    run.step()
    before = run.weight
    verdict = run.controller.finish()
    assert verdict is not None and verdict.final and verdict.step == 0 and verdict.measurement is not None
    assert run.controller.finish() is None and torch.equal(run.weight, before)
    assert run.step().step == 1
    run.controller.finish()
    assert [event["attempt"] for event in run.events] == [0, 1]


def test_finish_takes_the_last_step_back() -> None:
    run = Small(escalation=Escalation(attenuate_after=0))
    run.step()
    before, epochs = run.weight, run.scheduler.last_epoch
    assert run.step(BAD).accepted
    assert run.scheduler.last_epoch == epochs + 1
    verdict = run.controller.finish()
    assert verdict is not None and (verdict.action, verdict.step, verdict.undone) == (Action.ROLLBACK, 1, ())
    assert torch.equal(run.weight, before) and run.scheduler.last_epoch == epochs
    assert run.step().step == 2
    run.controller.finish()
    assert [(e["attempt"], e["action"], e["step"]) for e in run.events] == [
        (0, "commit", 1),
        (1, "rollback", 1),
        (2, "commit", 2),
    ]


def test_finish_after_the_next_forward_is_an_error() -> None:
    run = Small()
    run.step()
    run.forward().backward()
    for call in (run.controller.finish, run.controller.state_dict):
        with pytest.raises(RuntimeError, match="right after step"):
            call()
    assert run.controller.step().step == 1  # nothing was lost by asking


def test_leaving_the_context_settles_and_an_exception_does_not() -> None:
    run = Small(escalation=Escalation(attenuate_after=0))
    with run.controller:
        run.step()
        before = run.weight
        run.step(BAD)
        run.forward()  # a loop may stop anywhere
    assert torch.equal(run.weight, before) and run.controller.verdict.action is Action.ROLLBACK
    run = Small()
    with warnings.catch_warnings(), pytest.raises(OSError):
        warnings.simplefilter("error")
        with run.controller:
            run.step(BAD)
            before = run.weight
            raise OSError
    assert torch.equal(run.weight, before) and not run.events


def test_close_warns_of_a_verdict_that_nobody_read() -> None:
    run = Small()
    run.step()
    with pytest.warns(UserWarning, match="verdict of attempt 0"):
        run.controller.close()
    run.controller.close()
    run = Small()
    run.step()
    run.controller.finish()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run.controller.close()


def test_a_refusal_in_state_dict_is_warned_of() -> None:
    run = Small(escalation=Escalation(attenuate_after=0))
    run.step()
    run.controller.state_dict()
    before = run.weight
    run.step(BAD)
    with pytest.warns(UserWarning, match="attempt 1 was refused only now"):
        state = run.controller.state_dict()
    assert torch.equal(run.weight, before) and state["attempt"] == 2 and state["steps"] == 1


def test_immediate_has_nothing_to_finish() -> None:
    run = Small(decision="immediate")
    assert run.step().final and run.controller.finish() is None
    with pytest.raises(ValueError, match="decision: expected one of"):
        Small(decision="later")


def _address(tensor: Tensor) -> int | None:
    """Where it lies; None for what a compiler of another test has left, which lies nowhere."""
    try:
        return tensor.data_ptr()
    except RuntimeError:
        return None


def test_gradients_are_not_kept_for_the_verdict() -> None:
    """They would take as much memory as the parameters, through the whole of the next backward."""
    run = Small(guards=(NonFiniteGuard(), GradientNormGuard()))
    run.step()
    address = run.model.weight.grad.data_ptr()
    run.optimizer.zero_grad()
    left = [each for each in gc.get_objects() if issubclass(type(each), Tensor) and each.numel()]
    assert address not in [_address(each) for each in left]


def explained(rank: int, world: int, fault: str) -> list[tuple[str, str]]:
    """Signal and reason of each refusal; the rule itself would let everything pass."""
    guards = (NonFiniteGuard(), GradientNormGuard())
    case, faults = Case("fsdp2", steps=14), FaultInjector.parse([fault])
    outcome = zoo.train(
        case, rank, world, injector=faults, guards=guards, rule=FixedInnovation(1e6), decision="deferred"
    )
    return [(verdict.signal, verdict.reason) for verdict in outcome.verdicts if verdict.action.refused]


def test_a_late_no_of_a_guard_says_which_rank_saw_what(two: harness.Pool) -> None:
    """The gradients are others by then: what was computed from them must do."""
    for said in two.run(explained, "nan:step=10,rank=1"):
        assert said == [("gradient", "rank 1: gradient of embed.weight was not finite")], said
    for said in two.run(explained, "gradient-scale:step=10,factor=3e4"):
        assert len(said) == 1 and said[0][0] == "gradient" and "scales above the usual" in said[0][1], said


# ---------------------------------------------------------------------- other rungs


def test_attenuate_shortens_the_step_that_was_refused() -> None:
    """The proposal is still there when its verdict is read. The batch after it is dropped as ever."""
    run = Small(escalation=Escalation(attenuate_after=1))
    run.step()
    safe, epochs = run.weight, run.scheduler.last_epoch
    run.step(BAD)
    proposal = run.weight
    verdict = run.step()
    assert (verdict.action, verdict.undone, verdict.step) == (Action.ATTENUATE, (1,), 2)
    assert torch.equal(run.weight, safe.lerp(proposal, 0.5))
    assert run.scheduler.last_epoch == epochs + 1, "taken back with attempt 1, stepped for the part of it that stands"
    shortened = run.weight
    run.step(float("inf"))
    verdict = run.step()
    assert verdict.action is Action.ROLLBACK and verdict.undone == (3,) and torch.equal(run.weight, shortened)
    # Or the next forward would be captured with a copy that is of no use any more.
    assert not run.controller._recovery.holding
    run.step()
    run.step(float("nan"))
    verdict = run.controller.finish()
    assert (verdict.action, verdict.step, verdict.undone) == (Action.ROLLBACK, 6, ())
    assert torch.equal(run.weight, shortened - 0.1 * shortened)
    # One event for each attempt, with the optimizer steps that stand.
    said = [(event["action"], event["final"], event["step"]) for event in run.events]
    commit, provisional, refusal = ("commit", True), ("commit", False), ("rollback", True)
    expected = [(*commit, 1), (*provisional, 2), ("attenuate", True, 2), (*provisional, 3), (*refusal, 2), (*commit, 3)]
    assert said == [*expected, (*refusal, 3)] and [event["attempt"] for event in run.events] == [*range(7)]


def test_reload_and_stop() -> None:
    def reload() -> int:
        with torch.no_grad():
            run.model.weight.copy_(saved)
        return 1

    run = Small(
        escalation=Escalation(attenuate_after=0, reload_after=1, max_reloads=1, max_refusals_in_row=2), reload=reload
    )
    for _ in range(2):
        run.step()
    run.controller.finish()
    saved = run.weight
    for _ in range(2):
        run.step()
    run.step(BAD)
    verdict = run.step()
    assert (verdict.action, verdict.step, verdict.undone) == (Action.RELOAD, 5, (2, 3, 4))
    assert torch.equal(run.weight, saved)
    run.step(BAD)
    with pytest.raises(StabilityStop):
        run.step()
    assert torch.equal(run.weight, saved)
    assert run.controller.verdict.undone == (6,)


def test_stop_at_the_last_step() -> None:
    run = Small(escalation=Escalation(attenuate_after=0, max_refusals_in_row=1))
    run.step()
    before = run.weight
    run.step(BAD)
    with pytest.raises(StabilityStop), run.controller:
        pass
    assert torch.equal(run.weight, before)


def test_an_optimizer_that_raises_is_told_at_the_next_step() -> None:
    def broken(*_: Any) -> None:
        raise ArithmeticError("in the optimizer")

    run = Small()
    run.step()
    before = run.weight
    handle = run.optimizer.register_step_post_hook(broken)
    assert not run.step().final
    handle.remove()
    with pytest.raises(ArithmeticError):
        run.step()
    assert torch.equal(run.weight, before)


# ---------------------------------------------------------------------- checkpoints


def save(setup: zoo.Setup, controller: StabilityController) -> dict[str, Any]:
    controller.finish()
    return copy.deepcopy(
        {
            "model": setup.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in setup.optimizers],
            "extra": {name: value.state_dict() for name, value in setup.extra_state.items()},
            "controller": controller.state_dict(),
        }
    )


def load(state: dict[str, Any], setup: zoo.Setup, controller: StabilityController) -> None:
    state = copy.deepcopy(state)
    setup.model.load_state_dict(state["model"])
    for optimizer, saved in zip(setup.optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    for name, saved in state["extra"].items():
        setup.extra_state[name].load_state_dict(saved)
    controller.load_state_dict(state["controller"])


def resumed(rank: int, world: int, case: Case, fault: int) -> list[str]:
    """Saved after attempt 5, whose verdict is pending then, and loaded into a model and a controller of their own."""
    faults = [zoo_flip(fault, world - 1)] if fault >= 0 else []
    dropped: set[int] = set()

    def run(attempts: range, state: Any = None) -> tuple[Any, StateImage]:
        setup = zoo.build(case, rank, world)
        with zoo.control(case, setup, injector=FaultInjector.parse(faults), decision="deferred") as controller:
            if state is not None:
                load(state[0], setup, controller)
                state[1].restore()
            for attempt in attempts:
                zoo._attempt(case, setup, attempt, zoo.fetch(case, setup, attempt), controller, None)
                note(controller)
                for scheduler in setup.extra_state.values() if controller.verdict.accepted else ():
                    scheduler.step()
            state = save(setup, controller), RandomState.capture()
            note(controller)
        return state, capture_state(setup.model, setup.optimizers, setup.extra_state)

    def note(controller: StabilityController) -> None:
        verdict = controller.verdict
        dropped.update({verdict.step, *verdict.undone} if verdict.action.refused else ())

    saved, _ = run(range(6))
    _, image = run(range(6, case.steps), saved)
    expected = {fault} if fault in (-1, 5) else {fault, fault + 1}
    said = [] if dropped == expected - {-1} else [f"dropped {dropped}"]
    return said + compare(image, zoo.train(case, rank, world, skip=frozenset(dropped), guarded=False).image)


def zoo_flip(attempt: int, rank: int) -> str:
    return f"bit-flip:step={attempt},rank={rank},where=parameter"


@pytest.mark.parametrize("fault", [-1, 3, 5, 8])
@pytest.mark.parametrize("mode", ["single", "ddp", "fsdp2"])
def test_saved_and_resumed_while_a_verdict_is_pending(mode: str, fault: int) -> None:
    """A refusal that saving brings to light drops no other batch: none was trained on since."""
    case = Case(mode, scheduler=True, steps=11, draws=False)
    for said in harness.pool(zoo.MODES[mode]).run(resumed, case, fault):
        assert not said, "\n".join(said)


def gone_back(rank: int, world: int, case: Case) -> list[str]:
    """A checkpoint is loaded into the run that made it, while the verdict on a bad proposal is pending."""
    setup = zoo.build(case, rank, world)
    faults = FaultInjector.parse([zoo_flip(5, world - 1)])
    with zoo.control(case, setup, injector=faults, decision="deferred") as controller:
        state = None
        for attempt in (0, 1, 2, 3, 4, 5, 3, 4, 5, 6):
            if attempt == 3:
                if state is None:
                    state = save(setup, controller), RandomState.capture()
                else:
                    load(state[0], setup, controller)
                    state[1].restore()
            zoo._attempt(case, setup, attempt, zoo.fetch(case, setup, attempt), controller, None)
            assert controller.verdict.accepted and controller.verdict.step == attempt
            for scheduler in setup.extra_state.values():
                scheduler.step()
    image = capture_state(setup.model, setup.optimizers, setup.extra_state)
    return compare(image, zoo.train(case, rank, world, guarded=False).image)


@pytest.mark.parametrize("mode", ["single", "ddp", "fsdp2"])
def test_what_is_loaded_is_not_overwritten_by_a_refusal(mode: str) -> None:
    for said in harness.pool(zoo.MODES[mode]).run(gone_back, Case(mode, scheduler=True, steps=7, draws=False)):
        assert not said, "\n".join(said)


# ---------------------------------------------------------------------- ranks that die


def leaving(rank: int, world: int, mode: str, how: str) -> None:
    """Rank 1 leaves between step 3, whose vote it has begun, and step 4."""

    def after(attempt: int, setup: zoo.Setup, controller: StabilityController | None) -> None:
        if attempt == 3 and rank == 1:
            if how == "exit":
                os._exit(3)
            raise OSError("disk full")

    zoo.train(Case(mode, steps=7), rank, world, after_step=after, decision="deferred", timeout=5.0)


@pytest.mark.parametrize("mode", ["ddp", "fsdp2"])
@pytest.mark.parametrize("how", ["exit", "raise"])
def test_a_rank_that_leaves_between_two_steps_is_named(two: harness.Pool, mode: str, how: str) -> None:
    peer, culprit = two.run(leaving, mode, how, expect_failure=True, timeout=60)
    assert culprit.type == ("Died" if how == "exit" else "OSError"), str(culprit)
    assert isinstance(peer, RankError) and peer.is_a("LockstepError") and peer.facts["ranks"] == (1,), str(peer)


def hanging(rank: int, world: int, fault: str) -> Any:
    injector = FaultInjector.parse([fault])
    return zoo.train(Case("ddp", steps=6), rank, world, injector=injector, decision="deferred", timeout=5.0)


@pytest.mark.parametrize("phase", ["vote", "copy"])
def test_a_rank_that_never_votes_is_named(two: harness.Pool, phase: str) -> None:
    results = two.run(hanging, f"kill:step=3,phase={phase},rank=1", expect_failure=True, timeout=60, grace=10.0)
    assert results[0].is_a("LockstepError") and results[0].facts["ranks"] == (1,), str(results[0])


# ---------------------------------------------------------------------- cheap


def collectives(rank: int, world: int, case: Case, guards: tuple[Any, ...], give_norm: bool) -> list[dict[str, int]]:
    """The collectives inside each call of step(), counted."""
    setup = zoo.build(case, rank, world)
    counts = []
    with zoo.control(case, setup, guards=guards, decision="deferred") as controller:
        for attempt in range(case.steps):
            for batch in zoo.fetch(case, setup, attempt):
                loss = zoo.loss_fn(setup.model, batch)
                (loss if setup.scaler is None else setup.scaler.scale(loss)).backward()
            norm = torch.nn.utils.get_total_norm([p.grad for p in setup.model.parameters()]) if give_norm else None
            with test_lockstep.counted() as calls:
                assert controller.step(grad_norm=norm, scaler=setup.scaler).accepted
            counts.append(dict(calls))
            for optimizer in setup.optimizers:
                optimizer.zero_grad()
        with test_lockstep.counted() as calls:
            controller.finish()
        assert not calls
    return counts


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("guards", [(), (NonFiniteGuard(),), (NonFiniteGuard(), GradientNormGuard())], ids=len)
def test_one_collective_for_each_judged_step(two: harness.Pool, guards: tuple[Any, ...], norm: bool) -> None:
    """Also with guards: where a step can be taken back, their flags ride in the vote."""
    for optimizer in ("adamw-foreach", "adamw-fused"):
        for counts in two.run(collectives, Case("ddp", optimizer=optimizer, steps=6), guards, norm):
            assert counts == [{"all_reduce": 1}] * 6


def test_collectives_of_unjudged_attempts_and_a_scaler(two: harness.Pool) -> None:
    for counts in two.run(collectives, Case("ddp", every=3, steps=6), (), False):
        assert counts == [{}, {}, {"all_reduce": 1}] * 2
    for counts in two.run(collectives, Case("ddp", every=3, steps=6), (NonFiniteGuard(),), False):
        assert counts == [{"all_reduce": 1}, {"all_reduce": 1}, {"all_reduce": 2}] * 2
    for counts in two.run(collectives, Case("ddp", scaler=True, steps=4), (), False):
        assert counts == [{"all_reduce": 2}] * 4


class HostReads(TorchDispatchMode):
    """Counts every place where the host reads a number out of a tensor, outside the optimizer's own step."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        super().__init__()
        self.places: list[str] = []
        self.operations = 0
        self._inside = False
        optimizer.register_step_pre_hook(lambda *_: setattr(self, "_inside", True))
        optimizer.register_step_post_hook(lambda *_: setattr(self, "_inside", False))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            self.note(str(func))
        self.operations += 1
        return func(*args, **(kwargs or {}))

    def note(self, what: str) -> None:
        if not self._inside:
            self.places.append(what if self.operations else f"{what}, first of all")


@contextmanager
def host_reads(optimizer: torch.optim.Optimizer) -> Iterator[HostReads]:
    """``tolist``, ``numpy`` and ``cpu`` do not pass the dispatcher on the CPU."""
    reads = HostReads(optimizer)
    originals = {name: getattr(Tensor, name) for name in ("tolist", "numpy", "cpu")}

    def noting(name: str) -> Any:
        def call(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            reads.note(name)
            return originals[name](tensor, *args, **kwargs)

        return call

    for name in originals:
        setattr(Tensor, name, noting(name))
    try:
        with nothing_on_host():
            yield reads
    finally:
        for name, original in originals.items():
            setattr(Tensor, name, original)


def reads(rank: int, world: int, case: Case, decision: str, give: str) -> list[list[str]]:
    """Where the host read from tensors within each step()."""
    setup = zoo.build(case, rank, world)
    found = []
    guards = (NonFiniteGuard(), GradientNormGuard())
    controller = zoo.control(case, setup, guards=guards, decision=decision)
    with controller, host_reads(setup.optimizers[0]) as reads:
        for attempt in range(case.steps):
            loss = zoo.loss_fn(setup.model, zoo.fetch(case, setup, attempt)[0])
            loss.backward()
            given: dict[str, Any] = {"loss": loss.detach()} if "loss" in give else {}
            if "norm" in give:
                given["grad_norm"] = torch.nn.utils.get_total_norm([p.grad for p in setup.model.parameters()])
            reads.places.clear()
            reads.operations = 0
            with reads:
                assert controller.step(**given).accepted
            found.append([*reads.places])
            setup.optimizers[0].zero_grad()
    return found


@pytest.mark.parametrize("give", ["", "loss", "norm", "loss norm"])
@pytest.mark.parametrize("mode", ["single", "ddp", "fsdp2"])
def test_a_healthy_run_reads_nothing_but_the_vote_before(mode: str, give: str) -> None:
    """One read in each step: of the sum that was begun a step ago, before anything else. (The first step re-plans.)"""
    pool = harness.pool(zoo.MODES[mode])
    give = give if mode != "fsdp2" else give.replace("norm", "").strip()
    for optimizer in ("adamw-foreach", "adam-fused"):
        case = Case(mode, optimizer=optimizer, steps=8)
        for found in pool.run(reads, case, "deferred", give):
            assert found[1:] == [["tolist, first of all"]] * 7
        for found in pool.run(reads, case, "immediate", give) if optimizer == "adamw-foreach" else ():
            assert all(len(each) > 1 for each in found[1:]), "the counter counts"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("fused", [True, False])
def test_no_host_sync_on_a_gpu(fused: bool) -> None:
    """After warm-up, with guards and a scheduler: torch raises at the first synchronizing call."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.Dropout(0.1), nn.Linear(64, 8)).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=fused, capturable=not fused)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.99**step)
    batch = torch.randn(32, 64, device="cuda")

    def loss_fn(module: Any, x: Tensor) -> Tensor:
        return module(x).square().mean()

    with StabilityController(
        model,
        optimizer,
        LossProbe(loss_fn, [batch[:16]]),
        guards=(NonFiniteGuard(), GradientNormGuard()),
        extra_state={"scheduler": scheduler},
        decision="deferred",
    ) as controller:
        for attempt in range(24):
            torch.cuda.set_sync_debug_mode("error" if attempt >= 12 else "default")
            try:
                loss = loss_fn(model, batch)
                loss.backward()
                assert controller.step(loss=loss.detach()).accepted
                optimizer.zero_grad()
                scheduler.step()
            finally:
                torch.cuda.set_sync_debug_mode("default")
