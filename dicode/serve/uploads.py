"""Bodies of requests: JSON or forms, of limited size, with files known by their first bytes, never by their names."""

import asyncio
import base64
import binascii
import io
import json
import re
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fastapi.concurrency import run_in_threadpool
from PIL import Image
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.requests import Request

from dicode.files import put
from dicode.serve.request import MOST_SHOTS, RequestError
from dicode.video.timed import MOST_PIXELS

MOST_BYTES = 32 * 2**20  # of a body
MOST_FIELDS, MOST_FILES = 2 * MOST_SHOTS + 64, 4
NESTED = re.compile(r"(\w{1,40})(\[\])?\[(\w{1,40})\]")  # as clients write objects, and lists of them, into forms
SLOWEST_S = 60.0  # for a whole body
Files = dict[str, bytes]  # by the name that the job's folder has them under


@dataclass(frozen=True)
class Kind:
    """Files that a request may have: the fields they come in, what they are called then, and how they begin."""

    name: str
    fields: Mapping[str, str]
    magic: Sequence[tuple[int, bytes, str]]  # place, bytes, and the suffix of such files


IMAGES = Kind(
    "PNG, JPEG or WebP image",
    {"input_reference": "image", "last_image": "last_image"},
    [(0, b"\x89PNG\r\n\x1a\n", ".png"), (0, b"\xff\xd8\xff", ".jpg"), (8, b"WEBP", ".webp")],
)
MOVIES = Kind(
    "MP4, MOV, WebM, Matroska, AVI or GIF video",
    {"video": "source"},
    [(4, b"ftyp", ".mp4"), (0, b"\x1aE\xdf\xa3", ".mkv"), (8, b"AVI ", ".avi"), (0, b"GIF8", ".gif")],
)
BEGINNINGS = replace(MOVIES, fields={"video": "continued"})


async def body_of(request: Request, kind_of_files: Kind = IMAGES) -> tuple[dict[str, Any], Files]:
    """The fields and files of a request. Raises `RequestError`, and `HTTPException` 400, 408, 413 and 415."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    try:
        async with asyncio.timeout(SLOWEST_S):
            if kind in ("multipart/form-data", "application/x-www-form-urlencoded"):
                return await _form(request, kind_of_files)
            if kind in ("", "application/json"):
                return await run_in_threadpool(_json, await request.body(), kind_of_files)
    except TimeoutError as error:
        raise HTTPException(408, f"the body took longer than {SLOWEST_S:g} s") from error
    raise HTTPException(415, "content-type: expected multipart/form-data or application/json")


async def _form(request: Request, kind: Kind) -> tuple[dict[str, Any], Files]:
    values: dict[str, Any] = {}
    given: dict[str, bytes] = {}
    rows: Counter[str] = Counter()
    try:
        async with request.form(max_files=MOST_FILES, max_fields=MOST_FIELDS) as form:
            for name, value in form.multi_items():
                nested = NESTED.fullmatch(name)
                outer, inner = (nested[1], nested[3]) if nested else (name, None)
                if (inner is None and name in values) or outer in given:
                    raise RequestError(f"{name[:40]}: given twice", name[:40])
                if isinstance(value, UploadFile):
                    given[name] = await value.read()
                elif nested is None:
                    values[name] = value
                elif nested[2]:  # item after item of a list, field after field
                    _put_nested(values.setdefault(outer, []), rows[name], nested[3], value)
                    rows[name] += 1
                else:
                    _put_nested([values.setdefault(outer, {})], 0, nested[3], value)
    except MultiPartException as error:
        raise HTTPException(400, "the form cannot be read") from error
    if both := given.keys() & values.keys():
        raise RequestError(f"{min(both)[:40]}: given twice", min(both)[:40])
    if isinstance(values.get("shots"), str):
        values["shots"] = _json_value(values["shots"].encode())
    return await run_in_threadpool(_files, values, given, kind)


def _put_nested(items: object, place: int, name: str, value: str) -> None:
    """Set a field of an object of a list, the next of which may be new. Raises `RequestError`."""
    if isinstance(items, list) and place == len(items):
        items.append({})
    if not isinstance(items, list) or not isinstance(items[place], dict) or name in items[place]:
        raise RequestError(f"{name}: given twice", name)
    items[place][name] = value


def _json(body: bytes, kind: Kind) -> tuple[dict[str, Any], Files]:
    values = _json_value(body or b"{}")
    if not isinstance(values, dict):
        raise HTTPException(400, "expected a JSON object")
    return _files(values, {}, kind)


def _files(values: dict[str, Any], given: Mapping[str, bytes], kind: Kind) -> tuple[dict[str, Any], Files]:
    """Fields and files of a request, once those are taken out of its fields that are there as data: URLs."""
    data = dict(given)
    for name in kind.fields:
        url = values.get(name)
        url = url.get("image_url") if isinstance(url, dict) else url
        if kind is BEGINNINGS and not (isinstance(url, str) and url.startswith("data:")):
            continue  # a video of this server
        if values.pop(name, None) is not None:
            data[name] = _of_data_url(name, url)
    files: Files = {}
    for name, own in data.items():
        files |= _file(kind, name, own)
    return values, files


def _json_value(body: bytes) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise HTTPException(400, "the body is no JSON") from error


def _of_data_url(name: str, url: object) -> bytes:
    head, comma, data = url.partition(",") if isinstance(url, str) else ("", "", "")
    if not (comma and head.startswith("data:") and head.endswith(";base64")):
        raise RequestError(f"{name}: expected a file or a data: URL; addresses are not fetched", name)
    try:
        return base64.b64decode(data, validate=True)
    except binascii.Error as error:
        raise RequestError(f"{name}: its base64 cannot be read", name) from error


def _file(kind: Kind, name: str, data: bytes) -> Files:
    if name not in kind.fields:
        raise RequestError(f"{name[:40]}: no file is expected there", name[:40])
    suffix = next((suffix for at, magic, suffix in kind.magic if data[at : at + len(magic)] == magic), None)
    if suffix is None:
        raise HTTPException(415, f"{name}: expected a {kind.name}")
    if kind is IMAGES or suffix == ".gif":
        _check_image(name, data)
    return {f"{kind.fields[name]}{suffix}": data}


def _check_image(name: str, data: bytes) -> None:
    """Look at an image's header; its picture is decoded by the worker."""
    try:
        with warnings.catch_warnings(action="error"), Image.open(io.BytesIO(data)) as image:
            width, height = image.size
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, Warning) as error:
        raise RequestError(f"{name}: the image cannot be read, or is too large", name) from error
    if width * height > MOST_PIXELS:
        raise RequestError(f"{name}: expected at most {MOST_PIXELS:,} pixels, got {width}x{height}", name)


def keep(files: Files, folder: Path) -> None:
    """Write the files of a request into its job's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        put(folder / name, lambda partial, data=data: partial.write_bytes(data))  # type: ignore[misc]


class LimitedBodies:
    """ASGI middleware: a body of more than `MOST_BYTES` is answered 413, whatever its headers claim."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Count what is received."""
        received = 0

        async def counted() -> Any:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > MOST_BYTES:
                raise HTTPException(413, f"expected a body of at most {MOST_BYTES // 2**20} MiB")
            return message

        await self.app(scope, counted if scope["type"] == "http" else receive, send)
