"""SwAV: images are assigned to prototypes online, all prototypes alike; a view predicts the assignments of the others.

Caron, Misra, Mairal, Goyal, Bojanowski, Joulin, "Unsupervised Learning of Visual Features by Contrasting Cluster
Assignments", NeurIPS 2020 (arXiv 2006.09882). Written from the equations.

    n images of this process, N of all, V views of each, the first G are global crops
    D backbone width, P embedding width, K prototypes, L rows of the queue
"""

import math

import torch
from torch import nn
from torch.nn import functional as F

from baselines.joint import check_views, joint_logsumexp, ordered_pairs
from baselines.projector import Projector
from objective import NUM_GLOBAL, CodesObjective
from utils import all_gather_rows, not_negative, positive


def swav_loss(
    scores, temperature=0.1, epsilon=0.05, num_global=2, num_iterations=3, queue_scores=None, queue_log_weight=0.0
):
    """SwAV's loss, with the assignments of global views as targets of all other views:

        q_a   = sinkhorn(scores_a)                                    (n, K), without gradient
        loss  = mean over pairs (a, v), a < G, v != a of CE(q_a, softmax(scores_v / temperature))
        CE(q, p) = -mean_i sum_k q[i,k] log p[i,k]

    scores: list of V tensors (n, K), cosines of embeddings and prototypes, global crops first.
    queue_scores: G tensors (L, K) of past embeddings, which take part in `sinkhorn` only; see there.
    Returns (loss, {"entropy", "target_entropy"}), in nats: mean entropy of the global views' predictions and targets.
    Raises ValueError for shapes that do not fit.
    Source: Eqs. 1 to 5 of arXiv 2006.09882. An equal assignment of all images to all prototypes has loss log K.
    """
    check_views(scores, num_global)
    past = queue_scores or [s[:0] for s in scores[:num_global]]
    targets = [
        sinkhorn(torch.cat([p, s]), epsilon, num_iterations, len(p), queue_log_weight)[len(p) :]
        for p, s in zip(past, scores[:num_global], strict=True)
    ]
    log_probs = [F.log_softmax(s / temperature, dim=1) for s in scores]
    pairs = ordered_pairs(len(scores), num_global)
    loss = sum(-(targets[a] * log_probs[v]).sum(dim=1).mean() for a, v in pairs) / len(pairs)
    return loss, {
        "entropy": mean_entropy([log_p.detach().exp() for log_p in log_probs[:num_global]]),
        "target_entropy": mean_entropy(targets),
    }


def mean_entropy(views):
    """Mean over views and images of the entropy of probabilities (n, K), in nats."""
    return sum(torch.special.entr(p).sum(dim=1).mean() for p in views) / len(views)


@torch.no_grad()
def sinkhorn(scores, epsilon=0.05, num_iterations=3, num_queued=0, queue_log_weight=0.0):
    """Assignments of images to prototypes, as alike as the prototypes allow, of sum 1 for each image:

        Q = exp(scores / epsilon), of the joint batch
        num_iterations times:  each prototype's column /= its sum over images,  each image's row /= its sum

    by logarithms, so that no epsilon overflows; factors K and N cancel in the next division. The last division is the
    images': their sums are 1, the prototypes' sums are N / K only in the limit.

    scores: (n, K), the images of this process, after `num_queued` rows of a queue, the same on all processes, which
        count once.  queue_log_weight: 0, or -inf (also as a tensor) where the queue does not count.
    Returns (n, K), rows of the queue first.
    """
    log_q = scores / epsilon
    for _ in range(num_iterations):
        log_q = log_q - log_sum_over_images(log_q, num_queued, queue_log_weight)
        log_q = log_q.log_softmax(dim=1)
    return log_q.exp()


def log_sum_over_images(log_q, num_queued, queue_log_weight):
    of_batch = joint_logsumexp(log_q[num_queued:])
    if num_queued == 0:
        return of_batch
    return torch.logaddexp(of_batch, log_q[:num_queued].logsumexp(dim=0, keepdim=True) + queue_log_weight)


class SwAVHead(nn.Module):
    """Projector D-H-P to unit length, and K prototypes of unit length; scores are their cosines.

    Batch norm over all views of a step together, as in the authors' code. Runs in the parameters' dtype."""

    def __init__(self, in_dim, out_dim=3000, proj_dim=128, hidden_dim=2048):
        super().__init__()
        self.projector = Projector([in_dim, hidden_dim, proj_dim], norm="all")
        self.prototypes = nn.Linear(proj_dim, out_dim, bias=False)
        self.normalise_prototypes()

    @property
    def num_codes(self):
        return len(self.prototypes.weight)

    @torch.no_grad()
    def normalise_prototypes(self):
        self.prototypes.weight.copy_(F.normalize(self.prototypes.weight, dim=1))

    def forward(self, views):
        """V x (n, D) -> V x (n, P) of unit length."""
        with torch.autocast(views[0].device.type, enabled=False):
            return [F.normalize(z, dim=1) for z in self.projector(views)]

    def scores(self, z):
        """(n, P) of unit length -> cosines with the prototypes (n, K)."""
        with torch.autocast(z.device.type, enabled=False):
            return self.prototypes(z)

    @torch.no_grad()
    def assign(self, x):
        """Backbone features (n, D) -> the nearest prototype of each (n,) int64, by batch norm's running statistics."""
        was_training = self.training
        codes = self.eval().scores(self([x])[0]).argmax(dim=1)
        self.train(was_training)
        return codes

    @classmethod
    def from_state_dict(cls, in_dim, state):
        """A head of the sizes that a state dict tells; the weights are not loaded."""
        names = ("prototypes.weight", "projector.mlp.3.weight", "projector.mlp.0.weight")
        return cls(in_dim, *(len(state[name]) for name in names))


class SwAV(CodesObjective):
    """SwAV as the training loop's objective.

    queue   (L, G, P)  embeddings of the latest images of all processes, newest first; the same on all processes
    queued  how many of them there are: before they are L, they do not count

    queue_length: L; 0: no queue.  queue_starts, freeze_prototypes: in steps.
    """

    flags = {
        "out_dim": 3000,
        "proj_dim": 128,
        "hidden_dim": 2048,
        "temperature": 0.1,
        "epsilon": 0.05,
        "sinkhorn_iterations": 3,
        "queue_length": 0,
        "epoch_queue_starts": 15,
        "freeze_prototypes_epochs": 1,
    }
    advice = {
        "saddle": "predictions are uniform: lower --epsilon or --temperature, or raise --lr",
        "representation": "all images get one feature: lower --lr, or raise --freeze_prototypes_epochs",
        "dimensional": "features span few directions: raise --out_dim or --proj_dim, or train longer",
        "cluster": "few prototypes are used: raise --sinkhorn_iterations, use --queue_length or more images per step",
        "intracluster": "images that share a prototype are alike: raise --out_dim or --epsilon",
    }

    def __init__(
        self,
        head,
        temperature=0.1,
        epsilon=0.05,
        num_iterations=3,
        queue_length=0,
        queue_starts=0,
        freeze_prototypes=0,
        num_global=NUM_GLOBAL,
    ):
        super().__init__(head.num_codes)
        self.head, self.num_global = head, num_global
        self.temperature, self.epsilon, self.num_iterations = temperature, epsilon, num_iterations
        self.queue_starts, self.freeze_prototypes = queue_starts, freeze_prototypes
        self.register_buffer("queue", torch.zeros(queue_length, num_global, head.prototypes.in_features))
        self.register_buffer("queued", torch.zeros((), dtype=torch.int64))
        self.uses_queue = False

    @classmethod
    def from_args(cls, args, backbone, course):
        head = SwAVHead(backbone.embed_dim, args.out_dim, args.proj_dim, args.hidden_dim)
        return cls(
            head,
            args.temperature,
            args.epsilon,
            args.sinkhorn_iterations,
            args.queue_length,
            args.epoch_queue_starts * course.steps_per_epoch,
            args.freeze_prototypes_epochs * course.steps_per_epoch,
        )

    @classmethod
    def head_from_state_dict(cls, in_dim, state, settings):
        return SwAVHead.from_state_dict(in_dim, state) if "prototypes.weight" in state else None

    @staticmethod
    def add_arguments(parser):
        add = parser.add_argument_group("--objective swav").add_argument
        add("--temperature", type=positive(float), help="of the predictions")
        add("--epsilon", type=positive(float), help="of the targets; lower: harder targets")
        add("--sinkhorn_iterations", type=positive(int), help="more make the prototypes' shares more equal")
        add(
            "--queue_length",
            type=not_negative(int),
            help="past images that take part in the targets; 0: none. Small recipes: 3840. For batches smaller than K",
        )
        add("--epoch_queue_starts", type=not_negative(int), help="the queue is filled from this epoch on")
        add("--freeze_prototypes_epochs", type=not_negative(int), help="epochs in which the prototypes stay as drawn")

    def before_step(self, step, backbone):
        self.uses_queue = len(self.queue) > 0 and step >= self.queue_starts

    def forward(self, rows, kept=(), generator=None):
        views = self.head(rows)
        scores = [self.head.scores(z) for z in views]
        with torch.autocast(rows[0].device.type, enabled=False):
            loss, terms = swav_loss(
                scores, self.temperature, self.epsilon, self.num_global, self.num_iterations, *self._scores_of_queue()
            )
        self._append(views)
        self.remember_logits(scores[0] / self.temperature)
        return loss, terms

    @torch.no_grad()
    def _scores_of_queue(self):
        """G x (L, K), and the logarithm of their weight: a queue that is not yet full has none."""
        if not self.uses_queue:
            return None, 0.0
        scores = [self.head.scores(self.queue[:, a]) for a in range(self.num_global)]
        return scores, torch.where(self.queued < len(self.queue), -math.inf, 0.0)

    @torch.no_grad()
    def _append(self, views):
        if self.uses_queue:
            new = all_gather_rows(torch.stack(views[: self.num_global], dim=1))  # (N, G, P)
            self.queue.copy_(torch.cat([new, self.queue])[: len(self.queue)])
            self.queued += len(new)

    def before_update(self, step, backbone):
        if step < self.freeze_prototypes:
            self.head.prototypes.weight.grad = None

    def after_step(self, step, backbone):
        self.head.normalise_prototypes()

    def statistics(self, features, averages):
        """entropy_share   entropy of a prediction over log K: 1 where it is uniform
        disagreement    loss - target_entropy: mean divergence of predictions from targets, in nats, at least 0
        queued          images in the queue; None without one
        """
        return super().statistics(features, averages) | {
            "entropy_share": averages["entropy"] / math.log(self.num_codes),
            "disagreement": averages["loss"] - averages["target_entropy"],
            "queued": self.queued.clamp(max=len(self.queue)) if len(self.queue) else None,
        }

    def describe(self):
        queue = f"{len(self.queue)} past images from step {self.queue_starts}" if len(self.queue) else "none"
        return [
            f"head: {self.head.projector}, l2; {self.num_codes} prototypes of length 1, as drawn for "
            f"{self.freeze_prototypes} steps",
            f"loss: SwAV, temperature {self.temperature:g}, epsilon {self.epsilon:g}, {self.num_iterations} iterations "
            f"of Sinkhorn over the joint batch, queue: {queue}; log K = {math.log(self.num_codes):.4f} nats where "
            "nothing is learned",
        ]
