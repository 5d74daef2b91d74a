"""The form of Hugging Face's transformers: a folder that AutoModel opens.

A ViT with a CLS token and learned positions is a ViTModel, with LayerScale a Dinov2Model, with registers a
Dinov2WithRegistersModel. Tensors have the names of the hub's files, which all versions of transformers read, and
`pretrained.load_pretrained` too. Of images of another size than the position embedding's, features differ in the
third digit: transformers resizes the embedding without antialiasing.
"""

import json

import safetensors.torch
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from exports import input_channels
from exports.timm_folder import how_read, usage_here
from utils import UserError
from weight_layouts import is_our_vit


class HuggingFace:
    """See `exports`."""

    library, program, needs = "transformers", "transformers", ("transformers",)
    on_device = True

    def __init__(self, model, config):
        self.backbone, self.images = model.backbone, config["pretrained_cfg"]
        self.beside = how_read(config)  # read by load_pretrained alone
        self.beside |= {} if self.processor else {"pretrained_cfg": self.images}
        refuse_others(model.backbone, model.settings["arch"])
        self.kind = kind_of(model.backbone)
        self.sizes = [model.backbone.patch_embed.img_size]

    def write(self, folder):
        state = {name: tensor.contiguous().clone() for name, tensor in tensors_of(self.backbone).items()}
        (folder / "model.safetensors").write_bytes(safetensors.torch.save(state, {"format": "pt"}))
        write_json(folder / "config.json", config_of(self.backbone, self.kind) | self.beside)
        if self.processor:
            write_json(folder / "preprocessor_config.json", self.processor)

    def open(self, folder, device):
        import transformers  # here: no other form needs it

        transformers.utils.logging.disable_progress_bar()
        opened = transformers.AutoModel.from_pretrained(folder, local_files_only=True, **self.options)
        opened = opened.eval().to(device)
        return lambda images: opened(images).last_hidden_state[:, 0]

    @property
    def options(self):
        """A ViTModel has a pooling layer unless told otherwise, with random weights."""
        return {"add_pooling_layer": False} if self.kind == "vit" else {}

    @property
    def processor(self):
        """transformers' image processor with the sizes of data.eval_batches; None for other than three channels."""
        channels, size, _ = self.images["input_size"]
        if channels != 3:
            return None
        return {
            "image_processor_type": "BitImageProcessor",
            "do_convert_rgb": True,
            "do_resize": True, "size": {"shortest_edge": int(size / self.images["crop_pct"])}, "resample": 3,
            "do_center_crop": True, "crop_size": {"height": size, "width": size},
            "do_rescale": True, "rescale_factor": 1 / 255,
            "do_normalize": True, "image_mean": list(self.images["mean"]), "image_std": list(self.images["std"]),
        }  # fmt: skip

    def usage(self, name):
        options = "".join(f", {key}={value}" for key, value in self.options.items())
        images = (
            f'    processor = AutoImageProcessor.from_pretrained("{name}")\n'
            '    images = processor(image, return_tensors="pt")["pixel_values"]\n'
            if self.processor
            else "    # images (B, C, h, w): transformers has no image processor for this number of channels\n"
        )
        side = self.sizes[0][0]
        return (
            f'With transformers; once uploaded, `"<user>/{name}"`:\n\n'
            "    from transformers import AutoImageProcessor, AutoModel\n\n"
            f'    model = AutoModel.from_pretrained("{name}"{options}).eval()\n{images}'
            f"    features = model(images).last_hidden_state[:, 0]    # (1, {self.backbone.embed_dim})\n\n"
            f"Features equal the checkpoint's at {side} x {side} px. Of other sizes (a ViTModel wants "
            "interpolate_pos_encoding=True) they differ a little, as transformers resizes positions without "
            "antialiasing, and where a margin is odd its crop lies one pixel beside that of the evaluations.\n\n"
            f"{usage_here(name)}"
        )


def refuse_others(backbone, arch):
    """Raises UserError for a backbone that is none of these classes."""
    state, reason = backbone.state_dict(), None
    if not isinstance(backbone, VisionTransformer) or not is_our_vit(state) or "pos_embed" not in state:
        reason = "only a plain ViT with a CLS token and learned positions is one of its classes"
    elif backbone.global_pool != "token":
        reason = "its feature is no token but a mean of the patches with a norm of its own"
    elif not isinstance(backbone.blocks[0].mlp.act, nn.GELU):
        reason = f"its activation is {type(backbone.blocks[0].mlp.act).__name__}"
    if reason:
        raise UserError(
            f"--format hf: transformers has no class for this {arch}: {reason}; --format timm, onnx or torch take it"
        )


def kind_of(backbone):
    """model_type in transformers' config.json."""
    if backbone.reg_token is not None:
        return "dinov2_with_registers"
    return "dinov2" if has_scales(backbone) else "vit"


def has_scales(backbone):
    return "blocks.0.ls1.gamma" in backbone.state_dict()


CLASSES = {"vit": "ViTModel", "dinov2": "Dinov2Model", "dinov2_with_registers": "Dinov2WithRegistersModel"}


def config_of(backbone, kind):
    block = backbone.blocks[0]
    config = {
        "architectures": [CLASSES[kind]],
        "model_type": kind,
        "hidden_size": backbone.embed_dim,
        "num_hidden_layers": len(backbone.blocks),
        "num_attention_heads": block.attn.num_heads,
        "hidden_act": "gelu",
        "layer_norm_eps": backbone.norm.eps,
        "image_size": backbone.patch_embed.img_size[0],
        "patch_size": backbone.patch_embed.patch_size[0],
        "num_channels": input_channels(backbone),
        "qkv_bias": block.attn.qkv.bias is not None,
        "torch_dtype": "float32",
    }
    if kind == "vit":
        return config | {"intermediate_size": block.mlp.fc1.out_features}
    registers = {} if backbone.reg_token is None else {"num_register_tokens": backbone.reg_token.shape[1]}
    return config | {"mlp_ratio": block.mlp.fc1.out_features // backbone.embed_dim} | registers


def tensors_of(backbone):
    """The backbone's tensors under transformers' names."""
    state = backbone.state_dict()
    positions = state["pos_embed"]
    if backbone.no_embed_class:  # transformers has a place for the CLS token, which adds nothing
        positions = torch.cat([torch.zeros_like(positions[:, :1]), positions], dim=1)
    found = {"embeddings.cls_token": state["cls_token"], "embeddings.position_embeddings": positions}
    if "reg_token" in state:
        found["embeddings.register_tokens"] = state["reg_token"]
    if kind_of(backbone) != "vit":
        found["embeddings.mask_token"] = torch.zeros(1, backbone.embed_dim)  # read in its own pretraining alone
    found |= under(state, "patch_embed.proj", "embeddings.patch_embeddings.projection")
    for number, block in enumerate(backbone.blocks):
        found |= {f"encoder.layer.{number}.{name}": t for name, t in block_tensors(block, backbone).items()}
    return found | under(state, "norm", "layernorm")


def block_tensors(block, backbone):
    state, is_vit = block.state_dict(), kind_of(backbone) == "vit"
    names = VIT_NAMES if is_vit else DINOV2_NAMES
    found = {}
    for ours, theirs in names.items():
        found |= under(state, ours, theirs)
    for kind in ("weight", "bias"):
        if f"attn.qkv.{kind}" in state:
            parts = state[f"attn.qkv.{kind}"].chunk(3)
            found |= {f"attention.attention.{n}.{kind}": t for n, t in zip(QKV, parts, strict=True)}
    if not is_vit:
        ones = torch.ones(backbone.embed_dim)  # registers without LayerScale: a scale that changes nothing
        found |= {f"layer_scale{n}.lambda1": state.get(f"ls{n}.gamma", ones) for n in (1, 2)}
    return found


QKV = ("query", "key", "value")
VIT_NAMES = {
    "norm1": "layernorm_before", "attn.proj": "attention.output.dense", "norm2": "layernorm_after",
    "mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense",
}  # fmt: skip
DINOV2_NAMES = {
    "norm1": "norm1", "attn.proj": "attention.output.dense", "norm2": "norm2", "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}  # fmt: skip


def under(state, ours, theirs):
    """Weight and bias of a layer under another name; a layer without a bias has none."""
    return {f"{theirs}.{kind}": state[f"{ours}.{kind}"] for kind in ("weight", "bias") if f"{ours}.{kind}" in state}


def write_json(path, content):
    path.write_text(json.dumps(content, indent=2) + "\n")
