"""Other programs' 4-bit files, read exactly: one file for each format; ``recognize`` lists them."""
