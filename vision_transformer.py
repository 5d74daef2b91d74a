"""Vision Transformers (tiny, small, base, large) under the names and parameter keys of DINO, which are timm's as well.

    model = vit_small(patch_size=16)
    model.load_state_dict(weights)          # DINO's backbone, or timm's vit_small_patch16_224 without its classifier
    features = model(images)                # (B, 384): the CLS token after the final norm

The layers are timm's. What is added here: attention in the form that is fast on the device at hand, images of any size
that the patch size divides, and DINO's two ways of looking inside.

Shapes: B images, N patches, P tokens before them (CLS and registers: 1 without), D width, H heads, d = D / H.
"""

import functools

import timm.layers
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer
from torch import nn

WIDTHS = {"vit_tiny": 192, "vit_small": 384, "vit_base": 768, "vit_large": 1024}
ARCHS = tuple(WIDTHS)


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
    drop_path_rate: stochastic depth of the last block, rising linearly from 0 at the first.
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
            attn_layer=Attention,
            dynamic_img_size=True,
            **parts,
        )
        nn.init.trunc_normal_(self.cls_token, std=0.02)  # as DINO; timm has 1e-6 here and agrees with DINO elsewhere
        self.patch_size, self.in_chans, self.parts = patch_size, in_chans, parts
        self.set_grad_checkpointing(grad_checkpointing)

    def forward(self, x):
        """Images (B, C, h, w) -> (B, D), the CLS token after the final norm, or with global_pool the patches' mean."""
        self._check(x)
        return self.forward_head(self.forward_features(x), pre_logits=True)

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
        return self._pos_embed(self.patch_embed(x))  # (B, P + N, D)

    def _check(self, x):
        _, channels, height, width = x.shape
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(f"images of {height} x {width} pixels cannot be cut into patches of {self.patch_size}")
        if channels != self.in_chans:
            raise ValueError(f"images have {channels} channels, the model takes {self.in_chans}")


class Attention(timm.layers.Attention):
    """Multi-head self-attention, softmax(q k^T / sqrt(d)) v, under timm's parameter names.

    On CPU as written, elsewhere through PyTorch's fused kernel: on CPU that kernel is 3 to 5 times slower in bf16.
    The choice follows the input, so a model may move between devices after it was built.
    """

    def forward(self, x, attn_mask=None, is_causal=False):  # timm's block passes both; nothing here is masked
        assert attn_mask is None and not is_causal
        q, k, v = self.project(x)
        x = self.weights(q, k) @ v if _on_cpu(x) else F.scaled_dot_product_attention(q, k, v)  # (B, H, P + N, d)
        return self.proj(x.transpose(1, 2).flatten(2))

    def project(self, x):
        """Tokens (B, P + N, D) -> queries, keys and values, each (B, H, P + N, d)."""
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim))
        return qkv.permute(2, 0, 3, 1, 4).unbind(0)

    def weights(self, q, k):
        """Queries and keys (B, H, P + N, d) -> (B, H, P + N, P + N), rows summing to 1."""
        return ((q * self.scale) @ k.transpose(-2, -1)).softmax(dim=-1)


def _on_cpu(x: torch.Tensor) -> bool:
    return x.device.type == "cpu"
