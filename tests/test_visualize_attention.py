"""Attention and patch features against the backbone's own, scikit-learn's PCA, and masks found by trying all sets."""

import itertools
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.decomposition import PCA

import utils
import visualize_attention
from backbones import build_backbone
from pictures import picture, write
from vision_transformer import VisionTransformer
from visualize_attention import attention_and_tokens, attention_mask, pca_colours, size_in_patches


@pytest.fixture(scope="module")
def vit():
    """A ViT whose attention is far from uniform."""
    torch.manual_seed(0)
    model = VisionTransformer(patch_size=4, img_size=16, embed_dim=48, depth=3, num_heads=3).eval()
    for block in model.blocks:
        block.attn.qkv.weight.data *= 20
    return model


def random_tokens(*shapes):
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(12, 12, generator=generator)
    return [torch.randn(*shape, 12, generator=generator) @ mixing for shape in shapes]


@torch.no_grad()
def test_attention_and_tokens_are_those_of_the_backbone(vit):
    x = torch.randn(2, 3, 12, 20, generator=torch.Generator().manual_seed(1))  # 3 x 5 patches
    attention, tokens = attention_and_tokens(vit, x)
    torch.testing.assert_close(attention.flatten(2), vit.get_last_selfattention(x)[:, :, 0, 1:])
    torch.testing.assert_close(tokens.flatten(1, 2), vit.forward_features(x)[:, 1:])
    assert attention.shape == (2, 3, 3, 5)
    assert tokens.shape == (2, 3, 5, 48)
    assert not vit.blocks[-1].attn._forward_pre_hooks


@torch.no_grad()
def test_a_changed_patch_changes_its_own_place(vit):
    x = torch.randn(1, 3, 12, 20, generator=torch.Generator().manual_seed(2))
    before = attention_and_tokens(vit, x)[1]
    for row, column in ((0, 4), (2, 1)):
        changed = x.clone()
        changed[:, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] *= -1
        difference = (attention_and_tokens(vit, changed)[1] - before).norm(dim=-1)[0]  # (r, c)
        assert divmod(int(difference.argmax()), 5) == (row, column)


@pytest.mark.parametrize("threshold", [0.0, 0.1, 0.5, 0.6, 0.95, 1.0])
def test_a_mask_is_the_smallest_set_that_holds_the_mass(threshold):
    attention = np.random.default_rng(0).random((2, 2, 4)) ** 4 / 100
    for values, mask in zip(attention, attention_mask(attention, threshold), strict=True):
        values, mask = values.ravel(), mask.ravel()
        sizes = [  # of all sets of patches that hold enough
            len(chosen)
            for size in range(9)
            for chosen in itertools.combinations(range(8), size)
            if values[list(chosen)].sum() >= threshold * values.sum() * (1 - 1e-12)
        ]
        assert mask.sum() == min(sizes)
        assert values[mask].sum() >= threshold * values.sum() * (1 - 1e-12)


def test_a_mask_is_dino_s():
    attention = torch.rand(6, 7, 9, generator=torch.Generator().manual_seed(3))
    flat = attention.flatten(1)
    val, idx = torch.sort(flat)  # as in its visualize_attention.py
    val /= val.sum(1, keepdim=True)
    theirs = torch.cumsum(val, dim=1) > 1 - 0.6
    idx2 = torch.argsort(idx)
    for head in range(6):
        theirs[head] = theirs[head][idx2[head]]
    np.testing.assert_array_equal(attention_mask(attention.numpy(), 0.6).reshape(6, -1), theirs.numpy())


@pytest.mark.parametrize("patches", [10, 50, 100])
def test_rounding_adds_no_patch(patches):
    uniform = np.full((1, 1, patches), 1 / patches, np.float32)
    for tenths in range(11):
        assert attention_mask(uniform, tenths / 10).sum() == tenths * patches / 10


def test_colours_are_principal_components():
    tokens = random_tokens((9, 11), (5, 4))
    rows = torch.cat([each.flatten(0, 1) for each in tokens]).double().numpy()
    theirs = PCA(3, svd_solver="full").fit(rows)
    colours, percent = pca_colours(tokens, "joint")
    assert [each.shape for each in colours] == [(9, 11, 3), (5, 4, 3)]
    assert percent == pytest.approx(100 * theirs.explained_variance_ratio_.sum())
    ours = np.concatenate([each.reshape(-1, 3) for each in colours])
    for component, loadings in enumerate(theirs.components_):
        scores = theirs.transform(rows)[:, component] * np.sign(loadings[np.abs(loadings).argmax()])
        low, high = np.percentile(scores, [1, 99])
        np.testing.assert_allclose(ours[:, component], ((scores - low) / (high - low)).clip(0, 1), atol=1e-9)
    assert (ours.min(), ours.max()) == (0, 1)


def test_the_sign_of_eigenvectors_does_not_show(monkeypatch):
    tokens = random_tokens((6, 7))
    expected, _ = pca_colours(tokens, "joint")
    eigh = torch.linalg.eigh
    signs = torch.tensor([1.0, -1.0] * 6, dtype=torch.float64)
    for flip in (signs, -signs):
        monkeypatch.setattr(torch.linalg, "eigh", lambda x, flip=flip: (eigh(x)[0], eigh(x)[1] * flip))
        np.testing.assert_allclose(pca_colours(tokens, "joint")[0][0], expected[0])


def test_each_image_alone_is_a_joint_of_one():
    tokens = random_tokens((6, 7), (5, 5))
    together, alone = pca_colours(tokens, "joint")[0], pca_colours(tokens, "each")[0]
    for image in (0, 1):
        np.testing.assert_array_equal(alone[image], pca_colours([tokens[image]], "joint")[0][0])
        assert np.abs(alone[image] - together[image]).max() > 0.1


def test_features_that_do_not_vary_are_gray():
    constant, line = torch.ones(3, 4, 8), torch.arange(12.0).reshape(3, 4, 1) * torch.ones(8)
    assert (pca_colours([constant], "joint")[0][0] == 0.5).all()
    colours, percent = pca_colours([line], "joint")
    assert (colours[0][..., 1:] == 0.5).all()  # one direction only
    assert np.unique(colours[0][..., 0]).size == 12
    assert percent == pytest.approx(100)
    assert (pca_colours([torch.ones(1, 1, 8)], "each")[0][0] == 0.5).all()


def test_sizes_are_whole_patches_and_bounded():
    assert size_in_patches((224, 224), 16) == (224, 224)
    assert size_in_patches((375, 500), 16) == (368, 496)
    assert size_in_patches((28, 28), 7) == (28, 28)
    assert size_in_patches((5, 3), 16) == (16, 16)
    assert size_in_patches((100, 300), 7, [480]) == (483, 483)
    assert size_in_patches((100, 300), 8, [480, 240]) == (480, 240)
    for height, width in ((3000, 4000), (100, 20_000), (20_000, 100)):
        h, w = size_in_patches((height, width), 8)
        assert h % 8 == w % 8 == 0
        assert h * w < 1.15 * visualize_attention.MOST_PIXELS
        assert w / h == pytest.approx(width / height, rel=0.15)


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder with photos/, a gray image, a broken one, and checkpoints of a ViT-T/8 and a ResNet-8."""
    folder = tmp_path_factory.mktemp("attention")
    write(folder / "photos" / "a.png", picture(40, 33, seed=1))
    write(folder / "photos" / "a.jpg", picture(24, 24, seed=2))
    write(folder / "photos" / "deep" / "gray.png", picture(30, 60, channels=1, seed=3))
    (folder / "photos" / "broken.jpg").write_bytes(b"no picture")
    (folder / "bad").mkdir()
    (folder / "bad" / "x.png").write_bytes(b"")
    (folder / "empty").mkdir()
    args = {"arch": "vit_tiny", "img_size": 32, "patch_size": 8, "in_chans": 3, "mean": [0.4] * 3, "std": [0.3] * 3}
    for arch in ("vit_tiny", "resnet8"):
        torch.manual_seed(0)
        sizes = {"img_size": 32, "patch_size": 8} if arch == "vit_tiny" else {"width": 8}
        backbone = {f"backbone.{k}": v for k, v in build_backbone(arch, **sizes).state_dict().items()}
        torch.save({"teacher": backbone, "args": args | {"arch": arch}}, folder / f"{arch}.pth")
    return folder


def flags(folder, image, *more, checkpoint="vit_tiny.pth"):
    paths = {"--checkpoint": checkpoint, "--image_path": image, "--output_dir": "out"}
    given = [word for flag, name in paths.items() if flag not in more for word in (flag, str(folder / name))]
    return [*given, "--device", "cpu", *map(str, more)]


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*.png") if path.is_file())


FILES = sorted(
    ["img.png", "overview.png", "pca.png"]
    + [f"attn-head{head}.png" for head in range(3)]
    + [f"mask_th0.5_head{head}.png" for head in range(3)]
)


def test_one_image_gives_dino_s_files(run, tmp_path):
    visualize_attention.main(flags(run, "photos/a.png", "--threshold", 0.5, "--output_dir", tmp_path))
    assert files(tmp_path) == FILES
    image = np.asarray(Image.open(tmp_path / "img.png").convert("RGB"))
    assert image.shape == (40, 32, 3)  # 40 x 33 pixels, in whole patches

    model = build_backbone("vit_tiny", img_size=32, patch_size=8).eval()
    state = torch.load(run / "vit_tiny.pth")["teacher"]
    model.load_state_dict({name.removeprefix("backbone."): tensor for name, tensor in state.items()})
    x = (torch.from_numpy(image.copy()).permute(2, 0, 1)[None] / 255 - 0.4) / 0.3
    with torch.no_grad():
        attention = model.get_last_selfattention(x)[0, :, 0, 1:].unflatten(1, (5, 4)).numpy()
    for head in range(3):
        low, high = attention[head].min(), attention[head].max()
        expected = matplotlib.colormaps["viridis"]((attention[head] - low) / (high - low), bytes=True)[..., :3]
        drawn = np.asarray(Image.open(tmp_path / f"attn-head{head}.png").convert("RGB")).astype(int)
        assert np.abs(drawn - np.kron(expected, np.ones((8, 8, 1)))).max() <= 8  # neighbouring colours of the map
        mask = np.kron(attention_mask(attention, 0.5)[head], np.ones((8, 8))).astype(bool)
        coloured = np.ptp(np.asarray(Image.open(tmp_path / f"mask_th0.5_head{head}.png").convert("RGB")), axis=2) > 0
        np.testing.assert_array_equal(coloured, mask)  # gray elsewhere


def test_a_folder_gets_a_folder_per_image_and_a_sheet(run, tmp_path, capsys):
    visualize_attention.main(flags(run, "photos", "--threshold", 0.5, "--output_dir", tmp_path))
    output = capsys.readouterr()
    assert f"skipped {run / 'photos' / 'broken.jpg'}: " in output.err
    assert "3 of 4 images" in output.out
    names = [f"{name}/{file}" for name in ("a.jpg", "a.png", "deep/gray") for file in FILES]
    assert files(tmp_path) == sorted([*names, "contact_sheet.png"])
    assert Image.open(tmp_path / "deep" / "gray" / "img.png").size == (64, 32)  # 60 x 30 px


def test_gray_images_in_bf16_from_dino_s_flags(run, tmp_path):
    torch.manual_seed(0)
    torch.save(build_backbone("vit_tiny", img_size=28, patch_size=7, in_chans=1).state_dict(), tmp_path / "gray.pth")
    folder = tmp_path / "made"
    words = f"--pretrained_weights {tmp_path}/gray.pth --arch vit_tiny --patch_size 7 --image_size 30 42"
    words += f" --image_path {run}/photos/a.png --output_dir {folder} --device cpu --precision bf16"
    visualize_attention.main(words.split())
    image = np.asarray(Image.open(folder / "img.png").convert("RGB"))
    assert image.shape == (28, 42, 3)
    assert (image == image[..., :1]).all()


def test_many_images_fill_several_sheets(run, tmp_path, monkeypatch):
    monkeypatch.setattr(visualize_attention, "ROWS_PER_SHEET", 2)
    visualize_attention.main(flags(run, "photos", "--output_dir", tmp_path, "--image_size", 16, "--pca", "each"))
    assert [path.name for path in sorted(tmp_path.glob("con*"))] == ["contact_sheet.png", "contact_sheet_2.png"]


def test_one_process_of_several_draws(run, tmp_path, monkeypatch):
    monkeypatch.setattr(utils, "rank", lambda: 1)
    visualize_attention.main(flags(run, "photos/a.png", "--output_dir", tmp_path))
    assert files(tmp_path) == []


@pytest.mark.parametrize(
    ("image", "more", "message"),
    [
        ("photos/a.png", ["--threshold", "60"], "--threshold 60: expected a number of at least 0 and of at most 1"),
        ("photos/a.png", ["--image_size", "1", "2", "3"], "--image_size [1, 2, 3]"),
        ("photos/a.png", ["--image_size", "0"], "--image_size 0: expected"),
        ("photos/missing.png", [], "photos/missing.png: FileNotFoundError"),
        ("photos/broken.jpg", [], "photos/broken.jpg: not an image"),
        ("bad", [], "bad/x.png: "),
        ("empty", [], "empty: no image in it"),
        ("photos/a.png", ["--output_dir", "{folder}/vit_tiny.pth"], "--output_dir"),
        ("photos", ["--output_dir", "{folder}/photos/out"], "photos/out: its pictures would mix with --image_path"),
        ("photos", ["--output_dir", "{folder}/photos"], "would mix with"),
        ("img.png", ["--output_dir", "{folder}"], "would mix with"),  # and overwrite it
        (
            "photos/a.png",
            ["--checkpoint", "{folder}/resnet8.pth"],
            "resnet8 shows no attention; expected one of vit_mini",
        ),
    ],
)
def test_command_stops_with_one_line(run, image, more, message, capsys):
    more = [word.format(folder=run) for word in more]
    with pytest.raises(SystemExit) as stop:
        visualize_attention.main(flags(run, image, *more))
    assert stop.value.code == 2
    *notes, error = capsys.readouterr().err.splitlines()
    assert error.startswith("error: ")
    assert message in error
    assert all(".pth: " in line or "are assumed" in line for line in notes)
    assert not Path(run / "photos" / "out").exists()
