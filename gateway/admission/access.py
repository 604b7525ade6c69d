"""Decides who may pass a door: a key where keys are configured, else only this machine. Knows no wire format."""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Sequence
from pathlib import Path

from cluster.config import GatewayConfig
from cluster.errors import ConfigError, Unauthorized
from cluster.guarded_file import read_guarded
from gateway.admission.api_keys import ApiKey, ApiKeyFile

NO_KEY = "no API key was sent; expected 'Authorization: Bearer KEY' or 'X-Api-Key: KEY'"
TWO_KEYS = "two API keys were sent, in Authorization and X-Api-Key or more than once; expected one, or the same in both"
WRONG_KEY = "the API key is not known"
NOT_LOCAL = "without API keys (gateway.api_keys_file) only clients on the server's own machine are answered"
NO_METRICS_TOKEN = "metrics need a token of their own where API keys are configured: set gateway.metrics_token_file"


class AccessPolicy:
    """One per gateway replica, for both doors."""

    def __init__(self, config: GatewayConfig) -> None:
        """Raises ConfigError when a file of keys or tokens cannot be read."""
        self._keys = None if config.api_keys_file is None else ApiKeyFile(config.api_keys_file)
        self._metrics_token = None if config.metrics_token_file is None else read_token(config.metrics_token_file)
        # A proxy in front of a replica is a loopback peer itself, so where that proxy listens counts as well.
        self._listens_locally = is_loopback(config.host)
        self._origins = frozenset(config.cors_origins)
        self._hosts = frozenset({"localhost", *map(_host_name, (config.host, *config.allowed_hosts))})

    def identify(self, authorization: Sequence[str], peer: str | None, x_api_key: Sequence[str] = ()) -> ApiKey | None:
        """Whose request this is; None where no keys are configured. Raises Unauthorized.

        `authorization` and `x_api_key` are the values of all headers of that name, `peer` is an IP address. Two keys
        are nobody's: what stands before us may have looked at the other one.
        """
        if self._keys is None:
            self.require_local(peer)
            return None
        secrets = {secret for secret in (_bearer(authorization), *map(str.strip, x_api_key)) if secret}
        if len(secrets) > 1 or len(authorization) > 1 or len(x_api_key) > 1:
            raise Unauthorized(TWO_KEYS)
        if not secrets:
            raise Unauthorized(NO_KEY)
        key = self._keys.find(secrets.pop())
        if key is None:
            raise Unauthorized(WRONG_KEY)
        return key

    def require_metrics_token(self, authorization: Sequence[str], peer: str | None) -> None:
        """For /metrics, which shows the traffic of every key. Raises Unauthorized."""
        self.require_local(peer)
        if self._metrics_token is None:
            if self._keys is not None:
                raise Unauthorized(NO_METRICS_TOKEN)
            return
        secret = _bearer(authorization) or ""
        if not hmac.compare_digest(secret.encode("utf-8", "surrogateescape"), self._metrics_token):
            raise Unauthorized("the metrics token is missing or wrong; expected 'Authorization: Bearer TOKEN'")

    def require_local(self, peer: str | None) -> None:
        """Where there are no keys. Raises Unauthorized for a peer on another machine."""
        if self._keys is None and not (self._listens_locally and peer is not None and is_loopback(peer)):
            raise Unauthorized(NOT_LOCAL)

    def knows_host(self, host: str) -> bool:
        """Whether a Host header may name us so. A foreign name is how a web page reaches a server on loopback."""
        name = _host_name(host)
        return "*" in self._hosts or name in self._hosts or _ip(name) is not None

    def knows_page(self, origin: str | None, fetch_site: str | None, host: str) -> bool:
        """Whether a request that does something may be sent by the page that a browser names, if one does.

        A page of any site can have a browser on this machine POST to loopback, and only cannot read the answer; where
        keys are configured, it has none. Clients other than browsers send neither of the two headers.
        """
        if self._keys is not None or "*" in self._origins or origin in self._origins:
            return True
        if origin is None:
            return fetch_site in (None, "same-origin", "none")
        return origin.partition("://")[2].lower() == host.strip().lower()


def is_loopback(host: str) -> bool:
    """Whether an address, or the name localhost, is reached from this machine only."""
    ip = _ip(host)
    return host.lower() == "localhost" if ip is None else ip.is_loopback


def read_token(path: Path) -> bytes:
    """The first line of a file. Raises ConfigError when there is none."""
    lines = read_guarded(path).splitlines()
    token = lines[0].strip() if lines else b""
    if not token:
        raise ConfigError(f"{path}: expected a token in the first line")
    return token


def _bearer(authorization: Sequence[str]) -> str | None:
    """The one credential; two headers are nobody's."""
    if len(authorization) != 1:
        return None
    scheme, _, secret = authorization[0].strip().partition(" ")
    return secret.strip() or None if scheme.lower() == "bearer" else None


def _host_name(host: str) -> str:
    """Without port, brackets and a final dot: `[::1]:8000` is `::1`."""
    host = host.strip().lower()
    if host.startswith("["):
        return host[1:].partition("]")[0]
    if host.count(":") == 1:
        host = host.partition(":")[0]
    return host.removesuffix(".")


def _ip(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        ip = ipaddress.ip_address(host)
    except ValueError:
        return None
    return getattr(ip, "ipv4_mapped", None) or ip
