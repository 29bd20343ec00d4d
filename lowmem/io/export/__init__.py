"""Writers of other programs' files, from what lowmem wrote: one file per target."""
