"""The layers that hold frozen weights in 16 or 4 bits, and the adapters beside them."""
