import gzip
import hashlib
import io
import struct
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from blockprop.data import load
from blockprop.data.download import CHECKSUMS, HOSTS, cache_folder, fetch

TEXT = b"to be or not to be\n" * 200
PATH = "tinyshakespeare/input.txt"


class Mirror:
    """A web server on the loopback that serves bytes by path, and can be made to break off in the middle."""

    def __init__(self):
        self.files = {}
        self.requests = []
        self.truncate = False
        mirror = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                path = self.path.removeprefix("/base/")
                mirror.requests.append(path)
                if path not in mirror.files:
                    self.send_error(404)
                    return
                content = mirror.files[path]
                self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content[: len(content) // 2] if mirror.truncate else content)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server.server_port}/base"

    def stop(self):
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BLOCKPROP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return tmp_path / "cache"


@pytest.fixture
def mirror(monkeypatch, cache):
    server = Mirror()
    monkeypatch.setenv("BLOCKPROP_MIRROR", server.url)

    def publish(path, content, *, checksum=True):
        server.files[path] = content
        if checksum:
            monkeypatch.setitem(CHECKSUMS, path, f"md5:{hashlib.md5(content).hexdigest()}")

    server.publish = publish
    yield server
    server.stop()


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def idx(count, *dimensions):
    shape = (count, *dimensions)
    size = count * (dimensions[0] * dimensions[1] if dimensions else 1)
    return gzip.compress(bytes([0, 0, 8, len(shape)]) + struct.pack(f">{len(shape)}I", *shape) + bytes(size))


def archive(names, *, folder="cifar-10-batches-bin", size=3073):
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as members:
        for name in names:
            member = tarfile.TarInfo(f"{folder}/{name}")
            member.size = size
            members.addfile(member, io.BytesIO(bytes(size)))
    return packed.getvalue()


BATCHES = [*(f"data_batch_{number}.bin" for number in range(1, 6)), "test_batch.bin"]


def test_a_good_download_is_kept_and_used_again_with_the_server_off(mirror, cache):
    mirror.publish(PATH, TEXT)
    first = load("shakespeare", context=8)
    assert files(cache) == [PATH]
    assert (cache / PATH).read_bytes() == TEXT
    mirror.stop()
    again = load("shakespeare", context=8)
    assert mirror.requests == [PATH]
    assert len(first.train) == len(again.train)


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
def test_the_four_idx_files_are_downloaded(mirror, cache, name):
    for part in ("train", "t10k"):
        mirror.publish(f"{name}/{part}-images-idx3-ubyte.gz", idx(10, 28, 28))
        mirror.publish(f"{name}/{part}-labels-idx1-ubyte.gz", idx(10))
    assert len(load(name).test) == 10
    assert len(files(cache / name)) == 4


def test_the_cifar_archive_is_unpacked_once(mirror, cache):
    mirror.publish("cifar-10-binary.tar.gz", archive([*BATCHES, "readme.html", "../../evil", "/evil"]))
    assert len(load("cifar10", validation=0).train) == 5
    assert files(cache.parent) == [f"cache/cifar-10-batches-bin/{name}" for name in BATCHES]
    mirror.stop()
    assert len(load("cifar10").test) == 1


def test_a_lost_cifar_file_is_downloaded_again(mirror, cache):
    mirror.publish("cifar-10-binary.tar.gz", archive(BATCHES))
    load("cifar10")
    (cache / "cifar-10-batches-bin" / BATCHES[2]).unlink()
    load("cifar10")
    assert len(mirror.requests) == 2


def linked():
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as members:
        member = tarfile.TarInfo(f"cifar-10-batches-bin/{BATCHES[0]}")
        member.type, member.linkname = tarfile.SYMTYPE, "../../secret"
        members.addfile(member)
    return packed.getvalue()


def folder_instead_of_a_file():
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as members:
        member = tarfile.TarInfo(f"cifar-10-batches-bin/{BATCHES[0]}")
        member.type = tarfile.DIRTYPE
        members.addfile(member)
    return packed.getvalue()


@pytest.mark.parametrize(
    "content",
    [archive(BATCHES[:-1]), archive(BATCHES, folder="elsewhere"), b"no archive", linked(), folder_instead_of_a_file()],
    ids=["a file missing", "another folder", "no archive", "a link", "a folder"],
)
def test_another_archive_is_refused_in_one_line(mirror, cache, content):
    (cache.parent / "secret").write_bytes(bytes(3073))
    mirror.publish("cifar-10-binary.tar.gz", content)
    with pytest.raises(ValueError, match="cannot be unpacked") as caught:
        load("cifar10")
    assert "\n" not in str(caught.value)
    assert not (cache / "cifar-10-batches-bin" / BATCHES[-1]).exists()


def test_a_wrong_checksum_leaves_no_file(mirror, cache):
    mirror.publish(PATH, TEXT, checksum=False)
    with pytest.raises(ValueError, match="arrived with a wrong checksum, expected sha256:86c4e6aa") as caught:
        load("shakespeare")
    assert mirror.url in str(caught.value)
    assert "\n" not in str(caught.value)
    assert files(cache) == []


def test_a_truncated_download_leaves_no_file(mirror, cache):
    mirror.publish(PATH, TEXT)
    mirror.truncate = True
    with pytest.raises(ValueError, match=r"cannot download|wrong checksum") as caught:
        load("shakespeare")
    assert "\n" not in str(caught.value)
    assert files(cache) == []
    mirror.truncate = False
    assert fetch(PATH).read_bytes() == TEXT


def test_a_missing_file_on_the_server_is_told(mirror, cache):
    with pytest.raises(ValueError, match=r"cannot download .*404.*--data-dir") as caught:
        load("mnist")
    assert f"{mirror.url}/mnist/train-images-idx3-ubyte.gz" in str(caught.value)
    assert files(cache) == []


def test_a_server_that_is_down_is_told(mirror, cache):
    mirror.stop()
    with pytest.raises(ValueError, match=r"cannot download .*check the network.*--data-dir") as caught:
        load("shakespeare")
    assert f"{mirror.url}/{PATH}" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert files(cache) == []


@pytest.mark.parametrize("mirror_url", ["no-url", "ftp://127.0.0.1", "http://"])
def test_a_mirror_that_is_no_web_address_is_told(monkeypatch, cache, mirror_url):
    monkeypatch.setenv("BLOCKPROP_MIRROR", mirror_url)
    with pytest.raises(ValueError, match="cannot download") as caught:
        load("shakespeare")
    assert "\n" not in str(caught.value)


def test_a_damaged_file_in_the_cache_is_replaced(mirror, cache):
    mirror.publish(PATH, TEXT)
    (cache / "tinyshakespeare").mkdir(parents=True)
    (cache / PATH).write_bytes(b"half of it")
    assert fetch(PATH).read_bytes() == TEXT


def test_a_cache_that_cannot_be_written_is_told(mirror, cache):
    mirror.publish(PATH, TEXT)
    cache.write_text("a file where the folder should be")
    with pytest.raises(ValueError, match="cannot download") as caught:
        fetch(PATH)
    assert str(cache) in str(caught.value)


def test_every_file_has_a_published_place(monkeypatch, cache):
    monkeypatch.delenv("BLOCKPROP_MIRROR", raising=False)
    asked = []

    def retrieve(url, **options):
        asked.append(url)

    monkeypatch.setattr("blockprop.data.download.pooch.retrieve", retrieve)
    for path in CHECKSUMS:
        fetch(path)
    assert len(set(asked)) == len(CHECKSUMS)
    assert "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz" in asked
    assert f"{HOSTS['mnist']}/t10k-labels-idx1-ubyte.gz" in asked


def test_the_cache_is_the_systems_unless_told(monkeypatch):
    monkeypatch.delenv("BLOCKPROP_CACHE", raising=False)
    assert cache_folder().name == "blockprop"
