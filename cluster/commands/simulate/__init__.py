"""`manta simulate`: options to fleets, and what came of them as tables, JSON and a plot. Decides nothing."""
