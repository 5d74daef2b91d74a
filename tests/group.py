"""One process of `run_in_processes`. Not in conftest.py, of which there are several: workers import it by its name."""

import traceback

import torch
import torch.distributed as dist


def in_group(rank, world_size, store, function, args, results):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    try:
        results.put((rank, function(rank, *args), None))
    except Exception:
        results.put((rank, None, traceback.format_exc()))
    finally:
        dist.destroy_process_group()
