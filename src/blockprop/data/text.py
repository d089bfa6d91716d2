"""A text as a dataset: windows of characters, each to be continued by its next character."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from blockprop.data.dataset import Dataset
from blockprop.data.files import locate
from blockprop.data.holdout import check_fraction

_TEST_FRACTION = 0.05


@dataclass(frozen=True, eq=False)
class Windows:
    """Consecutive windows of a token stream; only the stream is in memory.

    Example i reads tokens i * context .. (i + 1) * context - 1 and its targets are the same shifted by one.
    In training every window starts up to ``context - 1`` tokens later, as far as the stream reaches, so that
    over the epochs each token is seen at each position.

    Args:
        tokens: The stream, integers [n].
        context: Tokens per window.

    >>> Windows(torch.arange(7), context=3).batch(torch.tensor([1]))
    (tensor([[3, 4, 5]]), tensor([[4, 5, 6]]))
    """

    tokens: Tensor
    context: int

    def __len__(self) -> int:
        return max(len(self.tokens) - 1, 0) // self.context

    def __repr__(self) -> str:
        return f"Windows({len(self)} of {self.context} tokens)"

    def batch(self, ids: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Inputs and next tokens of the windows ``ids`` [B], both int64 [B, context]; see `Split.batch`."""
        starts = ids * self.context
        if generator is not None:
            starts = starts + torch.randint(self.context, ids.shape, generator=generator)
            starts = starts.clamp(max=len(self.tokens) - self.context - 1)
        windows = self.tokens[starts[:, None] + torch.arange(self.context + 1)].long()
        return windows[:, :-1], windows[:, 1:]

    def batch_inputs(self, ids: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Inputs of the windows ``ids`` [B], int64 [B, context]."""
        return self.batch(ids, generator)[0]

    def batch_targets(self, ids: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Next tokens of the windows ``ids`` [B], int64 [B, context]; the generator shifts them with their inputs."""
        return self.batch(ids, generator)[1]

    def only_inputs(self) -> "Windows":
        """These windows as they are: inputs and targets are the same stream, a byte a character, so nothing goes."""
        return self

    def only_targets(self) -> "Windows":
        """These windows as they are, as for `only_inputs`."""
        return self


def load(path: Path, *, name: str, validation: float = 0.1, context: int = 64) -> Dataset:
    """Load a UTF-8 text for a character-level language model.

    The last 5 % of the text are the test part, and the last ``validation`` fraction of the rest is held out.

    Args:
        path: The text file.
        name: Name of the dataset.
        validation: Fraction of the first 95 % to hold out, in [0, 1).
        context: Characters per window, at least 1.

    Returns:
        A dataset with inputs int64 [N, context], whose ``classes`` is the number of different characters.

    Raises:
        ValueError: If there is no such file, it is not UTF-8, or a part of it is too short for one window.
    """
    check_fraction(validation)
    if context < 1:
        raise ValueError(f"context is {context}; it must be at least 1: give the number of characters to look back")
    tokens, vocabulary = read(path)
    first_test = len(tokens) - round(_TEST_FRACTION * len(tokens))
    first_held = first_test - round(validation * first_test)
    parts = {
        "train": Windows(tokens[:first_held], context),
        "validation": Windows(tokens[first_held:first_test], context),
        "test": Windows(tokens[first_test:], context),
    }
    for part, windows in parts.items():
        if len(windows) == 0 and not (part == "validation" and validation == 0):
            raise ValueError(
                f"{path} leaves {len(windows.tokens)} characters for its {part} part, expected at least "
                f"{context + 1} for a context of {context}: give a longer text or a smaller context"
            )
    return Dataset(
        name, **parts, classes=len(vocabulary), input_shape=(context,), task="language", vocabulary=vocabulary
    )


def load_shakespeare(data_dir: Path | None, *, validation: float = 0.1, context: int = 64) -> Dataset:
    """Load the "tiny Shakespeare" text, 1.1 million characters; see `load` for the rest.

    Args:
        data_dir: Folder of ``tinyshakespeare/input.txt``; None for the cache, which is filled by download.
        validation: Fraction of the first 95 % to hold out, in [0, 1).
        context: Characters per window, at least 1.

    Raises:
        ValueError: If the file is missing or damaged, or the download fails.
    """
    path = locate("tinyshakespeare/input.txt", data_dir)
    return load(path, name="shakespeare", validation=validation, context=context)


def read(path: Path) -> tuple[Tensor, str]:
    """Read a UTF-8 text as tokens, numbered in the order of its sorted characters.

    Returns:
        The tokens [n], uint8 if they fit and int32 if not, and the vocabulary: token t is ``vocabulary[t]``.

    Raises:
        ValueError: If there is no such file, or it is empty or not UTF-8.
    """
    if not path.is_file():
        raise ValueError(f"{path} does not exist; expected a text file there: check its name")
    try:
        text = path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 (byte 0x{error.object[error.start]:02x} at position {error.start}), "
            f"expected UTF-8 text: convert it first"
        ) from error
    if not text:
        raise ValueError(f"{path} is empty; expected text: check its name")
    points, tokens = np.unique(np.frombuffer(text.encode("utf-32-le"), np.uint32), return_inverse=True)
    kind = np.uint8 if len(points) <= 256 else np.int32
    return torch.from_numpy(tokens.astype(kind)), "".join(map(chr, points))
