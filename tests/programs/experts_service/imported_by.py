"""Imports the module of its argument and names all that this brought in."""

import importlib
import sys

importlib.import_module(sys.argv[1])
print(*sys.modules)
