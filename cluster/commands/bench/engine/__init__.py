"""`manta bench engine`: the parts of an engine's step, timed apart. Knows no server and nobody to compare with."""
