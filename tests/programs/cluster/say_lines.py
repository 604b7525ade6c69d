"""Logs as a shard does, and as a library in its process does."""

from __future__ import annotations

import logging

from cluster.telemetry.process_logs import log_to_standard_error

log_to_standard_error()
logging.getLogger("experts_service.shard.shard").info("ours")
logging.getLogger("library").info("a library's, which nobody needs")
logging.getLogger("library").warning("a library's warning")
