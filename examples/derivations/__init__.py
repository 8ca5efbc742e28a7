"""Where tables of numbers in the library come from."""
