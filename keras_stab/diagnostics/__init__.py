"""What training looks like from outside: figures, pictures, reports."""
