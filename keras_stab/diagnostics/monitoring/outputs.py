"""Where the monitor writes its figures: CSV files and TensorBoard."""

import csv
import pathlib

import keras

from keras_stab.diagnostics.extras import extra
from keras_stab.object_arguments import checked_path


class CsvRows:
    """A CSV file with one row per sample, complete after each.

    Args:
        path: Path of the file. An existing file is replaced.
    """

    def __init__(self, path):
        self._path = pathlib.Path(checked_path("csv", path))
        if self._path.is_dir() or not self._path.parent.is_dir():
            raise ValueError(
                "`csv` must be the path of a file in a folder that exists. "
                f"Received: csv={str(path)!r}"
            )
        self._columns = []

    def write(self, row):
        """Adds a row, a dict; a new name becomes a new column."""
        new = [name for name in row if name not in self._columns]
        rows = [row]
        if new:
            if self._columns:
                with self._path.open(newline="") as file:
                    rows = [*csv.DictReader(file), row]
            self._columns += new
        with self._path.open("w" if new else "a", newline="") as file:
            writer = csv.DictWriter(file, self._columns)
            if new:
                writer.writeheader()
            writer.writerows(rows)


class TensorBoardScalars:
    """Scalars for TensorBoard, written by the package `tensorboard`.

    Args:
        target: A folder, or a `keras.callbacks.TensorBoard`: the scalars then
            appear beside its training curves.
    """

    def __init__(self, target):
        if isinstance(target, keras.callbacks.TensorBoard):
            folder = pathlib.Path(target.log_dir) / "train"
        else:
            folder = checked_path("tensorboard", target)
        summary = extra(
            "tensorboard.summary",
            "`StabilityMonitor(tensorboard=...)`",
            "diagnostics",
        )
        self._writer = summary.Writer(str(folder))

    def write(self, row):
        """Adds a sample, a dict with `step`."""
        for name, value in row.items():
            if name not in ("step", "epoch"):
                self._writer.add_scalar(name, value, row["step"])
        self._writer.flush()
