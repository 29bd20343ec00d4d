"""Does the suite see? Planted faults (``tox -e faults``) and a sample of mutants (``tox -e mutants``)."""
