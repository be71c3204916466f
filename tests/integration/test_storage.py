"""`Storage` on a real S3 server: bulk deletes, conditional reads, timeouts and outages."""

import socket
import threading
import time
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from farm.errors import NotFound, StorageUnavailable
from farm.objects.storage import Storage
from farm.settings import Settings
from farm.specs.object_keys import checkpoint_key, image_key, preview_key, trajectory_keys


def test_many_objects_are_deleted_at_once_and_missing_ones_are_no_error(storage: Storage) -> None:
    for number in range(3):
        storage.put(f"b/{number}", b"x")
    storage.delete_many(["b/0", "b/2", *(f"gone/{number}" for number in range(1500))])
    assert list(storage.keys()) == ["b/1"]
    storage.delete_many([])


def test_a_bulk_delete_without_a_bucket_is_an_error(storage: Storage) -> None:
    storage.bucket = "there-is-no-such-bucket"
    with pytest.raises((StorageUnavailable, NotFound)):
        storage.delete_many(["a"])


def test_an_object_is_fetched_again_only_when_it_has_changed(storage: Storage) -> None:
    with pytest.raises(NotFound):
        storage.get_if_changed("p.png")
    storage.put("p.png", b"one")
    found = storage.get_if_changed("p.png")
    assert found is not None
    data, etag = found
    assert data == b"one"
    assert storage.get_if_changed("p.png", etag) is None
    storage.put("p.png", b"two")
    changed = storage.get_if_changed("p.png", etag)
    assert changed is not None
    assert changed[0] == b"two"


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="needs TCP_USER_TIMEOUT")
def test_what_is_under_way_when_the_network_is_cut_does_not_come_after_a_lease(
    storage: Storage, embedded: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, plain = [], socket.socket.setsockopt
    monkeypatch.setattr(socket.socket, "setsockopt", lambda *args: given.append(args[1:]) or plain(*args))
    settings = embedded.model_copy(update={"s3_bucket": storage.bucket, "lease_seconds": 7.0})
    Storage(settings).put("b/0", b"x")
    assert (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 7000) in given


def test_keys_of_one_attempt_stand_together_and_apart_from_other_attempts() -> None:
    assert checkpoint_key("b", 7, 2) == "b/00007.a2.checkpoint.safetensors"
    assert preview_key("b", 7, 2) == "b/00007.a2.preview.png"
    assert trajectory_keys(image_key("b", 7, 2, "A Cat.png")) == (
        "b/00007-a-cat-png.a2.trajectory.png",
        "b/00007-a-cat-png.a2.trajectory.webp",
    )


class NotHere(BaseHTTPRequestHandler):
    """The answer of a gateway while the object store behind it restarts."""

    def do_PUT(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_error(404, "page not found")

    def do_GET(self) -> None:
        self.send_error(404, "page not found")

    def do_HEAD(self) -> None:
        self.send_error(404)

    def do_POST(self) -> None:
        self.do_PUT()

    def log_message(self, *_: object) -> None:
        pass


def test_a_404_of_something_before_the_object_store_is_an_outage_and_no_missing_object(storage: Storage) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), NotHere) as gateway:
        threading.Thread(target=gateway.serve_forever, daemon=True).start()
        there = f"http://127.0.0.1:{gateway.server_port}"
        with closing(Storage(storage._settings.model_copy(update={"s3_endpoint_url": there}))) as behind:
            for call in (
                lambda: behind.put("b/0", b"x"),
                lambda: behind.get("b/0"),
                lambda: behind.delete_many(["b/0"]),
                lambda: list(behind.keys("b/")),
                lambda: behind.copy("b/0", "b/1"),
            ):
                with pytest.raises(StorageUnavailable, match="404"):
                    call()
        gateway.shutdown()
    with pytest.raises(NotFound):
        storage.get("b/gone")


def test_whether_an_object_store_answers_is_known_soon_where_it_hangs(storage: Storage) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts connections, and never answers
        there = f"http://127.0.0.1:{silent.getsockname()[1]}"
        hangs = Storage(storage._settings.model_copy(update={"s3_endpoint_url": there}))
        began = time.monotonic()
        with pytest.raises(StorageUnavailable) as raised:
            hangs.ping()
        assert time.monotonic() - began < 30
        assert len(str(raised.value).splitlines()) == 1
        hangs.close()
