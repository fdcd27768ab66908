"""The weights that sdzoo knows on the Hub: at which commit, and what they must be. None are published yet."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """A repository, the commit of it that was measured, and the sha256 of its ``model.safetensors``."""

    repo: str
    commit: str
    sha256: str

    def cfg(self) -> dict[str, str]:
        """Return what makes timm load these weights, and never a pickle, by a line in a family's ``default_cfgs``."""
        return {"hf_hub_id": f"{self.repo}@{self.commit}", "hf_hub_filename": "model.safetensors"}


PUBLISHED: tuple[Published, ...] = ()


def known(repo: str, commit: str | None = None) -> Published | None:
    """Return what is known of ``repo``, at ``commit`` if it is given; None if nothing is."""
    return next((one for one in PUBLISHED if one.repo == repo and commit in (None, one.commit)), None)
