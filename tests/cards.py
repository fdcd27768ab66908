"""Cards as a stranger could make them: with a seal that fits what they say."""

import hashlib
import json
from pathlib import Path
from typing import Any


def put_card(folder: Path, **changed: Any) -> Path:
    """Change the card in ``folder`` and seal it anew, by the rule that :class:`sdzoo.deploy.card.Card` documents."""
    entries = json.loads((folder / "card.json").read_bytes())
    return save_card(folder, entries | changed)


def save_card(folder: Path, entries: dict[str, Any]) -> Path:
    """Write ``entries`` as the card of ``folder``, sealed."""
    content = json.dumps(entries | {"seal": "0" * 64})
    (folder / "card.json").write_text(content.replace("0" * 64, hashlib.sha256(content.encode()).hexdigest()))
    return folder
