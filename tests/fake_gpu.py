"""A GPU without one: tensors of torch's meta device, which have no data, that say they are on a GPU. A whole step runs
on them, and what would make the host wait for the device is seen.

    with fake_gpu(words) as (run, batches), Waits() as waits:
        main_cplearn.train_one_step(run, batches, step)
    assert waits.found == []

FakeTensorMode, torch's own, has no backward pass for CUDA tensors where there is no GPU: autograd asks for its streams.
"""

import contextlib
import traceback
import warnings
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
import torch.fx.experimental._config as fx_config
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import accumulation
import main_cplearn
from monitor import RunLog
from running.watch import Watch

ROOT = Path(main_cplearn.__file__).resolve().parent
CUDA = torch.device("cuda", 0)


class AsIfOnGPU(TorchFunctionMode):
    """Inside, "cuda" is the meta device, and tensors of the meta device say that they are on a GPU."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function == torch.Tensor.device.__get__:
            return CUDA if args[0].is_meta else function(*args)
        if function == torch.Tensor.is_cuda.__get__:
            return args[0].is_meta
        if function is torch.Tensor.pin_memory:
            return pinned(*args)
        if function is torch.Tensor.backward:
            return self.backward(args[:1], [torch.ones_like(args[0])])
        if function is torch.autograd.backward:
            return self.backward(args[0], kwargs["grad_tensors"])
        if function in (torch.tensor, torch.as_tensor):  # numbers in Python's memory are copied
            device = (kwargs or {}).pop("device", None)
            made = function(*args, **kwargs or {})
            return made if device is None else made.to(meta_for_cuda(device))
        if function is not torch.device and "autocast" not in function.__name__:
            args, kwargs = tree_map(meta_for_cuda, (args, kwargs or {}))
        return function(*args, **kwargs or {})

    def backward(self, roots, gradients):
        with self:  # the backward passes of autograd's functions are ours too
            engine = torch.autograd.Variable._execution_engine
            engine.run_backward(tuple(roots), tuple(gradients), False, False, (), accumulate_grad=True)


def meta_for_cuda(x):
    if isinstance(x, GPUGenerator):  # nothing is drawn
        return None
    is_cuda = (isinstance(x, torch.device) and x.type == "cuda") or (isinstance(x, str) and x.startswith("cuda"))
    return torch.device("meta") if is_cuda else x


class GPUGenerator(torch.Generator):
    """Stands for a generator on a GPU, which only a GPU has."""

    device = CUDA


def pinned(tensor):
    tensor = tensor.view(tensor.shape)
    tensor.in_pinned_memory = True
    return tensor


# ---- what the host waits for -----------------------------------------------------------------------------------------

# operations whose result, its size or an error depends on what is in the tensors
READ_BY_THE_HOST = {
    "_local_scalar_dense", "is_nonzero", "nonzero", "nonzero_numpy", "argwhere", "masked_select", "equal", "bincount",
    "_unique", "_unique2", "unique_dim", "unique_consecutive", "unique_dim_consecutive", "repeat_interleave",
    "_linalg_check_errors", "_linalg_eigh", "_linalg_svd", "linalg_eig", "linalg_lstsq", "histc",
}  # fmt: skip
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}


class Waits(TorchDispatchMode):
    """Notes, as "operation at file:line", what would make the host wait for a GPU, and counts all operations there."""

    def __init__(self):
        super().__init__()
        self.found, self.operations = [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, function.__name__.split(".")[0]
        self.operations += not function.is_view
        if waits(name, args, kwargs):
            self.found.append(f"{name} at {place()}")
            if name == "_local_scalar_dense":  # nobody knows the number; 1 is also true
                return torch.ones((), dtype=args[0].dtype).tolist()
        return SHAPES.get(name, function)(*args, **kwargs)


def waits(name, args, kwargs):
    if name == "_to_copy":
        to_gpu = args[0].is_meta if kwargs.get("device") is None else kwargs["device"].type == "meta"
        return copy_waits(args[0], to_gpu, kwargs.get("non_blocking"))
    if name == "copy_":
        return copy_waits(args[1], args[0].is_meta, kwargs.get("non_blocking", args[2:] == (True,)))
    if name in INDEXING and args[0].is_meta:
        return any(index.dtype == torch.bool or not index.is_meta for index in args[1] if index is not None)
    return name in READ_BY_THE_HOST and any(
        leaf.is_meta for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)
    )


def copy_waits(source, to_gpu, non_blocking):
    """A copy between host and GPU does, unless it is told not to, and what goes to the GPU is in pinned memory."""
    if source.is_meta == to_gpu:
        return False
    return not non_blocking or (to_gpu and not getattr(source, "in_pinned_memory", False))


def place():
    """The line of this program, or of its tests, that is running."""
    frames = [frame for frame in traceback.extract_stack() if Path(frame.filename).is_relative_to(ROOT)]
    frames = [frame for frame in frames if ".venv" not in frame.filename and frame.filename != __file__]
    return f"{Path(frames[-1].filename).relative_to(ROOT)}:{frames[-1].lineno}"


def per_channel(x, count):
    return [x.new_empty(x.shape[1], dtype=torch.float32) for _ in range(count)]


# kernels of which torch does not know what they give
SHAPES = {
    "_fused_adamw_": lambda *args, **kwargs: None,
    "_fused_sgd_": lambda *args, **kwargs: None,
    "batch_norm_stats": lambda x, eps: per_channel(x, 2),
    "batch_norm_gather_stats_with_counts": lambda x, *rest: per_channel(x, 2),
    "batch_norm_elemt": lambda x, *rest: torch.empty_like(x),
    "batch_norm_backward_reduce": lambda grad, x, *rest: per_channel(x, 4),
    "batch_norm_backward_elemt": lambda grad, x, *rest: torch.empty_like(x),
}


# ---- a run -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def fake_gpu(words, processes=1):
    """(run, the micro-batches of a step): a run by the flags `words` with all its tensors on a fake GPU, as the first
    of so many processes; their collectives do nothing, and DDP, which is C++, is left out."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=processes)
    with contextlib.ExitStack() as stack:
        stack.callback(dist.destroy_process_group)
        stack.enter_context(mock.patch.object(main_cplearn, "wrap", lambda half, device: half))
        stack.enter_context(mock.patch.object(accumulation, "averaging", lambda *half: contextlib.nullcontext()))
        stack.enter_context(mock.patch.object(accumulation, "draws", lambda *place: GPUGenerator()))
        for name in ("all_reduce", "all_gather", "broadcast"):
            stack.enter_context(mock.patch.object(dist, name, lambda *args, **kwargs: None))
        stack.enter_context(mock.patch.object(fx_config, "meta_nonzero_assume_all_nonzero", True))
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", "CUDA is not available")
        run = main_cplearn.build_run(main_cplearn.get_args_parser().parse_args([*words, "--device", "cpu"]))
        stack.callback(main_cplearn.close, run)
        batches = next(run.loader.steps(0))
        run.log, run.watch = RunLog(run.args.output_dir, 0, run.total_steps), Watch((), 0, lambda: None)
        run.model.train().to("meta")
        stack.enter_context(AsIfOnGPU())
        run.ahead.memory_format = main_cplearn.lay_out(run.model, CUDA)
        run.device, run.optimizer = CUDA, main_cplearn.build_optimizer(run.args, run.model)
        yield run, [batch.pin_memory() for batch in batches]
