"""Which coordinators each application has, which of them are silent, and which one a request was given to.

Written by Serve's routers, which Serve builds and pickles by value, on threads of its choice; read by those who call.
So the table lives in a module of its own, which goes by name: one table a process, the gateway's only module-level
state.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable

from cluster.messages import Key


class CoordinatorTable:
    """Coordinators go by Serve's ids of their replicas, which are unique. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._coordinators: dict[str, frozenset[str]] = {}  # by application
        self._silent: frozenset[str] = frozenset()
        self._places: dict[Key, str | None] = {}  # of the requests that somebody waits for
        self._listeners: dict[str, list[Callable[[], object]]] = {}

    def coordinators(self, application: str) -> frozenset[str]:
        """Those that take requests; one that drains is none of them."""
        return self._coordinators.get(application, frozenset())

    def publish(self, application: str, coordinators: Iterable[str]) -> None:
        """What Serve's router was told."""
        with self._lock:
            self._coordinators[application] = frozenset(coordinators)
            listeners = list(self._listeners.get(application, ()))
        for listener in listeners:
            listener()

    def listen(self, application: str, listener: Callable[[], object]) -> Callable[[], None]:
        """Call `listener` after every change of an application's coordinators, on whichever thread it is made.

        Returns what ends that.
        """
        with self._lock:
            listeners = self._listeners.setdefault(application, [])
            listeners.append(listener)

        def end() -> None:
            with self._lock:
                listeners.remove(listener)

        return end

    @property
    def silent(self) -> frozenset[str]:
        """Coordinators that have said nothing for too long, to be asked only where there is no other."""
        return self._silent

    def set_silent(self, coordinator: str, silent: bool) -> None:
        """What the reader of its stream has noticed."""
        if silent != (coordinator in self._silent):
            with self._lock:
                self._silent = self._silent | {coordinator} if silent else self._silent - {coordinator}

    def expect(self, key: Key) -> None:
        """Note from now on where this request goes, until it is forgotten."""
        self._places[key] = None

    def forget(self, key: Key) -> None:
        """Nobody waits for it any more."""
        self._places.pop(key, None)

    def sent(self, key: Key, coordinator: str) -> None:
        """A request is being sent to a coordinator; not for the first time, when another one refused it."""
        with self._lock:
            if key in self._places:
                self._places[key] = coordinator

    def place(self, key: Key) -> str | None:
        """Where a request was sent, if it was."""
        return self._places.get(key)


TABLE = CoordinatorTable()
