"""Resolves a model and a revision; says, as JSON, its path or the error."""

import json
import sys

from cluster.checkpoint.hub import resolve_model
from cluster.errors import MantaError

try:
    print(json.dumps(["path", str(resolve_model(*sys.argv[1:]))]))
except MantaError as error:
    print(json.dumps([type(error).__name__, error.message]))
