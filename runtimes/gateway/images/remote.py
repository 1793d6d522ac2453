"""Fetch an image from a host that is allowed by name, and from nowhere else.

The host's addresses are resolved once and looked at; the connection goes to the address that was looked at, so a name
that resolves to another one a moment later gains nothing. Redirects are not followed. The model behind the gateway is
given the image, never the URL.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket

import httpx

from runtimes.gateway.options import GatewayOptions
from runtimes.gateway.refusal import Refusal, bad_request

__all__ = ["fetch_image", "public"]

PORTS = {"http": 80, "https": 443}
TUNNELS = tuple(map(ipaddress.IPv6Network, ("64:ff9b::/96", "64:ff9b:1::/48", "2001::/32", "2002::/16")))
"""IPv6 addresses that stand for IPv4 ones (NAT64, Teredo, 6to4), inside ones among them."""


async def fetch_image(url: str, where: str, options: GatewayOptions) -> bytes:
    """Return the bytes behind a URL. Raises Refusal for one that is not allowed, fails, or is too large."""
    parsed = _checked(url, where, options)
    try:
        return await asyncio.wait_for(_fetch(parsed, where, options), options.fetch_timeout)
    except (asyncio.TimeoutError, httpx.HTTPError, OSError):
        # what went wrong there is not told: it would tell who asks what this machine can reach
        raise bad_request(f"{where}: the image could not be fetched.", code="image_not_fetched", param=where) from None


def _checked(url: str, where: str, options: GatewayOptions) -> httpx.URL:
    refused = bad_request(
        f"{where}: images are not fetched from there; send the image as a data URL.",
        code="url_not_allowed",
        param=where,
    )
    try:
        parsed = httpx.URL(url)
    except (httpx.InvalidURL, ValueError):
        raise refused from None
    host = parsed.host.rstrip(".").lower()
    if parsed.scheme not in PORTS or parsed.userinfo or host not in options.hosts:
        raise refused
    return parsed


async def _fetch(url: httpx.URL, where: str, options: GatewayOptions) -> bytes:
    port = url.port or PORTS[url.scheme]
    host = url.host.rstrip(".")
    address = await _address(host, port, where, options)
    pinned = url.copy_with(host=address, port=port)
    headers = {"Host": url.netloc.decode("ascii"), "Accept": "image/*", "Accept-Encoding": "identity"}
    async with (
        httpx.AsyncClient(trust_env=False, follow_redirects=False, timeout=options.fetch_timeout) as client,
        client.stream("GET", pinned, headers=headers, extensions={"sni_hostname": host}) as response,
    ):
        if response.status_code != httpx.codes.OK:
            raise httpx.HTTPError(f"HTTP {response.status_code}")
        content = bytearray()
        async for chunk in response.aiter_raw():  # as it is: what is packed is no image
            content += chunk
            if len(content) > options.max_image_bytes:
                raise Refusal(
                    413,
                    "invalid_request_error",
                    f"{where}: the image has more than {options.max_image_bytes} bytes.",
                    code="image_too_large",
                    param=where,
                )
        return bytes(content)


async def _address(host: str, port: int, where: str, options: GatewayOptions) -> str:
    """Return an address of the host; one that is not public refuses them all."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = [ipaddress.ip_address(str(entry[4][0]).partition("%")[0]) for entry in found]
    if not addresses:
        raise OSError("no address")
    if not options.private_hosts and not all(map(public, addresses)):
        raise bad_request(
            f"{where}: images are not fetched from there; send the image as a data URL.",
            code="url_not_allowed",
            param=where,
        )
    return str(addresses[0])


def public(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    """Say whether an address is out in the internet, not of this machine or its networks."""
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return public(address.ipv4_mapped)
        if address.is_site_local or any(address in tunnel for tunnel in TUNNELS):
            return False
    return address.is_global and not address.is_multicast and not address.is_reserved
