"""Files at addresses: paths, or URLs of any store that fsspec knows. Their failures are told in one sentence."""

from __future__ import annotations

import errno
import os
import secrets
import zlib
from contextlib import contextmanager, suppress
from typing import IO, TYPE_CHECKING, Any, Self

import fsspec
import pyarrow as pa
from fsspec.implementations.local import LocalFileSystem

from rq_models.scoring.runs import shown

if TYPE_CHECKING:
    from collections.abc import Iterator

_READ_AHEAD = 1 << 22
_SENTENCES = {
    errno.ENOENT: "there is no such file or folder",
    errno.ENOTDIR: "there is no such file or folder",
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.EROFS: "the file system is read-only",
    errno.EISDIR: "this is a folder, not a file",
    errno.ENOSPC: "no space is left there",
    errno.EFBIG: "it grows larger than a file may be there",
    errno.EDQUOT: "no space is left there: the quota is used up",
    errno.ENAMETOOLONG: "the name is too long",
}
# Of errors that fsspec raises without a number.
_NUMBERS = {FileNotFoundError: errno.ENOENT, PermissionError: errno.EACCES, IsADirectoryError: errno.EISDIR}
# Their errors have no base in common with Python's.
_CLIENTS = {"botocore", "aiobotocore", "aiohttp", "gcsfs", "azure"}


class BadFile(Exception):
    """A file cannot be read or written; one sentence that names it.

    Attributes:
        retryable: the store or the network failed, so that the same may succeed later.
    """

    def __init__(self, address: str, what: str, *, retryable: bool = False) -> None:
        super().__init__(f"{shown(address)}: {what}")
        self.retryable = retryable


@contextmanager
def told(address: str) -> Iterator[None]:
    """Tell every failure of a file, its store or its format as `BadFile`; a mistake in the code stays what it is."""
    try:
        yield
    except BadFile:
        raise
    except Exception as error:
        guess = next((_NUMBERS[kind] for kind in _NUMBERS if isinstance(error, kind)), 0)
        number = getattr(error, "errno", None) or guess
        # A client's own words may hold the whole address.
        text = shown(" ".join(str(getattr(error, "strerror", None) or error).split()))[:300] or type(error).__name__
        if number in _SENTENCES:
            raise BadFile(address, _SENTENCES[number]) from error
        if isinstance(error, EOFError | zlib.error) or type(error).__name__ == "BadGzipFile":
            raise BadFile(address, f"it is no gzip file, or a damaged one: {text}") from error
        # Arrow's own OSError speaks of contents that do not unpack; it has no number.
        if isinstance(error, pa.ArrowException) or (type(error) is OSError and not number):
            raise BadFile(address, f"it is damaged: {text}") from error
        if isinstance(error, OSError) or type(error).__module__.partition(".")[0] in _CLIENTS:
            raise BadFile(address, text, retryable=True) from error
        raise


def located(address: str) -> tuple[Any, str]:
    """Return the file system and the path in it.

    Raises:
        BadFile: the store is unknown, its package is missing, or it refuses the address.
    """
    with told(address):
        try:
            store, path = fsspec.url_to_fs(address)
        except (ImportError, ValueError) as error:
            where = ", where the workers are" if isinstance(error, ImportError) else ""
            raise BadFile(address, " ".join(str(error).split()) + where) from error
        # What was listed before may have been replaced since, by another worker.
        store.invalidate_cache()
        return store, path


def opened(address: str) -> IO[bytes]:
    """Return the file, open for reading at any place. What it raises is the store's: see `told`."""
    store, path = located(address)
    return store.open(path, "rb", block_size=_READ_AHEAD)  # type: ignore[no-any-return]


def fingerprint(address: str) -> str:
    """Return what changes with the file's content, as far as its store tells: the size, and a time or an ETag."""
    store, path = located(address)
    with told(address):
        if isinstance(store, LocalFileSystem):
            status = os.stat(path)  # noqa: PTH116 - fsspec's paths are text
            return f"{status.st_size}-{status.st_mtime_ns}"
        info = store.info(path)
        return f"{info['size']}-{info.get('ETag') or info.get('etag') or store.ukey(path)}"


def size_of(address: str) -> int:
    """Return the size in bytes."""
    store, path = located(address)
    with told(address):
        info = store.info(path)
        if info["type"] == "directory":
            raise BadFile(address, _SENTENCES[errno.EISDIR])
        return int(info["size"])


def check_output(*addresses: str, overwrite: bool) -> None:
    """Look whether these files may be written, before work is spent on what goes into them.

    Raises:
        BadFile: one exists, unless `overwrite`; one is a folder; the folder is missing or takes no files.
    """
    for address in addresses:
        store, path = located(address)
        with told(address):
            if store.isdir(path):
                raise BadFile(address, _SENTENCES[errno.EISDIR])
            if not overwrite and store.exists(path):
                raise BadFile(address, "it exists already; --overwrite (overwrite=True) replaces it")
            if isinstance(store, LocalFileSystem):
                folder = os.path.dirname(path)  # noqa: PTH120 - likewise
                if not os.path.isdir(folder):  # noqa: PTH112 - likewise
                    raise BadFile(address, f"there is no folder {folder}")
                if not os.access(folder, os.W_OK | os.X_OK):
                    raise BadFile(address, f"the folder {folder} takes no files: permission denied")


def remove(address: str) -> None:
    """Remove a file, or a folder with all that is in it; none is fine."""
    store, path = located(address)
    with told(address), suppress(FileNotFoundError):
        store.rm(path, recursive=True)


def names(address: str) -> list[str]:
    """Return the names of what a folder holds; none if there is none."""
    store, path = located(address)
    with told(address), suppress(FileNotFoundError):
        return [found.rstrip("/").rpartition("/")[2] for found in store.ls(path, detail=False)]
    return []


def remove_folder(address: str) -> None:
    """Remove a folder if it is empty; a store has none that are."""
    store, path = located(address)
    if isinstance(store, LocalFileSystem):
        with suppress(OSError):
            os.rmdir(path)  # noqa: PTH106 - fsspec's paths are text


class Draft:
    """A file that appears under its address whole, at `close`, or never; a context manager that closes it on success.

    Args:
        address: of the file; missing local folders are made.
        aside: a local folder on the same disk for the unfinished file; by default the file's own. Stores need none:
            an upload is visible when it is complete.
    """

    def __init__(self, address: str, aside: str | None = None) -> None:
        self.address = address
        self.closed = False
        self.size = 0
        self._store, self._path = located(address)
        self._local = isinstance(self._store, LocalFileSystem)
        with told(address):
            if self._local:
                folder, name = os.path.split(self._path)
                folder = located(aside)[1] if aside else folder
                os.makedirs(folder, exist_ok=True)  # noqa: PTH103 - fsspec's paths are text
                # A name of its own: a worker that was taken for dead may be writing the same.
                self._temporary = os.path.join(folder, f".{name[:100]}.{secrets.token_hex(4)}")  # noqa: PTH118
                self._file: Any = open(self._temporary, "xb")  # noqa: SIM115, PTH123 - `close` closes it
            else:
                self._file = self._store.open(self._path, "wb", autocommit=False)

    def write(self, data: Any) -> int:
        """Append bytes."""
        with told(self.address):
            self._file.write(data)
        size = memoryview(data).nbytes
        self.size += size
        return size

    def flush(self) -> None:
        """Do nothing: `close` sees to it."""

    def close(self) -> None:
        """Let the file appear, on disk to stay."""
        self.closed = True
        with told(self.address):
            if self._local:
                self._file.flush()
                os.fsync(self._file.fileno())
                self._file.close()
                os.replace(self._temporary, self._path)  # noqa: PTH105 - likewise
            else:
                self._file.close()
                self._file.commit()

    def discard(self) -> None:
        """Leave nothing behind."""
        self.closed = True
        with suppress(Exception):  # it is the first failure that counts
            if self._local:
                os.unlink(self._temporary)  # noqa: PTH108 - likewise
                self._file.close()
            else:
                self._file.discard()
                # Else the collector would upload what there is.
                self._file.closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        try:
            if kind is None:
                self.close()
        finally:
            # After a successful close there is nothing to discard.
            if kind is not None:
                self.discard()
