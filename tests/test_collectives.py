"""What the processes of a run say to each other in a step: the same on all of them, in one order, and little."""

import torch
import torch.distributed as dist

import main_cplearn
from runs import flags, write_pictures

STEPS = 3
COLLECTIVES = ("all_reduce", "all_gather", "broadcast", "reduce_scatter_tensor", "barrier")
# {form of the head: most collectives in a step}, beside those by which DDP averages gradients: those of batch norm and
# of the loss, forward and backward, of a logged line, and one to agree on saving; 16, 16 and 23 were counted
FORMS = {"dense": 20, "tiled": 20, "sharded": 28}


def train_and_listen(rank, runs):
    """Of each run: of each step [(name, (shape, type, whether contiguous) of each tensor)], in order."""
    heard = []
    for name in COLLECTIVES:
        setattr(dist, name, listening(getattr(dist, name), name, heard))
    step = main_cplearn.train_one_step
    main_cplearn.train_one_step = lambda *args: (heard[-1].append([]), step(*args))[1]
    for words in runs:
        heard.append([[]])
        main_cplearn.train(main_cplearn.get_args_parser().parse_args(words))
    return [steps[1:] for steps in heard]


def listening(call, name, heard):
    def wrapped(*args, **kwargs):
        parts = [t for arg in args for t in (arg if isinstance(arg, list) else [arg]) if isinstance(t, torch.Tensor)]
        heard[-1][-1].append((name, *((tuple(t.shape), str(t.dtype), t.is_contiguous()) for t in parts)))
        return call(*args, **kwargs)

    return wrapped


def test_processes_say_the_same_in_the_same_order(run_in_processes, tmp_path):
    pictures = write_pictures(tmp_path / "pictures")
    words = [
        flags(pictures, tmp_path / form, 2, max_steps=STEPS, log_every=1,
              **({"shard_codes": True} if form == "sharded" else {"head_impl": form}))
        for form in FORMS
    ]  # fmt: skip
    ours, theirs = run_in_processes(train_and_listen, words)
    assert ours == theirs
    for (form, most), steps in zip(FORMS.items(), ours, strict=True):
        counts = [len(step) for step in steps]
        assert len(counts) == STEPS and 0 < max(counts[:-1]) <= most, f"{form}: {counts}"
        assert all(contiguous for step in steps for _, *parts in step for _, _, contiguous in parts)
