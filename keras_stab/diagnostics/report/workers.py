"""Performs tasks in processes of their own, any of which may be killed."""

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import sys
import traceback

import keras

from keras_stab.backend import devices
from keras_stab.diagnostics.report.one_run import perform
from keras_stab.diagnostics.report.run_files import write_record

UNSENDABLE = (
    "{what} cannot be sent to another process: {why}. Use a function at the "
    "top level of a file that can be imported (or a `functools.partial` of "
    "one), or run with `processes=1`."
)


def check_sendable(what, thing):
    """Raises a clear error if a spawned process could not load it."""
    try:
        pickle.dumps(thing)
    except Exception as error:
        raise ValueError(UNSENDABLE.format(what=what, why=error)) from error
    function = getattr(thing, "func", thing)
    main = sys.modules["__main__"]
    if getattr(function, "__module__", None) == "__main__" and not (
        getattr(main, "__file__", None) or getattr(main, "__spec__", None)
    ):
        raise ValueError(
            UNSENDABLE.format(
                what=what, why="it was defined in a session, not in a file"
            )
        )


def perform_all(tasks, build_and_fit, processes):
    """Performs tasks in spawned processes; each writes its own file.

    Args:
        tasks: List of dicts with `arm`, `seeds`, `make_optimizer`, `path` and
            `configuration`.
        build_and_fit: The user's function.
        processes: Int.

    Yields:
        Pair of a task and its record, in the order in which they finish.

    Raises:
        RuntimeError: At the end, if processes were killed.
        Exception: At once, if a run raised one by mistake.
    """
    waiting, lost = list(reversed(tasks)), []
    workers = []
    try:
        for _ in range(min(processes, len(tasks))):
            workers.append(_Worker(build_and_fit))
        while workers:
            ready = multiprocessing.connection.wait(
                [worker.connection for worker in workers]
            )
            for worker in [w for w in workers if w.connection in ready]:
                try:
                    kind, answer = worker.connection.recv()
                except (EOFError, OSError):
                    workers.remove(worker)
                    lost.append(worker.obituary())
                    if worker.started and len(workers) < len(waiting):
                        workers.append(_Worker(build_and_fit))
                    continue
                if kind == "error":
                    raise answer
                if kind == "record":
                    yield worker.task, answer
                worker.started, worker.task = True, None
                if waiting:
                    worker.give(waiting.pop())
                else:
                    workers.remove(worker)
                    worker.dismiss()
    finally:
        for worker in workers:
            worker.stop()
    if lost:
        raise RuntimeError(
            "\n".join(lost) + "\nFinished runs are kept: call again to do "
            "what is missing."
        )


class _Worker:
    """A spawned process that trains one task after another."""

    def __init__(self, build_and_fit):
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.task, self.started = None, False
        self.process = context.Process(
            target=_serve, args=(theirs, build_and_fit, _keras_settings())
        )
        with _environment(KERAS_BACKEND=devices.backend_name()):
            self.process.start()
        # Its end is noticed only when nobody else holds this connection.
        theirs.close()

    def give(self, task):
        self.task = task
        # If it has died, waiting for its answer shows that.
        with contextlib.suppress(OSError):
            self.connection.send(task)

    def dismiss(self):
        # It may have died since; its work is done.
        with contextlib.suppress(OSError):
            self.connection.send(None)
        self.process.join()

    def stop(self):
        self.process.terminate()
        self.process.join()

    def obituary(self):
        self.process.join()
        ended = f"ended with exit code {self.process.exitcode}"
        if self.task is None and not self.started:
            return (
                f"A process {ended} before it could train. Its own message "
                "is above. A script that uses `processes` must start its "
                "work below `if __name__ == '__main__':`."
            )
        if self.task is None:
            return f"An idle process {ended}."
        return (
            f"The process that trained arm {self.task['arm']!r} with seeds "
            f"{tuple(self.task['seeds'])} {ended} (killed, or out of memory). "
            "This run is lost."
        )


def _serve(connection, build_and_fit, settings):
    """What a spawned process runs."""
    # Ctrl-C reaches all processes; the parent decides.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    keras.config.set_floatx(settings["floatx"])
    keras.config.set_dtype_policy(settings["dtype_policy"])
    keras.config.set_image_data_format(settings["image_data_format"])
    # The end of the parent ends this process too.
    with contextlib.suppress(EOFError, OSError):
        connection.send(("ready", None))
        while (task := connection.recv()) is not None:
            connection.send(_answer(task, build_and_fit))


def _answer(task, build_and_fit):
    try:
        record = finish(task, build_and_fit)
    except Exception as error:
        error.add_note(traceback.format_exc())
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:
            error = RuntimeError(f"{type(error).__name__}: {error}")
            error.add_note(traceback.format_exc())
        return "error", error
    return "record", record


def finish(task, build_and_fit):
    """Performs a task and writes its file.

    Returns:
        The record.
    """
    try:
        record = perform(build_and_fit, task["make_optimizer"], task["seeds"])
    except Exception as error:
        error.add_note(
            f"In the run of arm {task['arm']!r} with seeds "
            f"{tuple(task['seeds'])}."
        )
        raise
    record.update(
        arm=task["arm"],
        seeds=list(task["seeds"]),
        configuration=task["configuration"],
    )
    write_record(task["path"], record)
    return record


def _keras_settings():
    return {
        "floatx": keras.config.floatx(),
        "dtype_policy": keras.config.dtype_policy().name,
        "image_data_format": keras.config.image_data_format(),
    }


@contextlib.contextmanager
def _environment(**variables):
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
