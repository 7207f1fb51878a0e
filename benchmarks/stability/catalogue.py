"""All tasks by name."""

import functools

from stability.cifar_large_batch import CifarLargeBatch
from stability.fashion_mnist import FashionMnist
from stability.text_classification import TextClassification

WRONG = 0.25
TASKS = {
    f"{data}_{rows}{'_wrong' if wrong else ''}": functools.partial(
        TextClassification, data, rows, wrong
    )
    for wrong in (0.0, WRONG)
    for rows in (64, 256)
    for data in ("sst2", "mrpc", "rte")
} | {
    "fashion_mnist": FashionMnist,
    "cifar_large_batch": CifarLargeBatch,
}
