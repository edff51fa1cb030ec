"""Division of the documents of a source into training and held-out text.

The decision is local to a document, so it does not depend on workers or interruptions. A hash of
the content decides for documents below `LONG_BYTES`; a longer one is trained on except for its
tail, which is held out. If the hashes of all documents would hold out too little or too much, as
with one file or a few, every document gives its tail.
"""

import hashlib
from collections.abc import Iterable

LONG_BYTES = 2**20
# The hashes decide once this much text falls to either split, in about the wanted proportion, or
# after this much in total.
ENOUGH_BYTES, MAX_READ_BYTES = 2**12, 2**28


def is_validation(text: str | bytes, fraction: float) -> bool:
    """Return whether a short document belongs to the validation split.

    This depends only on a hash of the content, so no document changes splits when the corpus grows.

    Args:
        text: The document, as a string or as UTF-8.
    """
    content = text.encode() if isinstance(text, str) else text
    digest = hashlib.blake2b(content, digest_size=8, person=b"llamesh-split").digest()
    return int.from_bytes(digest, "little") < fraction * 2**64


def tail_threshold(documents: Iterable[bytes], fraction: float) -> int:
    """Return the size in bytes from which the documents of a source give their tail.

    Reads documents until both splits have enough text; `LONG_BYTES` then. 0 if the hashes of all
    documents hold out less than half of `fraction` of the text, more than twice of it, or all.
    """
    n_bytes, n_held_out, is_near = 0, 0.0, True
    for content in documents if fraction else ():
        n_bytes += len(content)
        if len(content) >= LONG_BYTES:
            n_held_out += fraction * len(content)
        elif is_validation(content, fraction):
            n_held_out += len(content)
        is_near = fraction / 2 * n_bytes <= n_held_out <= 2 * fraction * n_bytes
        is_enough = is_near and min(n_held_out, n_bytes - n_held_out) >= ENOUGH_BYTES
        if is_enough or n_bytes >= MAX_READ_BYTES:
            return LONG_BYTES
    return LONG_BYTES if is_near and n_held_out < n_bytes else 0


def split_document(
    text: str, content: bytes, fraction: float, threshold: int = LONG_BYTES
) -> tuple[str, str]:
    """Return the training and the held-out text of a document; either may be empty.

    Args:
        content: The text as UTF-8.
        threshold: `tail_threshold(…)` of the source.
    """
    if not fraction:
        return text, ""
    if len(content) < threshold:
        return ("", text) if is_validation(content, fraction) else (text, "")
    n_tail = round(len(text) * fraction)
    cut = len(text) - n_tail
    line, word = (text.find(separator, cut, cut + n_tail // 8) for separator in "\n ")
    if line >= 0:
        cut = line + 1
    elif word >= 0:
        cut = word  # tokens start with the space
    return text[:cut], text[cut:]
