"""Mathematics that knows nothing of Keras models."""
