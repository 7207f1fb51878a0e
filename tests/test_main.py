"""`python -m keras_stab`."""

import keras
import pytest

import keras_stab
from keras_stab import __main__ as command


def test_lists_versions_devices_and_every_method(capsys):
    assert command.main(["--no-check"]) == 0
    printed = capsys.readouterr().out
    backend = keras.backend.backend()
    for words in (keras_stab.__version__, keras.version(), backend, "cpu"):
        assert words in printed.lower()
    for name in ("GRAIN", "LARS", "SAM", "ScheduleFree", "WeightAveraging"):
        assert name in command.methods()
        assert name in printed
    assert "conflicts with no group." in " ".join(printed.split())


def test_a_step_of_a_method(capsys):
    # One that cannot be made without arguments.
    assert command.main(["--only", "TVLARS"]) == 0
    printed = capsys.readouterr().out
    lines = [line.split() for line in printed.split("\n")]
    assert sum(line[-1:] == ["ok"] for line in lines) == 1


@pytest.mark.slow
def test_a_step_of_every_method():
    for name, method in command.methods().items():
        assert command.check(method) is None, name


def test_a_broken_method_shows(capsys, monkeypatch):
    class Still(keras.optimizers.SGD):
        """Does not move."""

        def update_step(self, gradient, variable, learning_rate):
            pass

    class Needy(keras.optimizers.SGD):
        """Needs more than there is."""

        def __init__(self, more):
            super().__init__()

    for kind in (Still, Needy):
        monkeypatch.setattr(keras_stab, kind.__name__, kind, raising=False)
    assert command.main(["--only", "Still", "Needy"]) == 1
    printed = " ".join(capsys.readouterr().out.split())
    assert "Still failed: the weights did not move" in printed
    assert "Needy failed: TypeError" in printed
    assert "Needs more than there is." in printed
    with pytest.raises(SystemExit):
        command.main(["--only", "Nothing"])
