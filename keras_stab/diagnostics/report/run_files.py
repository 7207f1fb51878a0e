"""The runs of a report on disk: one file per run, whole or not at all."""

import hashlib
import json
import math
import os
import pathlib
import re


class RunFiles:
    """Finished runs in a folder.

    Args:
        folder: Path of the report; runs are in `runs` below it.
    """

    def __init__(self, folder):
        self.folder = pathlib.Path(folder) / "runs"
        self.folder.mkdir(parents=True, exist_ok=True)

    def path(self, arm, seeds):
        readable = re.sub(r"\W+", "_", arm).strip("_")[:40]
        # Names may differ in what a file's name cannot hold.
        digest = hashlib.sha256(arm.encode()).hexdigest()[:6]
        return self.folder / (
            f"{readable}-{digest}-{seeds.initialisation}-{seeds.order}.json"
        )

    def read(self, arm, seeds, expected):
        """The record of a run, or `None` if there is none.

        Raises:
            ValueError: If it was made with another configuration than the
                `expected` one.
        """
        path = self.path(arm, seeds)
        if not path.is_file():
            return None
        record = json.loads(path.read_text(), parse_constant=float)
        changed = [
            f"  {key}: {was!r} then, {now!r} now"
            for key, was, now in _differences(record["configuration"], expected)
        ]
        if changed:
            raise ValueError(
                f"{path} holds a run of arm {arm!r} with another "
                "configuration:\n"
                + "\n".join(changed)
                + "\nRuns of different configurations cannot stand in one "
                "report. Choose another `folder`, delete that one to start "
                "again, or go back to the old settings."
            )
        return record


def write_atomically(path, text):
    """Writes a whole file or none."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_record(path, record):
    write_atomically(path, json.dumps(record))


def without_nan(value):
    """The same with `None` for NaN and infinity, which JSON cannot hold."""
    if isinstance(value, dict):
        return {key: without_nan(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _differences(was, now, prefix=""):
    """Triples of path, old and new value where two dicts differ."""
    for key in sorted({*was, *now}):
        a, b = was.get(key), now.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            yield from _differences(a, b, f"{prefix}{key}.")
        elif a != b:
            yield f"{prefix}{key}", a, b
