"""The commands behind `manta`, a module each, imported only when its command runs. Only cluster.cli imports them."""
