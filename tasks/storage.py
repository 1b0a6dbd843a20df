"""Where artifacts lie: a local folder, or s3://bucket/prefix, by one setting and one interface.

S3 takes its endpoint and credentials from the environment (AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID,
AWS_SECRET_ACCESS_KEY, AWS_DEFAULT_REGION, or any other source that boto3 knows), never from a setting, so that they
appear in no form, log or artifact. A write is all or nothing on both: a local file is renamed into place, an S3 object
appears when its upload ends.
"""

import functools
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tasks.errors import ArtifactError, ConfigError


def join(root: str, *parts: str) -> str:
    """Append path segments to a local path or an s3:// URI."""
    return "/".join([root.rstrip("/"), *(part.strip("/") for part in parts)])


def is_s3(uri: str) -> bool:
    return uri.startswith("s3://")


def resolve(root: str) -> str:
    """The absolute form of a storage root, so that references stay true from any working directory."""
    return root.rstrip("/") if is_s3(root) else str(Path(root).expanduser().absolute())


@functools.cache
def _client() -> Any:
    import boto3
    from botocore.config import Config

    return boto3.client("s3", config=Config(retries={"max_attempts": 6, "mode": "adaptive"}))


def _split(uri: str) -> tuple[str, str]:
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    if not bucket:
        raise ConfigError(f"{uri!r} names no bucket; write s3://bucket/prefix")
    return bucket, key


def write_bytes(uri: str, data: bytes) -> None:
    """Write one file whole: readers see the old content or the new, never a part."""
    if is_s3(uri):
        bucket, key = _split(uri)
        _client().put_object(Bucket=bucket, Key=key, Body=data)
        return
    path = Path(uri)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    with part.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def read_bytes(uri: str) -> bytes:
    """The content of one file.

    Raises:
        ArtifactError: nothing lies at `uri`.
    """
    if not is_s3(uri):
        try:
            return Path(uri).read_bytes()
        except (FileNotFoundError, IsADirectoryError) as error:
            raise ArtifactError(f"{uri} does not exist; run the stage that makes it again") from error
    bucket, key = _split(uri)
    client = _client()
    try:
        return client.get_object(Bucket=bucket, Key=key)["Body"].read()
    except client.exceptions.NoSuchKey as error:
        raise ArtifactError(f"{uri} does not exist; run the stage that makes it again") from error


def exists(uri: str) -> bool:
    """Whether a file, or any file below the folder, lies at `uri`."""
    return next(iter_files(uri), None) is not None


def iter_files(uri: str) -> Iterator[str]:
    """URIs of all files at or below `uri`, sorted. Files still being written (dot-files) are left out."""
    if not is_s3(uri):
        root = Path(uri)
        paths = [root] if root.is_file() else sorted(p for p in root.rglob("*") if p.is_file())
        yield from (str(p) for p in paths if p == root or not p.name.startswith("."))
        return
    bucket, key = _split(uri)
    pages = _client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=key)
    for page in pages:
        for entry in page.get("Contents", []):
            name = entry["Key"]
            if not key or name == key or name.startswith(key.rstrip("/") + "/"):
                yield f"s3://{bucket}/{name}"


def delete(uri: str) -> None:
    """Remove the file, or every file below the folder, at `uri`; nothing there is no error."""
    for file in list(iter_files(uri)):
        if is_s3(file):
            bucket, key = _split(file)
            _client().delete_object(Bucket=bucket, Key=key)
        else:
            Path(file).unlink(missing_ok=True)


def upload_folder(folder: Path, uri: str) -> None:
    """Copy every file below a local folder to `uri`, keeping relative paths."""
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        write_bytes(join(uri, path.relative_to(folder).as_posix()), path.read_bytes())


def download_folder(uri: str, folder: Path) -> None:
    """Copy every file below `uri` into a local folder, keeping relative paths."""
    base = uri.rstrip("/") + "/"
    for file in iter_files(uri):
        target = folder / file.removeprefix(base)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(read_bytes(file))
