"""images/folders.py: which files are images, splits and classes, and that nothing is left out without a word."""

import os
import shutil

import pytest

from images import BadImage, folders, open_dataset, open_folder
from pictures import folder_args, picture, write
from utils import UserError


def test_unlabelled_flat_and_nested_folders(tmp_path):
    for name in ("b.png", "a.JPEG", "deep/er/c.webp", "notes.txt.png", ".hidden.png"):
        write(tmp_path / name, picture(8, 8))
    (tmp_path / "readme.txt").write_text("no image")
    images = open_dataset(folder_args(tmp_path))
    assert images.labels is None and images.classes is None
    assert names_below(tmp_path, images) == ["a.JPEG", "b.png", "deep/er/c.webp", "notes.txt.png"]
    below = open_dataset(folder_args(tmp_path / "deep"))
    assert len(below) == 1 and below.labels is None
    (tmp_path / "list").write_text("a.JPEG\n")
    with pytest.raises(UserError, match="class folders"):
        open_dataset(folder_args(tmp_path, "--class_list", tmp_path / "list"))


def names_below(root, images):
    return [os.path.relpath(images.name(index), root) for index in range(len(images))]


def test_text_file_of_paths(tmp_path):
    write(tmp_path / "images" / "b.png", picture(8, 8))
    elsewhere = write(tmp_path / "else where" / "ä a.png", picture(9, 8))
    listing = tmp_path / "list.txt"
    listing.write_text(f"images/b.png\n\n{elsewhere}\n")
    images = open_dataset(folder_args(listing))
    assert len(images) == 2 and images.labels is None
    assert images.load(0).shape == (3, 8, 8) and images.load(1).shape == (3, 9, 8)
    assert images.name(1) == str(elsewhere)
    with pytest.raises(UserError, match="list of images"):
        open_dataset(folder_args(listing), "val")
    listing.write_text("\n")
    with pytest.raises(UserError, match="names no image"):
        open_dataset(folder_args(listing))


def test_splits(tmp_path):
    for name in ("train/a/1.png", "train/b/1.png", "val/a/2.png", "val/b/2.png", "val/b/3.png"):
        write(tmp_path / name, picture(8, 8))
    for path in (tmp_path, tmp_path / "train"):
        assert len(open_dataset(folder_args(path))) == 2
        assert len(open_dataset(folder_args(path), "val")) == 3
    with pytest.raises(UserError, match=r"no validation images for .*train/a: .*val, valid"):
        open_dataset(folder_args(tmp_path / "train" / "a"), "val")


def test_links_are_followed_but_loops_and_broken_ones_end_nothing(tmp_path):
    write(tmp_path / "a" / "x.png", picture(8, 8))
    write(tmp_path.parent / f"{tmp_path.name}_outside" / "y.png", picture(8, 8))
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    (tmp_path / "b").symlink_to(tmp_path.parent / f"{tmp_path.name}_outside")
    (tmp_path / "b" / "broken.png").symlink_to(tmp_path / "nothing")
    images = open_dataset(folder_args(tmp_path))
    assert names_below(tmp_path, images) == ["a/x.png", "b/broken.png", "b/y.png"]
    with pytest.raises(BadImage):
        images.load(1)


def test_file_names_that_are_not_utf8(tmp_path, capsys):
    write(tmp_path / "good.png", picture(8, 8))
    os.rename(tmp_path / "good.png", os.fsencode(tmp_path) + b"/caf\xe9.png")
    images = open_dataset(folder_args(tmp_path))
    assert images.name(0).endswith("caf\\xe9.png") and images.load(0).shape == (3, 8, 8)


# What a folder is

# name: (files, what train is, what val is), as "number and classes: place; remarks"; in capitals: a refusal's words
LAYOUTS = {
    "usual": ("train/a/1 train/b/1 val/a/1 val/b/1", "2 a b: train", "2 a b: val"),
    "kaggle": ("Training/a/1 Training/b/1 Testing/a/1 Testing/b/1", "2 a b: Training", "2 a b: Testing"),
    "capitals": ("TRAIN/a/1 TRAIN/b/1 Valid/a/1 Valid/b/1", "2 a b: TRAIN", "2 a b: Valid"),
    "dev before test": ("train/1 dev/1 eval/1", "1: train", "1: dev"),
    "class called train": ("bird/1 cat/1 train/1 train/2", "4 bird cat train: .", "NO VALIDATION"),
    "class called test": ("bird/1 cat/1 test/1", "3 bird cat test: .", "NO VALIDATION"),
    "the same below a split": (
        "train/cat/1 train/train/1 train/test/1 val/cat/1 val/train/1 val/test/1",
        "3 cat test train: train",
        "3 cat test train: val",
    ),
    "names of things": (
        "bullet_train/1 test_tube/1 train_station/1 cat/1",
        "4 bullet_train cat test_tube train_station: .",
        "NO VALIDATION",
    ),
    "languages": ("de/1 en/1 te/1 tr/1", "4 de en te tr: .", "NO VALIDATION"),
    "coco": (
        "train2017/1 val2017/1 test2017/1 unlabeled2017/1 annotations/x.json",
        "1: train2017; left out: annotations, test2017, unlabeled2017",
        "1: val2017",
    ),
    "coco of two years": ("train2014/1 val2014/1 train2017/1 val2017/1", "SEVERAL SETS OF SPLITS", "SEVERAL"),
    "stl": ("train/a/1 train/b/1 test/a/1 test/b/1 unlabeled/1", "2 a b: train; left out: unlabeled", "2 a b: test"),
    "roboflow": ("train/images/1 train/labels/x.txt valid/images/1 test/images/1", "1: train", "1: valid"),
    "images above splits": ("images/train/1 images/val/1 labels/train/x.txt", "1: images/train", "1: images/val"),
    "imagenet": (
        "Annotations/x.xml Data/LOC/train/a/1 Data/LOC/train/b/1 Data/LOC/val/1 Data/LOC/test/1 Sets/x.txt",
        "2 a b: Data/LOC/train; left out: test",
        "1: Data/LOC/val",
    ),
    "a split in itself": (
        "training_set/training_set/a/1 training_set/training_set/b/1 test_set/test_set/a/1 test_set/test_set/b/1",
        "2 a b: training_set/training_set",
        "2 a b: test_set/test_set",
    ),
    "in one folder": ("x/s_train/a/1 x/s_train/b/1 x/s_test/1 __MACOSX/x/1", "2 a b: x/s_train", "1: x/s_test"),
    "figures beside": ("train/a/1 train/b/1 val/1 figures/1 2", "2 a b: train; left out: figures, images", "1: val"),
    "train alone": ("train/a/1 train/b/1 docs/x.txt", "2 a b: train; left out: docs", "NO VAL IMAGES"),
    "val alone": ("val/1 val/2", "NO TRAIN IMAGES", "2: val"),
    "splits or classes": ("bird/1 cat/1 train/1 test/1", "SPLITS OR CLASSES", "SPLITS OR CLASSES"),
    "of what": ("train/1 val2017/1", "SPLITS OF WHAT", "SPLITS OF WHAT"),
    "two names of one split": ("train/1 val/1 validation/1", "1: train", "TWO NAMES OF ONE SPLIT"),
    "two domains": ("trainA/1 trainB/1 testA/1 testB/1", "SEVERAL SETS OF SPLITS", "SEVERAL"),
    "nothing but a wrapper": ("x/a/1 x/b/1", "2: .; all of them in its folder x", "NO VALIDATION"),
    "images beside folders": ("a/1 b/1 1", "3: .; 1 of them beside its folders", "NO VALIDATION"),
    "class without images": ("a/1 b/1 c/ d/x.heic", "2 a b: .; as they hold no images: c, d (.heic 1)", "NO"),
}  # fmt: skip


def make_layout(root, files):
    for name in files.split():
        path = root / name
        (path if name.endswith("/") else path.parent).mkdir(parents=True, exist_ok=True)
        if path.suffix:
            path.write_text("no image")
        elif not name.endswith("/"):
            write(path.with_suffix(".png"), picture(8, 8))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_a_folder_is(tmp_path, layout):
    files, *expected = LAYOUTS[layout]
    make_layout(tmp_path, files)
    for split, words in zip(("train", "val"), expected, strict=True):
        if words.isupper():
            with pytest.raises(UserError, match=f"(?i){words}"):
                open_folder(tmp_path, split)
            continue
        images = open_folder(tmp_path, split)
        (number, *classes), (place, _, remarks) = words.split(": ")[0].split(), words.split(": ", 1)[1].partition("; ")
        assert (len(images), images.classes) == (int(number), classes or None)
        assert images.summary.split(";")[0].endswith(f" of {tmp_path / place}") and remarks in images.summary


def test_a_split_given_by_name_has_its_counterpart_beside_it(tmp_path, monkeypatch):
    make_layout(tmp_path, "train2014/1 val2014/1 val2014/2 train2017/1 val2017/1 cat/train/1 cat/test/1")
    assert len(open_folder(tmp_path / "train2014", "val")) == 2
    monkeypatch.chdir(tmp_path / "train2014")
    assert len(open_folder(".", "val")) == 2 and len(open_folder("../train2017/", "val")) == 1
    make_layout(tmp_path, "x/train/cat/1 x/train/train/1 x/train/test/1 x/val/cat/1")
    assert open_folder(tmp_path / "x" / "train", "train").classes == ["cat", "test", "train"]
    for wrong in ("val2014", "cat/test"):  # never tested on what it was trained on
        with pytest.raises(UserError, match="no validation images"):
            open_folder(tmp_path / wrong, "val")


def test_a_link_in_a_circle_ends(tmp_path):
    (tmp_path / "only").mkdir()
    (tmp_path / "only" / "again").symlink_to(tmp_path)
    with pytest.raises(UserError, match=r"no images in .*link to a folder above 1"):
        open_folder(tmp_path, "train")


# What is passed over


def test_what_is_passed_over_is_counted(tmp_path):
    make_layout(tmp_path, "a/1 a/2 b/1 b/x.txt b/y.txt b/z.HEIC a/.DS_Store c/x.heic .git/config.x @eaDir/1 a/@EADIR/1")
    make_layout(tmp_path, "b/lost+found/1 $RECYCLE.BIN/1 __MACOSX/1 b/.ipynb_checkpoints/1 a/.AppleDouble/1")
    (tmp_path / "noending").write_text("?")
    images = open_folder(tmp_path, "train")
    assert images.classes == ["a", "b"] and images.labels.tolist() == [0, 0, 1]
    said = dict(part.split(": ", 1) for part in images.summary.split("; ")[1:])
    assert set(said["passed over"].split(", ")) == {".txt 2", ".heic 2", "hidden 1", "without ending 1"}
    assert said["no classes, as they hold no images"] == "c (.heic 1)"
    assert "@eaDir 1" in said["folders passed over"] and "and 2 more" in said["folders passed over"]


def test_many_endings_are_not_all_named(tmp_path):
    for number in range(100):
        make_layout(tmp_path, f"x.{number:03} {number}")
    assert len(open_folder(tmp_path, "train").summary) < 300 + len(str(tmp_path))


def test_every_ending_that_pillow_reads_is_an_image(tmp_path):
    for ending in (".jfif", ".jpe", ".gif", ".JP2", ".PNG"):
        write(tmp_path / "a" / "1.png", picture(8, 8)).rename(tmp_path / "a" / f"1{ending}")
    assert len(open_folder(tmp_path, "train")) == 5


def test_a_folder_that_cannot_be_read_is_said(tmp_path, monkeypatch):
    """Root reads everything: the refusal is put in."""
    make_layout(tmp_path, "a/1 a/deep/1 b/1 lost+found/1")
    look = folders.look_into

    def refuse(name):
        def look_or_refuse(folder):
            if os.path.basename(folder.rstrip(b"/")) == name:
                raise PermissionError(13, "Permission denied")
            return look(folder)

        return look_or_refuse

    for name, expected in ((b"deep", 2), (b"lost+found", 3)):
        monkeypatch.setattr(folders, "look_into", refuse(name))
        images = open_folder(tmp_path, "train")
        assert len(images) == expected and (name == b"deep") == ("cannot be read: a/deep" in images.summary)
    monkeypatch.setattr(folders, "look_into", refuse(b"b"))
    make_layout(tmp_path, "c/1")
    with pytest.raises(UserError, match=r"class folder .*b/ cannot be read"):
        open_folder(tmp_path, "train")


# Lists


def test_labels_in_a_list(tmp_path):
    make_layout(tmp_path, "a d.x/b c.d/e")
    write(tmp_path / "b c.png", picture(8, 8))
    make = (tmp_path / "list.txt").write_bytes
    for text, classes, labels in (
        ("a.png 7\nb c.png 10\nd.x/b.png\t07\n", ["7", "10"], [0, 1, 0]),
        ("\ufeffa.png,tabby cat\r\nb c.png, dog\r\n\r\n", ["dog", "tabby cat"], [1, 0]),
        ("image;label\na.png;x\nb c.png;y", ["x", "y"], [0, 1]),
        ("a.png -1\nb c.png 1\n", ["-1", "1"], [0, 1]),
        ("a.png\nb c.png", None, None),
    ):
        make(text.encode())
        images = open_folder(tmp_path / "list.txt", "train")
        assert images.classes == classes and (labels is None or images.labels.tolist() == labels)
        assert [images.load(i).shape for i in range(2)] == [(3, 8, 8)] * 2
        assert ("first line passed over: image;label" in images.summary) == text.startswith("image")
    make(b"a.png 1\nb c.png\na.png 2\nb c.png\n")
    with pytest.raises(UserError, match=r"2 of 4 images have no label, such as b c\.png"):
        open_folder(tmp_path / "list.txt", "train")


def test_lists_of_two_splits(tmp_path):
    make_layout(tmp_path, "a b")
    for name, text in (("train.txt", "a.png 0\nb.png 1"), ("val.txt", "b.png 1\na.png 0"), ("train.csv", "a.png")):
        (tmp_path / name).write_text(text)
    assert open_folder(tmp_path / "train.txt", "val").labels.tolist() == [1, 0]
    with pytest.raises(UserError, match="without a validation part"):
        open_folder(tmp_path / "train.csv", "val")


def test_a_class_list_with_a_byte_order_mark_and_carriage_returns(tmp_path):
    make_layout(tmp_path, "images/a/1 images/b/1 images/c/1")
    (tmp_path / "list").write_bytes("\ufeffb\r\na\r\n".encode())
    images = open_dataset(folder_args(tmp_path / "images", "--class_list", tmp_path / "list"))
    assert images.classes == ["a", "b"] and "1 classes left out by --class_list" in images.summary


OTHER_FILES = {
    "pth": (b"PK\x03\x04" + bytes(50), "a zip archive"),
    "": (b"name".ljust(257, b"\0") + b"ustar\x0000" + bytes(300), "a tar archive"),
    "tar.gz": (b"\x1f\x8b\x08" + bytes(50), "a gzip archive"),
    "mat": (b"\x89HDF\r\n\x1a\n", "an HDF5 file"),
    "pq": (b"PAR1\x15\x04", "a Parquet file"),
    "npy": (b"\x93NUMPY\x01\0", "a NumPy array"),
    "utf-16": ("a.png\n".encode("utf-16"), "text in UTF-16"),
    "mdb": (bytes(5000), "a binary file"),
    "tfrecord": (b"\x2a\0\0\0\0\0\0\0\x9f\x1e", "a binary file"),
}


@pytest.mark.parametrize("ending", [*OTHER_FILES, "png", "jpg", "tif"])
@pytest.mark.parametrize("split", ["train", "val"])
def test_other_files_are_called_what_they_are(tmp_path, ending, split):
    path = tmp_path / f"data.{ending}"
    if ending in OTHER_FILES:
        path.write_bytes(OTHER_FILES[ending][0])
    else:
        write(path, picture(8, 8))
    with pytest.raises(UserError) as error:
        open_folder(path, split)
    assert OTHER_FILES.get(ending, ("", "one image"))[1] in str(error.value) and "one path per line" in str(error.value)


def test_a_text_that_lists_no_images_is_one_printable_line(tmp_path):
    (tmp_path / "notes").write_text("\x1b[31mred\x07\n{'a': 1}\n")
    with pytest.raises(UserError, match="none of its images is there") as error:
        open_folder(tmp_path / "notes", "train")
    assert str(error.value).isprintable()


def test_splits_inside_classes_are_read_as_one_and_said(tmp_path):
    for name in ("cat/train/1.png", "cat/test/1.png", "dog/train/1.png", "dog/Testing/1.png", "emu/1.png"):
        write(tmp_path / "animals" / name, picture(8, 8))
    summary = open_dataset(folder_args(tmp_path / "animals")).summary
    said = "read as one, though called as splits: cat/test, cat/train, dog/Testing, dog/train"
    assert "5 images in 3 classes (cat, dog, emu)" in summary and said in summary
    shutil.make_archive(tmp_path / "animals", "tar", tmp_path / "animals")
    assert said in open_dataset(folder_args(tmp_path / "animals.tar")).summary
    for name in ("fruits/Training/a/1.png", "fruits/Test/a/1.png", "papers/1.png", "emu/train/1.png"):
        write(tmp_path / "more" / name, picture(8, 8))
    summary = open_dataset(folder_args(tmp_path / "more")).summary
    assert "read as one, though called as splits: fruits/Test, fruits/Training" in summary and "emu/" not in summary


def test_folders_of_one_set_without_classes_are_named(tmp_path):
    for name in ("JPEGImages/1.png", "SegmentationClass/1.png", "SegmentationObject/deep/1.png"):
        write(tmp_path / "VOCdevkit" / "VOC2012" / name, picture(8, 8))
    inside = [f"VOCdevkit/VOC2012/{name}" for name in ("JPEGImages", "SegmentationClass", "SegmentationObject")]
    assert f"all of them in its folder {', '.join(inside)}" in open_dataset(folder_args(tmp_path)).summary


@pytest.mark.parametrize("name", ["@eaDir", "@tmp", "#snapshot", "#recycle", "~snapshot", "found.000", "RECYCLER"])
def test_folders_of_network_storage_and_disks_are_no_classes(name, tmp_path):
    for folder in ("a", "b", name, f"a/{name}"):
        write(tmp_path / folder / "1.png", picture(8, 8))
    images = open_dataset(folder_args(tmp_path))
    assert images.classes == ["a", "b"] and f"folders passed over: {name} 2" in images.summary


def test_heic_that_is_passed_over_says_what_reads_it(tmp_path, monkeypatch):
    write(tmp_path / "a.png", picture(8, 8))
    (tmp_path / "b.heic").write_bytes(b"1")
    monkeypatch.setattr(folders, "known_formats", lambda: ("PNG",))
    summary = open_dataset(folder_args(tmp_path)).summary
    assert "passed over: .heic 1; HEIC: convert it, or pip install pillow-heif" in summary


@pytest.mark.parametrize("content", [b"\x80\x02}q\x01(U\x04datq\x02", b"\x80\x05\x95"])
def test_what_is_no_text_is_no_list(content, tmp_path):
    (tmp_path / "data_batch_1").write_bytes(content)
    with pytest.raises(UserError, match="is a binary file, which is not read as a data set"):
        open_dataset(folder_args(tmp_path / "data_batch_1"))
