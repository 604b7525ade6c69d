"""What numba compiles for CPUs, and what holds it together: registers, panels, threads. Knows rows; knows no layer."""
