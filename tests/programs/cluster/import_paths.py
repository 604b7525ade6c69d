"""Imports what each argument names, `module:attribute` or `module.attribute`; says those that are not there."""

import importlib
import re
import sys

for path in sys.argv[1:]:
    module, attribute = re.fullmatch(r"(.+)[:.](\w+)", path).groups()
    try:
        getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        print(f"{path}: {error}")
