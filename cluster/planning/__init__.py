"""Where experts go and what they cost: placement, sizes, rooflines, when to scale.

Arithmetic on plain data; knows no torch and no Ray.
"""
