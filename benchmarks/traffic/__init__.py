"""What the devices send each other in a train step; see `communication.py`."""
