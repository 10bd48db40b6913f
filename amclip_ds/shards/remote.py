"""Shards behind URLs: ranges of them, whole ones, and what their servers call their content; all through fsspec.

Over http every answer is checked for what servers do to offsets: a redirect to something else than http, a body that
was compressed on its way, a range other than the one asked for, a body without ranges. fsspec takes long to import:
import this module where a shard is remote.
"""

import re
from typing import Any, BinaryIO

import aiohttp
import fsspec
from fsspec.asyn import sync
from fsspec.implementations.http import HTTPFileSystem
from yarl import URL

from amclip_ds.redact import redact
from amclip_ds.shards.reader import Refused
from amclip_ds.shards.sources import scheme_of

MAX_REDIRECTS = 10
REDIRECTS = (301, 302, 303, 307, 308)
PIECE = 1 << 20
Facts = tuple[int, str]
"""(size in bytes, -1 where it is not known; the ETag or generation, empty where there is no exact one)"""


class Http(HTTPFileSystem):
    """http and https. `facts`: of each URL, from its last answer; `whole`: URLs whose server sends no ranges."""

    cachable = False

    def __init__(self, silence_s: float) -> None:
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=silence_s, sock_read=silence_s)
        super().__init__(client_kwargs={"timeout": timeout}, use_listings_cache=False)
        self.facts: dict[str, Facts] = {}
        self.whole: set[str] = set()

    async def _cat_file(self, url: str, start: int | None = None, end: int | None = None, **_: Any) -> bytes:
        assert start is not None and end is not None
        response = await self._ask("GET", url, {"Range": f"bytes={start}-{end - 1}"})
        async with response:
            if response.status == 416:
                self.facts[url] = (_total(response), _etag(response))
                raise OSError(f"has no bytes from {start} on")
            if response.status == 206:
                first = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
                if not first or int(first.group(1)) != start:
                    raise Refused(f"asked for byte {start}, the server sent {response.headers.get('Content-Range')!r}")
                self.facts[url] = (_total(response), _etag(response))
                return await response.read()
            self.facts[url] = (int(response.headers.get("Content-Length", -1)), _etag(response))
            self.whole.add(url)
            body = bytearray()
            while len(body) < end and (piece := await response.content.read(min(PIECE, end - len(body)))):
                body += piece
            response.close()  # the rest is not wanted
            return bytes(body[start:end])

    async def _info(self, url: str, **_: Any) -> dict[str, Any]:
        for method, more in (("HEAD", {}), ("GET", {"Range": "bytes=0-0"})):  # a signed URL may be good for GET alone
            try:
                async with await self._ask(method, url, more) as response:
                    size = (
                        _total(response) if response.status == 206 else int(response.headers.get("Content-Length", -1))
                    )
                    return {"name": url, "size": size, "ETag": _etag(response), "type": "file"}
            except (OSError, aiohttp.ClientError):
                if method == "GET":
                    raise
        raise AssertionError("unreachable")

    def download(self, url: str, file: BinaryIO) -> Facts:  # type: ignore[override]
        """The whole of it, written to a file. Raises OSError or aiohttp's errors."""
        return sync(self.loop, self._download, url, file)

    async def _download(self, url: str, file: BinaryIO) -> Facts:
        async with await self._ask("GET", url, {}) as response:
            expected = int(response.headers.get("Content-Length", -1))
            while piece := await response.content.read(PIECE):
                file.write(piece)
            if expected not in (-1, file.tell()):
                raise OSError(f"{file.tell()} of {expected} bytes came")
            return file.tell(), _etag(response)

    async def _ask(self, method: str, url: str, headers: dict[str, str]) -> aiohttp.ClientResponse:
        """The answer, after the redirects that may be followed. Raises OSError, or aiohttp's error of a status."""
        session = await self.set_session()
        for _ in range(MAX_REDIRECTS):
            response = await session.request(
                method, self.encode_url(url), headers={"Accept-Encoding": "identity"} | headers, allow_redirects=False
            )
            if response.status in REDIRECTS:
                response.close()
                url = _redirected(url, response.headers.get("Location", ""))
                continue
            if response.status != 416:
                self._raise_not_found_for_status(response, url)
            encoding = response.headers.get("Content-Encoding", "identity")
            if encoding not in ("", "identity"):
                response.close()
                raise Refused(
                    f"the server sends it with Content-Encoding: {encoding}, in which offsets are others;"
                    f" switch that off for .tar files"
                )
            return response
        raise Refused(f"more than {MAX_REDIRECTS} redirects")


class Store:
    """Any other back end of fsspec: s3, gs, az."""

    def __init__(self, scheme: str) -> None:
        self._system = fsspec.filesystem(scheme, use_listings_cache=False)
        self.facts: dict[str, Facts] = {}
        self.whole: set[str] = set()

    def cat_ranges(self, urls: list[str], starts: list[int], stops: list[int], on_error: str) -> list[Any]:
        paths = [self._system._strip_protocol(url) for url in urls]
        return self._system.cat_ranges(paths, starts, stops, on_error=on_error)

    def cat_file(self, url: str, start: int, end: int) -> bytes:
        return self._system.cat_file(self._system._strip_protocol(url), start=start, end=end)

    def info(self, url: str) -> dict[str, Any]:
        found = self._system.info(self._system._strip_protocol(url))
        exact = next((f"{name} {found[name]}" for name in ("generation", "ETag", "etag") if found.get(name)), "")
        return {"size": found.get("size", -1), "ETag": exact}

    def download(self, url: str, file: BinaryIO) -> Facts:
        facts = self.info(url)
        with self._system.open(self._system._strip_protocol(url), "rb", block_size=PIECE) as source:
            while piece := source.read(PIECE):
                file.write(piece)
        if facts["size"] not in (-1, file.tell()):
            raise OSError(f"{file.tell()} of {facts['size']} bytes came")
        return file.tell(), facts["ETag"]


def open_system(url: str, silence_s: float) -> Http | Store:
    """What reads a URL. No chain of fsspec's is ever taken apart: the URL's own scheme decides."""
    scheme = scheme_of(url)
    return Http(silence_s) if scheme in ("http", "https") else Store(scheme)


def _redirected(url: str, location: str) -> str:
    """Where a redirect leads. Raises Refused for anything but http, and for http from https."""
    try:
        target = URL(url).join(URL(location))
    except ValueError:
        target = URL()
    if target.scheme not in ("http", "https") or not target.host:
        raise Refused(f"redirects to {redact(location)!r}, which is no http address")
    if target.scheme == "http" and URL(url).scheme == "https":
        raise Refused(f"redirects from https to {redact(str(target))!r}, which anybody on the way can change")
    return str(target)


def _total(response: aiohttp.ClientResponse) -> int:
    total = response.headers.get("Content-Range", "").rpartition("/")[2]
    return int(total) if total.isdigit() else -1


def _etag(response: aiohttp.ClientResponse) -> str:
    """A strong ETag; a weak one says only that the content means the same."""
    etag = response.headers.get("ETag", "")
    return "" if etag.startswith("W/") else etag.strip('"')
