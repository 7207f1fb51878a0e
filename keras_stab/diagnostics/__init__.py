"""What happened in training, and whether a method helped."""
