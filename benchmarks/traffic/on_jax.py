"""JAX: reads the program that is compiled for a step under `DataParallel`."""

import jax
import keras

from traffic import cases
from traffic.compiled_program import Program


def measure(model, arm):
    """Bytes, memory and rows of one step of one model, on one device."""
    distribution = keras.distribution.DataParallel()
    with distribution.scope():
        network = cases.make_model(model, arm)
        batch = cases.make_data(model)
        network.train_on_batch(*batch)
        program, memory = compiled_step(network, batch, distribution)
    weights = cases.number_of_weights(network)
    return {
        **cases.summary(weights, program.collectives()),
        "memory": memory / (4 * weights),
        "rows": program.rows_of_products(*model.layer) / model.products,
    }


def compiled_step(network, batch, distribution):
    """The step as `fit` compiles it: its program and temporary memory."""
    state = tuple(
        [variable.value for variable in variables]
        for variables in (
            network.trainable_variables,
            network.non_trainable_variables,
            network.optimizer.variables,
            network.metrics_variables,
        )
    )
    data = tuple(
        jax.device_put(
            part, distribution.get_data_layout(part.shape).backend_layout
        )
        for part in batch
    )
    shardings = jax.tree.map(lambda value: value.sharding, state)
    step = jax.jit(
        network.train_step,
        donate_argnums=0,
        out_shardings=(None, shardings),
    )
    compiled = step.lower(state, data).compile()
    memory = compiled.memory_analysis().temp_size_in_bytes
    return Program(compiled.as_text()), memory
