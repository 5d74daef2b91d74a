"""k-nearest-neighbour classification on frozen features: no training, nothing to tune.

    python eval_knn.py --checkpoint runs/cplearn/checkpoint.pth
    torchrun --nproc_per_node=8 eval_knn.py --checkpoint dino_deitsmall16_pretrain.pth runs/in1k/checkpoint.pth \\
        --dataset imagefolder --data_path /data/imagenet --features_dir /scratch/features

Each process extracts the features of its share of the images, then the first one searches, exactly, by faiss (on GPUs
where faiss has them). Prints top-1 and top-5 accuracy in percent of the validation images for every k and temperature
and, with --output_dir, writes results_knn.json and results_knn.md.
"""

import evaluation
import utils
from evaluation.knn import check_knn, knn_accuracy

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
    add("--nb_knn", type=int, nargs="+", default=[10, 20, 100, 200], help="numbers of neighbours; 20 is usually best")
    add(
        "--temperature",
        type=float,
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
    check_knn(args.nb_knn, args.temperature, len(train_images))
    rows = []
    for evaluated, (train, _), (test, _) in evaluation.extract_all(models, train_images, test_images):
        accuracy = knn_accuracy(train, train_images.labels, test, test_images.labels, args.nb_knn, args.temperature)
        rows += [
            {"checkpoint": evaluated.name, "k": k, "temperature": temperature, **scores}
            for (k, temperature), scores in accuracy.items()
        ]
    if utils.rank() == 0:
        counts = {"num_train": len(train_images), "num_test": len(test_images)}
        evaluation.report("knn", rows, COLUMNS, args, models, **counts)


if __name__ == "__main__":
    main()
