"""Where the published files of a dataset are: in a folder the user names, or in the cache."""

from pathlib import Path

from blockprop.data.download import fetch


def locate(path: str, data_dir: Path | None) -> Path:
    """Find one published file, downloading it only when no folder is named.

    Args:
        path: Published path such as "mnist/train-images-idx3-ubyte.gz"; in ``data_dir``, the file may also
            lie without its ".gz".
        data_dir: The user's folder, or None for the cache.

    Returns:
        The path of a file that exists.

    Raises:
        ValueError: If ``data_dir`` lacks the file, or the download fails.
    """
    if data_dir is None:
        return fetch(path)
    plain = data_dir / path.removesuffix(".gz")
    for candidate in (plain, data_dir / path):
        if candidate.is_file():
            return candidate
    looked_for = f"{plain}[.gz]" if path.endswith(".gz") else f"{plain}"
    raise ValueError(
        f"{looked_for} does not exist; expected the published file there: put it there, "
        f"name another folder as data_dir, or name none to download it"
    )
