"""All tasks by name."""

import functools

from stability.cifar_large_batch import CifarLargeBatch
from stability.digits import Digits
from stability.fashion_mnist import FashionMnist
from stability.text_classification import TextClassification

WRONG = 0.25
TEXTS = {
    f"{data}_{rows}{'_wrong' if wrong else ''}": functools.partial(
        TextClassification, data, rows, wrong
    )
    for data in ("sst2", "mrpc", "rte")
    for rows in (64, 256)
    for wrong in (0.0, WRONG)
}
TASKS = {
    **TEXTS,
    "fashion_mnist": FashionMnist,
    "cifar_large_batch": CifarLargeBatch,
    "digits_wrong": Digits,
}
