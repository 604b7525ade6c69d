"""Transport `auto`: lanes, and the object store where a shard has none. Knows which groups a lane reaches, no bytes.

Whether a lane's rows lie in memory of both ends or are sent is the lane's own affair.

A lane was cheaper at every size measured (`manta bench dispatch`), so size decides nothing.
A group is apart when none of its trusted replicas gives us a lane: it has no secret to show, or its node refuses the
connection. They are dialled behind the requests; the epoch says when one of them is connected after all.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from experts_service.carriers.lane import LaneTransport
from experts_service.carriers.object_store import ObjectStoreTransport
from experts_service.device import on_host
from experts_service.transport import Flight, GroupRows


class AutoTransport:
    """Both transports to the same groups; one dispatch goes over one of them."""

    def __init__(self, lane: LaneTransport, object_store: ObjectStoreTransport) -> None:
        self._lane = lane
        self._object_store = object_store
        self._epoch = -1
        self._apart: frozenset[int] = frozenset()

    def send(self, layer: int, rows: Tensor, parts: Sequence[GroupRows]) -> Flight:
        if self._epoch != self._lane.table.epoch:
            self._try_lanes()
        if self._apart and any(part.group in self._apart for part in parts):
            return self._object_store.send(layer, on_host(rows), parts)
        return self._lane.send(layer, rows, parts)

    @property
    def takes_device_rows(self) -> bool:
        return self._lane.takes_device_rows

    def close(self) -> None:
        self._lane.close()
        self._object_store.close()

    def _try_lanes(self) -> None:
        self._epoch = self._lane.table.epoch
        self._apart = frozenset(group for group in self._lane.deployments if not self._lane.reaches(group))
