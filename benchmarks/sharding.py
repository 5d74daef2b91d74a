"""What the loss needs on each GPU with and without --shard_codes: arithmetic, nothing is run.

    python -m benchmarks.sharding                     # the table of benchmarks/README.md
    python -m benchmarks.sharding --batch_size 32 --dim 768

Per GPU and step. A ring moves (R - 1) / R of the result for an all-gather of R parts, and twice that for an all-reduce.
"""

import argparse

FLOAT, INDEX = 4, 8  # bytes


def get_parser():
    parser = argparse.ArgumentParser("benchmarks.sharding", description=__doc__.split("\n")[0])
    parser.add_argument("--batch_size", type=int, default=64, help="images per GPU, B (default 64)")
    parser.add_argument("--dim", type=int, default=384, help="head width F (default 384)")
    parser.add_argument("--views", type=int, default=2, help="V, of which 2 are global (default 2)")
    parser.add_argument("--gpus", type=int, nargs="+", default=[8, 64, 512])
    parser.add_argument("--num_codes", type=int, nargs="+", default=[131072, 1048576, 16777216])
    parser.add_argument(
        "--gigabytes_per_s", type=float, default=25, help="of one GPU's network (default 25: 200 Gbit/s)"
    )
    return parser


def whole(args, num_gpus, num_codes):
    """(dictionary as int8, all other memory, bytes moved) where each GPU holds all codes."""
    rows = args.views * args.batch_size
    # pbar here and over all GPUs, and the slope, of two views; usage and counts; h, centers, gradient
    memory = 3 * 2 * num_codes * FLOAT + 2 * num_codes * FLOAT + 3 * rows * args.dim * FLOAT
    all_reduced = 2 * 2 * num_codes * FLOAT  # pbar of two views, and its gradient in the backward pass
    return args.dim * num_codes, memory, 2 * all_reduced * (num_gpus - 1) / num_gpus


def sharded(args, num_gpus, num_codes):
    """The same where each GPU holds num_codes / num_gpus codes and sees the images of all."""
    rows, global_rows = (views * args.batch_size * num_gpus for views in (args.views, 2))
    vectors = rows * args.dim * FLOAT
    memory = 3 * 2 * num_codes / num_gpus * FLOAT + 2 * num_codes * FLOAT + 4 * vectors  # h twice: gathered, rounded
    gathered = vectors
    all_reduced = vectors + global_rows * args.dim * FLOAT  # centers; sum_k A w_k
    all_reduced += rows * (2 * FLOAT + INDEX) + global_rows * FLOAT  # top (twice), total, best; sum_k A
    return args.dim * num_codes / num_gpus, memory, (gathered + 2 * all_reduced) * (num_gpus - 1) / num_gpus


def main(args):
    print("| GPUs | K | codes | dictionary, int8 | as bits | other memory | moved | at the network's speed |")
    print("|---" * 8 + "|")
    for num_gpus in args.gpus:
        for num_codes in args.num_codes:
            for name, form in (("whole", whole), ("sharded", sharded)):
                dictionary, memory, moved = form(args, num_gpus, num_codes)
                sizes = " | ".join(f"{x / 1e6:,.1f} MB" for x in (dictionary, dictionary / 8, memory, moved))
                milliseconds = moved / args.gigabytes_per_s / 1e6
                print(f"| {num_gpus} | {num_codes:,} | {name} | {sizes} | {milliseconds:.2f} ms |")


if __name__ == "__main__":
    main(get_parser().parse_args())
