"""What `step_time.py` and the other benchmarks are made of."""
