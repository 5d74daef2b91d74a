"""Images in tar, zip, Parquet, Arrow and HDF5 files against the same images in a folder."""

import concurrent.futures
import json
import os
import pickle
import shutil
import sys
import tarfile
import zipfile

import numpy as np
import pyarrow.ipc
import pyarrow.parquet
import pytest
import tifffile
import torch

import benchmarks.shards
import data
import eval_knn
import export_backbone
import extract_features
import images.shards
import images.tars
import main_cplearn
from images import BadImage, open_dataset, open_folder
from images.reading import Reading
from images.workers import as_it_is
from pictures import folder_args, make_args, picture, write
from runs import assert_same_checkpoint, flags, logged, stopping_at
from shards import FORMS, add, parquet, table_of, tars, webdataset, zipped
from utils import UserError

QUICK = ("tars", "zip", "parquet", "hdf5")
SAME_NAMES = ("tars", "zip", "stored zip")  # and the sizes of all files are known: the fingerprint of the folder


@pytest.fixture(scope="module")
def forms(class_folders, tmp_path_factory):
    out = tmp_path_factory.mktemp("forms")
    return {name: write_form(class_folders, out) for name, write_form in FORMS.items()}


def assert_same_images(found, expected):
    assert found.classes == expected.classes and np.array_equal(found.labels, expected.labels)
    assert len(found) == len(expected)
    assert all(torch.equal(found.load(i), expected.load(i)) for i in range(len(found)))


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_the_folder(class_folders, forms, form):
    found, expected = open_folder(forms[form]), open_folder(class_folders)
    assert_same_images(found, expected)
    assert (found.fingerprint == expected.fingerprint) == (form in SAME_NAMES)
    assert f"27 images in 3 classes (ant, bee, cat) of {forms[form]}" in found.summary
    assert "/cat/" in found.name(26).replace(":", "/") and found.name(26).endswith(".jpg")


@pytest.fixture(scope="module")
def deep_folders(tmp_path_factory):
    """TIFFs of 5 channels with signed values of 16 bits: 24 to train and 9 to validate on, in 3 classes."""
    root, noise = tmp_path_factory.mktemp("deep"), np.random.default_rng(0)
    for number in range(33):
        pixels = noise.integers(-900, 900, (20 + number % 3, 24, 5)) + 100 * (number % 3)
        path = root / ("train" if number < 24 else "val") / f"class{number % 3}" / f"{number:02}.tif"
        path.parent.mkdir(parents=True, exist_ok=True)
        tifffile.imwrite(path, pixels.astype(np.int16), photometric="minisblack", planarconfig="contig")
    return root


def train(folder, output_dir, **changes):
    """2 epochs of 3 steps."""
    words = flags(folder, output_dir, epochs=2, in_chans=5, knn_every=1, log_every=1, **changes)
    main_cplearn.main([*words, "--value_range", "-1000", "1000"])


def train_in_two_parts(folder, output_dir):
    """Stopped in the middle of the second epoch, and gone on with by other processes."""
    with stopping_at(4):
        train(folder, output_dir)
    train(folder, output_dir, num_workers=2)


def what_follows(folder, output_dir):
    """(the rows of k-NN, features in a file, the exported weights) of a run's checkpoint."""
    common = ["--checkpoint", str(output_dir / "checkpoint.pth"), "--device", "cpu"]
    images = ["--data_path", str(folder), "--num_workers", "0"]
    knn = ["--nb_knn", "5", "20", "--features_dir", str(output_dir / "kept"), "--output_dir", str(output_dir / "knn")]
    for _ in range(2):  # the features are computed, then read
        eval_knn.main([*common, *images, *knn])
    extract_features.main([*common, *images, "--output_dir", str(output_dir / "features")])
    export_backbone.main([*common, "--output_dir", str(output_dir / "out")])
    rows = json.loads((output_dir / "knn" / "results_knn.json").read_text())["rows"]
    files = [output_dir / "features" / "cls.npy", output_dir / "out" / "model.safetensors"]
    return [row | {"checkpoint": None} for row in rows], *(file.read_bytes() for file in files)


@pytest.fixture(scope="module")
def run_of_folder(deep_folders, tmp_path_factory):
    """(the folder of a run that was not stopped, what follows)"""
    output_dir = tmp_path_factory.mktemp("run")
    train(deep_folders, output_dir)
    return output_dir, what_follows(deep_folders, output_dir)


@pytest.mark.parametrize(
    "form", ["folder", *(pytest.param(f, marks=[] if f in QUICK else pytest.mark.slow) for f in FORMS)]
)
def test_every_form_trains_resumes_evaluates_and_exports_as_the_folder_bit_for_bit(
    deep_folders, run_of_folder, tmp_path, form
):
    for split in ("train", "val") if form != "folder" else ():
        FORMS[form](deep_folders / split, tmp_path / "set" / split)
    images = deep_folders if form == "folder" else tmp_path / "set"
    train_in_two_parts(images, tmp_path / "run")
    whole, expected = run_of_folder
    assert_same_checkpoint(tmp_path / "run" / "checkpoint.pth", whole / "checkpoint.pth")
    assert logged(tmp_path / "run") == logged(whole)
    assert [line["knn_top1"] for line in logged(whole) if line["kind"] == "epoch"] == [expected[0][-1]["top1"]] * 2
    assert what_follows(images, tmp_path / "run") == expected


def test_a_set_of_shards_goes_to_workers_which_open_a_few(class_folders, tmp_path, monkeypatch):
    monkeypatch.setattr(images.shards, "MOST_OPEN", 3)
    found, expected = open_folder(tars(class_folders, tmp_path / "tars", 20)), open_folder(class_folders)
    assert_same_images(found, expected)
    assert len(found.opened.shards) == 3 and len(open_files(tmp_path)) == 3
    again = pickle.loads(pickle.dumps(found))
    assert len(open_files(tmp_path)) == 3
    assert_same_images(again, expected)


def open_files(folder):
    links = (f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd"))
    return [link for link in links if os.path.exists(link) and os.readlink(link).startswith(str(folder))]


@pytest.mark.slow
@pytest.mark.parametrize("context", ["fork", "spawn", "forkserver"])
@pytest.mark.parametrize("form", FORMS)
def test_workers_of_every_kind_read_every_form(forms, form, context):
    found = open_folder(forms[form])
    found.load(5)  # opened before the workers are
    steps = [[0, 5, 13], [26, 1], [7]]
    dataset = data.EvalDataset(found, 32, 3)
    batches = torch.utils.data.DataLoader(
        dataset, batch_sampler=steps, num_workers=2, multiprocessing_context=context, collate_fn=as_it_is
    )
    assert all(map(torch.equal, batches, map(dataset.__getitems__, steps)))


@pytest.mark.slow
def test_the_benchmark_has_a_row_for_every_form(capsys):
    words = ["--images", "24", "--side", "16", "--rows", "4", "--block", "4", "--repeats", "1"]
    benchmarks.shards.main(benchmarks.shards.get_parser().parse_args(words))
    said = capsys.readouterr().out
    assert all(f"| {form}" in said for form in ["folder", *FORMS])


# Splits


def test_splits_are_told_by_names_of_shards_and_by_folders_inside(class_folders, tmp_path):
    expected = open_folder(class_folders)
    for split in ("train", "validation"):
        webdataset(class_folders, tmp_path / split, 2)
        for path in (tmp_path / split).iterdir():
            (tmp_path / "shards").mkdir(exist_ok=True)
            path.rename(tmp_path / "shards" / path.name.replace("train", split))
    for split in ("train", "val"):
        assert_same_images(open_folder(tmp_path / "shards", split), expected)
    assert_same_images(open_folder(tmp_path / "shards" / "train-000.tar", "val"), expected)
    for split in ("train", "val"):
        shutil.copytree(class_folders, tmp_path / "inside" / split)
    write(tmp_path / "inside" / "more" / "1.png", picture(8, 8))
    archive = zipped(tmp_path / "inside", tmp_path / "inside.zip")
    for split in ("train", "val"):
        found = open_folder(archive, split)
        assert_same_images(found, expected)
        assert found.summary.endswith("left out: more")


def test_a_data_set_of_splits_saved_by_datasets(class_folders, tmp_path):
    import datasets

    both = datasets.Dataset(table_of(class_folders))
    datasets.DatasetDict({"train": both, "test": both.select(range(9))}).save_to_disk(tmp_path / "saved")
    assert_same_images(open_folder(tmp_path / "saved"), open_folder(class_folders))
    found = open_folder(tmp_path / "saved", "val")
    assert len(found) == 9 and found.name(0).startswith(str(tmp_path / "saved" / "test"))


def test_groups_of_hdf5_are_splits_and_arrays_are_images(tmp_path):
    import h5py

    pixels = np.random.default_rng(0).integers(0, 256, (6, 20, 24, 3), np.uint8)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        for split, rows in (("train", slice(0, 4)), ("test", slice(4, 6))):
            group = file.create_group(split)
            group["images"], group["labels"] = pixels[rows], np.arange(6)[rows] % 2
    found = open_folder(tmp_path / "a.h5")
    assert found.classes == ["0", "1"] and found.labels.tolist() == [0, 0, 1, 1]
    expected = torch.from_numpy(pixels[[0, 2, 1, 3]]).permute(0, 3, 1, 2)
    assert all(torch.equal(found.load(i), expected[i]) for i in range(4))
    assert len(open_folder(tmp_path / "a.h5", "val")) == 2


@pytest.mark.parametrize("order", ["NHWC", "NCHW"])
def test_arrays_of_hdf5_are_the_images_of_a_folder_whatever_their_type(tmp_path, order):
    """5 channels of signed 16 bits, as a file of arrays and as a TIFF for each."""
    import h5py

    pixels = np.random.default_rng(0).integers(-1500, 1500, (6, 20, 24, 5), np.int16)
    for number, image in enumerate(pixels):
        path = tmp_path / "folder" / f"class{number % 2}" / f"{number}.tif"
        path.parent.mkdir(parents=True, exist_ok=True)
        tifffile.imwrite(path, image, photometric="minisblack", planarconfig="contig")
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["images"] = pixels if order == "NHWC" else pixels.transpose(0, 3, 1, 2)
        file["labels"], file["classes"] = np.arange(6) % 2, ["class0", "class1"]
    reading = Reading((-1000, 1000), channels=5)
    found, expected = (
        open_folder(tmp_path / "a.h5", "train", reading),
        open_folder(tmp_path / "folder", "train", reading),
    )
    assert found.classes == expected.classes and np.array_equal(found.labels, expected.labels)
    for number in range(6):
        assert torch.equal(found.load(number, 5), expected.load(number, 5))
    assert found.load(0, 5).min() == 0 and found.load(0, 5).max() == 255


def test_shards_without_validation_images_say_so(class_folders, tmp_path):
    tars(class_folders, tmp_path / "tars")
    for path in (tmp_path / "tars", tmp_path / "tars" / "shard-000.tar"):
        with pytest.raises(UserError, match="no validation images for --data_path"):
            open_folder(path, "val")


def test_shards_named_one_by_one_are_one_root(class_folders, tmp_path):
    paths = sorted(tars(class_folders, tmp_path / "tars").iterdir())
    found = open_dataset(make_args("--dataset", "imagefolder", "--data_path", *paths))
    assert_same_images(found, open_folder(class_folders))
    mixed = open_dataset(make_args("--dataset", "imagefolder", "--data_path", f"{paths[0]}:2", *paths[1:]))
    assert mixed.draws == ((9, 18), (18, 18)) and mixed.classes == ["ant", "bee", "cat"]


def test_hugging_faces_hub_is_asked_for_hf_paths_alone(class_folders, tmp_path, monkeypatch):
    import datasets

    asked = []
    made = datasets.Dataset(table_of(class_folders))
    made.save_to_disk(tmp_path / "saved")

    def load_dataset(name):
        asked.append(name)
        return {"train": datasets.load_from_disk(tmp_path / "saved"), "extra": None}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    found = open_folder("hf://someone/birds")
    assert_same_images(found, open_folder(class_folders))
    assert asked == ["someone/birds"] and "of hf://someone/birds" in found.summary
    with pytest.raises(UserError, match="splits train, extra"):
        open_folder("hf://someone/birds", "val")
    with pytest.raises(UserError):
        open_folder("someone/birds")
    assert asked == ["someone/birds"] * 2


@pytest.mark.parametrize(("library", "path"), [("h5py", "a.h5"), ("datasets", "hf://someone/birds")])
def test_without_a_library_there_is_one_line_that_names_it(tmp_path, monkeypatch, library, path):
    monkeypatch.setitem(sys.modules, library, None)
    (tmp_path / "a.h5").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"not installed: pip install {library}$"):
        open_folder(path)


# Labels


@pytest.mark.parametrize(
    "label",
    [
        lambda name: (".json", json.dumps({"width": 3, "label": name}).encode()),
        lambda name: (".json", json.dumps({"cls": name}).encode()),
        lambda name: (".txt", f"{name}\n".encode()),
    ],
)
def test_labels_of_webdataset(class_folders, tmp_path, label):
    assert_same_images(
        open_folder(webdataset(class_folders, tmp_path / "wds", label=label)), open_folder(class_folders)
    )


def test_captions_and_missing_labels_are_no_classes(class_folders, tmp_path):
    numbers = iter(range(100))
    captions = webdataset(class_folders, tmp_path / "a", label=lambda name: (".txt", f"no. {next(numbers)}".encode()))
    found = open_folder(captions)
    assert found.labels is None and "27 texts beside 27 images are taken for captions" in found.summary
    numbers = iter(range(100))
    some = webdataset(
        class_folders, tmp_path / "b", label=lambda name: (".cls", b"\xff" if next(numbers) == 3 else b"1")
    )
    found = open_folder(some)
    assert found.labels is None and "1 of 27 images have no label" in found.summary


def test_classes_are_kept_and_numbers_go_by_text(class_folders, tmp_path):
    (tmp_path / "list").write_text("cat ant")
    archive = zipped(class_folders, tmp_path / "a.zip")
    found = open_dataset(folder_args(archive, "--class_list", tmp_path / "list"))
    assert_same_images(found, open_dataset(folder_args(class_folders, "--class_list", tmp_path / "list")))
    numbers = {"ant": b"10", "bee": b"9", "cat": b"2"}
    found = open_folder(webdataset(class_folders, tmp_path / "w", label=lambda name: (".cls", numbers[name])))
    assert found.classes == ["10", "2", "9"] and np.bincount(found.labels).tolist() == [8, 10, 9]
    found = open_folder(parquet(class_folders, tmp_path / "p", as_numbers=False))
    assert found.classes == ["ant", "bee", "cat"]


def test_arrays_beside_pictures_are_passed_over_as_in_a_folder(class_folders, tmp_path):
    archive = zipped(class_folders, tmp_path / "a.zip")
    with zipfile.ZipFile(archive, "a") as opened:
        opened.writestr("wrapper/ant/embedding.npy", b"?")
    found = open_folder(archive)
    assert len(found) == 27 and "passed over: .npy 1" in found.summary


# The index of tar shards


def test_an_index_is_made_once_and_anew_for_another_or_a_damaged_one(class_folders, tmp_path, monkeypatch):
    folder, expected = tars(class_folders, tmp_path / "tars"), open_folder(class_folders)
    assert "index of 3 shards made, kept beside them" in open_folder(folder).summary
    scanned, scan = [], images.tars.scan
    monkeypatch.setattr(images.tars, "scan", lambda path: scanned.append(os.path.basename(path)) or scan(path))
    found = open_folder(folder)
    assert scanned == [] and "index of" not in found.summary
    assert_same_images(found, expected)
    index = folder / "shard-001.tar.index"
    whole = index.read_bytes()
    for damage in (whole[:-5], whole[:200] + b"?" + whole[201:], b"", b"\xff" * 300, whole + b" "):
        index.write_bytes(damage)
        found = open_folder(folder)
        assert "index of 1 shards made anew, as it was damaged, kept beside them" in found.summary
        assert scanned.pop() == "shard-001.tar" and not scanned and index.read_bytes() == whole
        assert_same_images(found, expected)
    with tarfile.open(folder / "shard-001.tar", "a") as archive:
        add(archive, "dog/1.jpg", b"?")
    found = open_folder(folder)
    assert len(found) == 28 and "index of 1 shards made anew, as the shard has changed" in found.summary


def test_an_index_beside_which_nothing_can_be_written_goes_to_a_cache(class_folders, tmp_path, monkeypatch):
    folder, write_whole = tars(class_folders, tmp_path / "tars"), images.tars.write_whole

    def refusing(path, content):
        if os.path.dirname(path) == str(folder):
            raise PermissionError(13, "Permission denied")
        write_whole(path, content)

    monkeypatch.setattr(images.tars, "write_whole", refusing)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert f"index of 3 shards made, kept in {tmp_path / 'cache' / 'cplearn'}" in open_folder(folder).summary
    assert "index of" not in open_folder(folder).summary
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert "made, not kept" in open_folder(folder).summary


def test_many_make_one_index_at_once(class_folders, tmp_path):
    folder = tars(class_folders, tmp_path / "tars", 2)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            found = list(pool.map(lambda _: open_folder(folder).fingerprint, range(8)))
            assert set(found) == {open_folder(class_folders).fingerprint}
            assert sorted(os.listdir(folder)) == [f"shard-00{n}.tar{end}" for n in range(2) for end in ("", ".index")]
            for path in folder.glob("*.index"):
                path.unlink()


# Damage


@pytest.mark.parametrize("form", ["tars", "parquet", "datasets", "zip", "hdf5"])
def test_a_broken_shard_is_named_and_ends_nothing(class_folders, tmp_path, form):
    folder = FORMS[form](class_folders, tmp_path / "set")
    if folder.is_file():  # one of two
        shutil.copy(folder, folder.with_stem("second"))
        folder = folder.parent
    whole = len(open_folder(folder))
    path = sorted(path for path in folder.rglob("*") if path.suffix in images.shards.KINDS)[0]
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    found = open_folder(folder)
    assert 0 < len(found) < whole and f"shards broken: {path.name}: " in found.summary
    assert all(found.load(i).shape[0] == 3 for i in range(len(found)))


def test_a_bad_member_is_a_bad_image_and_a_shard_that_changes_is_noticed(class_folders, tmp_path, capsys):
    archive = tmp_path / "a.zip"
    with zipfile.ZipFile(archive, "w") as opened:
        for number in range(12):
            opened.writestr(
                f"{number:02}.png", b"?" if number == 5 else class_folders.joinpath("ant/1.jpg").read_bytes()
            )
    args = folder_args(archive, "--max_bad_images", 0.1)
    loader = data.TrainLoader(open_dataset(args), args, 4)
    assert all(5 not in batch.indices for batch in loader.epoch(0))
    assert (
        list(loader.bad_images) == [f"{archive}:05.png"] and "another image takes its place" in capsys.readouterr().out
    )
    found = open_folder(archive)
    os.utime(archive, (1, 1))
    with pytest.raises(BadImage, match="changed since the run began"):
        found.load(0)


def test_shards_of_several_kinds_are_not_one_set(class_folders, tmp_path):
    tars(class_folders, tmp_path / "set")
    zipped(class_folders, tmp_path / "set" / "a.zip")
    with pytest.raises(UserError, match=r"shards of several kinds \(.tar 3, .zip 1\)"):
        open_folder(tmp_path / "set")


def test_files_that_are_no_shards_are_said(class_folders, tmp_path):
    tars(class_folders, tmp_path / "set")
    open_folder(tmp_path / "set")  # makes the indices
    assert "passed over" not in open_folder(tmp_path / "set").summary
    for name in ("shard-003.tar.gz", "shard-004.tgz", "README", ".hidden"):
        (tmp_path / "set" / name).write_bytes(b"")
    assert "passed over beside them: without ending 1, .gz 1, .tgz 1" in open_folder(tmp_path / "set").summary


@pytest.mark.parametrize("form", ["parquet", "arrow"])
def test_columns_that_could_have_been_taken_are_said(class_folders, tmp_path, form):
    table = table_of(class_folders)
    assert "passed over" not in open_folder(write_table(table, tmp_path / f"one.{form}")).summary
    more = table.append_column("fine_label", [[0] * len(table)]).append_column("mask", table.column("image"))
    found = open_folder(write_table(more, tmp_path / f"two.{form}"))
    assert "passed over: column mask 27, column fine_label 27" in found.summary
    assert found.classes == ["ant", "bee", "cat"]


def write_table(table, path):
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(table, path)
    else:
        with pyarrow.ipc.new_file(str(path), table.schema) as file:
            file.write_table(table)
    return path


def test_images_in_a_folder_come_before_shards_beside_them(class_folders, tmp_path):
    """As before shards were read: a folder and the archive that it came out of."""
    shutil.copytree(class_folders, tmp_path / "set")
    zipped(class_folders, tmp_path / "set" / "a.zip")
    found = open_folder(tmp_path / "set")
    assert found.fingerprint == open_folder(class_folders).fingerprint and "passed over: .zip 1" in found.summary
