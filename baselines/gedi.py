"""GEDI: a classifier without labels that is also an energy model of images; and GEDI no gen, the classifier alone.

Sansone, Manhaeve, "GEDI: GEnerative and DIscriminative Training for Self-Supervised Learning" (arXiv 2212.13425). The
sampler is that of JEM, Grathwohl et al., "Your Classifier is Secretly an Energy Based Model" (arXiv 1912.03263).

    n images of this process, N of all, V views of each, the first G are global crops
    D backbone width, K classes, C channels, S slots of the replay buffer
    images are in [-1, 1] here, and normalised by --mean and --std where they are views
"""

import contextlib
import math
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from baselines.joint import check_views, joint_mean, ordered_pairs
from baselines.projector import Projector
from cplearn_head import PRIORS, prior_loss
from objective import NUM_GLOBAL, CodesObjective, features_of_views
from utils import Number, UserError, all_gather_rows, boolean, not_negative, positive, rank, world_size

NOISE_STD = 0.03  # of the noise on real images in [-1, 1], JEM's
LARGEST_IMAGE = 64  # px: larger ones are not sampled in a few steps


def gedi_no_gen_loss(logits, beta=1.0, prior="kl", authors_form=False, num_global=2):
    """The loss of GEDI without its generative term, on the logits of a trained head; p_v = softmax(logits_v):

        loss    = beta * mean over pairs (a, v), a < G, v != a of CE(p_a, p_v)  +  mean over a < G of prior(pbar_a)
        CE(p_a, p_v) = -mean_i sum_k p_a[i,k] log p_v[i,k]         invariance
        prior(pbar)  = `prior_loss` of the mean over the joint batch: "kl" or "ce"

    authors_form: as their code has it, of two views: 1/2 (-sum_k log pbar_0k) + 1/2 beta CE(p_1, p_0). The prior is
        one view's and not divided by K: their beta is K times that of the first form. `prior` is not read.
    Gradients flow through both sides.

    logits: list of V tensors (n, K), divided by the temperature, global crops first.
    Returns (loss, {"invariance", "prior", "entropy"}): nats, unweighted; entropy of the p_a, without gradient.
    Raises ValueError for shapes that do not fit, an unknown prior, or the authors' form of more than two views.
    Source: Eqs. 2 and 3 of arXiv 2212.13425; the first form is CPLearn's loss (arXiv 2410.04959) on these logits.
    """
    check_views(logits, num_global)
    if prior not in PRIORS:
        raise ValueError(f"prior is {prior!r}; expected one of {PRIORS}")
    if authors_form and len(logits) != 2:
        raise ValueError(f"{len(logits)} views; the authors' form is expected to have 2")
    log_probs = [F.log_softmax(s, dim=1) for s in logits]
    probs = [log_p.exp() for log_p in log_probs]
    pairs = [(1, 0)] if authors_form else ordered_pairs(len(logits), num_global)
    invariance = sum(-(probs[a] * log_probs[v]).sum(dim=1).mean() for a, v in pairs) / len(pairs)
    means = [joint_mean(p) for p in probs[: 1 if authors_form else num_global]]
    prior_term = sum(prior_loss(mean, "ce" if authors_form else prior) for mean in means) / len(means)
    with torch.no_grad():
        entropy = sum(torch.special.entr(p).sum(dim=1).mean() for p in probs[:num_global]) / num_global
    if authors_form:
        prior_term = prior_term * logits[0].shape[1]
    loss = (beta * invariance + prior_term) / (2 if authors_form else 1)
    return loss, {"invariance": invariance, "prior": prior_term, "entropy": entropy}


def sgld(energy, images, num_steps=20, step_size=1.0, noise_std=0.01, generator=None):
    """Stochastic gradient Langevin dynamics: num_steps times  x <- x + step_size * d sum f / d x + noise_std * noise.

    energy: f, images (B, C, h, w) -> (B,), the negative energy, which the samples climb; f of an image is its own.
    images: where the chains start.  generator: of the noise, on the images' device.
    Returns images of the chains' ends, without a graph; no parameter of f gets a gradient.
    Source: Eq. 4 of arXiv 1912.03263, with a step and a noise that are not tied, as in its code.
    """
    x = images.detach()
    for _ in range(num_steps):
        with torch.enable_grad():
            x.requires_grad_()
            (gradient,) = torch.autograd.grad(energy(x).sum(), x)
        x = x.detach() + step_size * gradient + noise_std * normal_like(x, generator)
    return x.detach()


def normal_like(x, generator):
    return torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)


class GEDIHead(Projector):
    """D-H [-H] -K, batch norm per view and ReLU between: scores of K classes."""

    def __init__(self, in_dim, out_dim=2048, hidden_dim=2048, hidden_layers=1):
        super().__init__([in_dim, *[hidden_dim] * hidden_layers, out_dim], norm="view")

    @property
    def num_codes(self):
        return self.widths[-1]

    def log_density(self, x):
        """Backbone features (n, D) -> f = logsumexp of the scores, without temperature (n,): log p(image) + const."""
        return self([x])[0].logsumexp(dim=1)

    @torch.no_grad()
    def assign(self, x):
        """Backbone features (n, D) -> the class of each (n,) int64, by batch norm's running statistics."""
        with evaluating(self):
            return self([x])[0].argmax(dim=1)

    @classmethod
    def from_state_dict(cls, in_dim, state):
        """A head of the sizes that a state dict tells; the weights are not loaded."""
        layers = [len(state[name]) for name in ("mlp.0.weight", "mlp.3.weight", "mlp.6.weight") if name in state]
        return cls(in_dim, layers[-1], layers[0], len(layers) - 1)


@contextlib.contextmanager
def evaluating(*modules):
    """Inside, in evaluation mode: nothing is dropped, and batch norm has, and keeps, its running statistics."""
    modes = {part: part.training for module in modules for part in module.modules()}
    for module in modules:
        module.eval()
    try:
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode


class GEDINoGen(CodesObjective):
    """GEDI without its generative term as the training loop's objective."""

    flags = {
        "out_dim": 2048,
        "hidden_dim": 2048,
        "hidden_layers": 1,
        "head_temp": 0.1,
        "beta": 0.25,
        "prior": "kl",
        "authors_form": False,
    }
    advice = {
        "saddle": "the loss rests where every p is uniform: raise --beta or --lr, or lower --head_temp",
        "representation": "all images get one feature: lower --lr or --beta",
        "dimensional": "features span few directions: raise --out_dim, or train longer",
        "cluster": "few classes are used: lower --beta, or use more images per step",
        "intracluster": "images that share a class are alike: raise --out_dim, or lower --beta",
    }

    def __init__(self, head, beta=1.0, prior="kl", authors_form=False, head_temp=0.1, num_global=NUM_GLOBAL):
        super().__init__(head.num_codes)
        self.head, self.head_temp, self.num_global = head, head_temp, num_global
        self.beta, self.prior, self.authors_form = beta, prior, authors_form

    @classmethod
    def from_args(cls, args, backbone, course):
        if args.authors_form and args.local_crops_number:
            raise UserError(
                f"--local_crops_number {args.local_crops_number}: --authors_form is of two views; expected 0"
            )
        head = GEDIHead(backbone.embed_dim, args.out_dim, args.hidden_dim, args.hidden_layers)
        return cls(head, args.beta, args.prior, args.authors_form, args.head_temp)

    @classmethod
    def head_from_state_dict(cls, in_dim, state, settings):
        return GEDIHead.from_state_dict(in_dim, state) if "mlp.3.weight" in state else None

    @staticmethod
    def add_arguments(parser):
        add = parser.add_argument_group("--objective gedi_no_gen").add_argument
        add("--hidden_layers", type=Number(int, least=1, most=2), help="of the head: 1 in the code, 2 by the paper")
        add("--head_temp", type=positive(float), help="divides the head's scores in the softmax")
        add(
            "--authors_form",
            type=boolean,
            nargs="?",
            const=True,
            help="true: the loss as in the authors' code: the prior of one view, not divided by K, so that --beta has "
            "other units; without local crops",
        )

    def forward(self, rows, kept=(), generator=None):
        with torch.autocast(rows[0].device.type, enabled=False):
            logits = [s / self.head_temp for s in self.head(rows)]
            loss, terms = gedi_no_gen_loss(logits, self.beta, self.prior, self.authors_form, self.num_global)
            self.remember_logits(logits[0])
        return loss, terms

    def statistics(self, features, averages):
        """entropy_share      entropy of a prediction over log K: 1 where it is uniform
        batch_perplexity   K exp(-prior): of one batch's mean prediction, in classes ("kl")
        information        log K - prior - H(p): per image, what the views agree on, in nats ("kl")
        """
        log_k = math.log(self.num_codes)
        line = super().statistics(features, averages) | {"entropy_share": averages["entropy"] / log_k}
        if self.prior == "kl" and not self.authors_form:
            line["batch_perplexity"] = self.num_codes * math.exp(-averages["prior"])
            line["images_per_mean"] = len(features)
            line["information"] = log_k - averages["prior"] - averages["entropy"]
        return line

    def describe(self):
        prior = f"beta {self.beta:g}, prior {self.prior}, symmetric over views"
        if self.authors_form:
            prior = (
                f"the authors' form, of one view and a prior not divided by K: its beta {self.beta:g} is "
                f"{self.beta / self.num_codes:.2g} in units of the paper's"
            )
        lines = [f"head: {self.head}, divided by {self.head_temp:g}", f"loss: GEDI no gen, {prior}"]
        if self.beta >= 1 and not self.authors_form:
            lines.append(
                f"note: --beta {self.beta:g}: from 1 on, one class for all images is no worse than uniform p; if "
                "classes fall out of use, lower it"
            )
        return lines


@dataclass(frozen=True)
class Sampling:
    """How the chains of GEDI run; JEM's numbers."""

    num_steps: int = 20
    step_size: float = 1.0
    noise_std: float = 0.01
    reinit: float = 0.05  # probability that a chain begins anew, from U(-1, 1)


class GEDI(GEDINoGen):
    """GEDI as the training loop's objective:

        loss = weight_gen * (mean f(samples) - mean f(noisy images)) + the loss of GEDI no gen
        f(x) = logsumexp_k of the scores, without temperature

    The noisy images are the first view's. f is one function of one image, in sampling and in the loss: for it, backbone
    and head are in evaluation mode, also where their parameters get its gradient.

    replay  (S, C, h, w)  ends of earlier chains, in [-1, 1] at first; the same on all processes. Each of the P M
            micro-batches of a step has a share of its own, so that no two of them ever meet in a slot.
    """

    flags = GEDINoGen.flags | {
        "beta": 1.0,  # all three weights are 1
        "weight_gen": 1.0,
        "sgld_steps": 20,
        "sgld_step_size": 1.0,
        "sgld_noise": 0.01,
        "replay_size": 10000,
        "reinit": 0.05,
    }
    advice = GEDINoGen.advice | {
        "representation": "all images get one feature: lower --lr or --weight_gen",
        "dimensional": "features span few directions: lower --weight_gen, raise --out_dim, or train longer",
    }

    def __init__(
        self, head, mean, std, image_shape, replay_size=10000, accum_steps=1, weight_gen=1.0, sampling=None, **no_gen
    ):
        super().__init__(head, **no_gen)
        self.weight_gen, self.accum_steps, self.sampling = weight_gen, accum_steps, sampling or Sampling()
        self.register_buffer("replay", torch.rand(replay_size, *image_shape) * 2 - 1)
        for name, levels in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(levels).view(-1, 1, 1), persistent=False)
        self.num_prepared = 0  # micro-batches of this step that have their samples

    @classmethod
    def from_args(cls, args, backbone, course):
        num_images = course.batch_size * course.accum_steps * world_size()
        if args.img_size > LARGEST_IMAGE:
            raise UserError(
                f"--img_size {args.img_size}: --objective gedi samples images of at most {LARGEST_IMAGE} px; lower it, "
                "or use --objective gedi_no_gen"
            )
        if args.grad_checkpointing:
            raise UserError(
                "--grad_checkpointing: --objective gedi has features in evaluation mode too, and would recompute them "
                "in training mode; leave it out"
            )
        if args.replay_size < num_images:
            raise UserError(f"--replay_size {args.replay_size}: expected at least {num_images}, the images of a step")
        no_gen = GEDINoGen.from_args(args, backbone, course)
        return cls(
            no_gen.head,
            args.mean,
            args.std,
            (args.in_chans, args.img_size, args.img_size),
            args.replay_size,
            course.accum_steps,
            args.weight_gen,
            Sampling(args.sgld_steps, args.sgld_step_size, args.sgld_noise, args.reinit),
            **{name: getattr(args, name) for name in ("beta", "prior", "authors_form", "head_temp")},
        )

    @staticmethod
    def add_arguments(parser):
        add = parser.add_argument_group("--objective gedi").add_argument
        add(
            "--weight_gen",
            type=not_negative(float),
            help="weight of the generative term; if it runs away from 0, lower it or --lr",
        )
        add("--sgld_steps", type=positive(int), help="of a chain; each costs a forward and a backward pass")
        add("--sgld_step_size", type=positive(float), help="of the gradient in a chain, images being in [-1, 1]")
        add("--sgld_noise", type=not_negative(float), help="standard deviation of the noise of each step of a chain")
        add("--replay_size", type=positive(int), help="chains that go on in later steps; floats of an image for each")
        add("--reinit", type=Number(float, least=0, most=1), help="probability that a chain begins anew, from noise")

    def before_step(self, step, backbone):
        self.num_prepared = 0

    def prepare(self, backbone, views, generator):
        """Noisy images and samples, (B, C, h, w) in [-1, 1], and the samples' slots (B,)."""
        real = self._to_images(views[0])
        noisy = real + NOISE_STD * normal_like(real, generator)
        slots = self._own_slots(len(real), generator)
        settings = self.sampling
        with evaluating(backbone, self.head):
            samples = sgld(
                lambda x: self.head.log_density(backbone(self._to_views(x))),
                self._starts(slots, real, generator),
                settings.num_steps,
                settings.step_size,
                settings.noise_std,
                generator,
            )
        return [noisy, samples, slots]

    def _own_slots(self, count, generator):
        """Distinct slots of this micro-batch's share. How many were prepared before it in this step is all that
        `prepare` leaves behind."""
        place = rank() * self.accum_steps + self.num_prepared % self.accum_steps
        self.num_prepared += 1
        share = len(self.replay) // (world_size() * self.accum_steps)
        return place * share + torch.randperm(share, generator=generator, device=generator.device)[:count]

    def _starts(self, slots, like, generator):
        noise = torch.rand(like.shape, generator=generator, device=like.device, dtype=like.dtype) * 2 - 1
        anew = torch.rand(len(slots), 1, 1, 1, generator=generator, device=like.device) < self.sampling.reinit
        return torch.where(anew, noise, self.replay[slots].to(like.dtype))

    def _to_images(self, views):
        return (views * self.std + self.mean) * 2 - 1

    def _to_views(self, images):
        return ((images + 1) / 2 - self.mean) / self.std

    def embed(self, backbone, views, kept):
        noisy, samples, _ = kept
        features = features_of_views(backbone, views)
        with evaluating(backbone):
            return [*features, *backbone(self._to_views(torch.cat([noisy, samples]))).chunk(2)]

    def forward(self, rows, kept=(), generator=None):
        *views, noisy, samples = rows
        loss, terms = super().forward(views)
        # after the views: the backward pass of evaluation mode needs running statistics that move no more
        with evaluating(self.head):
            of_noisy, of_samples = (self.head.log_density(x).mean() for x in (noisy, samples))
        self._write_back(*kept[1:])
        generative = of_samples - of_noisy
        return loss + self.weight_gen * generative, terms | {"generative": generative, "log_density": of_noisy}

    @torch.no_grad()
    def _write_back(self, samples, slots):
        self.replay.index_copy_(0, all_gather_rows(slots), all_gather_rows(samples).to(self.replay.dtype))

    def statistics(self, features, averages):
        """The numbers of GEDI no gen, and
        outside    share of the replay buffer's values outside [-1, 1]: near 1, the chains run away
        """
        return super().statistics(features, averages) | {"outside": (self.replay.abs() > 1).float().mean()}

    def describe(self):
        settings, size = self.sampling, self.replay.nbytes / 2**20
        return [
            *super().describe(),
            f"generative term: weight {self.weight_gen:g}; {settings.num_steps} steps of {settings.step_size:g} with "
            f"noise {settings.noise_std:g}, anew with probability {settings.reinit:g}; {len(self.replay)} chains in a "
            f"replay buffer of {size:.0f} MiB",
            "note: no public source has the weights of its terms (1, 1, 1 by default); the noisy images are those of "
            "the first view; the generative term is taken in evaluation mode, as its samples are",
        ]
