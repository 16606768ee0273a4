"""A bucket on loopback: the package gcp-storage-emulator, and what it leaves out of Google's storage."""

import contextlib
import os
from collections.abc import Iterator
from http import HTTPStatus
from typing import Any

import pytest


def read_all(handler: Any) -> bytes | None:
    """The body of a request; that of a process killed in its middle is dropped, not stored cut short."""
    length = int(handler.headers.get("Content-Length") or 0)
    body = handler.rfile.read(length)
    if len(body) < length:
        raise ConnectionAbortedError
    return body or None


def generation(request: Any, storage: Any, name: str) -> str:
    """The number that a write gives an object; "0" where there is none."""
    return storage.objects.get(request.params["bucket_name"], {}).get(name, {}).get("generation", "0")


@contextlib.contextmanager
def serving() -> Iterator[str]:
    """gs://bucket while it is entered, for this process and those that it starts."""
    # Read when gcsfs is imported, here or in a process; with it gcsfs asks Google what kind of bucket it is.
    os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"
    pytest.importorskip("gcsfs")
    emulator = pytest.importorskip("gcp_storage_emulator.server")
    objects = emulator.objects
    download, upload = objects.download, objects._media_upload

    def download_with_generation(request: Any, response: Any, storage: Any) -> None:
        response["x-goog-generation"] = generation(request, storage, request.params["object_id"])
        download(request, response, storage)

    def upload_on_condition(request: Any, response: Any, storage: Any) -> None:
        wanted, name = (request.query.get(k, [None])[0] for k in ("ifGenerationMatch", "name"))
        if wanted is None or wanted == generation(request, storage, name):
            upload(request, response, storage)
        else:
            response.status = HTTPStatus.PRECONDITION_FAILED

    def move(request: Any, response: Any, storage: Any) -> None:
        (bucket, name), new = (request.params[k] for k in ("bucket_name", "object_id")), request.params["new"]
        if name in storage.objects[bucket]:
            response.json(objects._copy(request.base_url, storage, bucket, name, bucket, new))
            storage.delete_file(bucket, name)
        else:
            response.status = HTTPStatus.NOT_FOUND

    route = r"^/storage/v1/b/(?P<bucket_name>[-.\w]+)/o/(?P<object_id>.+)/moveTo/o/(?P<new>.+)$"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(objects, "download", download_with_generation)
        patch.setattr(objects, "_media_upload", upload_on_condition)
        patch.setattr(emulator, "HANDLERS", ((route, {"POST": move}), *emulator.HANDLERS))
        patch.setattr(emulator, "_read_raw_data", read_all)
        patch.setattr(emulator.server.HTTPServer, "request_queue_size", 128)
        patch.setattr(emulator.server.HTTPServer, "handle_error", lambda *_: None)  # of clients that were killed
        running = emulator.create_server("127.0.0.1", 0, in_memory=True, default_bucket="bucket")
        running.start()
        address = f"http://127.0.0.1:{running._api._httpd.server_port}"
        for name in ("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL"):
            patch.setenv(name, address)
        patch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "none")
        try:
            yield "gs://bucket"
        finally:
            running.stop()
