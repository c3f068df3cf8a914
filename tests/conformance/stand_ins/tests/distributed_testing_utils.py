"""Runs a function on several CPU processes that form one `torch.distributed` group."""

import os
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_distributed(world_size):
    """`run_distributed(n)(function)(*args)` calls `function(rank, *args)` on `n` ranks."""

    def decorate(function):
        def run(*args):
            with tempfile.TemporaryDirectory() as folder:
                mp.spawn(_run_rank, (world_size, f"file://{folder}/store", function, args), nprocs=world_size)

        return run

    return decorate


def _run_rank(rank, world_size, init_method, function, args):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=init_method, rank=rank, world_size=world_size)
    try:
        function(rank, *args)
    finally:
        dist.destroy_process_group()
