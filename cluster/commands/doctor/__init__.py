"""`manta doctor`: looks whether this machine can serve, one file a group of checks. Starts no Ray, serves nothing."""
