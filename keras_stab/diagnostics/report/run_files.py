"""The runs of a report on disk: one file per run, whole or not at all."""

import hashlib
import json
import math
import os
import pathlib
import re

NOTHING = type(None)
# What a record holds, and the kind of each.
PARTS = {
    "arm": str,
    "seeds": list,
    "configuration": dict,
    "metrics": dict,
    "curves": dict,
    "predictions": (list, NOTHING),
    "targets": (list, NOTHING),
    "failure": (str, NOTHING),
    "seconds": (int, float),
}


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
            ValueError: If the file is damaged or holds another run, or if the
                run was made with another configuration than the `expected`
                one.
        """
        path = self.path(arm, seeds)
        if not path.is_file():
            return None
        record = _load(path, arm, seeds)
        held = (record["arm"], tuple(record["seeds"]))
        if held != (arm, tuple(seeds)):
            raise ValueError(
                f"{path} should hold the run of arm {arm!r} with seeds "
                f"{tuple(seeds)}. {_remedy(arm, seeds)}. Received: a run of "
                f"arm {held[0]!r} with seeds {held[1]}"
            )
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


def _load(path, arm, seeds):
    try:
        record = json.loads(
            path.read_text(encoding="utf-8"), parse_constant=float
        )
        reason = _damage(record)
    except ValueError as error:  # no JSON, or no text at all
        reason = str(error)
    if reason is not None:
        raise ValueError(f"{path} is damaged: {reason}. {_remedy(arm, seeds)}")
    return record


def _remedy(arm, seeds):
    return (
        f"Remove this file, and the run of arm {arm!r} with seeds "
        f"{tuple(seeds)} is trained again"
    )


def _damage(record):
    """What is wrong with a record, or `None`."""
    if not isinstance(record, dict):
        return f"it holds a {type(record).__name__} instead of a dict"
    for name, kind in PARTS.items():
        if name not in record:
            return f"it has no {name!r}"
        if not isinstance(record[name], kind):
            return f"{name!r} is {record[name]!r}"
    for name, value in record["metrics"].items():
        if not isinstance(value, (int, float)):
            return f"the metric {name!r} is {value!r}"
    if record["failure"] is None and not record["metrics"]:
        return "it has no score"
    return None


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
    write_atomically(path, json.dumps(record) + "\n")


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
