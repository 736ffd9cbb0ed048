"""The one place that knows DDP, FSDP1, FSDP2, HSDP, tensor parallelism and ``torch.compile`` wrappers.

Everything here works without torch.distributed initialized, and where torch was built without it. Only
:func:`clip_grad_norm_` enters a collective.
"""

from ._classes import this_rank
from .boxes import offsets, without_boxes
from .layout import Layout, Residence, optimizer_state, residence
from .modules import (
    data_replica,
    describe,
    forward_groups,
    forward_module,
    has_collectives,
    is_compiled,
    named_modules,
    original_class,
    reshard,
    standalone,
    unwrapped,
)
from .norm import clip_grad_norm_
from .tensors import Wrapping, is_dtensor, is_wrapped_as, local, local_gradient, offset, shards, wrapping

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
    "is_compiled",
    "is_dtensor",
    "is_wrapped_as",
    "local",
    "local_gradient",
    "named_modules",
    "offsets",
    "offset",
    "optimizer_state",
    "original_class",
    "reshard",
    "residence",
    "shards",
    "standalone",
    "this_rank",
    "unwrapped",
    "without_boxes",
    "wrapping",
]
