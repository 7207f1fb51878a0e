"""The variables of layers, by name."""

import keras

from keras_stab import keras_internals


def variables_of_layers(model, layers, variables):
    """The variables of each layer that was asked for, by its name."""
    if layers is None:
        return {}
    known = keras_internals.all_layers(model)
    wanted = {id(v) for v in variables}
    if isinstance(layers, str) and layers == "all":
        return _with_own_weights(known, wanted)
    if isinstance(layers, (str, keras.Layer)):
        layers = [layers]
    if not isinstance(layers, (list, tuple)):
        raise ValueError(
            '`layers` must be "all", or a list of layers or of their names. '
            f"Received: layers={layers!r}"
        )
    found = {}
    for layer in layers:
        chosen = [
            each
            for each in known
            if each is layer or layer in (each.name, each.path)
        ]
        if not chosen:
            names = ", ".join(each.name for each in known)
            raise ValueError(
                "The model has no such layer. Received: layer "
                f"{getattr(layer, 'name', layer)!r}; its layers are {names}"
            )
        own = {id(v): v for each in chosen for v in each.trainable_variables}
        own = [v for v in own.values() if id(v) in wanted]
        if not own:
            raise ValueError(
                "The layer has no trainable weights. Received: layer "
                f"{chosen[0].name!r}"
            )
        found[getattr(layer, "name", layer)] = own
    return found


def _with_own_weights(known, wanted):
    """Every variable with the smallest layer that holds it."""
    names = [layer.name for layer in known]
    taken, found = set(), {}
    for layer in sorted(known, key=_count):
        own = [v for v in layer.trainable_variables if id(v) not in taken]
        own = [v for v in own if id(v) in wanted]
        taken.update(map(id, own))
        if own:
            twice = names.count(layer.name) > 1
            found[layer.path if twice else layer.name] = own
    order = [layer.path for layer in known] + names
    return dict(sorted(found.items(), key=lambda item: order.index(item[0])))


def _count(layer):
    return len(layer.trainable_variables)
