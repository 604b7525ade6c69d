"""`manta plan`: what a model takes on which hardware. Knows the arithmetic of cluster.planning; starts nothing."""
