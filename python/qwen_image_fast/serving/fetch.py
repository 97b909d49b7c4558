"""Pictures from addresses: off unless hosts are named, and then without a way to what only this machine can reach."""

from __future__ import annotations

import http.client
import ipaddress
import socket
import ssl
import time
from collections.abc import Sequence
from urllib.parse import urlsplit

from qwen_image_fast.serving.errors import ApiError, invalid

SECONDS = 20.0


def is_public(address: str) -> bool:
    """Not private, loopback, link-local, shared, multicast or reserved; an IPv4 address inside of IPv6 counts as it."""
    found = ipaddress.ip_address(address)
    if isinstance(found, ipaddress.IPv6Address):
        inside = found.ipv4_mapped or found.sixtofour or (found.teredo[1] if found.teredo else None)
        if inside is not None:
            return is_public(str(inside))
    return found.is_global and not found.is_multicast


def place_of(name: str, url: str, hosts: Sequence[str]) -> tuple[str, int, str]:
    """Host, port and path of an address that may be asked."""
    try:
        parts = urlsplit(url)
        host, port = (parts.hostname or "").lower(), parts.port or 443
    except ValueError as error:
        raise invalid(f"{name} is not an address: {error}", name, "invalid_image_url") from error
    if not hosts:
        raise invalid(f"{name} must be a data URL: this server fetches nothing", name, "image_url_disabled")
    if parts.scheme != "https" or not host or parts.username or parts.password:
        raise invalid(f"{name} must begin with https:// and name a host, without a user", name, "invalid_image_url")
    if host not in (h.lower() for h in hosts):
        raise invalid(
            f"{name} must be of one of the hosts that this server asks, not of {host}", name, "host_not_allowed"
        )
    return host, port, f"{parts.path or '/'}{'?' + parts.query if parts.query else ''}"


def fetch(name: str, url: str, hosts: Sequence[str], largest: int) -> bytes:
    """The bytes at an address: https, no redirects, resolved once, at most `largest`, within `SECONDS`.

    Raises:
        ApiError: anything else.
    """
    host, port, path = place_of(name, url, hosts)
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise invalid(f"{name}: {host} was not found", name, "invalid_image_url") from error
    addresses = [entry[4][0] for entry in found]
    if not addresses or not all(is_public(str(address)) for address in addresses):
        raise invalid(f"{name}: {host} has an address that is not public", name, "address_not_public")
    connection = _Pinned(host, port, str(addresses[0]))
    until = time.monotonic() + SECONDS
    try:
        connection.request("GET", path, headers={"accept": "image/*", "user-agent": "qwen-image-fast"})
        response = connection.getresponse()
        if response.status != 200:
            raise invalid(
                f"{name}: {host} answered {response.status}, and only 200 is taken", name, "invalid_image_url"
            )
        content = bytearray()
        while chunk := response.read(65536):
            content += chunk
            if len(content) > largest:
                raise ApiError(413, f"{name} must have at most {largest} bytes", "too_large", name)
            if time.monotonic() > until:
                raise invalid(f"{name} did not come within {SECONDS:g} s", name, "invalid_image_url")
        return bytes(content)
    except (OSError, http.client.HTTPException) as error:
        raise invalid(f"{name} could not be fetched: {error}", name, "invalid_image_url") from error
    finally:
        connection.close()


class _Pinned(http.client.HTTPSConnection):
    """To one address, that was checked, whatever the name resolves to by now."""

    def __init__(self, host: str, port: int, address: str):
        super().__init__(host, port, timeout=SECONDS, context=ssl.create_default_context())
        self._address = address

    def connect(self) -> None:
        plain = socket.create_connection((self._address, self.port), self.timeout)
        self.sock = self._context.wrap_socket(plain, server_hostname=self.host)  # type: ignore[attr-defined]
