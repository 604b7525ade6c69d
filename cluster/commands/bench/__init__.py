"""`manta bench`: one module or package a benchmark, and what all of them print. Knows no test."""
