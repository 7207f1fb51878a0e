"""All code that names a backend, by subject.

Each function does the same on TensorFlow, JAX and PyTorch; the three versions
stand side by side. A backend is imported only when Keras runs on it.
"""
