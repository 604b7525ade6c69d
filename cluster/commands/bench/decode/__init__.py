"""`manta bench decode`: engines without a server, beside transformers. Knows no HTTP."""
