"""Runs a script with accelerate's FSDP plugin on the CPU, for tests alone.

    accelerate launch --config_file accelerate_configs/fsdp2.yaml tests/fsdp_on_cpu.py SCRIPT FLAGS

accelerate turns several GPUs into FSDP, never several CPUs: there the plugin is dropped without a
word, and the model ends up in DDP. torch's FSDP itself runs with gloo. `allow_fsdp_on_cpu` is all
that is changed; what follows is accelerate's and transformers' real path.
"""

from __future__ import annotations

import functools
import os
import runpy
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType


def allow_fsdp_on_cpu() -> None:
    """Let accelerate keep the FSDP plugin of the launcher on several CPUs."""
    original = AcceleratorState.__init__
    if getattr(original, "for_tests", False):
        return

    @functools.wraps(original)
    def with_plugin(
        self: AcceleratorState, *args: Any, fsdp_plugin: Any = None, **kwargs: Any
    ) -> None:
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type is DistributedType.MULTI_CPU:
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            self.distributed_type = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin
            self.device = torch.device("cpu")  # not "cpu:0", which FSDP1 takes for another one
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    with_plugin.for_tests = True
    AcceleratorState.__init__ = with_plugin
    # What a mesh of several dimensions, as for tensor parallelism, is asked for; as on GPUs, not of
    # FSDP, and FSDP1 would else become DDP.
    Accelerator.multi_device = property(
        lambda self: self.distributed_type is DistributedType.MULTI_CPU
    )


if __name__ == "__main__":
    allow_fsdp_on_cpu()
    sys.argv = sys.argv[1:]
    sys.path.insert(0, str(Path(sys.argv[0]).resolve().parent))
    status: Any = 0
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        status = end.code
    if status:
        sys.exit(status)
    if dist.is_initialized():
        dist.barrier()
        sys.stdout.flush()
        os._exit(0)  # gloo may hang or abort in its destructors, plain Trainer or not
