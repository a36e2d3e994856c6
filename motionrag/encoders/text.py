"""The retrieval encoder for captions and prompts: a sentence-transformers model.

It holds the library's own model, frozen. It embeds texts only, in their own space; for images and texts in one space
see `clip.py`. `trust_remote_code` is never set.

Shapes: b batch, d embedding width.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from motionrag.encoders.fingerprint import fingerprint, tokenizer_hash
from motionrag.encoders.pretrained import freeze, raise_for_keys

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

_DOWNLOADED = ["*.json", "*.txt", "*.model", "*.safetensors"]
# Configurations, vocabularies and weights, but neither pickles nor code.

_BOOKKEEPING = ("_name_or_path", "architectures", "dtype", "transformers_version", "use_cache")
# Entries of a transformers config that say where a model comes from, not what it computes.


def check_texts(texts: Sequence[str]) -> None:
    """Refuse anything but a sequence of strings.

    Args:
        texts: What the caller passed.

    Raises:
        ValueError: If it is a single string, which would be read letter by letter, or holds something else.
    """
    if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"texts must be a list of strings, got {texts!r:.80}")


class SentenceEncoder(nn.Module):
    """A frozen sentence-transformers model: texts to L2-normalised embeddings.

    Attributes:
        fingerprint: Hash of weights, settings and vocabulary as given to the constructor; `.to()` does not change it.
        embedding_dim: Width of the embeddings.

    Args:
        model: The model, loaded or built in code; it is frozen in place.

    Raises:
        ValueError: If a weight is not finite.
    """

    def __init__(self, model: "SentenceTransformer") -> None:
        super().__init__()
        freeze(model, source="sentence-transformers model")
        self.model = model
        dimension: Any = model.truncate_dim or model.get_embedding_dimension()
        self.embedding_dim = int(dimension)
        self.fingerprint = fingerprint("SentenceEncoder", _settings(model), model)

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **hub_kwargs: Any,
    ) -> "SentenceEncoder":
        """Load a sentence-transformers model, strictly and from safetensors.

        Args:
            source: Hub id or local folder.
            device: Where to run; None: the CPU.
            dtype: Working precision; None: float32.
            **hub_kwargs: Passed to the hub: `revision`, `cache_dir`, `token`, `local_files_only`.

        Returns:
            The encoder.

        Raises:
            ValueError: If weights are missing, are pickles, or need code from the model's folder.
        """
        from huggingface_hub import snapshot_download
        from sentence_transformers import SentenceTransformer

        folder = Path(source)
        if not folder.is_dir():
            folder = Path(snapshot_download(str(source), allow_patterns=_DOWNLOADED, **hub_kwargs))
        _refuse_pickles(folder)
        try:
            model = SentenceTransformer(
                str(folder),
                device="cpu",
                trust_remote_code=False,
                local_files_only=True,
                model_kwargs={"use_safetensors": True, "dtype": torch.float32},
            )
        except (KeyError, RuntimeError) as error:  # how its modules report a weight that is not in the file
            raise ValueError(f"{source}: weights are missing or do not fit ({error}); fetch the model again") from error
        _check_transformers(model, folder)
        return cls(model.float()).to(device=device, dtype=dtype)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write an ordinary sentence-transformers folder.

        Args:
            folder: Created if it does not exist.
        """
        self.model.save_pretrained(str(folder), create_model_card=False)

    @property
    def device(self) -> torch.device:
        """Where the encoder runs."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The working precision."""
        return next(self.model.parameters()).dtype

    def train(self, mode: bool = True) -> "SentenceEncoder":
        """Stay in evaluation mode, whatever a surrounding module switches to."""
        return super().train(False)

    @torch.no_grad()
    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Embed texts.

        Args:
            texts: Texts; what exceeds the model's maximum length is cut.

        Returns:
            Embeddings `(b d)`, float32, L2-normalised, on the encoder's device.

        Raises:
            ValueError: If `texts` is a single string or holds anything but strings, or if a text has no direction,
                as the empty text in a model that averages token vectors.
        """
        check_texts(texts)
        if not texts:
            return torch.empty(0, self.embedding_dim, device=self.device)
        encoded = self.model.encode(list(texts), convert_to_tensor=True, show_progress_bar=False)
        # The library encodes in inference mode; its tensors could not be used in training.
        embeddings = encoded.to(self.device).float().clone()
        lengths = embeddings.norm(dim=-1)
        if not bool((lengths > 0).all()):
            empty = int((~(lengths > 0)).nonzero()[0])
            raise ValueError(f"text {empty} ({texts[empty]!r}) has no embedding: the model knows none of its words")
        return F.normalize(embeddings, dim=-1)


def _settings(model: "SentenceTransformer") -> dict[str, Any]:
    modules: list[Any] = list(model)
    networks = [module.auto_model.config.to_diff_dict() for module in modules if hasattr(module, "auto_model")]
    return {
        "max_seq_length": str(model.max_seq_length),
        "modules": [[type(module).__name__, module.get_config_dict()] for module in modules],
        "networks": [{k: v for k, v in config.items() if k not in _BOOKKEEPING} for config in networks],
        "prompts": [model.prompts, model.default_prompt_name],
        "tokenizer": tokenizer_hash(model.tokenizer),
        "truncate_dim": model.truncate_dim,
    }


def _refuse_pickles(folder: Path) -> None:
    for pickled in folder.rglob("pytorch_model.bin"):
        if not pickled.with_name("model.safetensors").is_file():
            raise ValueError(f"{pickled}: weights are read from model.safetensors only; convert the model first")


def _check_transformers(model: "SentenceTransformer", folder: Path) -> None:
    """Insist on every weight of the transformers models inside, which the library fills with random ones if missing."""
    listing = folder / "modules.json"
    modules = json.loads(listing.read_text(encoding="utf-8")) if listing.is_file() else [{"path": ""}]
    for module, entry in zip(model, modules, strict=False):
        network = getattr(module, "auto_model", None)
        if network is None:
            continue
        _, report = type(network).from_pretrained(
            folder / entry["path"], config=network.config, use_safetensors=True, output_loading_info=True
        )
        missing: set[str] = report["missing_keys"]
        if missing and all(key.startswith("pooler.") for key in missing):
            network.pooler = None  # sentence-transformers pools by itself: this layer is optional and never read
        else:
            raise_for_keys(folder, type(network).__name__, {"missing": missing})
