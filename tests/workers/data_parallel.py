"""Trains every row of the contract table on two devices; writes weights.

python data_parallel.py FILE    XLA_FLAGS sets the number of devices
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import conftest  # noqa: F401,I001  (imports torch before the backend)
import keras
import numpy as np

import contract
from test_contract import DEVICE_BATCHES
from test_contract import linear_model
from test_contract import regression


def main(path):
    assert len(keras.distribution.list_devices()) == 2
    results = {}
    with keras.distribution.DataParallel().scope():
        for row in contract.ROWS:
            if row.nested:
                continue
            batches, kernel, bias = regression(DEVICE_BATCHES)
            model = linear_model(
                row.build(keras.optimizers.SGD(0.1)), kernel, bias
            )
            for batch in batches:
                model.train_on_batch(*[a.astype("float32") for a in batch])
            sharding = model.trainable_variables[0].value.sharding
            assert len(sharding.device_set) == 2
            for i, weights in enumerate(model.get_weights()):
                results[f"{row.name}/{i}"] = weights
    np.savez(path, **results)


if __name__ == "__main__":
    main(*sys.argv[1:])
