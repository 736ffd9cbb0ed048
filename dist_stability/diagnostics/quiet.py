"""Run a model as it would run in evaluation, without leaving a trace."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from dist_stability import parallel
from dist_stability.snapshot.buffers import BufferCopies
from dist_stability.snapshot.rng import forked


@contextmanager
def quiet(model: nn.Module, seed: int) -> Iterator[None]:
    """Eval mode, no gradients, no compiled code and no fused Transformer kernels: every module runs as written.

    Afterwards train/eval flags, random streams and buffers are as before, autocast's cache is empty and FSDP modules
    are sharded. Compiled code is left out because it does not call hooks added later; the fused path of
    ``nn.TransformerEncoder`` because it packs padded sequences. Enters no collective.

    Args:
        model: What ``parallel.forward_module`` returned.
        seed: Seed of every random stream meanwhile.
    """
    modules = list(model.modules())
    buffers = BufferCopies(model)
    with ExitStack() as undo:  # undone in reverse order, every step of it, whatever happens
        undo.enter_context(torch.no_grad())
        undo.callback(torch.clear_autocast_cache)
        torch.clear_autocast_cache()
        undo.callback(parallel.reshard, model)
        parallel.reshard(model)
        buffers.capture()
        undo.callback(buffers.restore)
        for module in modules:
            undo.callback(setattr, module, "training", module.training)
            module.training = False
        undo.enter_context(forked(seed))
        undo.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
        torch.backends.mha.set_fastpath_enabled(False)
        if "torch._dynamo" in sys.modules:  # nothing is compiled in a process that has not loaded the compiler
            undo.enter_context(torch.compiler.set_stance("force_eager"))
        yield
