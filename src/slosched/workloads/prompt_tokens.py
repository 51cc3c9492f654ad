"""Prompts as the diffusion models take them: token ids of a fixed number.

CLIP's tokenizer comes as files, and none travel with this package. So a word's id is a hash of its bytes: the
same prompt always gives the same ids, and other prompts other ones, but the ids are not those that trained
weights would know. This fits the models here, whose weights are random (daemon/backends/diffusion).
"""

from __future__ import annotations

import zlib

#: CLIP's: ids of one prompt, the size of its vocabulary, and the ids that begin and end a prompt.
TOKENS = 77
VOCABULARY = 49_408
BEGIN, END = VOCABULARY - 2, VOCABULARY - 1


def hashed_tokens(text: str) -> list[int]:
    """TOKENS ids of `text`: BEGIN, one id for each word, and END up to the end.

    Words are what white space separates, in lower case. Words past the 75th are cut off, as CLIP's tokenizer
    cuts tokens off.
    """
    words = text.lower().split()[: TOKENS - 2]
    ids = [zlib.crc32(word.encode("utf-8", "surrogatepass")) % BEGIN for word in words]
    return [BEGIN, *ids, *[END] * (TOKENS - 1 - len(ids))]
