"""`manta serve`: starts a server, watches it, and ends it with all that it has started."""
