"""Where artifacts lie: an S3 bucket (any MinIO or S3 endpoint) or a local directory, behind one protocol.

A store has a root URI; keys are paths below it. This module is the only place that speaks S3.

    store = open_store("s3://models/team-a", endpoint="http://minio:9000", access_key="...", secret_key="...")
    store = open_store("/data/sparseline")
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import unquote, urlparse

from components.runtime.errors import InputError, disk_errors

_BUSY = (500, 502, 503, 504)  # statuses after which the request is made again
_PATIENT_TRIES = 16  # over about a minute
_INCOMPLETE = ".incomplete-"  # how the names of files begin that are not whole yet


class ObjectStore(Protocol):
    """What stages need of a store. Missing objects raise FileNotFoundError; everything else that the user can
    repair (unreachable, wrong credentials, full disk) raises InputError."""

    uri: str

    def put_file(self, key: str, path: Path) -> None: ...
    def put_bytes(self, key: str, data: bytes) -> None: ...
    def get_file(self, key: str, path: Path) -> None: ...
    def get_bytes(self, key: str) -> bytes: ...
    def exists(self, key: str) -> bool: ...
    def keys(self, prefix: str = "") -> list[str]: ...
    def remove(self, key: str) -> None: ...


def key_of(store: ObjectStore, uri: str) -> str:
    """The key of `uri` in `store`. Raises InputError when `uri` lies in another store."""
    root = store.uri.rstrip("/") + "/"
    if not uri.startswith(root):
        raise InputError(f"{uri} does not lie in the store {store.uri}; give --store the store that it was written to")
    return uri[len(root) :]


class DirectoryStore:
    """A store in a local (or mounted) directory. Every object appears whole, by rename."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory.resolve()
        self.uri = self.directory.as_uri()
        try:
            with disk_errors(self.directory):
                self.directory.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise InputError(f"the store {self.directory} is a file; --store takes a directory or s3://") from error
        except OSError as error:
            raise InputError(f"the store {self.directory} cannot be made: {error.strerror}; choose another") from error

    def _path(self, key: str) -> Path:
        path = (self.directory / key).resolve()
        if not path.is_relative_to(self.directory) or path == self.directory:
            raise InputError(f"the key {key!r} points outside the store {self.directory}")
        return path

    @contextmanager
    def _whole(self, key: str) -> Iterator[Path]:
        path = self._path(key)
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, name = self._incomplete(path.parent)
            try:
                yield Path(name)
                os.fsync(handle)
                os.replace(name, path)
            except BaseException:
                Path(name).unlink(missing_ok=True)
                raise
            finally:
                os.close(handle)

    @staticmethod
    def _incomplete(folder: Path) -> tuple[int, str]:
        """A new file that is locked as long as it is open: what nobody holds was left by a writer that was killed."""
        while True:
            handle, name = tempfile.mkstemp(prefix=_INCOMPLETE, dir=folder)
            with suppress(OSError):  # a file system without locks: then nothing is swept either
                fcntl.flock(handle, fcntl.LOCK_EX)
            if os.path.exists(name):
                return handle, name
            os.close(handle)  # swept before we held it

    def sweep(self) -> int:
        """Remove what writers that were killed left half written. Returns how many files that were."""
        swept = 0
        for path in self.directory.rglob(f"{_INCOMPLETE}*"):
            with suppress(OSError), path.open("rb") as left:  # another one sweeps too, or it is being written
                fcntl.flock(left, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
                swept += 1
        return swept

    def put_file(self, key: str, path: Path) -> None:
        with self._whole(key) as target:
            shutil.copyfile(path, target)

    def put_bytes(self, key: str, data: bytes) -> None:
        with self._whole(key) as target:
            target.write_bytes(data)

    def get_file(self, key: str, path: Path) -> None:
        source = self._path(key)
        with disk_errors(path):
            shutil.copyfile(source, path)

    def get_bytes(self, key: str) -> bytes:
        return self._path(key).read_bytes()

    def exists(self, key: str) -> bool:
        return self._path(key).is_file()

    def keys(self, prefix: str = "") -> list[str]:
        files = (path for path in self.directory.rglob("*") if path.is_file())
        names = (path.relative_to(self.directory).as_posix() for path in files)
        return sorted(name for name in names if name.startswith(prefix) and not Path(name).name.startswith(_INCOMPLETE))

    def remove(self, key: str) -> None:
        self._path(key).unlink()


class S3Store:
    """A store in a bucket, through the minio client."""

    def __init__(self, uri: str, endpoint: str, access_key: str, secret_key: str, region: str = "us-east-1") -> None:
        # Imported here: a stage that runs on a directory needs neither.
        import certifi
        import urllib3
        from minio import Minio

        parsed, address = urlparse(uri), urlparse(endpoint if "//" in endpoint else f"http://{endpoint}")
        if parsed.scheme != "s3" or not parsed.netloc:
            raise InputError(f"{uri!r} is no store; write s3://BUCKET or s3://BUCKET/PREFIX")
        if address.scheme not in ("http", "https") or not address.netloc:
            raise InputError(f"the S3 endpoint {endpoint!r} is no address; write http://HOST:PORT or https://HOST")
        self.uri = uri.rstrip("/")
        self.endpoint, self.access_key, self.secret_key = endpoint, access_key, secret_key
        self.bucket, self.prefix = parsed.netloc, parsed.path.strip("/")
        self._answered = False
        self._http = http = urllib3.PoolManager(
            timeout=urllib3.Timeout(connect=5.0, read=120.0),
            retries=urllib3.Retry(total=3, backoff_factor=0.2, status_forcelist=_BUSY),
            cert_reqs="CERT_REQUIRED",
            ca_certs=os.environ.get("SSL_CERT_FILE") or certifi.where(),
        )
        self.client = Minio(
            address.netloc,
            access_key=access_key,
            secret_key=secret_key,
            secure=address.scheme == "https",
            region=region,
            http_client=http,
        )

    @contextmanager
    def _errors(self, key: str) -> Iterator[None]:
        import urllib3
        from minio.error import InvalidResponseError, S3Error

        try:
            yield
            self._has_answered()
        except S3Error as error:
            if error.code in ("NoSuchKey", "NoSuchObject", "ResourceNotFound"):
                raise FileNotFoundError(f"{self.uri}/{key}") from error
            if error.code == "NoSuchBucket":
                raise InputError(f"the bucket {self.bucket} does not exist at {self.endpoint}; create it") from error
            if error.code in (
                "AccessDenied",
                "SignatureDoesNotMatch",
                "InvalidAccessKeyId",
                "AuthorizationHeaderMalformed",
            ):
                raise InputError(
                    f"{self.endpoint} refused the credentials for {self.uri} ({error.code}); "
                    "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
                ) from error
            if error.code == "RequestTimeTooSkewed":
                raise InputError(
                    f"the clock of this machine and that of {self.endpoint} are too far apart, so that it refuses "
                    "signatures; set the clock and run the command again"
                ) from error
            raise
        except (urllib3.exceptions.HTTPError, InvalidResponseError) as error:
            reason = getattr(error, "reason", None)
            if isinstance(reason, urllib3.exceptions.ResponseError):
                raise InputError(
                    f"the object store at {self.endpoint} answers with errors ({reason}); look into its log, and "
                    "whether its disk is full"
                ) from error
            raise InputError(
                f"the object store at {self.endpoint} cannot be reached ({type(error).__name__}); "
                "check the endpoint and that the store runs"
            ) from error

    def _has_answered(self) -> None:
        """From now on be patient: a store that was there once is waited for, while a wrong address is told at once."""
        if not self._answered:
            import urllib3

            self._answered = True
            self._http.connection_pool_kw["retries"] = urllib3.Retry(
                total=_PATIENT_TRIES, status=3, backoff_factor=0.2, backoff_max=5.0, status_forcelist=_BUSY
            )
            self._http.clear()  # pools that are there already keep the old ones

    def _name(self, key: str) -> str:
        return f"{self.prefix}/{key}" if self.prefix else key

    def ensure_bucket(self) -> None:
        """Create the bucket when it does not exist."""
        with self._errors(""):
            if not self.client.bucket_exists(self.bucket):
                self.client.make_bucket(self.bucket)

    def put_file(self, key: str, path: Path) -> None:
        with self._errors(key):
            self.client.fput_object(self.bucket, self._name(key), str(path))

    def put_bytes(self, key: str, data: bytes) -> None:
        import io

        with self._errors(key):
            self.client.put_object(self.bucket, self._name(key), io.BytesIO(data), len(data))

    def get_file(self, key: str, path: Path) -> None:
        with self._errors(key), disk_errors(path):
            self.client.fget_object(self.bucket, self._name(key), str(path))

    def get_bytes(self, key: str) -> bytes:
        with self._errors(key):
            response: Any = self.client.get_object(self.bucket, self._name(key))
            try:
                return bytes(response.read())
            finally:
                response.close()
                response.release_conn()

    def exists(self, key: str) -> bool:
        try:
            with self._errors(key):
                self.client.stat_object(self.bucket, self._name(key))
        except FileNotFoundError:
            return False
        return True

    def keys(self, prefix: str = "") -> list[str]:
        skip = len(self.prefix) + 1 if self.prefix else 0
        with self._errors(prefix):
            found = self.client.list_objects(self.bucket, prefix=self._name(prefix), recursive=True)
            return sorted(item.object_name[skip:] for item in found if item.object_name)

    def remove(self, key: str) -> None:
        with self._errors(key):
            self.client.remove_object(self.bucket, self._name(key))


def open_store(
    uri: str, *, endpoint: str = "", access_key: str = "", secret_key: str = "", region: str = "us-east-1"
) -> ObjectStore:
    """The store at `uri`: `s3://bucket[/prefix]`, `file:///directory` or a directory.

    Raises InputError when the URI is no store, or S3 is asked for without endpoint or credentials.
    """
    parsed = urlparse(uri)
    if parsed.scheme == "s3":
        missing = [
            name
            for name, value in (
                ("SPARSELINE_S3_ENDPOINT", endpoint),
                ("AWS_ACCESS_KEY_ID", access_key),
                ("AWS_SECRET_ACCESS_KEY", secret_key),
            )
            if not value
        ]
        if missing:
            raise InputError(f"the store {uri} needs {', '.join(missing)} in the environment")
        return S3Store(uri, endpoint, access_key, secret_key, region)
    if parsed.scheme == "file":
        return DirectoryStore(Path(unquote(parsed.path)))
    if parsed.scheme:
        raise InputError(f"unknown kind of store {uri!r}; use s3://bucket/prefix or a directory")
    if not uri:
        raise InputError("no store is given; set SPARSELINE_STORE to s3://bucket/prefix or a directory")
    return DirectoryStore(Path(uri).expanduser())
