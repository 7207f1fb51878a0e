"""The stability benchmark: which method helps, on which task, by how much."""
