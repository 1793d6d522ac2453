"""Who may ask, and how often: keys by their hash, each with limits of its own.

A file names them, and holds no key::

    [[client]]
    name = "shop"
    key_sha256 = "2c26b46b68ffc68ff99b453c1d30413413422d706483bfa0f98a5e886266e7ae"
    requests_per_minute = 60    # leave out: no limit
    images_per_minute = 120

``python -m runtimes.gateway.keys NAME`` makes a key and these lines. Its 256 random bits are why a plain hash is
enough: there is no list of likely keys to try.
"""

from __future__ import annotations

import hashlib
import hmac
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from runtimes.gateway.refusal import Refusal
from runtimes.gateway.serving.private_file import check_private
from safevlm.errors import InputError
from safevlm.files.json_file import first_problem
from safevlm.files.table_file import read_table

__all__ = ["MOST_A_MINUTE", "Client", "ClientEntry", "Clients", "digest_of", "read_clients"]

MINUTE = 60.0
MOST_A_MINUTE = 1_000_000
"""Requests or images of a minute."""
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Limit = Annotated[int, Field(ge=1, le=MOST_A_MINUTE)]


class ClientEntry(BaseModel):
    """A client as a file states it."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: Name
    key_sha256: Digest
    requests_per_minute: Limit | None = None
    images_per_minute: Limit | None = None


class _File(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    client: Annotated[list[ClientEntry], Field(min_length=1)]


@dataclass(eq=False)
class _Bucket:
    """A minute's worth that refills evenly; ``take`` returns the seconds to wait, 0 where there is enough."""

    limit: int
    left: float
    at: float

    def take(self, count: int, now: float) -> float:
        self.left = min(self.limit, self.left + (now - self.at) * self.limit / MINUTE)
        self.at = now
        if count <= self.left:
            self.left -= count
            return 0.0
        return (min(count, self.limit) - self.left) * MINUTE / self.limit


class Client:
    """A client that has shown its key. ``clock`` gives seconds."""

    def __init__(self, entry: ClientEntry, clock: Callable[[], float] = time.monotonic) -> None:
        self.entry, self.name, self._clock = entry, entry.name, clock
        limits = {"requests": entry.requests_per_minute, "images": entry.images_per_minute}
        self._buckets = {what: _Bucket(limit, limit, clock()) for what, limit in limits.items() if limit is not None}

    def take(self, what: str, count: int = 1) -> None:
        """Count ``requests`` or ``images``. Raises Refusal, 429, when the minute's limit is used up."""
        bucket = self._buckets.get(what)
        if bucket is None or count == 0:
            return
        if count > bucket.limit:
            raise self._refusal(what, bucket, f"one request has {count}, so waiting does not help", 0)
        wait = bucket.take(count, self._clock())
        if wait > 0:
            seconds = math.ceil(wait)
            raise self._refusal(what, bucket, f"try again in {seconds} s", seconds)

    def _refusal(self, what: str, bucket: _Bucket, advice: str, seconds: int) -> Refusal:
        return Refusal(
            429,
            "rate_limit_error",
            f"this key has {bucket.limit} {what} a minute: {advice}.",
            code="rate_limit_exceeded",
            retry=seconds,
            more={
                **({} if seconds else {"x-should-retry": "false"}),  # which OpenAI's clients heed
                f"x-ratelimit-limit-{what}": str(bucket.limit),
                f"x-ratelimit-remaining-{what}": str(max(0, int(bucket.left))),
            },
        )


class Clients:
    """Those who may ask. Raises InputError where two have one name or one key."""

    def __init__(self, entries: Iterable[ClientEntry], clock: Callable[[], float] = time.monotonic) -> None:
        entries = list(entries)
        names = [each.name for each in entries]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise InputError(f"two clients have the name {twice}. Each client needs its own name.")
        owners: dict[str, str] = {}
        for each in entries:
            owner = owners.setdefault(each.key_sha256, each.name)
            if owner != each.name:
                raise InputError(
                    f"the clients {owner} and {each.name} have the same key. Each client needs its own key."
                )
        self._clients = [(bytes.fromhex(each.key_sha256), Client(each, clock)) for each in entries]

    @classmethod
    def of_key(cls, key: str) -> Clients:
        """Return one client, without limits."""
        return cls([ClientEntry(name="client", key_sha256=digest_of(key))])

    def go_on(self, before: Clients) -> None:
        """Count on where ``before`` was for each client that is the same: a new file begins no new minute."""
        known = {client.entry: client for _, client in before._clients}
        self._clients = [(digest, known.get(client.entry, client)) for digest, client in self._clients]

    def find(self, authorization: str) -> Client:
        """Return who shows this ``Authorization`` header. Raises Refusal, 401."""
        scheme, _, key = authorization.partition(" ")
        shown = hashlib.sha256(key.strip().encode("utf-8", "surrogateescape")).digest()
        found = None
        for digest, client in self._clients:  # all of them, so that time tells nothing
            if hmac.compare_digest(digest, shown):
                found = client
        if found is None or scheme.lower() != "bearer":
            raise Refusal(401, "authentication_error", "the API key is missing or wrong.", code="invalid_api_key")
        return found


def digest_of(key: str) -> str:
    """Return the SHA-256 of a key, in hexadecimal."""
    return hashlib.sha256(key.encode()).hexdigest()


def read_clients(path: Path) -> Clients:
    """Read a file of clients, TOML or JSON. Raises InputError, also where others than owner and group may read it."""
    check_private(path)
    try:
        return Clients(_File.model_validate(read_table(path, "client key"), strict=True).client)
    except ValidationError as error:
        raise InputError(
            f"{path}: {first_problem(error, secret=True)}. The fields of a [[client]] are "
            f"{', '.join(ClientEntry.model_fields)}."
        ) from None
