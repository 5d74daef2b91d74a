"""Features of the parts of an image: a ViT's patch tokens, or the last map of a convolutional network.

    seer = WithPatches(model.backbone)
    features, patches = seer(images)        # (B, D), (B, r, c, D)

Shapes: B images of h x w px, r x c patches, P tokens before them, D features.
"""

from torch import nn

from utils import UserError
from vision_transformer import VisionTransformer

LAST_PART = {"ResNet8": "block4", "ResNet": "layer4"}  # class -> the part that makes the last map: ours, torchvision's


class WithPatches(nn.Module):
    """What a backbone makes of images, before it is reduced to one vector each.

    Patches of a ViT are its last block's, each through the final norm. Raises UserError for a network that has none.
    """

    def __init__(self, backbone):
        super().__init__()
        self.backbone, self.embed_dim = backbone, backbone.embed_dim
        self.part = getattr(backbone, LAST_PART.get(type(backbone).__name__, ""), None)
        if self.part is None and not hasattr(backbone, "forward_features"):
            raise UserError(f"{type(backbone).__name__} has no patches: expected a ViT or a convolutional network")

    def forward(self, images):
        if isinstance(self.backbone, VisionTransformer):
            tokens = self.backbone.get_intermediate_layers(images, 1)[0]
            return self._features_of(tokens), as_grid(tokens, self.backbone, images)
        if self.part is not None and not hasattr(self.backbone, "forward_features"):
            return self._through_last_part(images)
        found = self.backbone.forward_features(images)
        features = self.backbone.forward_head(found, pre_logits=True)
        return features, as_grid(found, self.backbone, images)

    def _features_of(self, tokens):
        """As VisionTransformer.forward: the CLS token, or the patches' mean, whose norm they have had."""
        is_mean = self.backbone.global_pool == "avg"
        return tokens[:, self.backbone.num_prefix_tokens :].mean(dim=1) if is_mean else tokens[:, 0]

    def _through_last_part(self, images):
        maps = []
        with self.part.register_forward_hook(lambda part, given, made: maps.append(made)):
            features = self.backbone(images)
        return features, maps[0].permute(0, 2, 3, 1)


def as_grid(found, backbone, images):
    """What a network has before its pooling -> (B, r, c, D)."""
    if found.ndim == 4:
        is_last = getattr(backbone, "output_fmt", "NCHW") == "NHWC"  # where timm's networks have their channels
        return found if is_last else found.permute(0, 2, 3, 1)
    patches = found[:, getattr(backbone, "num_prefix_tokens", 0) :]
    side = backbone.patch_embed.patch_size
    side = side if isinstance(side, tuple) else (side, side)
    return patches.unflatten(1, (images.shape[2] // side[0], images.shape[3] // side[1]))
