"""The one place that knows DDP, FSDP1, FSDP2, HSDP, tensor parallelism and ``torch.compile`` wrappers.

Everything here works without torch.distributed initialized, and where torch was built without it. Only
:func:`clip_grad_norm_` enters a collective.
"""

from ._classes import this_rank
from .layout import Layout, Residence, optimizer_state, residence
from .modules import data_replica, describe, forward_groups, forward_module, has_collectives, reshard
from .norm import clip_grad_norm_
from .tensors import Wrapping, is_dtensor, is_wrapped_as, local, offset, wrapping

__all__ = [
    "Layout",
    "Residence",
    "Wrapping",
    "clip_grad_norm_",
    "data_replica",
    "describe",
    "forward_groups",
    "forward_module",
    "has_collectives",
    "is_dtensor",
    "is_wrapped_as",
    "local",
    "offset",
    "optimizer_state",
    "reshard",
    "residence",
    "this_rank",
    "wrapping",
]
