"""k-nearest-neighbour classification on frozen features: no training, nothing to tune.

    python eval_knn.py --checkpoint runs/cplearn/checkpoint.pth
    torchrun --nproc_per_node=8 eval_knn.py --checkpoint dino_deitsmall16_pretrain.pth runs/in1k/checkpoint.pth \\
        --dataset imagefolder --data_path /data/imagenet --features_dir /scratch/features

Each process extracts the features of its share of the images, then the first one searches, exactly: by faiss where it
is installed (on GPUs where faiss has them), else by torch. Prints top-1 and top-5 accuracy in percent of the validation
images for every k and temperature and, with --output_dir, writes results_knn.json and results_knn.md.
"""

import evaluation
import utils
from evaluation.knn import check_ks, choose_search, knn_accuracy

NB_KNN = (10, 20, 100, 200)

COLUMNS = {
    "checkpoint": ("checkpoint", ""),
    "k": ("k", "d"),
    "temperature": ("temperature", "g"),
    "top1": ("top-1 %", ".2f"),
    "top5": ("top-5 %", ".2f"),
}


def get_args_parser():
    parser = evaluation.evaluation_parser("eval_knn.py", "k-NN classification on frozen features.")
    add = parser.add_argument
    add(
        "--nb_knn", type=utils.positive(int), nargs="+", default=None,
        help=f"numbers of neighbours; 20 is usually best (default: {' '.join(map(str, NB_KNN))}, as far as there are "
        "as many training images)",
    )  # fmt: skip
    add(
        "--temperature",
        type=utils.positive(float),
        nargs="+",
        default=[0.07],
        help="votes weigh exp(similarity / temperature); lower: nearest ones. Several are all tried, on the test "
        "images: a grid shows how much depends on them, the best cell is not a score to report",
    )
    return parser


@utils.command_line
def main(argv=None):
    args = get_args_parser().parse_args(argv)
    device = utils.init_distributed(args.device)
    models = evaluation.open_models(args, device)
    train_images, test_images = evaluation.open_train_and_val(models, "k-NN")
    args.nb_knn = choose_ks(args.nb_knn, len(train_images))
    rows = []
    for evaluated, (train, _), (test, _) in evaluation.extract_all(models, train_images, test_images):
        matrices = train, train_images.labels, test, test_images.labels
        accuracy = knn_accuracy(*matrices, args.nb_knn, args.temperature, choose_search(device))
        rows += [
            {"checkpoint": evaluated.name, "k": k, "temperature": temperature, **scores}
            for (k, temperature), scores in accuracy.items()
        ]
    if utils.rank() == 0:
        counts = {"num_train": len(train_images), "num_test": len(test_images)}
        evaluation.report("knn", rows, COLUMNS, args, models, **counts)


def choose_ks(typed, num_train):
    """The numbers of neighbours that were typed, or of the usual numbers as many as there are images for."""
    if typed is not None:
        check_ks(typed, num_train)
        return typed
    chosen = [k for k in NB_KNN if k <= num_train] or [num_train]
    if len(chosen) < len(NB_KNN):
        evaluation.note(f"--nb_knn {' '.join(map(str, chosen))}: there are {num_train} training images")
    return chosen


if __name__ == "__main__":
    main()
