"""What the tests of shards share: the images of a folder of class folders, written in every other form."""

import io
import json
import os
import tarfile
import zipfile
from pathlib import Path

import numpy as np


def files_of(root):
    """[(name relative to root, class, content)], in no order of their own."""
    paths = sorted(path for path in Path(root).rglob("*") if path.is_file())
    paths = paths[1::2] + paths[::2]
    return [(str(path.relative_to(root)), path.relative_to(root).parts[0], path.read_bytes()) for path in paths]


def add(archive, name, content, **fields):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    for field, value in fields.items():
        setattr(member, field, value)
    archive.addfile(member, io.BytesIO(content))


def tars(root, out, count=3):
    """Class folders in tar files."""
    out.mkdir(parents=True)
    files = files_of(root)
    for number in range(count):
        with tarfile.open(out / f"shard-{number:03}.tar", "w") as archive:
            for name, _, content in files[number::count]:
                add(archive, f"./{name}", content)
    return out


def webdataset(root, out, count=3, label=lambda name: (".cls", name.encode())):
    """Images under numbers in the order of the folder, each with a file of its label."""
    out.mkdir(parents=True)
    files = files_of(root)
    key_of = {name: f"{number:06}" for number, name in enumerate(sorted(name for name, _, _ in files))}
    for number in range(count):
        with tarfile.open(out / f"train-{number:03}.tar", "w") as archive:
            for name, class_name, content in files[number::count]:
                ending, text = label(class_name)
                add(archive, key_of[name] + ending, text)
                add(archive, key_of[name] + os.path.splitext(name)[1], content)
    return out


def zipped(root, out, compression=zipfile.ZIP_DEFLATED):
    out.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(out, "w", compression) as archive:
        for name, _, content in files_of(root):
            archive.writestr(f"wrapper/{name}", content)
    return out


def table_of(root, as_numbers=True):
    """A table in Hugging Face's layout."""
    import pyarrow as pa

    files = files_of(root)
    classes = sorted({class_name for _, class_name, _ in files}, reverse=True)  # in another order than by name
    images = [{"bytes": content, "path": os.path.basename(name)} for name, _, content in files]
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    labels = [classes.index(name) if as_numbers else name for _, name, _ in files]
    feature = {"names": classes, "_type": "ClassLabel"}
    described = json.dumps({"info": {"features": {"image": {"_type": "Image"}, "label": feature}}})
    table = pa.table({"number": list(range(len(files))), "image": pa.array(images, struct), "label": labels})
    return table.replace_schema_metadata({b"huggingface": described.encode()}) if as_numbers else table


def parquet(root, out, rows=4, as_numbers=True):
    import pyarrow.parquet as pq

    (out / "data").mkdir(parents=True)
    table = table_of(root, as_numbers)
    half = len(table) * 2 // 5
    for number, part in enumerate((table.slice(0, half), table.slice(half))):
        pq.write_table(part, out / "data" / f"train-0000{number}-of-00002.parquet", row_group_size=rows)
    return out


def saved(root, out):
    import datasets

    data = datasets.Dataset(table_of(root))
    data.save_to_disk(out, num_shards=2)
    return out


def hdf5(root, out):
    import h5py

    files = files_of(root)
    classes = sorted({class_name for _, class_name, _ in files})
    out.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(out, "w") as file:
        encoded = file.create_dataset("images", len(files), h5py.vlen_dtype(np.uint8))
        for row, (_, _, content) in enumerate(files):
            encoded[row] = np.frombuffer(content, np.uint8)
        file["labels"] = [classes.index(class_name) for _, class_name, _ in files]
        file["names"] = [os.path.basename(name) for name, _, _ in files]
        file["classes"] = classes
    return out


FORMS = {
    "tars": lambda root, out: tars(root, out / "tars"),
    "webdataset": lambda root, out: webdataset(root, out / "wds"),
    "zip": lambda root, out: zipped(root, out / "images.zip"),
    "stored zip": lambda root, out: zipped(root, out / "stored.zip", zipfile.ZIP_STORED),
    "parquet": lambda root, out: parquet(root, out / "parquet"),
    "datasets": lambda root, out: saved(root, out / "saved"),
    "hdf5": lambda root, out: hdf5(root, out / "images.h5"),
}
