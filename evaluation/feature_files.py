"""Features of many images in files, written block by block, so that a run that was killed goes on where it was.

    folder = NpyFiles(path, columns, images, block_size)        # columns: {"cls": ((384,), float32), ...}
    make_or_check(folder, meaning)                              # by one process
    for block in folder.todo():
        folder.write(block, {"cls": array})             # by any process; blocks come in any order
    folder.finish()                                     # by one, once all have written
    for first, rows in folder.read("cls"): ...

    features/meaning.json       all that the features depend on: another run's folder is told by it, and left alone
    features/cls.npy            (N, ...), which np.load(..., mmap_mode="r") maps; names.txt has a line per row
    features/features.parquet/  or instead of them: parts with a column each, and the name, which are read as one table

Until all is there, files end in .part, and the file `done` has a byte per block. Rows are written in place, not through
a map, whose pages would count as memory. N: images.
"""

import json
import os

import numpy as np

from running.files import new_folder
from utils import UserError

READ_BYTES = 2**26  # that `read` holds at a time


def make_or_check(folder, meaning):
    """Makes a `FeatureFolder`'s files where there are none. Raises UserError where another run's are there."""
    meaning = json.loads(json.dumps(meaning))  # as it reads from a file
    try:
        if not folder.path.exists() or not any(folder.path.iterdir()):
            make(folder, meaning)
        else:
            check_is_same(folder.path, meaning)
            folder.check()
    except OSError as error:
        raise UserError(f"--output_dir {folder.path}: cannot be written: {error.strerror or error}") from error


def make(folder, meaning):
    """Beside its place, then renamed: a folder that is there has all its files."""
    final = folder.path
    try:
        with new_folder(final) as folder.path:
            folder.make_files()
            (folder.path / "done").write_bytes(bytes(folder.num_blocks))
            (folder.path / "meaning.json").write_text(json.dumps(meaning, indent=2) + "\n")
    finally:
        folder.path = final


def check_is_same(path, meaning):
    try:
        found = json.loads((path / "meaning.json").read_text())
        differ = [key for key in meaning.keys() | found.keys() if meaning.get(key) != found.get(key)]
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(
            f"--output_dir {path}: holds something else than features of extract_features.py ({error}); nothing is "
            "overwritten, name another"
        ) from error
    if differ:
        raise UserError(
            f"--output_dir {path}: holds another run's features, which differ in {', '.join(sorted(differ))} (see its "
            "meaning.json); nothing is overwritten, name another or remove it"
        )


class FeatureFolder:
    """What both formats share. columns: {name: (shape of an image's, dtype)}.  block_size: images that are written at
    once."""

    def __init__(self, path, columns, images, block_size):
        self.path, self.columns, self.images, self.block_size = path, columns, images, block_size
        self.num_blocks = -(-len(images) // block_size)

    @property
    def is_finished(self):
        return not (self.path / "done").exists()

    def todo(self):
        """Numbers of the blocks that are not written."""
        if self.is_finished:
            return np.zeros(0, np.int64)
        return np.flatnonzero(np.frombuffer((self.path / "done").read_bytes(), np.uint8) == 0)

    def rows_of(self, block):
        return range(block * self.block_size, min((block + 1) * self.block_size, len(self.images)))

    def write(self, block, arrays):
        """A block's rows, on disk before the block counts as done."""
        try:
            self.write_rows(self.rows_of(block), arrays)
            write_at(self.path / "done", block, b"\1")
        except OSError as error:
            raise UserError(f"--output_dir {self.path}: cannot be written: {error.strerror or error}") from error

    def finish(self):
        """The files take their names; what a process that was killed had begun is removed."""
        for left in self.path.glob("*/.*.tmp"):
            left.unlink()
        for part in self.path.glob("*.part"):
            os.replace(part, part.with_suffix(""))
        (self.path / "done").unlink(missing_ok=True)

    def damaged(self, why):
        return UserError(f"--output_dir {self.path}: damaged ({why}); remove the folder, it is made anew")


class NpyFiles(FeatureFolder):
    """A file for each column."""

    def place(self, name):
        """The column's file, whole or not yet."""
        part = self.path / f"{name}.npy.part"
        return part if part.exists() else self.path / f"{name}.npy"

    def make_files(self):
        for name, (shape, dtype) in self.columns.items():
            shape = (len(self.images), *shape)
            header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
            with open(self.path / f"{name}.npy.part", "wb") as file:
                np.lib.format.write_array_header_1_0(file, header)
                file.truncate(file.tell() + np.dtype(dtype).itemsize * int(np.prod(shape)))
        with open(self.path / "names.txt", "w", encoding="utf-8") as file:
            file.writelines(f"{one_line_name(self.images.name(i))}\n" for i in range(len(self.images)))

    def check(self):
        """Raises UserError where a file is not what this run would have made."""
        for name, (shape, dtype) in self.columns.items():
            try:
                found = np.load(self.place(name), mmap_mode="r")
                is_own = (found.shape, found.dtype) == ((len(self.images), *shape), np.dtype(dtype))
            except (OSError, ValueError, EOFError) as error:
                raise self.damaged(error) from error
            if not is_own:
                raise self.damaged(f"{name}.npy is {found.dtype} {found.shape}")

    def write_rows(self, rows, arrays):
        for name, array in arrays.items():
            array = np.ascontiguousarray(array, self.columns[name][1])
            write_at(self.place(name), self._offset(name, rows[0]), array.tobytes())

    def read(self, name):
        """Yields (first row, rows) of a column, in order."""
        shape, dtype = self.columns[name]
        per_row = np.dtype(dtype).itemsize * int(np.prod(shape))
        step = max(1, READ_BYTES // per_row)
        with open(self.place(name), "rb") as file:
            file.seek(self._offset(name, 0))
            for first in range(0, len(self.images), step):
                number = min(step, len(self.images) - first)
                yield first, np.frombuffer(file.read(number * per_row), dtype).reshape(number, *shape)

    def _offset(self, name, row):
        shape, dtype = self.columns[name]
        return np.load(self.place(name), mmap_mode="r").offset + row * np.dtype(dtype).itemsize * int(np.prod(shape))


class ParquetParts(FeatureFolder):
    """A file for each block, in a folder that pyarrow, pandas and DuckDB read as one table."""

    @property
    def place(self):
        part = self.path / "features.parquet.part"
        return part if part.exists() else self.path / "features.parquet"

    def make_files(self):
        (self.path / "features.parquet.part").mkdir()

    def check(self):
        done = set(range(self.num_blocks)) - set(self.todo().tolist())
        missing = [block for block in sorted(done) if not self._file(block).exists()]
        if missing:
            raise self.damaged(f"{self._file(missing[0]).name} is missing")

    def write_rows(self, rows, arrays):
        import pyarrow  # here: .npy files need it not
        import pyarrow.parquet

        columns = {"name": pyarrow.array([self.images.name(row) for row in rows])}
        columns |= {name: as_column(array, pyarrow) for name, array in arrays.items()}
        file = self._file(rows[0] // self.block_size)
        aside = file.with_name(f".{file.name}.tmp")
        with open(aside, "wb") as stream:
            pyarrow.parquet.write_table(pyarrow.table(columns), stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(aside, file)

    def read(self, name):
        """Yields (first row, rows) of a column, in order."""
        import pyarrow.parquet

        shape, dtype = self.columns[name]
        for block in range(self.num_blocks):
            rows = self.rows_of(block)
            column = pyarrow.parquet.read_table(self._file(block), columns=[name])[name].combine_chunks()
            while hasattr(column, "flatten") and hasattr(column.type, "list_size"):
                column = column.flatten()
            yield rows[0], column.to_numpy().astype(dtype).reshape(len(rows), *shape)

    def _file(self, block):
        return self.place / f"part-{block:08d}.parquet"


FORMATS = {"npy": NpyFiles, "parquet": ParquetParts}


def as_column(array, pyarrow):
    """(n, a, b) -> n lists of a lists of b numbers."""
    column = pyarrow.array(array.reshape(-1))
    for length in array.shape[:0:-1]:
        column = pyarrow.FixedSizeListArray.from_arrays(column, length)
    return column


def write_at(path, offset, content):
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def one_line_name(name):
    return name.replace("\n", "\\n").replace("\r", "\\r")
