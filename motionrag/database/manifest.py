"""`manifest.json`: what a database is and which encoders made its numbers. Its presence makes a folder a database."""

import json
import uuid
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import motionrag
from motionrag.database.durable import written_aside

NAME = "manifest.json"
FORMAT = 1


@dataclass(frozen=True)
class Manifest:
    """The settings of a database; written once, when it is created.

    Attributes:
        name: Shown to people.
        encoder: "source" (bundle) and "text_encoder" (or null): how to open the encoder again.
        fingerprints: "motion_tokens", "context_tokens", "text", "image" → hash of the weights behind them.
        embedding_dims: Retrieval key → width of its embedding.
        num_tokens: Tokens of a clip.
        token_dim: Channels of a token.
        index_factory: FAISS factory string that overrides the choice by size.
        database_id: Tells databases apart, so that an index of another one is noticed.
        created_with: Version of motionrag.
        format: Version of this layout.
    """

    name: str
    encoder: dict[str, str | None]
    fingerprints: dict[str, str]
    embedding_dims: dict[str, int]
    num_tokens: int
    token_dim: int
    index_factory: str | None = None
    database_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created_with: str = motionrag.__version__
    format: int = FORMAT

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Read the manifest of a database.

        Args:
            folder: The database.

        Returns:
            The manifest.

        Raises:
            FileNotFoundError: If the folder is no database.
            ValueError: If the manifest is damaged or of another format.
        """
        path = folder / NAME
        if not path.is_file():
            raise FileNotFoundError(
                f"There is no database at {folder}; make one with: motionrag index CLIPS --out {folder}"
            )
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is damaged ({error}); restore it from a backup, or index again.") from error
        if not isinstance(content, dict):
            raise ValueError(f"{path} is damaged (no JSON object); restore it from a backup, or index again.")
        if content.get("format") != FORMAT:
            raise ValueError(
                f"{path} has format {content.get('format')}, this version of motionrag reads {FORMAT}; index again."
            )
        known = {item.name for item in fields(cls)}
        if content.keys() != known:
            raise ValueError(f"{path} has fields {sorted(content)}, expected {sorted(known)}.")
        return cls(**content)

    def write(self, folder: Path) -> None:
        """Write the manifest durably.

        Args:
            folder: The database.
        """
        with written_aside(folder / NAME) as aside:
            aside.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")
