"""A backbone as one file that needs no code of ours: model.onnx for any ONNX runtime, model.pt2 for torch.export.load.

Both are made from one graph, of batches of any size. Images may be of any size too where the graph can be made so: a
ViT's positions are then resized by matrices that are made from the size (`resizing`), as timm resizes them; other
backbones are tried, and where one cannot, its size is fixed and a line says so. The graph holds attention as it is
written for CPUs, in float32.
"""

import copy
import io
import sys
import types
import warnings

import torch
from timm.models.vision_transformer import VisionTransformer
from torch.export import Dim

from exports import input_channels
from exports.timm_folder import write_config
from utils import UserError, one_line


class Graph:
    """What `Onnx` and `TorchExport` share. .graph: torch's ExportedProgram.  .free: whether images of any size fit."""

    library, on_device = "pytorch", False

    def __init__(self, model, config):
        self.config, self.embed_dim = config, model.embed_dim
        size = config["pretrained_cfg"]["input_size"][1:]
        self.step = patch_side(model.backbone)
        self.graph, self.free = trace(model.backbone, size, self.step)
        other = [(size[0] + self.step, size[1] + 2 * self.step)] if self.free else []
        self.sizes = [tuple(size), *other]

    @property
    def allowed(self):
        """Sizes of images, in words."""
        if not self.free:
            return f"of {self.sizes[0][0]} x {self.sizes[0][1]} px, no other size"
        return (
            f"of any size that is a multiple of {self.step} px, from {2 * self.step} px on"
            if self.step > 1
            else "of any size"
        )


class Onnx(Graph):
    """See `exports`."""

    program, needs = "onnxruntime", ("onnx", "onnxscript", "onnxruntime")

    def write(self, folder):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch 2.11's, of itself
            program = torch.onnx.export(
                self.graph, dynamo=True, verbose=False, input_names=["images"], output_names=["features"]
            )
        tensors = self.graph.state_dict.values()
        program.save(folder / "model.onnx", external_data=sum(t.nbytes for t in tensors) > MOST_BYTES)
        write_config(folder, self.config)

    def open(self, folder, device):
        import onnxruntime  # here: no other form needs it

        session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
        return lambda images: session.run(["features"], {"images": images.cpu().numpy()})[0]

    def usage(self, name):
        return (
            f"With onnxruntime, on batches of any size, images {self.allowed}, float32 (B, C, h, w), normalised as "
            "above:\n\n"
            f'    session = onnxruntime.InferenceSession("{name}/model.onnx")\n'
            '    features = session.run(["features"], {"images": images.numpy()})[0]'
            f"    # (B, {self.embed_dim})"
        )


class TorchExport(Graph):
    """See `exports`."""

    program, needs = "torch.export.load", ("torch",)

    def write(self, folder):
        content = io.BytesIO()  # a file of torch's own that a full disk cuts short ends the process when it is closed
        torch.export.save(self.graph, content)
        (folder / "model.pt2").write_bytes(content.getbuffer())
        write_config(folder, self.config)

    def open(self, folder, device):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # torch 2.11: a buffer that is only read
            module = torch.export.load(folder / "model.pt2").module()
        return lambda images: module(images.cpu())

    def usage(self, name):
        return (
            f"With torch {torch.__version__.split('+')[0]} or later, on batches of any size, images {self.allowed}, "
            "float32 (B, C, h, w), normalised as above:\n\n"
            f'    model = torch.export.load("{name}/model.pt2").module()\n'
            f"    features = model(images)    # (B, {self.embed_dim})"
        )


MOST_BYTES = 1_900_000_000  # of an ONNX file; above, tensors lie in model.onnx.data beside it: protobuf ends at 2 GiB


# ---- backbone -> graph -----------------------------------------------------------------------------------------------


def patch_side(backbone):
    """Pixels of which images of a ViT are a multiple; 1 for other backbones."""
    return backbone.patch_embed.patch_size[0] if isinstance(backbone, VisionTransformer) else 1


def trace(backbone, size, step):
    """(ExportedProgram, whether images of any size fit)."""
    backbone = copy.deepcopy(backbone).cpu().eval()
    images = torch.zeros(2, input_channels(backbone), size[0], size[1] + 2 * step)  # no square: sides are unlike
    rows, columns = Dim("rows", min=2 if step > 1 else 8), Dim("columns", min=2 if step > 1 else 8)
    sides = {2: step * rows, 3: step * columns} if step > 1 else {2: rows, 3: columns}
    try:
        graph = graph_of(with_any_size(backbone), images, {0: Dim("batch", min=1), **sides})
        graph.module()(images[:, :, : size[0], : size[1]])  # torch 2.11 makes graphs that are of one size all the same
        return graph, True
    except Exception as error:  # torch raises many kinds where a graph depends on the size
        reason = one_line(error, 120)
    print(
        f"images of {size[0]} x {size[1]} px only: the graph of another size is another one ({reason})", file=sys.stderr
    )
    try:
        return graph_of(backbone, images[..., : size[1]].contiguous(), {0: Dim("batch", min=1)}), False
    except Exception as error:
        raise UserError(
            f"torch.export makes no graph of this backbone ({one_line(error, 120)}); --format timm takes it"
        ) from error


def graph_of(backbone, images, dynamic):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch 2.11's, of itself
        return torch.export.export(backbone, (images,), dynamic_shapes=(dynamic,))


def with_any_size(backbone):
    """A ViT whose positions are a function of the size without a branch; any other backbone as it is."""
    is_timm_s = getattr(type(backbone), "_pos_embed", None) is VisionTransformer._pos_embed
    if is_timm_s and backbone.dynamic_img_size and backbone.pos_embed is not None:
        backbone._pos_embed = types.MethodType(add_positions, backbone)
    return backbone


def add_positions(self, patches):
    """timm's _pos_embed, always resizing. Patches (B, rows, columns, D) -> tokens (B, P + N, D)."""
    batch, rows, columns, dim = patches.shape
    before = 0 if self.no_embed_class else self.num_prefix_tokens
    grid = self.pos_embed[:, before:].unflatten(1, self.patch_embed.grid_size)
    down, across = (resizing(old, new) for old, new in zip(self.patch_embed.grid_size, (rows, columns), strict=True))
    positions = torch.einsum("hi,bijd,wj->bhwd", down, grid, across).reshape(1, rows * columns, dim)
    first = [token.expand(batch, -1, -1) for token in (self.cls_token, self.reg_token) if token is not None]
    patches = patches.reshape(batch, rows * columns, dim)
    if self.no_embed_class:
        return torch.cat([*first, patches + positions], dim=1)
    return torch.cat([*first, patches], dim=1) + torch.cat([self.pos_embed[:, :before], positions], dim=1)


def resizing(old, new):
    """(new, old): the matrix of F.interpolate(mode="bicubic", antialias=True) along one side; identity where old = new.

    Weight of pixel j for pixel i: cubic((j + 1/2 - (i + 1/2) s) / max(s, 1)), s = old / new, of sum 1 for each i."""
    scale = torch.ones(()) * old / new
    at = torch.arange(old)[None] + 0.5 - (torch.arange(new)[:, None] + 0.5) * scale
    weights = cubic(at / scale.clamp(min=1))
    return weights / weights.sum(dim=1, keepdim=True)


def cubic(x, a=-0.5):
    """Keys' kernel, of support [-2, 2]."""
    x = x.abs()
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((x - 5) * x + 8) * x * a - 4 * a
    return torch.where(x < 1, near, torch.where(x < 2, far, 0.0))
