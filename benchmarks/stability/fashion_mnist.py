"""Fashion-MNIST from scratch: a small network with batch norm."""

import keras

from stability import arms
from stability import images


class FashionMnist(images.FromScratch):
    """2,000 rows of Fashion-MNIST, drawn anew for each seed.

    Args:
        rows: Int, of a run.
        sizes: Ints: rows to draw from, held out, and to test on.
        epochs: Int.
    """

    name = "fashion_mnist"
    arms = arms.COMMON
    rates = (1e-3, 3e-3, 1e-2, 3e-2)
    shape = (28, 28, 1)
    batch_size = 40

    def __init__(self, rows=2000, sizes=(8000, 1000, 4000), epochs=4):
        super().__init__()
        self.rows, self.sizes, self.epochs = rows, sizes, epochs
        self.title = f"Fashion-MNIST, {rows:,} rows, from scratch"

    def prepare(self, data, cache):
        if data is None:
            parts = images.made_up(self.shape, self.sizes)
        else:
            parts = images.read_fashion_mnist(data, self.sizes)
        for part, arrays in parts.items():
            setattr(self, part, arrays)

    def make_base(self, rate):
        return keras.optimizers.Adam(rate)
