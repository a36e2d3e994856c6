"""Fingerprints: one short hash that says whether two encoders give the same numbers for the same input.

A database stores the fingerprints of the encoders that filled it. The hash covers what decides an encoder's output:
its kind, its settings (preprocessing, the parts of the architecture that no weight shows) and its weights. It does
not cover where or how the encoder runs: device, working precision, batch size. So it is taken from the weights as
loaded, before any conversion to a working precision.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

FORMAT = 1
"""Raised when the recipe below changes, so that old and new fingerprints cannot be taken for each other."""


def fingerprint(kind: str, settings: Mapping[str, Any], model: nn.Module) -> str:
    """Hash an encoder.

    Tensors are taken in the module's own order and without their names: libraries rename modules between releases
    (transformers renamed DINOv2's attention within version 5), which must not orphan a database. Exchanging two
    tensors still changes the hash. Values are cast to float32 (integers to int64) first, so that the same numbers
    give the same hash whether a file or a loader keeps them in 16 or in 32 bits.

    Args:
        kind: Name of the encoder class.
        settings: Everything else that decides the output, as JSON values.
        model: The network; its state dict is hashed, on whichever device it is.

    Returns:
        32 hexadecimal characters.
    """
    head = json.dumps({"format": FORMAT, "kind": kind, "settings": settings}, sort_keys=True, allow_nan=False)
    digest = hashlib.sha256(head.encode())
    for tensor in model.state_dict().values():
        digest.update(f"\n{tuple(tensor.shape)}\n".encode())
        digest.update(_canonical_bytes(tensor))
    return digest.hexdigest()[:32]


def tokenizer_hash(tokenizer: Any) -> str:
    """Hash what a tokeniser turns texts into.

    Args:
        tokenizer: A transformers tokeniser, a `tokenizers.Tokenizer`, or open_clip's `SimpleTokenizer`.

    Returns:
        64 hexadecimal characters.
    """
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    if hasattr(backend, "to_str"):
        content = json.loads(backend.to_str())
        content.pop("padding")  # follows the batch
        if backend is not tokenizer:
            content.pop("truncation")  # transformers sets it anew in every call, from settings hashed elsewhere
    elif hasattr(backend, "get_vocab"):
        content = backend.get_vocab()
    else:
        content = {"vocabulary": backend.encoder, "context_length": backend.context_length}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _canonical_bytes(tensor: Tensor) -> memoryview:
    dtype = torch.float32 if tensor.is_floating_point() else torch.int64
    return tensor.detach().to(device="cpu", dtype=dtype).contiguous().numpy().reshape(-1).view("uint8").data
