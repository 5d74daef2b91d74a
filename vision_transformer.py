"""Vision Transformers (mini to large) under the names and parameter keys of DINO, which are timm's as well.

    model = vit_small(patch_size=16)
    model.load_state_dict(weights)          # DINO's backbone, or timm's vit_small_patch16_224 without its classifier
    features = model(images)                # (B, 384): the CLS token after the final norm

The layers are timm's. What is added here: attention in the form that is fast on the device at hand, images of any size
that the patch size divides, of several sizes in one pass, stochastic depth that skips what it drops, and DINO's two
ways of looking inside.

Shapes: B images, N patches, P tokens before them (CLS and registers: 1 without), D width, H heads, d = D / H.
Tokens of images of one size are (B, P + N, D); of several sizes they are joined to (T, D), and `shapes` has (B, P + N)
of each size, in their order. `shapes` is None for one size.
"""

import functools
import math
from typing import NamedTuple

import timm.layers
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block as TimmBlock
from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer
from torch import nn
from torch.utils.checkpoint import checkpoint

WIDTHS = {"vit_mini": 128, "vit_tiny": 192, "vit_small": 384, "vit_base": 768, "vit_large": 1024}
ARCHS = tuple(WIDTHS)


def vit_mini(num_heads=4, **kwargs):
    """For small images and for CPUs, of our own: D = 128, 4 blocks, 4 heads, 0.8 M parameters at 32 px in patches of 4.
    Arguments as in `VisionTransformer`."""
    return VisionTransformer(embed_dim=128, depth=4, num_heads=num_heads, **kwargs)


def vit_tiny(num_heads=3, **kwargs):
    """ViT-T/16: D = 192, 12 blocks, 3 heads, 5.5 M parameters. Arguments as in `VisionTransformer`."""
    return VisionTransformer(embed_dim=192, depth=12, num_heads=num_heads, **kwargs)


def vit_small(num_heads=6, **kwargs):
    """ViT-S/16: D = 384, 12 blocks, 6 heads, 21.7 M parameters. Arguments as in `VisionTransformer`."""
    return VisionTransformer(embed_dim=384, depth=12, num_heads=num_heads, **kwargs)


def vit_base(num_heads=12, **kwargs):
    """ViT-B/16: D = 768, 12 blocks, 12 heads, 85.8 M parameters. Arguments as in `VisionTransformer`."""
    return VisionTransformer(embed_dim=768, depth=12, num_heads=num_heads, **kwargs)


def vit_large(num_heads=16, **kwargs):
    """ViT-L/16: D = 1024, 24 blocks, 16 heads, 303 M parameters. Arguments as in `VisionTransformer`."""
    return VisionTransformer(embed_dim=1024, depth=24, num_heads=num_heads, **kwargs)


class VisionTransformer(TimmVisionTransformer):
    """A ViT without classifier (Dosovitskiy et al. 2021), with DINO's settings and initialisation.

    patch_size: side of a square patch, pixels.
    img_size: side of the images that the position embedding is made for; other sizes get it interpolated (bicubic).
        DINO interpolates without antialiasing, so its features of images smaller than img_size differ slightly.
    in_chans: image channels.
    drop_path_rate: stochastic depth of the last block, rising linearly from 0 at the first; see `draw_paths`.
    grad_checkpointing: recompute each block in the backward pass; less memory for about a third more time.
    norm_eps: of every layer norm.
    parts: what released networks have beside, under timm's names: init_values (LayerScale), reg_tokens (registers),
        no_embed_class (positions for patches only), global_pool ("avg": the normed mean of the patches), qkv_bias.
    Raises ValueError where patch_size does not divide the image, or the channels differ from in_chans.
    """

    def __init__(
        self,
        patch_size=16,
        img_size=224,
        in_chans=3,
        embed_dim=384,
        depth=12,
        num_heads=6,
        drop_path_rate=0.0,
        grad_checkpointing=False,
        norm_eps=1e-6,
        **parts,
    ):
        if patch_size < 1 or img_size < 1 or img_size % patch_size:
            raise ValueError(f"img_size {img_size} is not a multiple of patch_size {patch_size}")
        super().__init__(
            img_size=img_size,
            patch_size=patch_size,
            in_chans=in_chans,
            num_classes=0,
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            drop_path_rate=drop_path_rate,
            norm_layer=functools.partial(nn.LayerNorm, eps=norm_eps),
            block_fn=Block,
            attn_layer=Attention,
            dynamic_img_size=True,
            **parts,
        )
        nn.init.trunc_normal_(self.cls_token, std=0.02)  # as DINO; timm has 1e-6 here and agrees with DINO elsewhere
        self.patch_size, self.in_chans, self.parts = patch_size, in_chans, parts
        self.set_grad_checkpointing(grad_checkpointing)

    def forward(self, x):
        """Images (B, C, h, w) -> (B, D), the CLS token after the final norm, or with global_pool the patches' mean.

        A list of such tensors, of several sizes, -> (sum of B, D), in their order: one pass through all that works on
        each token alone; attention is split by size. Where CLS is all that is asked for, the last block works for it
        alone: 1 / 16 less to compute."""
        images = [x] if isinstance(x, torch.Tensor) else x
        tokens = [self._embed(each) for each in images]
        shapes = tuple(tuple(each.shape[:2]) for each in tokens) if len(tokens) > 1 else None
        x, only_cls = join_sizes(tokens), self.global_pool == "token"
        x = self._through(self.blocks[: len(self.blocks) - only_cls], x, shapes)
        if only_cls:  # (sum of B, 1, D)
            x, shapes = self._through(self.blocks[-1:], x, shapes, only_cls=True), None
        return torch.cat([self.forward_head(each, pre_logits=True) for each in split_sizes(self.norm(x), shapes)])

    @property
    def joins_sizes(self):
        """Whether images of several sizes are better given at once: off the CPU, where it saves a pass's launches
        (never measured). On a CPU it takes 1.01 of the time of one pass per size (python -m benchmarks.crops: ViT-S,
        2 x 224 + 8 x 96, B 4 and 8), as the products are as fast on fewer tokens, and joining is copying."""
        return not _on_cpu(self.cls_token)

    def _through(self, blocks, x, shapes, only_cls=False):
        rates = [block.drop_rate for block in blocks]
        paths = draw_paths(rates, first_tokens(x, shapes), skip=False) if only_cls else draw_paths(rates, x, shapes)
        for block, pair in zip(blocks, paths, strict=True):
            settings = {"shapes": shapes, "paths": pair, "only_cls": only_cls}
            if self.grad_checkpointing:
                x = checkpoint(block, x, use_reentrant=False, **settings)
            else:
                x = block(x, **settings)
        return x

    def get_intermediate_layers(self, x, n=1):
        """Images -> list of (B, P + N, D): the last n blocks' outputs, oldest first, each through the final norm.
        The first P = `num_prefix_tokens` are the CLS token and the registers."""
        x = self._embed(x)
        outputs = []
        for block in self.blocks:
            x = block(x)
            outputs.append(x)
        return [self.fc_norm(self.norm(x)) for x in outputs[-n:]]  # one of the two is the identity

    def get_last_selfattention(self, x):
        """Images -> (B, H, P + N, P + N): softmaxed attention of the last block; row i says where token i looks."""
        x = self._embed(x)
        for block in self.blocks[:-1]:
            x = block(x)
        last = self.blocks[-1]
        q, k, _ = last.attn.project(last.norm1(x))
        return last.attn.weights(q, k)

    def _embed(self, x):
        self._check(x)
        return self.norm_pre(self.patch_drop(self._pos_embed(self.patch_embed(x))))  # (B, P + N, D)

    def _check(self, x):
        _, channels, height, width = x.shape
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(f"images of {height} x {width} pixels cannot be cut into patches of {self.patch_size}")
        if channels != self.in_chans:
            raise ValueError(f"images have {channels} channels, the model takes {self.in_chans}")


class Block(TimmBlock):
    """timm's block, under its parameter names, for tokens of one size or of several, and with paths to skip."""

    def forward(self, x, attn_mask=None, is_causal=False, shapes=None, paths=None, only_cls=False):
        """Tokens -> tokens, or with only_cls the first of each image, (sum of B, 1, D). timm's callers pass a mask of
        None. paths: of the attention and of the MLP, as `draw_paths` has them; None: drawn here."""
        assert attn_mask is None and not is_causal
        if paths is None:
            [paths] = draw_paths([self.drop_rate], x, shapes)
        if only_cls:
            x = add_branch(x, self._attend_by_cls, shapes, paths[0], onto=first_tokens(x, shapes))
            return add_branch(x, self._transform, None, paths[1])
        x = add_branch(x, self._attend, shapes, paths[0])
        return add_branch(x, self._transform, shapes, paths[1])

    @property
    def drop_rate(self):
        return getattr(self.drop_path1, "drop_prob", 0.0) if self.training else 0.0

    def _attend(self, x, shapes):
        return self.ls1(self.attn(self.norm1(x), shapes=shapes))

    def _attend_by_cls(self, x, shapes):
        return self.ls1(self.attn(self.norm1(x), shapes=shapes, only_cls=True))

    def _transform(self, x, shapes):
        return self.ls2(self.mlp(self.norm2(x)))


class Attention(timm.layers.Attention):
    """Multi-head self-attention, softmax(q k^T / sqrt(d)) v, under timm's parameter names.

    On CPU as written, elsewhere through PyTorch's fused kernel: on CPU that kernel is 3 to 5 times slower in bf16.
    The choice follows the input, so a model may move between devices after it was built.
    """

    def forward(self, x, shapes=None, only_cls=False):
        """only_cls: what the first token of each image has looked up, (sum of B, 1, D)."""
        heads = [self._heads(qkv) for qkv in split_sizes(self.qkv(x), shapes)]
        if only_cls:
            return self.proj(torch.cat([self._mix(q[:, :, :1], k, v) for q, k, v in heads]))
        return self.proj(join_sizes([self._mix(*each) for each in heads]))

    def project(self, x):
        """Tokens (B, P + N, D) -> queries, keys and values, each (B, H, P + N, d)."""
        return self._heads(self.qkv(x))

    def _heads(self, qkv):
        heads = qkv.unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        return (heads.contiguous() if _on_cpu(qkv) else heads).unbind(0)  # else each product copies its operands

    def _mix(self, q, k, v):
        x = self.weights(q, k) @ v if _on_cpu(q) else F.scaled_dot_product_attention(q, k, v)  # (B, H, P + N, d)
        return x.transpose(1, 2).flatten(2)

    def weights(self, q, k):
        """Queries and keys (B, H, P + N, d) -> (B, H, P + N, P + N), rows summing to 1."""
        return ((q * self.scale) @ k.transpose(-2, -1)).softmax(dim=-1)


def split_sizes(x, shapes):
    """Tokens (T, D) -> (B, P + N, D) of each size; with shapes None a list of x alone."""
    if shapes is None:
        return [x]
    parts = x.split([batch * tokens for batch, tokens in shapes])
    return [part.unflatten(0, shape) for part, shape in zip(parts, shapes, strict=True)]


def join_sizes(parts):
    """The reverse of `split_sizes`."""
    return parts[0] if len(parts) == 1 else torch.cat([part.flatten(0, 1) for part in parts])


def first_tokens(x, shapes):
    """Of each image, (sum of B, 1, D)."""
    return torch.cat([part[:, :1] for part in split_sizes(x, shapes)])


# ---- stochastic depth ------------------------------------------------------------------------------------------------


class Path(NamedTuple):
    """Which images go through a residual branch, and how much their result counts."""

    rows: torch.Tensor | None  # along the first axis of the tokens: images of one size, or tokens; None: all
    weights: torch.Tensor  # of each row, 1 / (1 - p) or 0
    shapes: tuple | None  # of these rows


def add_branch(x, branch, shapes, path, onto=None):
    """x + branch(x), along a path. branch: tokens, shapes -> tokens.  onto: takes the place of the sum's x."""
    onto = x if onto is None else onto
    skips = path is not None and path.rows is not None
    y = branch(x.index_select(0, path.rows), path.shapes) if skips else branch(x, shapes)
    y = y.to(x.dtype)  # a sum of two dtypes is 5 times slower on a CPU
    y = y if path is None else y * path.weights
    return onto.index_add(0, path.rows, y) if skips else onto + y


def draw_paths(rates, x, shapes=None, skip=True):
    """Stochastic depth (Huang et al. 2016) that skips whole images: a pair of paths for each block, of its attention
    and of its MLP, drawn before the first block; (None, None) where p is 0, and no draw where all are.

    A branch counts for an image with probability 1 - p, and then 1 / (1 - p) times: the law of timm's DropPath. But of
    the B images of a size always n = ceil(B (1 - p)) go through the branch, at random without replacement, the last of
    them with weight 0 in a share n - B (1 - p) of the draws. So shapes are fixed, and nobody waits for the device.
    Skipping images is DINOv2's (Oquab et al. 2023, "Efficient stochastic depth"); there B (1 - p) is rounded, and each
    image that goes through counts B / n times. Where fewer than `least_spared` of the tokens would be spared, all go
    through, and weights alone tell which count.

    rates: p of each block.  x: tokens.  skip: whether images may be spared at all.
    The draws are from torch's default generator on the device of x.
    """
    if not any(rates):
        return [(None, None)] * len(rates)
    sizes, draws, first = shapes or ((len(x), 1),), [], 0  # of one size: an image is a row
    for batch, tokens in sizes:
        draws.append(_draw_size(len(rates), batch, tokens, first, x.device))
        first += batch * tokens
    return [
        tuple(
            _path(1 - rate, [draw.of(i, branch) for draw in draws], x, shapes, skip) if rate else None
            for branch in (0, 1)
        )
        for i, rate in enumerate(rates)
    ]


class _Draw(NamedTuple):
    """Of the images of one size, for one branch, or with two axes more in front for all."""

    rows: torch.Tensor  # (B, P + N) places along the first axis of all tokens; the images in random order
    places: torch.Tensor  # (B,) of the image in row b of `rows`: its place in the random order, plus u in [0, 1)
    scattered: torch.Tensor  # (B,) of image b: its place in the random order, plus its u

    def of(self, block, branch):
        return _Draw(*(each[block, branch] for each in self))


def _draw_size(blocks, batch, tokens, first, device):
    order = torch.rand(blocks, 2, batch, device=device).argsort()
    u = torch.rand(blocks, 2, 1, device=device)
    rows = order[..., None] * tokens + torch.arange(first, first + tokens, device=device)
    return _Draw(rows, torch.arange(batch, device=device) + u, order + u)


def _path(keep, draws, x, shapes, skip):
    """The first n images in the order go through; those at a place + u < B keep count, which keeps each in a share
    `keep` of the draws."""
    sizes = [draw.rows.shape for draw in draws]
    counts = [math.ceil(batch * keep) for batch, _ in sizes]
    total = sum(batch * tokens for batch, tokens in sizes)
    spared = 1 - sum(count * tokens for count, (_, tokens) in zip(counts, sizes, strict=True)) / total
    if not skip or spared < least_spared(x):
        rows, places = None, [draw.scattered for draw in draws]
    else:
        rows = torch.cat([draw.rows[:count].flatten() for draw, count in zip(draws, counts, strict=True)])
        places = [draw.places[:count] for draw, count in zip(draws, counts, strict=True)]
        shapes = shapes and tuple((count, tokens) for count, (_, tokens) in zip(counts, sizes, strict=True))
    counted = [(place < batch * keep)[:, None].expand(-1, tokens).flatten()
               for place, (batch, tokens) in zip(places, sizes, strict=True)]  # fmt: skip
    weights = torch.cat(counted).to(x.dtype) / keep
    return Path(rows, weights.view(-1, *[1] * (x.dim() - 1)), shapes)


def least_spared(x):
    """Share of a branch's tokens that is worth copying the others out and back.

    On a CPU they cost little: p 0.3 spares 12 % of the rows of 16 images, and 14 % of the time (python -m
    benchmarks.crops: ViT-S, B 8, 2 crops). Elsewhere copies cost more beside the products: 0.1 is DINOv2's, never
    measured here.
    """
    return 0.02 if _on_cpu(x) else 0.1


def _on_cpu(x: torch.Tensor) -> bool:
    return x.device.type == "cpu"
