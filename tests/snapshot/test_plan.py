"""The plan finds everything that is state, knows when it no longer does, and is the same number on every rank."""

from __future__ import annotations

import gc
import weakref
from collections import OrderedDict, UserDict, namedtuple
from typing import Any

import pytest
import torch
from test_slot import OPTIMIZERS
from torch import nn
from torch.distributed.tensor import DTensor, Partial, Replicate
from torch.testing._internal.two_tensor import TwoTensor

from dist_stability import SnapshotError, StabilityError
from dist_stability.snapshot import Slot, StatePlan, digest
from dist_stability.snapshot.tree import walk_optimizers

Pair = namedtuple("Pair", "first second")


def trained(optimizer: str = "adam") -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    made: torch.optim.Optimizer
    if optimizer == "adam":
        made = torch.optim.Adam(model.parameters(), lr=0.1)
    elif optimizer == "sgd":
        made = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    else:
        made = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3)
    step(model, made)
    return model, made


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(torch.arange(6.0).reshape(2, 3)).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)


def plan_of(model: nn.Module, *optimizers: torch.optim.Optimizer, world: int = 1) -> StatePlan:
    return StatePlan.build(model, optimizers, world)


def test_entries_of_adam() -> None:
    model, optimizer = trained()
    plan = plan_of(model, optimizer)
    names = [f"{layer}.{kind}" for layer in (0, 1) for kind in ("weight", "bias")]
    assert [entry.name for entry in plan.entries] == [
        place for name in names for place in (name, f"step of {name}", f"exp_avg of {name}", f"exp_avg_sq of {name}")
    ]
    assert [entry.shape for entry in plan.entries[:4]] == [(4, 3), (), (4, 3), (4, 3)]
    assert all(entry.residence.ranks == (0,) for entry in plan.entries)
    assert plan.nbytes == sum(tensor.numel() * 4 for tensor in plan.tensors()) == 4 * (3 * (12 + 4 + 8 + 2) + 4)
    assert [name for name, _, _ in plan.parameters] == names
    assert plan.residences == ((0,),)
    assert plan.values == {}


def test_tensors_are_the_live_ones_of_this_moment() -> None:
    model, optimizer = trained()
    plan = plan_of(model, optimizer)
    plan.tensors()[0].fill_(3)
    assert model[0].weight.tolist() == [[3] * 3] * 4
    # Another storage for the parameter, another object for the state: found all the same.
    model[0].weight.data = torch.full((4, 3), 5.0)
    optimizer.state[model[0].weight]["exp_avg"] = torch.full((4, 3), 6.0)
    assert plan.is_current()
    assert plan.tensors()[0][0, 0] == 5 and plan.tensors()[2][0, 0] == 6


@pytest.mark.parametrize("optimizer", ["adam", "sgd", "lbfgs"])
def test_state_that_appears_or_vanishes(optimizer: str) -> None:
    model, made = trained(optimizer)
    before = plan_of(model, made)
    assert before.is_current()
    made.state.clear()
    assert not before.is_current()
    empty = plan_of(model, made)
    assert [entry.name for entry in empty.entries] == ["0.weight", "0.bias", "1.weight", "1.bias"]
    _ = made.state[model[0].weight]  # looking into a defaultdict leaves an empty dict behind
    assert empty.is_current()
    step(model, made)
    assert not empty.is_current()
    with pytest.raises(SnapshotError, match=r"rank 0.*new plan"):
        empty.tensors()
    assert empty.signature == before.signature == plan_of(model, made).signature


def test_looking_leaves_nothing_behind() -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.Adam(model.parameters())
    plan = plan_of(model, optimizer)
    plan.tensors(), plan.values, plan.is_current()
    assert len(optimizer.state) == 0


def test_every_change_of_form_is_seen() -> None:
    model, optimizer = trained()
    state = optimizer.state[model[0].weight]
    plan = plan_of(model, optimizer)

    def changed(key: str, value: Any) -> bool:
        kept = dict(state)
        state[key] = value
        try:
            return not plan.is_current()
        finally:
            state.clear()
            state.update(kept)

    assert changed("exp_avg", torch.zeros(4, 3, dtype=torch.bfloat16))
    assert changed("exp_avg", torch.zeros(3, 4))
    assert changed("exp_avg", None)
    assert changed("new", torch.zeros(1))
    assert changed("new", 1)
    assert changed("step", 1.0)
    assert changed("exp_avg", [torch.zeros(4, 3)])
    assert not changed("exp_avg", torch.ones(4, 3))
    del state["exp_avg"]
    assert not plan.is_current()


def test_every_change_of_parameters_is_seen() -> None:
    model, optimizer = trained()
    plan = plan_of(model, optimizer)
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
    assert not plan.is_current()
    optimizer.param_groups.pop()
    assert plan.is_current()
    optimizer.param_groups[0]["params"].reverse()
    assert not plan.is_current()


def test_values_and_containers() -> None:
    model, optimizer = trained()
    state = optimizer.state[model[0].weight]
    state["note"] = {"count": 3, "pair": Pair(torch.ones(2), "text"), "list": [None, torch.zeros(1), 2.5]}
    optimizer.state["ema"] = {"decay": 0.5, "shadow": torch.ones(3)}  # type: ignore[index]
    optimizer.state["total"] = 7  # type: ignore[index,assignment]
    plan = plan_of(model, optimizer)
    assert plan.values == {
        "note.count of 0.weight": 3,
        "note.pair.1 of 0.weight": "text",
        "note.list.0 of 0.weight": None,
        "note.list.2 of 0.weight": 2.5,
        "decay of state 'ema' of optimizer 0": 0.5,
        "state 'total' of optimizer 0": 7,
    }
    names = [entry.name for entry in plan.entries]
    assert {"note.pair.0 of 0.weight", "note.list.1 of 0.weight", "shadow of state 'ema' of optimizer 0"} < set(names)
    assert len(names) == 4 * 4 + 3
    state["note"]["count"] = 4
    assert plan.is_current(), "another value is not another form"
    state["note"]["list"].append(1)
    assert not plan.is_current()


def test_lbfgs_has_nested_state() -> None:
    model, optimizer = trained("lbfgs")
    plan = plan_of(model, optimizer)
    assert any(entry.name.startswith("old_dirs.0 of") for entry in plan.entries)
    assert plan.values["func_evals of 0.weight"] > 0


def test_shared_memory_is_one_entry() -> None:
    model, optimizer = trained("sgd")
    shared = torch.zeros(3)
    for parameter in model.parameters():
        optimizer.state[parameter]["shared"] = shared
    tied = nn.Parameter(model[0].bias.data)
    optimizer.add_param_group({"params": [tied]})
    plan = plan_of(model, optimizer)
    names = [entry.name for entry in plan.entries]
    assert sum("shared" in name for name in names) == 1
    assert len(names) == 4 + 4 + 1
    assert len(plan.parameters) == 5, "both parameters have gradients of their own"
    # Once they part, one entry is no longer enough.
    optimizer.state[model[1].bias]["shared"] = torch.zeros(3)
    assert not plan.is_current()


def test_tied_weights_are_one_parameter() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(4, 2), "head": nn.Linear(2, 4, bias=False)})
    model["head"].weight = model["embed"].weight
    plan = plan_of(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert [entry.name for entry in plan.entries] == ["embed.weight"]


def test_frozen_parameters_are_not_state() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).requires_grad_(False)
    model[1].requires_grad_(True)
    plan = plan_of(model, torch.optim.SGD(model[1].parameters(), lr=0.1))
    assert [entry.name for entry in plan.entries] == ["1.weight", "1.bias"]


def test_names_come_without_wrappers() -> None:
    model = torch.compile(nn.ModuleDict({"module": nn.Sequential(nn.Linear(2, 2))})["module"])
    plan = plan_of(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert [entry.name for entry in plan.entries] == ["0.weight", "0.bias"]


def test_a_foreign_parameter_beside_known_ones() -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD([*model.parameters(), nn.Parameter(torch.ones(1))], lr=0.1)
    assert plan_of(model, optimizer).entries[2].name == "optimizer 0 group 0 parameter 2"


def test_an_optimizer_of_another_model() -> None:
    optimizer = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)
    with pytest.raises(StabilityError, match=r"optimizer 1 \(SGD\).*make the optimizer after wrapping"):
        plan_of(model := nn.Linear(2, 2), torch.optim.SGD(model.parameters(), lr=0.1), optimizer)


def test_two_optimizers_with_one_parameter() -> None:
    model = nn.Linear(2, 2)
    first, second = (torch.optim.SGD(model.parameters(), lr=0.1) for _ in range(2))
    with pytest.raises(StabilityError, match="optimizers 0 and 1 both have the parameter weight"):
        plan_of(model, first, second)


def test_two_optimizers() -> None:
    model, _ = trained()
    one, two = torch.optim.SGD(model[0].parameters(), lr=0.1), torch.optim.Adam(model[1].parameters())
    plan = plan_of(model, one, two)
    assert [entry.name for entry in plan.entries] == ["0.weight", "0.bias", "1.weight", "1.bias"]
    swapped = plan_of(model, two, one)
    assert plan.signature != swapped.signature


def test_signature_knows_names_shapes_and_dtypes() -> None:
    def signature(model: nn.Module) -> int:
        return plan_of(model, torch.optim.SGD(model.parameters(), lr=0.1)).signature

    base = signature(nn.Linear(2, 3))
    assert 0 <= base < 2**64
    assert base == signature(nn.Linear(2, 3)) == signature(torch.compile(nn.Linear(2, 3)))
    different = [nn.Linear(3, 2), nn.Linear(2, 3, bias=False), nn.Linear(2, 3).double(), nn.Sequential(nn.Linear(2, 3))]
    assert len({base, *map(signature, different)}) == 5


def test_digests() -> None:
    model, optimizer = trained()
    plan = plan_of(model, optimizer)
    tensors = plan.tensors()
    digests = plan.digests(tensors)
    assert list(digests) == [(0,)] and int(digests[(0,)]) == int(digest(tensors))
    assert digests.entries.shape == (len(plan.entries),)
    with torch.no_grad():
        model[1].bias[1] += 1
    after = plan.digests(plan.tensors())
    assert after[(0,)] != digests[(0,)]
    changed = (after.entries != digests.entries).nonzero().flatten().tolist()
    assert [plan.entries[index].name for index in changed] == ["1.bias"]


def wrapped_late(rank: int, world: int, mode: str) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    model: nn.Module = nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    if mode == "fsdp2":
        fully_shard(model)
    else:
        model = FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=mode == "fsdp1")
    if mode == "fsdp1":  # keeps the parameter objects, so this is fine
        assert plan_of(model, optimizer, world=world).entries
        return
    with pytest.raises(StabilityError, match="make the optimizer after wrapping"):
        plan_of(model, optimizer, world=world)


@pytest.mark.parametrize("mode", ["fsdp1", "fsdp1-flat", "fsdp2"])
def test_wrapped_after_the_optimizer_was_made(two: Any, mode: str) -> None:
    two.run(wrapped_late, mode)


def signatures(rank: int, world: int) -> list[int]:
    """Shards of any size, down to none, and an optimizer that has state on one rank only."""
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    found = []
    for wrap in (
        lambda net: FullyShardedDataParallel(net, device_id=torch.device("cpu"), use_orig_params=True),
        lambda net: FullyShardedDataParallel(net, device_id=torch.device("cpu")),
        fully_shard,
    ):
        torch.manual_seed(0)
        model = wrap(nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 1)))
        optimizer = torch.optim.Adam(model.parameters())
        found.append(plan_of(model, optimizer, world=world).signature)
        step(model, optimizer)
        plan = plan_of(model, optimizer, world=world)
        found.append(plan.signature)
        assert found[-1] == found[-2]
        assert "0.weight" in plan.entries[0].name or "_flat_param" in plan.entries[0].name
    return found


def test_signature_is_the_same_on_all_ranks(two: Any) -> None:
    first, second = two.run(signatures)
    assert first == second and len(set(first)) == 3 - (first[0] == first[4])


# ---------------------------------------------------------------------- the second look


def test_the_second_look_finds_what_the_first_found() -> None:
    """Along the earlier walk: the same tensors, the same copies of values, whatever the values are by now."""
    model, optimizer = trained()
    state = optimizer.state[model[0].weight]
    state["note"] = {"count": 3, "pair": Pair(torch.ones(2), "text"), "list": [None, torch.zeros(1), 2.5]}
    state["twin"] = TwoTensor(torch.ones(2), torch.zeros(2))
    optimizer.state["ema"] = {"decay": 0.5, "shadow": torch.ones(3)}  # type: ignore[index]
    plan = plan_of(model, optimizer)
    for count in (3, 4):
        state["note"]["count"] = count
        walk, held = walk_optimizers([optimizer])
        image = plan.image()
        assert [t.data_ptr() for t in image.tensors] == [t.data_ptr() for t in walk.parts]
        assert [t.data_ptr() for t in plan.tensors()] == [t.data_ptr() for t in walk.parts]
        assert [t.requires_grad for t in plan.tensors()] == [False] * len(walk.parts)
        assert image.held == held
        assert image.devices == (torch.device("cpu"),) * len(walk.parts)
    state["note"]["list"][0] = 7
    assert plan.image().held[0][0].state["note"]["list"][0] == 7
    assert plan.values["note.list.0 of 0.weight"] == 7


def test_values_that_can_change_are_copies_on_every_look() -> None:
    model, optimizer = trained("sgd")
    optimizer.state[model[0].weight]["seen"] = {1, 2}
    plan = plan_of(model, optimizer)
    first, second = (plan.image().held[0][0].state["seen"] for _ in range(2))
    live = optimizer.state[model[0].weight]["seen"]
    assert first == second == live and len({id(first), id(second), id(live)}) == 3


def test_a_parameter_of_a_wrapper_subclass() -> None:
    """What two-tensor or quantized parameters hold inside is the state, and comes back in place."""
    model = nn.Module()
    model.weight = nn.Parameter(TwoTensor(torch.arange(3.0), torch.arange(3.0) + 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.state[model.weight]["momentum_buffer"] = TwoTensor(torch.ones(3), torch.zeros(3))
    plan, slot = plan_of(model, optimizer), Slot()
    assert [entry.name for entry in plan.entries] == [
        "0 of weight",
        "1 of weight",
        "momentum_buffer.0 of weight",
        "momentum_buffer.1 of weight",
    ]
    kept = model.weight
    slot.fill(plan, 0)
    for tensor in plan.tensors():
        tensor.zero_()
    assert not model.weight.a.any() and slot.verify() == []
    slot.restore()
    assert model.weight is kept and model.weight.a.tolist() == [0, 1, 2] and model.weight.b.tolist() == [10, 11, 12]
    inner = optimizer.state[model.weight]["momentum_buffer"]
    inner.a, inner.b = torch.zeros(5), torch.zeros(5)
    assert not plan.is_current(), "inner tensors have another shape, the outer one has not"
    optimizer.state[model.weight]["momentum_buffer"] = torch.ones(3)
    assert not plan.is_current(), "a plain tensor is none of two parts"


def test_memory_that_overlaps_in_part_comes_back_too() -> None:
    model = nn.Module()
    model.whole = nn.Parameter(torch.arange(10.0))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.state[model.whole]["middle"] = model.whole.data[3:7]
    plan, slot = plan_of(model, optimizer), Slot()
    assert len(plan.entries) == 2 and plan.nbytes == 56
    slot.fill(plan, 0)
    optimizer.state[model.whole]["middle"].fill_(-1)
    assert model.whole[3] == -1
    slot.restore()
    assert model.whole.tolist() == list(range(10)) and slot.verify() == []


def gathered(rank: int, world: int) -> list[bool]:
    """A gathered parameter has the dtype and shape of the DTensor whose shard is the state."""
    from torch.distributed.fsdp import fully_shard

    model = fully_shard(nn.Linear(4, 4))
    optimizer = torch.optim.AdamW(model.parameters())
    step(nn.Sequential(nn.Linear(3, 4), model), optimizer)
    plan = plan_of(model, optimizer, world=world)
    state = optimizer.state[model.weight]
    found = [plan.is_current()]
    kept = state["exp_avg"]
    state["exp_avg"] = kept.full_tensor()
    found.append(plan.is_current())
    state["exp_avg"] = kept.redistribute(placements=[Replicate()])
    found.append(plan.is_current())
    state["exp_avg"] = kept
    found.append(plan.is_current())
    whole, mesh = torch.ones(4, 4), kept.device_mesh
    state["exp_avg"] = DTensor.from_local(whole, mesh, [Replicate()])
    plan = plan_of(model, optimizer, world=world)
    state["exp_avg"] = DTensor.from_local(whole, mesh, [Partial()])
    return [*found, plan.is_current()]


def test_another_layout_of_the_same_shape_is_another_form(two: Any) -> None:
    assert two.run(gathered) == [[True, False, False, True, False]] * 2


# ---------------------------------------------------------------------- the flat look


def outlined(plan: StatePlan) -> bool:
    """Whether the state still fits the flat lists, so that nothing is walked."""
    return all(
        outline is not None and outline.tensors(optimizer) is not None
        for outline, optimizer in zip(plan._outlines, plan.optimizers, strict=True)
    )


class Subclass(torch.Tensor):
    """Of another class than torch's own."""


def first_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return next(iter(optimizer.state.values()))


def put(optimizer: torch.optim.Optimizer, **values: Any) -> None:
    first_state(optimizer).update(values)


def replace_state(optimizer: torch.optim.Optimizer, make: Any) -> None:
    key, state = next(iter(optimizer.state.items()))
    optimizer.state[key] = make(state)


def swap_states(optimizer: torch.optim.Optimizer) -> None:
    """The same states in another order."""
    key = next(iter(optimizer.state))
    optimizer.state[key] = optimizer.state.pop(key)


def parameter(optimizer: torch.optim.Optimizer) -> nn.Parameter:
    return optimizer.param_groups[0]["params"][0]


CHANGES: dict[str, tuple[Any, bool]] = {  # what is done to (optimizer), and whether the plan is current afterwards
    "nothing": (lambda o: None, True),
    "data of another shape": (lambda o: setattr(parameter(o), "data", torch.ones(3, 4)), False),
    "data of another dtype": (lambda o: setattr(parameter(o), "data", torch.ones(4, 3).double()), False),
    "other data": (lambda o: setattr(parameter(o), "data", torch.ones(4, 3)), True),
    "data with other strides": (lambda o: setattr(parameter(o), "data", torch.ones(3, 4).t()), True),
    "a frozen parameter": (lambda o: parameter(o).requires_grad_(False), True),
    "the same tensor twice": (lambda o: put(o, exp_avg=first_state(o)["exp_avg_sq"]), True),
    "state resized in place": (lambda o: first_state(o)["exp_avg"].resize_(3, 4), False),
    "state of no elements": (lambda o: first_state(o)["exp_avg"].resize_(0), False),
    "another dtype": (lambda o: put(o, exp_avg=torch.ones(4, 3).half()), False),
    "another shape": (lambda o: put(o, exp_avg=torch.ones(12)), False),
    "another tensor": (lambda o: put(o, exp_avg=torch.ones(4, 3)), True),
    "a number": (lambda o: put(o, step=1.0), False),
    "a subclass": (lambda o: put(o, exp_avg=torch.ones(4, 3).as_subclass(Subclass)), False),
    "a parameter as state": (lambda o: put(o, exp_avg=nn.Parameter(torch.ones(4, 3))), True),
    "two parts": (lambda o: put(o, exp_avg=TwoTensor(torch.ones(4, 3), torch.ones(4, 3))), False),
    "on another device": (lambda o: put(o, exp_avg=torch.ones(4, 3, device="meta")), True),
    "a new key": (lambda o: put(o, more=torch.ones(1)), False),
    "a removed key": (lambda o: first_state(o).pop("exp_avg"), False),
    "another key": (
        lambda o: replace_state(o, lambda s: {("x" if k == "step" else k): v for k, v in s.items()}),
        False,
    ),
    "a key that is a tensor": (lambda o: replace_state(o, lambda s: {torch.ones(1): 0, **s}), False),
    "keys in another order": (lambda o: replace_state(o, lambda s: dict(reversed(s.items()))), True),
    "another dictionary": (lambda o: replace_state(o, dict), True),
    "a dictionary of another class": (lambda o: replace_state(o, OrderedDict), True),
    "a mapping that is no dictionary": (lambda o: replace_state(o, UserDict), False),
    "a list": (lambda o: replace_state(o, lambda s: list(s.values())), False),
    "no state": (lambda o: replace_state(o, lambda s: {}), False),
    "a state removed": (lambda o: o.state.pop(parameter(o)), False),
    "states in another order": (swap_states, True),
    "state under another key": (lambda o: o.state.update(ema={"x": torch.ones(1)}), False),
    "an empty state under another key": (lambda o: o.state.update(ema={}), True),
    "parameters in another order": (lambda o: o.param_groups[0]["params"].reverse(), False),
    "a parameter removed": (lambda o: o.param_groups[0]["params"].pop(), False),
    "another parameter": (lambda o: o.param_groups[0]["params"].__setitem__(0, nn.Parameter(torch.ones(4, 3))), False),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_flat_look_sees_what_a_walk_sees(change: str) -> None:
    """And finds the same tensors in the same order."""
    model, optimizer = trained()
    plan = plan_of(model, optimizer)
    assert outlined(plan)
    act, current = CHANGES[change]
    act(optimizer)
    flat = plan.look()
    plan._outlines = [None]
    walked = plan.look()
    assert (flat is not None) == (walked is not None) == current
    if flat is not None and walked is not None:
        assert all(one is other for one, other in zip(flat.tensors, walked.tensors, strict=True))
        assert flat.held == walked.held and flat.devices == walked.devices
        assert flat.devices == tuple(tensor.device for tensor in flat.tensors)


@pytest.mark.parametrize(
    "change", ["data with other strides", "a frozen parameter", "on another device", "states in another order"]
)
def test_after_a_change_that_is_none_of_form_the_look_is_flat_again(change: str) -> None:
    model, optimizer = trained()
    plan = plan_of(model, optimizer)
    CHANGES[change][0](optimizer)
    assert not outlined(plan)
    first = plan.image()
    assert outlined(plan)
    second = plan.image()
    assert all(one is other for one, other in zip(first.tensors, second.tensors, strict=True))
    assert first.devices == second.devices == tuple(tensor.device for tensor in second.tensors)


def flat_shards(rank: int, world: int) -> list[bool]:
    """State of FSDP2 is looked at flat, and every change of a DTensor is seen that a walk sees."""
    from torch.distributed.fsdp import fully_shard

    model = fully_shard(nn.Linear(4, 4))
    optimizer = torch.optim.AdamW(model.parameters())
    step(nn.Sequential(nn.Linear(3, 4), model), optimizer)
    plan = plan_of(model, optimizer, world=world)
    state = optimizer.state[model.weight]
    kept, local = state["exp_avg"], state["exp_avg"].to_local()
    mesh = kept.device_mesh
    image = plan.image()
    walked = walk_optimizers([optimizer])[0].parts
    found = [
        outlined(plan),
        [t.data_ptr() for t in image.tensors] == [t.data_ptr() for t in walked],
        not any(isinstance(tensor, DTensor) for tensor in image.tensors),
    ]
    others = {
        "an equal one": (DTensor.from_local(local.clone(), mesh, kept.placements), True),
        "its shard": (local, False),
        "replicated": (DTensor.from_local(torch.ones(4, 4), mesh, [Replicate()]), False),
        "a wider shard": (DTensor.from_local(local.double(), mesh, kept.placements), False),
    }
    for other, current in others.values():
        state["exp_avg"] = other
        found += [outlined(plan) is current, plan.is_current() is current]
    state["exp_avg"] = kept
    kept._local_tensor = torch.ones(3, 4)  # as nobody should
    found += [not outlined(plan), not plan.is_current()]
    kept._local_tensor = local
    return [*found, plan.is_current(), outlined(plan)]


def test_shards_are_looked_at_flat(two: Any) -> None:
    assert two.run(flat_shards) == [[True] * 15] * 2


def two_alike() -> tuple[torch.optim.Optimizer, nn.Parameter, nn.Parameter, StatePlan]:
    """Two parameters of one shape; all that tells their states apart is where they are."""
    model = nn.ParameterList([nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))])
    one, two = model
    optimizer = torch.optim.SGD([one, two], lr=0.1)
    optimizer.state[one].update(first=torch.zeros(2), second=torch.zeros(2))
    optimizer.state[two].update(third=torch.zeros(2), fourth=torch.zeros(2))
    plan = plan_of(model, optimizer)
    assert outlined(plan)
    return optimizer, one, two, plan


def test_a_value_that_moves_to_the_next_state() -> None:
    optimizer, one, two, plan = two_alike()
    optimizer.state[two] = {"second": optimizer.state[one].pop("second"), **optimizer.state[two]}
    assert not plan.is_current()


def test_states_that_change_places() -> None:
    optimizer, one, two, _ = two_alike()
    optimizer.state[two] = {key: torch.ones(2) for key in optimizer.state[one]}
    plan = plan_of(nn.ParameterList([one, two]), optimizer)
    states = dict(optimizer.state)
    optimizer.state.clear()
    optimizer.state.update({two: states[two], one: states[one]})
    assert [tensor.tolist() for tensor in plan.tensors()] == [[1, 1], [0, 0], [0, 0], [1, 1], [1, 1], [1, 1]]
    del optimizer.state[one]
    other = nn.Parameter(torch.ones(2))
    optimizer.state[other] = states[one]
    assert not plan.is_current(), "the same state, of somebody else"


@pytest.mark.parametrize(
    "name", ["none", "sgd", "momentum", "adam-foreach", "amsgrad", "adafactor", "rprop", "two", "frozen", "double"]
)
def test_which_states_are_looked_at_flat(name: str) -> None:
    """All that are dictionaries of plain tensors, also where only some parameters have a state."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    make = OPTIMIZERS.get(name, OPTIMIZERS["adam-foreach"])
    made = [make(model.parameters())]
    if name == "two":
        made = [make(model[1].parameters()), OPTIMIZERS["momentum"](model[0].parameters())]
    if name == "frozen":
        model[0].requires_grad_(False)
    if name == "double":
        model[0].double()
        model.forward = lambda x: model[1](model[0](x.double()).float())  # type: ignore[method-assign]
    for optimizer in made if name != "none" else ():
        step(model, optimizer)
    plan = plan_of(model, *made)
    assert outlined(plan)
    image = plan.image()
    assert [t.data_ptr() for t in image.tensors] == [t.data_ptr() for t in walk_optimizers(made)[0].parts]
    assert image.devices is plan._devices


def test_a_plan_keeps_no_tensor_of_the_state_alive() -> None:
    model, optimizer = trained()
    plan, slot = plan_of(model, optimizer), Slot()
    plan.digests(plan.tensors())
    slot.fill(plan, 0)
    kept = weakref.ref(optimizer.state[model[0].weight]["exp_avg"])
    assert kept() is not None
    optimizer.state[model[0].weight]["exp_avg"] = torch.zeros(4, 3)
    gc.collect()
    assert kept() is None and plan.is_current()


def test_nothing_is_taken_for_the_tensor_whose_place_it_took() -> None:
    """Objects that are freed and made again often get the same address, and so the same id."""
    model, optimizer = trained()
    plan, state = plan_of(model, optimizer), optimizer.state[model[0].weight]
    for shape, current in (((4, 3), True), ((3, 4), False), ((4, 3), True)) * 20:
        del state["exp_avg_sq"]
        state["exp_avg_sq"] = torch.zeros(shape)
        assert plan.is_current() is current
