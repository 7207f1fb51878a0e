"""CIFAR-10 from scratch in few steps of a large batch."""

import keras

from stability import arms
from stability import images


class CifarLargeBatch(images.FromScratch):
    """4,096 rows of CIFAR-10 (JPEG copy) in batches of 512.

    Args:
        rows: Int, of a run.
        sizes: Ints: rows to draw from, held out, and to test on.
        epochs: Int.
        batch_size: Int; divides `rows`.
    """

    name = "cifar_large_batch"
    arms = (*arms.COMMON, *arms.LARGE_BATCH)
    rates = (0.03, 0.1, 0.3, 1.0)
    shape = (32, 32, 3)
    widths = (8, 16, 32)

    def __init__(
        self,
        rows=4096,
        sizes=(9000, 1000, 3000),
        epochs=8,
        batch_size=512,
    ):
        super().__init__()
        self.rows, self.sizes, self.epochs = rows, sizes, epochs
        self.batch_size = batch_size
        self.title = f"CIFAR-10, {rows:,} rows, batch {batch_size}"

    def prepare(self, data, cache):
        images.prepare_cifar10(self, data, cache)

    def make_base(self, rate):
        return keras.optimizers.SGD(rate, momentum=0.9)
