"""What `keras_stab.callbacks.StabilityMonitor` measures and writes."""
