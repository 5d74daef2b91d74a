"""k-nearest-neighbour classification of feature matrices, exactly.

    accuracy = knn_accuracy(train, train_labels, test, test_labels, ks=(10, 20), temperatures=(0.07,))

Shapes: N training images, M test images, D features, C classes, k neighbours, b test images at a time.
"""

import itertools
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

import evaluation
import utils
from evaluation import RANKED
from utils import UserError

MEMORY_MB = 1024  # what one chunk of test images may take
PRODUCTS = 2**26  # of features that `search_by_torch` holds at a time: 256 MB
TEST_ROWS = 1024  # test images in one of its matrix products


# ---- the classifier --------------------------------------------------------------------------------------------------


def knn_accuracy(
    train_features,
    train_labels,
    test_features,
    test_labels,
    ks=(20,),
    temperatures=(0.07,),
    search=None,
    over_processes=False,
):
    """Accuracy of `knn_classify`: {(k, temperature): {"top1": percent, "top5": percent}}.

    train_features (N, D), train_labels (N,), test_features (M, D), ks, temperatures, search: `knn_classify`'s.
    test_labels: (M,) integers from 0.
    over_processes: all processes call it with the same arguments, each classifies its share of the test images, and all
        get the accuracy of all of them. Otherwise nothing is exchanged.
    A class without any vote is never a hit; DINO's script fills the five up with classes in arbitrary order.
    """
    test_labels = torch.as_tensor(test_labels)
    check_labels(test_labels, len(test_features), "test")
    own = slice(utils.rank(), None, utils.world_size()) if over_processes else slice(None)
    predictions = knn_classify(train_features, train_labels, test_features[own], ks, temperatures, search=search)
    hits = torch.stack([evaluation.count_hits(ranked, test_labels[own]) for ranked in predictions.values()])
    if over_processes and utils.world_size() > 1:
        dist.all_reduce(hits)
    return {
        setting: evaluation.top1_and_top5(counted, len(test_labels))
        for setting, counted in zip(predictions, hits, strict=True)
    }


@torch.no_grad()
def knn_classify(
    train_features,
    train_labels,
    test_features,
    ks=(10, 20, 100, 200),
    temperatures=(0.07,),
    chunk_size=None,
    search=None,
):
    """Weighted vote of the k most similar training images, for each k and temperature:

        class of x = argmax_c  sum over the k nearest i with label c of exp(cos(x, x_i) / temperature)

    train_features: (N, D) float.  test_features: (M, D). Both on CPU, normalised here; flattened pixels will do.
    train_labels: (N,) integers from 0.
    temperatures: above 0.
    chunk_size: b; by default as many as `MEMORY_MB` allow. It changes the memory used, not the result.
    search: `search_by_faiss`, `search_by_torch`, or the latter with a device; by default what `choose_search` chooses.
    Returns {(k, temperature): (M, 5) int64}: classes by falling vote, -1 where fewer than five have one.
    Raises UserError for k outside [1, N] and for missing labels.
    Source: Wu et al. 2018 (arXiv 1805.01978), as in DINO, which takes at most 1000 classes in (b, k, C) arrays.
    """
    train_labels = torch.as_tensor(train_labels)
    check_ks(ks, len(train_features))
    check_labels(train_labels, len(train_features), "training")
    num_classes = int(train_labels.max()) + 1
    nearest = (search or choose_search())(train_features)
    ranked = {setting: [] for setting in itertools.product(ks, temperatures)}
    for chunk in test_features.split(chunk_size or rows_in_memory(num_classes, max(ks), train_features.shape[1])):
        similarity, neighbours = nearest(F.normalize(chunk.float(), dim=1), max(ks))
        labels = train_labels[neighbours].long()
        for k, temperature in ranked:
            # relative to the nearest: the same order of classes, and no overflow at a small temperature
            weights = ((similarity[:, :k] - similarity[:, :1]).double() / temperature).exp()
            ranked[k, temperature].append(rank_by_votes(labels[:, :k], weights, num_classes))
    return {setting: torch.cat(parts) for setting, parts in ranked.items()}


def rank_by_votes(labels, weights, num_classes):
    """Labels and weights (b, k) of the neighbours -> (b, 5) classes by falling vote, -1 for those without any."""
    votes = torch.zeros(len(labels), num_classes, dtype=weights.dtype).scatter_add_(1, labels, weights)  # (b, C)
    votes, classes = votes.topk(min(RANKED, num_classes), dim=1)
    classes[votes == 0] = -1
    return F.pad(classes, (0, RANKED - classes.shape[1]), value=-1)


# ---- the search ------------------------------------------------------------------------------------------------------
# search(train (N, D)) -> nearest; nearest(test (b, D) of length 1, k) -> (cosines, rows of train), each (b, k), largest
# first. Both searches are exact; which of several equal neighbours come first is theirs.


def choose_search(device="cpu"):
    """faiss's search where faiss is installed, else torch's on `device`, which a line says."""
    if evaluation.find_faiss(f"neighbours are searched by torch, exactly, on {search_device(device)}"):
        return search_by_faiss
    return partial(search_by_torch, device=device)


def search_by_faiss(train):
    """On all GPUs that faiss sees. Holds a normalised copy of train: 2 GB for ImageNet at D = 384."""
    import faiss  # here: --help need not wait for it

    train = np.ascontiguousarray(F.normalize(train.float(), dim=1).numpy())

    def nearest(test, k):
        test = np.ascontiguousarray(test.numpy())
        if faiss.get_num_gpus() > 0:
            found = faiss.knn_gpu(faiss.StandardGpuResources(), test, train, k, metric=faiss.METRIC_INNER_PRODUCT)
        else:
            found = faiss.knn(test, train, k, metric=faiss.METRIC_INNER_PRODUCT)
        return tuple(map(torch.from_numpy, found))

    return nearest


def search_by_torch(train, device="cpu"):
    """By matrix products, `PRODUCTS` at a time; of train a block at a time is normalised and sent to `device`."""
    device = search_device(device)
    rows = max(1, PRODUCTS // max(TEST_ROWS, train.shape[1]))

    def nearest(test, k):
        parts = [part.to(device) for part in test.split(TEST_ROWS)]
        best = [(part.new_empty(len(part), 0), part.new_empty(len(part), 0, dtype=torch.int64)) for part in parts]
        for first in range(0, len(train), rows):
            block = F.normalize(train[first : first + rows].to(device).float(), dim=1)
            best = [larger(*of_part, part @ block.T, first, k) for of_part, part in zip(best, parts, strict=True)]
        return tuple(torch.cat(column).cpu() for column in zip(*best, strict=True))

    return nearest


def larger(cosines, rows, products, first, k):
    """The k largest of cosines (b, j), which belong to rows (b, j) of train, and of products (b, n) with its rows from
    `first` on: (cosines, rows) again."""
    products, columns = products.topk(min(k, products.shape[1]), dim=1)
    return largest(cosines, rows, products, columns + first, k)


def largest(cosines, rows, more, more_rows, k):
    """The k largest of cosines (b, j) and `more` (b, n), largest first, and the rows that they belong to."""
    cosines, rows = torch.cat([cosines, more], dim=1), torch.cat([rows, more_rows], dim=1)
    cosines, order = cosines.topk(min(k, cosines.shape[1]), dim=1)
    return cosines, rows.gather(1, order)


def search_device(device):
    """A GPU of CUDA's or the CPU."""
    device = torch.device(device)
    return device if device.type == "cuda" else torch.device("cpu")


# ---- checks ----------------------------------------------------------------------------------------------------------


def rows_in_memory(num_classes, k, dim):
    """Test images whose votes (8 C bytes), neighbours (48 k) and features (4 D) fit in `MEMORY_MB`; at least 1."""
    return max(1, MEMORY_MB * 2**20 // (8 * num_classes + 48 * k + 4 * dim))


def check_ks(ks, num_train):
    wrong = [k for k in ks if not 1 <= k <= num_train]
    if wrong or not ks:
        raise UserError(
            f"--nb_knn {wrong[0] if wrong else ks}: expected from 1 to {num_train}, the number of training images"
        )


def check_labels(labels, num_images, which):
    if len(labels) != num_images:
        raise ValueError(f"{len(labels)} labels for {num_images} {which} images")
    if (labels < 0).any():
        raise UserError(
            f"{int((labels < 0).sum())} of {num_images} {which} images have no label; k-NN needs one for each"
        )
