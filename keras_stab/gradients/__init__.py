"""How a method gets the gradients that it asks for."""
