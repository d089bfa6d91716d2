"""Download of the published files into the user's cache, each checked against its checksum.

Two environment variables change where from and where to:

- ``BLOCKPROP_CACHE``: the folder to keep files in, instead of the operating system's cache folder.
- ``BLOCKPROP_MIRROR``: a base URL that serves every file under the paths of `CHECKSUMS`.
"""

import os
from pathlib import Path, PurePosixPath

import pooch  # type: ignore[import-untyped]
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

HOSTS = {
    "": "https://www.cs.toronto.edu/~kriz",
    "fashion-mnist": "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com",
    "mnist": "https://ossci-datasets.s3.amazonaws.com/mnist",
    "tinyshakespeare": "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare",
}
"""URL of the folder that the files of each folder of `CHECKSUMS` are published in."""

CHECKSUMS = {
    "cifar-10-binary.tar.gz": "md5:c32a1d4ab5d03f1284b67883e8d87530",
    "fashion-mnist/train-images-idx3-ubyte.gz": "md5:8d4fb7e6c68d591d4c3dfef9ec88bf0d",
    "fashion-mnist/train-labels-idx1-ubyte.gz": "md5:25c81989df183df01b3e8a0aad5dffbe",
    "fashion-mnist/t10k-images-idx3-ubyte.gz": "md5:bef4ecab320f06d8554ea6380940ec79",
    "fashion-mnist/t10k-labels-idx1-ubyte.gz": "md5:bb300cfdad3c16e7a12a480ee83cd310",
    "mnist/train-images-idx3-ubyte.gz": "md5:f68b3c2dcbeaaa9fbdd348bbdeb94873",
    "mnist/train-labels-idx1-ubyte.gz": "md5:d53e105ee54ea40749a09fcbcd1e9432",
    "mnist/t10k-images-idx3-ubyte.gz": "md5:9fb629c4189551a2d022fa330f9573f3",
    "mnist/t10k-labels-idx1-ubyte.gz": "md5:ec29112dd5afa0611ce80d1b7f02629c",
    "tinyshakespeare/input.txt": "sha256:86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
}
"""Published checksum of every file, by its path in the cache and on a mirror."""


def cache_folder() -> Path:
    """Folder that downloads are kept in: ``BLOCKPROP_CACHE``, or the operating system's cache folder."""
    return Path(os.environ.get("BLOCKPROP_CACHE") or pooch.os_cache("blockprop")).expanduser()


def fetch(path: str) -> Path:
    """Give one published file from the cache, downloading it first if it is absent or damaged.

    The file appears in the cache only once it is whole and its checksum is right.

    Args:
        path: One of the paths of `CHECKSUMS`.

    Returns:
        The file's path in the cache.

    Raises:
        ValueError: If the download fails or what arrives has another checksum.
    """
    target = cache_folder() / path
    url = _url(path)
    try:
        pooch.retrieve(url, known_hash=CHECKSUMS[path], fname=target.name, path=target.parent, downloader=_download)
    except OSError as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"cannot download {url} to {target} ({reason}): check the network, "
            f"or name a folder that holds the published files as data_dir (--data-dir)"
        ) from error
    except ValueError as error:
        raise ValueError(
            f"{url} arrived with a wrong checksum, expected {CHECKSUMS[path]}, and was not kept: "
            f"try again, or name a folder that holds the published files as data_dir (--data-dir)"
        ) from error
    return target


def _download(url: str, output_file: str, caller: object) -> None:
    console = Console(stderr=True)
    with Progress(
        TextColumn(PurePosixPath(url).name),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as progress:
        pooch.HTTPDownloader(progressbar=_Bar(progress), chunk_size=1 << 16)(url, output_file, caller)


def _url(path: str) -> str:
    if mirror := os.environ.get("BLOCKPROP_MIRROR"):
        return f"{mirror.rstrip('/')}/{path}"
    published = PurePosixPath(path)
    return f"{HOSTS[str(published.parent).removeprefix('.')]}/{published.name}"


class _Bar:
    """The interface that pooch asks of a progress bar, on top of rich."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task = progress.add_task("download", total=None)

    @property
    def total(self) -> float | None:
        return self._progress.tasks[self._task].total

    @total.setter
    def total(self, size: int) -> None:
        # A server that does not tell the size is reported as 0, which rich would show as finished.
        self._progress.update(self._task, total=size or None)

    def update(self, size: int) -> None:
        self._progress.advance(self._task, size)

    def reset(self) -> None:
        self._progress.update(self._task, completed=0)

    def close(self) -> None:
        self._progress.stop_task(self._task)
