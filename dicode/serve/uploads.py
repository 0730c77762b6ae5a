"""Bodies of requests: JSON or forms, of limited size, with files known by their first bytes, never by their names."""

import asyncio
import base64
import binascii
import json
from pathlib import Path
from typing import Any

from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.requests import Request

from dicode.files import put

MOST_BYTES = 32 * 2**20  # of a body
MOST_FIELDS, MOST_FILES = 64, 4
SLOWEST_S = 60.0  # for a whole body
IMAGES = {b"\x89PNG\r\n\x1a\n": ".png", b"\xff\xd8\xff": ".jpg"}
FILE_FIELDS = {"input_reference": "image", "last_image": "last_image"}
Files = dict[str, bytes]  # by the name that the job's folder has them under


async def body_of(request: Request) -> tuple[dict[str, Any], Files]:
    """The fields and files of a request. Raises `HTTPException` 400, 408, 413 and 415."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    try:
        async with asyncio.timeout(SLOWEST_S):
            if kind in ("multipart/form-data", "application/x-www-form-urlencoded"):
                return await _form(request)
            if kind in ("", "application/json"):
                return _json(await request.body())
    except TimeoutError as error:
        raise HTTPException(408, f"the body took longer than {SLOWEST_S:g} s") from error
    raise HTTPException(415, "content-type: expected multipart/form-data or application/json")


async def _form(request: Request) -> tuple[dict[str, Any], Files]:
    values: dict[str, Any] = {}
    files: Files = {}
    try:
        async with request.form(max_files=MOST_FILES, max_fields=MOST_FIELDS) as form:
            for name, value in form.multi_items():
                if name in values or FILE_FIELDS.get(name) in files:
                    raise HTTPException(400, f"{name[:40]}: given twice")
                if isinstance(value, UploadFile):
                    files |= _file(name, await value.read())
                elif name in FILE_FIELDS:
                    files |= _file(name, _of_data_url(name, value))
                else:
                    values[name] = value
    except MultiPartException as error:
        raise HTTPException(400, "the form cannot be read") from error
    if isinstance(values.get("shots"), str):
        values["shots"] = _json_value(values["shots"].encode())
    return values, files


def _json(body: bytes) -> tuple[dict[str, Any], Files]:
    values = _json_value(body or b"{}")
    if not isinstance(values, dict):
        raise HTTPException(400, "expected a JSON object")
    files: Files = {}
    for name in FILE_FIELDS:
        if (given := values.pop(name, None)) is not None:
            url = given.get("image_url") if isinstance(given, dict) else given
            files |= _file(name, _of_data_url(name, url))
    return values, files


def _json_value(body: bytes) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise HTTPException(400, "the body is no JSON") from error


def _of_data_url(name: str, url: object) -> bytes:
    head, comma, data = url.partition(",") if isinstance(url, str) else ("", "", "")
    if not (comma and head.startswith("data:") and head.endswith(";base64")):
        raise HTTPException(400, f"{name}: expected a file or a data: URL; addresses are not fetched")
    try:
        return base64.b64decode(data, validate=True)
    except binascii.Error as error:
        raise HTTPException(400, f"{name}: its base64 cannot be read") from error


def _file(name: str, data: bytes) -> Files:
    if name not in FILE_FIELDS:
        raise HTTPException(400, f"{name[:40]}: no file is expected there")
    suffix = next((suffix for magic, suffix in IMAGES.items() if data.startswith(magic)), None)
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        suffix = ".webp"
    if suffix is None:
        raise HTTPException(415, f"{name}: expected a PNG, JPEG or WebP image")
    return {f"{FILE_FIELDS[name]}{suffix}": data}


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
