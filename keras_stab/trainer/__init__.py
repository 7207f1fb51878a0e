"""What this library adds to the trainer of `keras.Model`."""
