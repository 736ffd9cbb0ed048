"""Every parallel mode, model and optimizer the project promises to guard, and the one loop that trains them all.

A :class:`Case` is plain data, so it travels to the workers and names the failure. ``build`` makes everything from fixed
seeds. ``train`` is the same loop for guarded, unguarded and twin runs: it fetches the data of an attempt by its index
(so that dropping a batch drops exactly that batch), with draws from the global random number generators of python and
torch before the first micro-batch, so that a generator that is off by one draw changes everything after it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from dist_stability import LossProbe, NonFiniteGuard, PredictiveInnovation, StabilityController, Verdict
from dist_stability.diagnostics.kss import SpectralShaping
from dist_stability.parallel import clip_grad_norm_
from dist_stability.testing import FaultInjector, Outcome, capture_state

MODES = {  # name -> ranks
    "single": 1,
    "ddp": 2,
    "fsdp1": 2,
    "fsdp1-flat": 2,
    "fsdp2": 2,
    "fsdp2-uneven": 2,
    "fsdp2-empty": 2,
    "fsdp2-keep": 2,
    "fsdp2-mixed": 2,
    "fsdp2-offload": 2,
    "tp": 2,
    "hsdp": 4,
    "fsdp2+tp": 4,
}
MODELS = ("transformer", "conv", "bf16")
OPTIMIZERS = ("sgd", "adam-loop", "adamw-loop", "adamw-foreach", "adam-fused", "adamw-fused")


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.mix = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.mix(x).chunk(3, dim=-1))
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.norm1(x)))
        return x + self.dropout(self.down(F.gelu(self.up(self.norm2(x)))))


class Transformer(nn.Module):
    """Embedding and head share one weight; ``gain`` has one element, so all but one rank hold an empty shard of it."""

    def __init__(self, vocabulary: int, width: int, heads: int, hidden: int, gain: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.block = Block(width, heads, hidden)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embed.weight
        self.gain = nn.Parameter(torch.ones(1)) if gain else None
        nn.init.normal_(self.embed.weight, std=0.3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.block(self.embed(x)))
        return self.head(x * self.gain if self.gain is not None else x)


class Conv(nn.Module):
    """BatchNorm and dropout, and a buffer outside the state dict that every training forward replaces by a new one."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.1), nn.Flatten(), nn.Linear(64, 12)
        )
        self.norm = nn.BatchNorm1d(12)
        self.head = nn.Linear(12, 4)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen = self.seen + len(x)
        return self.head(torch.tanh(self.norm(self.features(x))))


class Perceptron(nn.Module):
    """All parameters in bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(36, 12), nn.Tanh(), nn.Dropout(0.1), nn.Linear(12, 4)).to(torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x.flatten(1).to(torch.bfloat16))


@dataclass(frozen=True)
class Case:
    """One run of the zoo. ``form`` is how the controller is used: "step", "attach", "closure" or "attach+closure"."""

    mode: str = "single"
    model: str = "transformer"
    optimizer: str = "adamw-foreach"
    optimizers: int = 1
    accumulation: int = 1
    scheduler: bool = False
    scaler: bool = False
    clip: float | None = None
    form: str = "step"
    every: int = 1
    probe_on: str = "rank0"
    lr: float | None = None
    tensor_lr: bool = False
    draws: bool = True
    guards: bool = True
    shape: int = 0  # spectral shaping at every so-many-th loss; 0: never
    probes: int = 1
    steps: int = 12
    ranks: int = 0  # 0: as many as the mode needs

    def __str__(self) -> str:
        default = Case()
        other = [f"{k}={v}" for k, v in vars(self).items() if k != "mode" and v != getattr(default, k)]
        return " ".join([self.mode, *other])


@dataclass
class Setup:
    """What ``build`` makes."""

    model: nn.Module
    optimizers: list[torch.optim.Optimizer]
    extra_state: dict[str, Any]
    scaler: Any
    replica: int


class Shaping(SpectralShaping):
    """Among the extra state, which the loops step as they do schedulers; it counts its losses by itself."""

    def step(self) -> None:
        pass


def world_of(case: Case) -> int:
    return case.ranks or MODES[case.mode]


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = batch
    return F.cross_entropy(model(x).float().flatten(0, -2), y.flatten())


def probe_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """The same, drawing from the global generators on the way: the probe must leave no trace of that either."""
    random.random()
    torch.rand(3)
    return loss_fn(model, batch)


def data(case: Case, index: int, replica: int, size: int = 4) -> tuple[Tensor, Tensor]:
    """Batch ``index`` of a data replica: something that can be learned, from a seed of its own."""
    draw = torch.Generator().manual_seed(7919 * index + replica)
    if case.model == "transformer":
        x = torch.randint(0, 12, (size, 6), generator=draw)
        return x, (x + 1) % 12
    x = torch.randn(size, 1, 6, 6, generator=draw)
    quadrants = F.avg_pool2d(x, 3).flatten(1)
    return x, quadrants.argmax(1)


def shuffled(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """What a loader with augmentation does: draws from python's and torch's global generators, and uses them."""
    x, y = batch
    order = torch.randperm(len(x))
    if x.is_floating_point():
        return x[order] + 0.1 * random.random(), y[order]
    shift = random.randrange(12)
    return (x[order] + shift) % 12, (y[order] + shift) % 12


def build(case: Case, rank: int, world: int) -> Setup:
    """Model, optimizers, schedulers and scaler, from fixed seeds; the generators then differ between data replicas."""
    random.seed(11)
    torch.manual_seed(11)
    model, replica = _parallel(case, _model(case), rank, world)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    half = len(parameters) // 2
    parts = [parameters] if case.optimizers == 1 else [parameters[:half], parameters[half:]]
    optimizers = [_optimizer(case, case.optimizer if i == 0 else "sgd", part) for i, part in enumerate(parts)]
    extra: dict[str, Any] = {}
    if case.scheduler:
        for i, optimizer in enumerate(optimizers):
            extra[f"scheduler{i}"] = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.97**step)
    if case.shape:
        extra["shaping"] = Shaping(model, ["block"], every=case.shape)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=4) if case.scaler else None
    random.seed(101 + replica)
    torch.manual_seed(101 + replica)
    return Setup(model, optimizers, extra, scaler, replica)


def _model(case: Case) -> nn.Module:
    if case.model == "conv":
        return Conv()
    if case.model == "bf16":
        return Perceptron()
    if case.mode in ("fsdp2-uneven", "fsdp1", "fsdp1-flat"):
        return Transformer(13, 9, 3, 7, gain=False)
    return Transformer(12, 8, 2, 16, gain=case.mode == "fsdp2-empty")


def _parallel(case: Case, model: nn.Module, rank: int, world: int) -> tuple[nn.Module, int]:
    """The wrapped model, and which data replica this rank belongs to."""
    mode = case.mode
    inner = {"transformer": "block", "conv": "features", "bf16": "layers"}[case.model]
    if mode == "single":
        return model, 0
    if mode == "ddp":
        return DistributedDataParallel(model), rank
    if mode.startswith("fsdp1"):
        policy = ModuleWrapPolicy({type(getattr(model, inner))}) if case.model == "transformer" else None
        wrapped = FullyShardedDataParallel(
            model, auto_wrap_policy=policy, use_orig_params=mode == "fsdp1", device_id=torch.device("cpu")
        )
        return wrapped, rank
    if mode == "hsdp":
        mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("replicate", "shard"))
        fully_shard(getattr(model, inner), mesh=mesh)
        return fully_shard(model, mesh=mesh), rank
    options: dict[str, Any] = {}
    if mode.endswith("tp"):
        mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("dp", "tp"))
        names = {"transformer": ("up", "down"), "bf16": ("0", "3")}[case.model]
        plan = dict(zip(names, (ColwiseParallel(), RowwiseParallel()), strict=True))
        parallelize_module(getattr(model, inner), mesh["tp"], plan)
        if mode == "tp":
            return model, 0
        options["mesh"] = mesh["dp"]
    if mode == "fsdp2-mixed":
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        for layer in model.modules() if case.model == "conv" else ():
            # BatchNorm's running statistics are buffers and stay in float32, so it must compute in float32.
            normed = isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d)
            if normed or isinstance(layer, nn.Conv2d | nn.Linear):
                fully_shard(layer, mp_policy=MixedPrecisionPolicy() if normed else options["mp_policy"])
    if mode == "fsdp2-offload":
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=False)
    if mode == "fsdp2-keep":
        options["reshard_after_forward"] = False
    fully_shard(getattr(model, inner), **options)
    return fully_shard(model, **options), rank // 2 if mode == "fsdp2+tp" else rank


def _optimizer(case: Case, name: str, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    kind, _, implementation = name.partition("-")
    # Tensors on different meshes cannot share a foreach or fused call, so each mesh has a group of its own.
    by_mesh: dict[Any, list[nn.Parameter]] = {}
    for parameter in parameters:
        by_mesh.setdefault(parameter.device_mesh if isinstance(parameter, DTensor) else None, []).append(parameter)
    groups = [{"params": part} for part in by_mesh.values()]
    lr: Any = case.lr or (0.05 if kind == "sgd" else 0.01)
    if case.tensor_lr:
        lr = torch.tensor(lr)
    if kind == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=0.9, foreach=implementation == "foreach" or None)
    flags = {"loop": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}[implementation]
    return (torch.optim.Adam if kind == "adam" else torch.optim.AdamW)(groups, lr=lr, **flags)


def control(
    case: Case, setup: Setup, *, injector: FaultInjector | None = None, rule: Any = None, **options: Any
) -> StabilityController:
    """A controller for the case, with the injector attached."""
    # Larger than a training batch: a probe with little noise lets a short history tell a fault from a fluctuation.
    batches = [data(case, 10**6 + i, 0, size=32 // case.probes) for i in range(case.probes)]
    probed: Callable[[Any, Any], Tensor] = injector.wrap_loss(probe_loss) if injector is not None else probe_loss
    controller = StabilityController(
        setup.model,
        setup.optimizers if len(setup.optimizers) > 1 else setup.optimizers[0],
        probe=LossProbe(probed, batches),
        rule=rule if rule is not None else PredictiveInnovation(),
        guards=options.pop("guards", (NonFiniteGuard(),) if case.guards else ()),
        extra_state=setup.extra_state or None,
        every=options.pop("every", case.every),
        probe_on=case.probe_on,
        **options,
    )
    if injector is not None:
        injector.attach(controller)
    return controller


def fetch(case: Case, setup: Setup, attempt: int) -> list[tuple[Tensor, Tensor]]:
    """The micro-batches of one attempt; all draws from the global generators happen here, before the first of them."""
    batches = [data(case, attempt * case.accumulation + i, setup.replica) for i in range(case.accumulation)]
    return [shuffled(batch) for batch in batches] if case.draws else batches


def train(
    case: Case,
    rank: int,
    world: int,
    *,
    skip: frozenset[int] = frozenset(),
    guarded: bool = True,
    injector: FaultInjector | None = None,
    setup: Setup | None = None,
    after_step: Callable[[int, Setup, StabilityController | None], None] | None = None,
    at_start: Callable[[Setup, StabilityController], None] | None = None,
    **options: Any,
) -> Outcome:
    """Train ``case.steps`` attempts. ``options`` go to :func:`control`."""
    setup = setup or build(case, rank, world)
    controller = control(case, setup, injector=injector, **options) if guarded else None
    hooked = controller is not None and case.form.startswith("attach")
    verdicts: list[Verdict] = []
    with controller if controller is not None else nullcontext():
        if controller is not None and hooked:
            controller.attach()
        if controller is not None and at_start is not None:
            at_start(setup, controller)
        for attempt in range(case.steps):
            batches = fetch(case, setup, attempt)
            if attempt in skip:
                continue
            accepted = _attempt(case, setup, attempt, batches, controller, injector)
            if controller is not None:
                assert controller.verdict is not None
                verdicts.append(controller.verdict)
            # Behind hooks the loop knows of no verdict and steps its schedulers every time.
            for scheduler in setup.extra_state.values() if accepted or hooked else ():
                scheduler.step()
            if after_step is not None:
                after_step(attempt, setup, controller)
        if controller is not None and (final := controller.finish()) is not None:
            verdicts.append(final)
    return Outcome(capture_state(setup.model, setup.optimizers, setup.extra_state, setup.scaler), verdicts)


def _attempt(
    case: Case,
    setup: Setup,
    attempt: int,
    batches: list[tuple[Tensor, Tensor]],
    controller: StabilityController | None,
    injector: FaultInjector | None,
) -> bool:
    """Forward, backward and one optimizer step, guarded or not. Whether the step stands."""
    parameters = list(_parameters(setup))
    scaler = setup.scaler
    norm: Tensor | None = None

    def gradients() -> Tensor:
        nonlocal norm
        for optimizer in setup.optimizers:
            optimizer.zero_grad()
        total = torch.zeros(())
        for batch in batches:
            shaping = setup.extra_state.get("shaping")
            loss = (shaping(loss_fn, batch) if shaping is not None else loss_fn(setup.model, batch)) / len(batches)
            (loss if scaler is None else scaler.scale(loss)).backward()
            total += loss.detach()
        if injector is not None:
            injector.gradients(attempt, parameters)
        if case.clip is not None:
            for optimizer in setup.optimizers if scaler is not None else ():
                scaler.unscale_(optimizer)
            norm = clip_grad_norm_(setup.model, parameters, case.clip)
        return total

    closure = gradients if case.form.endswith("closure") else None
    if closure is None:
        gradients()
    if controller is not None and not case.form.startswith("attach"):
        controller.step(grad_norm=norm, scaler=scaler, closure=closure)
    else:
        for optimizer in setup.optimizers:
            if scaler is not None:
                scaler.step(optimizer)
            elif closure is not None:
                optimizer.step(closure)
            else:
                optimizer.step()
        if injector is not None and controller is None:
            injector.weights(attempt, parameters)
    accepted = controller is None or controller.verdict.accepted
    if scaler is not None and controller is None:
        scaler.update()  # the guarded step does that itself
    return accepted


def _parameters(setup: Setup) -> Iterator[nn.Parameter]:
    for optimizer in setup.optimizers:
        for group in optimizer.param_groups:
            yield from group["params"]


def matrix_of(mode: str) -> list[Case]:
    """Each optimizer on the transformer (tied weights, dropout), two on the models with BatchNorm and in bfloat16."""
    tensor_parallel = mode.endswith("tp")
    cases = [Case(mode, optimizer=name) for name in OPTIMIZERS if not (tensor_parallel and name.endswith("fused"))]
    for model in ("conv", "bf16"):
        if not (tensor_parallel and model == "conv"):
            cases += [Case(mode, model, name) for name in ("sgd", "adamw-foreach")]
    return cases


def variants(case: Case, **axes: Any) -> list[Case]:
    """The case with each value of one axis: ``variants(Case(), mode=MODES)``."""
    (axis, values), *rest = axes.items()
    cases = [replace(case, **{axis: value}) for value in values]
    return [each for case in cases for each in variants(case, **dict(rest))] if rest else cases
