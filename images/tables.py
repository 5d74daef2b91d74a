"""Tables of images: Parquet files, and the Arrow files of Hugging Face's data sets saved on disk.

The image column is binary, or Hugging Face's {bytes, path}; a label column holds numbers or names. Parquet is read row
group by row group in batches of a few rows, Arrow is mapped into memory: neither is ever in memory as a whole.
"""

import json
import os
from collections import Counter

from images.listing import LARGEST, LONGEST_NAME, Broken, Listing, clean, label_text

# the first that is there; another name does where its type says what it is
IMAGE_COLUMNS = ("image", "img", "images", "jpg", "jpeg", "png", "webp", "image_bytes", "bytes", "content", "data")
LABEL_COLUMNS = ("label", "labels", "cls", "class", "class_name", "target", "fine_label", "y")
BATCH_ROWS = 16
LARGEST_PAGE = 2**30  # bytes of a row group's or record batch's images


def pyarrow():
    import pyarrow.ipc
    import pyarrow.parquet

    return pyarrow


class Columns:
    """Which columns of a schema are the images and their labels.

    image: name.  leaf: the path of the bytes in it.  names: the path of their file names, or None.  label: name or
    None.  classes: names of the numbers in it, where Hugging Face's description has them.  passed_over: columns that
    could have been the image or the label too, and those called as labels are, of values that are no classes.
    """

    def __init__(self, schema):
        types = pyarrow().types
        kinds = {field.name: kind_of_column(types, field.type) for field in schema}
        images = [name for name, kind in kinds.items() if kind in ("bytes", "struct")]
        named = [name for name in IMAGE_COLUMNS if name in images]
        structs = [name for name in images if kinds[name] == "struct"]
        if not images or (not named and not structs and len(images) > 1):
            there = ", ".join(f"{field.name} ({field.type})" for field in list(schema)[:8]) or "none"
            raise Broken(f"its columns are {there}; expected images as binary, or as bytes and path, in a column image")
        self.image = (named or structs or images)[0]
        self.is_struct = kinds[self.image] == "struct"
        self.leaf = f"{self.image}.bytes" if self.is_struct else self.image
        self.names = f"{self.image}.path" if self.is_struct and has_path(types, schema.field(self.image).type) else None
        labels = [name for name in LABEL_COLUMNS if kinds.get(name) == "label"]
        self.label = labels[0] if labels else None
        others = [f"{name} of type {schema.field(name).type}" for name in LABEL_COLUMNS if kinds.get(name, "") is None]
        self.passed_over = [name for name in images if name != self.image] + labels[1:] + others
        self.classes = class_names(schema.metadata, self.label)

    def listing(self, num_rows):
        """An empty Listing, which says what is passed over of so many rows."""
        return Listing(width=2, passed=Counter({f"column {name}": num_rows for name in self.passed_over}))

    def leaves(self):
        return [column for column in (self.names, self.label) if column]

    def names_and_labels(self, table, stem, start):
        """(names, labels) of the rows of a table with `leaves`; rows are counted from `start` where they have none."""
        names = labels = [None] * len(table)
        if self.names:
            names = of_each_value(name_of, paths_of(table.column(self.image)))
        if self.label:
            labels = of_each_value(self.label_of, table.column(self.label))
        counted = [f"{stem}-{start + row:012d}".encode() for row in range(len(table))]
        return [name or number for name, number in zip(names, counted, strict=True)], labels

    def label_of(self, value):
        if self.classes and type(value) is int:
            value = self.classes[value] if 0 <= value < len(self.classes) else None
        return label_text(value)


def name_of(text):
    """None for one that is none, or too long to stand in every row."""
    name = clean(os.fsencode(text))
    return name if name and len(name) <= LONGEST_NAME else None


def of_each_value(function, column):
    """[function(value) or None] of each row of a chunked column, each different value once: a text that stands in many
    rows may be long, and stands once in the file."""
    found = []
    for chunk in column.chunks:
        encoded = chunk if pyarrow().types.is_dictionary(chunk.type) else chunk.dictionary_encode()
        values = [None if value is None else function(value) for value in encoded.dictionary.to_pylist()]
        found += [None if index is None else values[index] for index in encoded.indices.to_pylist()]
    return found


def kind_of_column(types, type_):
    if types.is_binary(type_) or types.is_large_binary(type_):
        return "bytes"
    if types.is_struct(type_) and type_.get_field_index("bytes") >= 0:
        inner = type_.field("bytes").type
        return "struct" if types.is_binary(inner) or types.is_large_binary(inner) else None
    text = types.is_string(type_) or types.is_large_string(type_) or types.is_dictionary(type_)
    return "label" if types.is_integer(type_) or text else None


def has_path(types, type_):
    return type_.get_field_index("path") >= 0 and types.is_string(type_.field("path").type)


def class_names(metadata, label):
    """Of Hugging Face's ClassLabel, which stands beside the columns as JSON; None where there is none."""
    try:
        feature = json.loads((metadata or {})[b"huggingface"])["info"]["features"][label]
        names = feature["names"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return None
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else None


def paths_of(column):
    """The field `path` of a chunked struct column."""
    chunks = [chunk.field("path") for chunk in column.chunks]
    return pyarrow().chunked_array(chunks, pyarrow().string() if not chunks else chunks[0].type)


def cell(column, is_struct, row):
    value = (column.field("bytes") if is_struct else column)[row]
    if not value.is_valid:
        raise Broken("the row holds no bytes of an image")
    return value.as_py()


def stem_of(path):
    return os.path.splitext(os.path.basename(path))[0]


class Parquet:
    """place: row group, row in it."""

    has_folders, size_column = False, None

    def __init__(self, path):
        parquet = pyarrow().parquet
        with parquet.ParquetFile(path, memory_map=True) as opened:
            metadata, self.columns = opened.metadata, Columns(opened.schema_arrow)
        once = self.columns.leaves()  # a text that stands in many rows is then in memory as often as it is in the file
        self.file = parquet.ParquetFile(path, memory_map=True, metadata=metadata, read_dictionary=once)
        self.group, self.start, self.batch = None, 0, None

    def read(self, place):
        """Rows of a group come in batches: a row behind the last one is reached by going on, another from the start."""
        group, row = map(int, place)
        if group != self.group or row < self.start:
            self.batches = self.file.iter_batches(
                BATCH_ROWS, row_groups=[group], columns=[self.columns.leaf], use_threads=False
            )
            self.group, self.start, self.batch = group, 0, next(self.batches)
        while row >= self.start + len(self.batch):
            self.start += len(self.batch)
            self.batch = next(self.batches)
        return cell(self.batch.column(0), self.columns.is_struct, row - self.start)

    def close(self):
        self.file.close()

    @staticmethod
    def look(path):
        shard = Parquet(path)
        metadata, columns = shard.file.metadata, shard.columns
        check_count(metadata.num_rows, path)
        listing = columns.listing(metadata.num_rows)
        done = 0
        for group in range(metadata.num_row_groups):
            rows = metadata.row_group(group).num_rows
            sizes = [column_bytes(metadata.row_group(group), leaf) for leaf in (columns.leaf, *columns.leaves())]
            if max(sizes) > LARGEST_PAGE or max(sizes[1:], default=0) > LARGEST:
                listing.passed[f"in row groups of more than {LARGEST_PAGE} bytes: write smaller ones"] += rows
                done += rows
                continue
            names, labels = [f"{stem_of(path)}-{done + row:012d}".encode() for row in range(rows)], [None] * rows
            if columns.leaves():
                table = shard.file.read_row_group(group, columns=columns.leaves(), use_threads=False)
                names, labels = columns.names_and_labels(table, stem_of(path), done)
            for row, (name, label) in enumerate(zip(names, labels, strict=True)):
                listing.add(name, (group, row), label)
            done += rows
        shard.close()
        return listing, ""


def column_bytes(group, leaf):
    chunks = [group.column(number) for number in range(group.num_columns)]
    return sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema == leaf)


def check_count(count, path):
    if count > os.path.getsize(path):
        raise Broken(f"says that it holds {count} rows in {os.path.getsize(path)} bytes")


class Arrow:
    """place: record batch, row in it."""

    has_folders, size_column = False, None

    def __init__(self, path):
        ipc, self.map = pyarrow().ipc, pyarrow().memory_map(path)
        if self.map.read(6) == b"ARROW1":
            reader = ipc.open_file(self.map)
            self.batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
        else:
            self.map.seek(0)
            reader = ipc.open_stream(self.map)
            self.batches = list(reader)
        self.columns = Columns(reader.schema)

    def read(self, place):
        batch, row = map(int, place)
        column = self.batches[batch].column(self.columns.image)
        return cell(column, self.columns.is_struct, row)

    def close(self):
        self.batches = []
        self.map.close()

    @staticmethod
    def look(path):
        shard, done = Arrow(path), 0
        num_rows = sum(map(len, shard.batches))
        check_count(num_rows, path)
        listing = shard.columns.listing(num_rows)
        for number, batch in enumerate(shard.batches):
            batch.validate(full=True)  # that lengths inside lead to no place outside
            table = pyarrow().Table.from_batches([batch])
            names, labels = shard.columns.names_and_labels(table, stem_of(path), done)
            for row, (name, label) in enumerate(zip(names, labels, strict=True)):
                listing.add(name, (number, row), label)
            done += len(batch)
        shard.close()
        return listing, ""
