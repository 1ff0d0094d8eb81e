"""What parts are made of."""
