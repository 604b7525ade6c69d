"""`manta status`: what runs on a cluster, as tables. Reads Serve and metrics; changes nothing."""
