"""The files of other programs: a file or folder for each format, which reads and writes it."""
