"""All tasks by name."""

import functools

from stability.digits import Digits
from stability.text_classification import TextClassification

WRONG = 0.25
TASKS = {"digits_wrong": Digits} | {
    f"{data}_{rows}{'_wrong' if wrong else ''}": functools.partial(
        TextClassification, data, rows, wrong
    )
    for wrong in (0.0, WRONG)
    for rows in (64, 256)
    for data in ("sst2", "mrpc", "rte")
}
