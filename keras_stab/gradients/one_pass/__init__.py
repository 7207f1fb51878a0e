"""The gradients of all groups from one forward and one backward pass."""
