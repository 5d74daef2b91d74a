"""k-nearest-neighbour classification of feature matrices, exactly.

    accuracy = knn_accuracy(train, train_labels, test, test_labels, ks=(10, 20), temperatures=(0.07,))

Shapes: N training images, M test images, D features, C classes, k neighbours, b test images at a time.
"""

import itertools

import numpy as np
import torch
import torch.nn.functional as F

from utils import UserError

MEMORY_MB = 1024  # what the votes of one chunk of test images may take
RANKED = 5  # classes that a prediction names, for top-5


# ---- the classifier --------------------------------------------------------------------------------------------------


def knn_accuracy(train_features, train_labels, test_features, test_labels, ks=(20,), temperatures=(0.07,)):
    """Accuracy of `knn_classify`: {(k, temperature): {"top1": percent, "top5": percent}}.

    Arguments as there; test_labels: (M,) integers.
    Local to the calling process: nothing is exchanged.
    A class without any vote is never a hit; DINO's script fills the five up with classes in arbitrary order.
    """
    predictions = knn_classify(train_features, train_labels, test_features, ks, temperatures)
    test_labels = torch.as_tensor(test_labels)
    check_labels(test_labels, len(test_features), "test")
    accuracy = {}
    for setting, ranked in predictions.items():
        hits = ranked == test_labels[:, None]  # (M, 5)
        accuracy[setting] = {
            "top1": 100 * hits[:, 0].double().mean().item(),
            "top5": 100 * hits.any(dim=1).double().mean().item(),
        }
    return accuracy


@torch.no_grad()
def knn_classify(
    train_features,
    train_labels,
    test_features,
    ks=(10, 20, 100, 200),
    temperatures=(0.07,),
    chunk_size=None,
):
    """Weighted vote of the k most similar training images, for each k and temperature:

        class of x = argmax_c  sum over the k nearest i with label c of exp(cos(x, x_i) / temperature)

    train_features: (N, D) float.  test_features: (M, D). Both on CPU, normalised here; flattened pixels will do.
    train_labels: (N,) integers from 0.
    chunk_size: b; by default as many as `MEMORY_MB` allow, beside one normalised copy of train_features (2 GB for
        ImageNet at D = 384; faiss searches it in place). It changes the memory used, not the result.
    Returns {(k, temperature): (M, 5) int64}: classes by falling vote, -1 where fewer than five have one.
    Raises UserError for k outside [1, N], a temperature that is not positive, and missing labels.
    Source: Wu et al. 2018 (arXiv 1805.01978), as in DINO, which takes at most 1000 classes in (b, k, C) arrays.
    """
    train_labels = torch.as_tensor(train_labels)
    check_knn(ks, temperatures, len(train_features))
    check_labels(train_labels, len(train_features), "training")
    num_classes = int(train_labels.max()) + 1
    train = F.normalize(train_features.float(), dim=1)
    ranked = {setting: [] for setting in itertools.product(ks, temperatures)}
    for chunk in test_features.split(chunk_size or rows_in_memory(num_classes, max(ks))):
        similarity, neighbours = nearest(F.normalize(chunk.float(), dim=1), train, max(ks))
        labels = train_labels[neighbours].long()
        for k, temperature in ranked:
            # relative to the nearest: the same order of classes, and no overflow at a small temperature
            weights = ((similarity[:, :k] - similarity[:, :1]).double() / temperature).exp()
            ranked[k, temperature].append(rank_classes(labels[:, :k], weights, num_classes))
    return {setting: torch.cat(parts) for setting, parts in ranked.items()}


def nearest(test, train, k):
    """The k rows of train (N, D) with the largest inner products with each of test (b, D): (products, rows), each
    (b, k), largest first. Exact; faiss holds a block of b x N products at a time."""
    import faiss  # here: --help need not wait for it

    test, train = np.ascontiguousarray(test.numpy()), np.ascontiguousarray(train.numpy())
    if faiss.get_num_gpus() > 0:
        found = faiss.knn_gpu(faiss.StandardGpuResources(), test, train, k, metric=faiss.METRIC_INNER_PRODUCT)
    else:
        found = faiss.knn(test, train, k, metric=faiss.METRIC_INNER_PRODUCT)
    return tuple(map(torch.from_numpy, found))


def rank_classes(labels, weights, num_classes):
    """Labels and weights (b, k) of the neighbours -> (b, 5) classes by falling vote, -1 for those without any."""
    votes = torch.zeros(len(labels), num_classes, dtype=weights.dtype).scatter_add_(1, labels, weights)  # (b, C)
    votes, classes = votes.topk(min(RANKED, num_classes), dim=1)
    classes[votes == 0] = -1
    return F.pad(classes, (0, RANKED - classes.shape[1]), value=-1)


def rows_in_memory(num_classes, k):
    """Test images whose votes (8 C bytes) and neighbours (48 k) fit in `MEMORY_MB`; at least 1."""
    return max(1, MEMORY_MB * 2**20 // (8 * num_classes + 48 * k))


def check_knn(ks, temperatures, num_train):
    wrong = [k for k in ks if not 1 <= k <= num_train]
    if wrong or not ks:
        raise UserError(
            f"--nb_knn {wrong[0] if wrong else ks}: expected from 1 to {num_train}, the number of training images"
        )
    for temperature in temperatures:
        if not temperature > 0:
            raise UserError(f"--temperature {temperature}: expected a positive number")


def check_labels(labels, num_images, which):
    if len(labels) != num_images:
        raise ValueError(f"{len(labels)} labels for {num_images} {which} images")
    if (labels < 0).any():
        raise UserError(
            f"{int((labels < 0).sum())} of {num_images} {which} images have no label; k-NN needs one for each"
        )
