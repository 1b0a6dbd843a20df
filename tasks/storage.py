"""Where artifacts lie: a local folder, or s3://bucket/prefix, by one setting and one interface.

S3 takes its endpoint and credentials from the environment (AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID,
AWS_SECRET_ACCESS_KEY, AWS_DEFAULT_REGION, or any other source that boto3 knows), never from a setting, so that they
appear in no form, log or artifact. A write is all or nothing on both: a local file is renamed into place, an S3 object
appears when its upload ends.
"""

import contextlib
import functools
import hashlib
import io
import os
import shutil
import threading
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from tasks import locks
from tasks.errors import ArtifactError, ConfigError, StorageError

_CHECK = "check the bucket's name and AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_DEFAULT_REGION"
_PART_BYTES = 64 * 2**20  # a request of this size takes long enough that its overhead is nothing


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

    for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"):
        if "@" in urllib.parse.urlsplit(os.environ.get(name, "")).netloc:  # errors and logs quote the address
            raise ConfigError(
                f"{name} holds a user or password: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY instead"
            )

    # A session of its own, because boto3's default one may not be made by two threads at once.
    return boto3.session.Session().client("s3", config=Config(retries={"max_attempts": 6, "mode": "adaptive"}))


@contextlib.contextmanager
def _s3(uri: str) -> Iterator[tuple[Any, str, str]]:
    """(client, bucket, key) of an s3:// URI; what the server or the client complains of becomes a typed error."""
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    if not bucket:
        raise ConfigError(f"{uri!r} names no bucket; write s3://bucket/prefix")
    from botocore.exceptions import BotoCoreError, ClientError, HTTPClientError
    from botocore.exceptions import ConnectionError as NotConnected
    from s3transfer.exceptions import RetriesExceededError, S3DownloadFailedError, S3ValidationError

    try:
        yield _client(), bucket, key
    except ClientError as error:
        if error.response.get("Error", {}).get("Code") in ("NoSuchKey", "404"):
            raise ArtifactError(f"{uri} does not exist; run the stage that makes it again") from error
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        # 429 and what is the server's fault can pass; a wrong key or bucket cannot
        kind = StorageError if status == 429 or status >= 500 else ConfigError
        raise kind(f"{uri}: {error}; {_CHECK}") from error
    except (
        *(NotConnected, HTTPClientError),  # refused, timed out, broken off
        *(RetriesExceededError, S3DownloadFailedError, S3ValidationError),  # or written over while it was read
    ) as error:
        raise StorageError(f"{uri}: {error}; {_CHECK}") from error
    except (BotoCoreError, ValueError) as error:  # an endpoint that is no address is a ValueError
        raise ConfigError(f"{uri}: {error}; {_CHECK}") from error


@contextlib.contextmanager
def local_errors(uri: str, done: str) -> Iterator[None]:
    """What the file system complains of becomes a typed error; `done` says what cannot be done with `uri`."""
    try:
        yield
    except (PermissionError, NotADirectoryError, FileExistsError, IsADirectoryError) as error:
        raise ConfigError(f"{uri} cannot be {done}: {error.strerror}; check the path, and who may do so") from error
    except OSError as error:  # a disk or a network share that fails can be there again
        raise StorageError(f"{uri} cannot be {done}: {error.strerror}; check the disk that it lies on") from error


def write_bytes(uri: str, data: bytes) -> None:
    """Write one file whole: readers see the old content or the new, never a part.

    Raises:
        ConfigError: the storage does not take it; the message says what to check.
        StorageError: it cannot just now: it does not answer, or is full.
    """
    if is_s3(uri):
        with _s3(uri) as (client, bucket, key):
            client.put_object(Bucket=bucket, Key=key, Body=data)
        return
    _write_local(uri, io.BytesIO(data))


def _write_file(uri: str, source: Path) -> None:
    """Write one file whole, as `write_bytes`, its content a local file's, which may be larger than memory."""
    with local_errors(str(source), "read"), source.open("rb") as content:
        if is_s3(uri):
            with _s3(uri) as (client, bucket, key):
                client.upload_fileobj(content, bucket, key, Config=_in_parts())
            return
        _write_local(uri, content)


def _in_parts() -> Any:
    """How files go to and from S3: larger ones in parts, which are tried again one by one, and all of them in this thread."""
    from boto3.s3.transfer import TransferConfig

    return TransferConfig(multipart_threshold=_PART_BYTES, multipart_chunksize=_PART_BYTES, use_threads=False)


def _write_local(uri: str, content: IO[bytes]) -> None:
    path = Path(uri)
    part = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    with local_errors(uri, "written"):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with part.open("wb") as file:
                locks.hold(file)  # until it is in place, for `clear_unfinished`
                shutil.copyfileobj(content, file)
                file.flush()
                os.fsync(file.fileno())
                part.replace(path)
        except OSError:
            part.unlink(missing_ok=True)  # on a full disk more than anywhere
            raise


def read_bytes(uri: str) -> bytes:
    """The content of one file.

    Raises:
        ArtifactError: nothing lies at `uri`.
        StorageError: the storage does not answer.
        ConfigError: it refuses; a local file that may not be read has a PermissionError as its cause.
    """
    if not is_s3(uri):
        with local_errors(uri, "read"):
            try:
                return Path(uri).read_bytes()
            except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
                raise ArtifactError(f"{uri} does not exist; run the stage that makes it again") from error
    with _s3(uri) as (client, bucket, key):
        return client.get_object(Bucket=bucket, Key=key)["Body"].read()


def signed_url(uri: str, seconds: int) -> str:
    """An address that the s3:// file at `uri` can be read from without credentials, for so long.

    Raises:
        ConfigError: there are no credentials to sign it with.
    """
    with _s3(uri) as (client, bucket, key):
        return client.generate_presigned_url("get_object", Params={"Bucket": bucket, "Key": key}, ExpiresIn=seconds)


def read_lines(uri: str) -> Iterator[bytes]:
    """The lines of one file, which is not in memory as a whole where it is a local one.

    Raises:
        as `read_bytes`.
    """
    if is_s3(uri):
        yield from io.BytesIO(read_bytes(uri))
        return
    with local_errors(uri, "read"), Path(uri).open("rb") as file:
        yield from file


def exists(uri: str) -> bool:
    """Whether a file, or any file below the folder, lies at `uri`."""
    return next(iter_files(uri), None) is not None


def is_file(uri: str) -> bool:
    """Whether one file lies at `uri` itself."""
    if is_s3(uri):
        return next(iter_files(uri), None) == uri
    with local_errors(uri, "looked for"):
        return Path(uri).is_file()


def iter_files(uri: str, closed: list[str] | None = None) -> Iterator[str]:
    """URIs of all files at or below `uri`, sorted. Local files still being written are left out.

    Local links are followed to where nothing is listed yet, so that no file comes twice.

    Args:
        closed: is told the local folders below `uri` that may not be listed; one is an error when None.
    """
    if is_s3(uri):
        yield from (name for name, _ in _iter_objects(uri))
        return
    root = Path(uri)
    with local_errors(uri, "listed"):
        if root.is_dir():
            paths = sorted(_walk(root, [os.path.realpath(root)], closed))
        else:
            paths = [root] if root.is_file() else []
    yield from (str(p) for p in paths if not (p.name.startswith(".") and p.name.endswith(".tmp")))


def _walk(folder: Path, trees: list[str], closed: list[str] | None) -> Iterator[Path]:
    """All files below a folder.

    Args:
        trees: real paths of the folder that all began with and of those that links have led to.
    """
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        path = Path(entry.path)
        linked = entry.is_symlink()  # a link that leads nowhere, or round in a circle, is neither
        if not (os.path.isdir(path) if linked else entry.is_dir()):
            if os.path.isfile(path) if linked else entry.is_file():
                yield path
            continue
        if linked:
            target = os.path.realpath(path)
            if any(os.path.commonpath([target, tree]) in (target, tree) for tree in trees):
                continue
            trees.append(target)
        try:
            yield from _walk(path, trees, closed)
        except PermissionError:
            if closed is None:
                raise
            closed.append(str(path))


def _iter_objects(uri: str) -> Iterator[tuple[str, str]]:
    """(URI, entity tag) of all objects at or below `uri`, sorted."""
    with _s3(uri) as (client, bucket, key):
        for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=key):
            for entry in page.get("Contents", []):
                name = entry["Key"]
                if not key or name == key or name.startswith(key.rstrip("/") + "/"):
                    yield f"s3://{bucket}/{name}", entry["ETag"]


def relative(uri: str, root: str) -> str:
    """The path of a file below a folder, with forward slashes; the file's own name when the root is that file."""
    if is_s3(uri):
        return uri.rsplit("/", 1)[-1] if uri == root else uri.removeprefix(root.rstrip("/") + "/")
    path = Path(uri)
    return path.name if path == Path(root) else path.relative_to(root).as_posix()


def portable(uri: str, root: str) -> str:
    """What files below a storage root call `uri`: its path below the root, so that a root can be moved, copied and known by
    several names; the whole address where it lies elsewhere."""
    return resolve(uri).removeprefix(resolve(root) + "/")


def located(name: str, root: str) -> str:
    """The address of what files below a storage root call `name`."""
    return name if is_s3(name) or Path(name).is_absolute() else join(resolve(root), name)


def fingerprint(uri: str, ending: str = "") -> str:
    """Hash of the names and contents of all files at or below `uri` whose names end so; what may not be read counts as empty.

    On S3, where reading a collection to find it unchanged would take as long as ingesting it, the objects' entity tags stand
    for their contents: other content has another tag.
    """
    if is_s3(uri):
        contents = {
            relative(file, uri): tag.encode() for file, tag in _iter_objects(uri) if file.lower().endswith(ending)
        }
    else:
        files = (file for file in iter_files(uri, closed=[]) if file.lower().endswith(ending))
        contents = {relative(file, uri): _digest(file) for file in files}
    digest = hashlib.sha256()
    for name in sorted(contents):
        digest.update(os.fsencode(name) + b"\0" + contents[name] + b"\0")
    return digest.hexdigest()


def _digest(file: str) -> bytes:
    """Hash of a local file; one that may not be read counts as empty."""
    with local_errors(file, "read"):
        try:
            return file_sha256(Path(file))
        except PermissionError:
            return b""


def file_sha256(path: Path) -> bytes:
    """Hash of a local file, which may be larger than memory."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def delete(uri: str) -> None:
    """Remove the file, or the folder with every file below it, at `uri`; nothing there is no error."""
    if is_s3(uri):
        for file in list(iter_files(uri)):
            with _s3(file) as (client, bucket, key):
                client.delete_object(Bucket=bucket, Key=key)
        return
    with local_errors(uri, "deleted"):
        if Path(uri).is_dir():
            shutil.rmtree(uri)
        else:
            Path(uri).unlink(missing_ok=True)


def clear_unfinished(uri: str) -> None:
    """Remove what killed processes left of files that they were writing below a local folder, and nothing of a live one's."""
    if is_s3(uri):
        return
    with local_errors(uri, "cleared"):
        for part in Path(uri).rglob(".*.[0-9]*.[0-9]*.tmp"):
            with contextlib.suppress(FileNotFoundError):  # in place meanwhile
                if part.stat().st_size and locks.is_free(part):  # an empty one's writer may not hold the lock yet
                    part.unlink(missing_ok=True)


def upload_folder(folder: Path, uri: str) -> None:
    """Copy every file below a local folder to `uri`, keeping relative paths.

    Raises:
        as `write_bytes`.
    """
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        _write_file(join(uri, path.relative_to(folder).as_posix()), path)


def download_folder(uri: str, folder: Path) -> None:
    """Copy every file below `uri` into a local folder, keeping relative paths. Cut off, it leaves a part of them.

    Raises:
        as `read_bytes`; ConfigError, StorageError: a file cannot be written.
    """
    for file in iter_files(uri):
        target = folder / relative(file, uri)
        with local_errors(str(target), "written"):
            target.parent.mkdir(parents=True, exist_ok=True)
            if not is_s3(file):
                shutil.copyfile(file, target)
                continue
            with target.open("wb") as content, _s3(file) as (client, bucket, key):
                client.download_fileobj(bucket, key, content, Config=_in_parts())
