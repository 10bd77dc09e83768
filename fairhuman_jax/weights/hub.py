"""Models on the Hugging Face hub: `org/name` instead of a folder.

Files go to the hub library's own cache, from which an interrupted download goes on, and which serves without a network.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from fairhuman_jax.files import read_json
from fairhuman_jax.weights.folders import choose_weights, pipeline_parts
from fairhuman_jax.weights.tensors import shards

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
TIMEOUT = 20.0  # seconds for the hub's first answer
TOKENIZER_FILES = (
    "vocab.json",
    "merges.txt",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)


def is_hub_id(path: str | Path) -> bool:
    """Whether `path` is to be looked for on the hub: it reads `org/name`, and nothing local has that name."""
    return bool(HUB_ID.fullmatch(str(path))) and not Path(path).exists()


def fetch_model(
    repo: str, subfolder: str | None = None, variant: str | None = None, revision: str | None = None
) -> Path:
    """A local folder with `config.json` and the weights of one network of `repo`, fetched where they are not yet.

    revision: branch, tag or commit. Nothing else of the repository is fetched; without a network, what the cache holds
    is used. Raises: ValueError, one line each: no such repository, revision or network in it; a gated one; no
    connection.
    """
    folder = f"{subfolder}/" if subfolder else ""
    remote = _Repository(repo, revision)
    if remote.names is None:
        return remote.cached(f"{folder}config.json") / folder
    remote.fetch_network(folder, variant)
    return remote.root / folder


def fetch_pipeline(repo: str, variant: str | None = None, revision: str | None = None) -> Path:
    """A local pipeline folder with the parts of `repo` that `load_pipeline` reads.

    Raises: FileNotFoundError, as `fetch_model`.
    """
    remote = _Repository(repo, revision)
    if remote.names is None:
        return remote.cached("model_index.json")
    if "model_index.json" not in remote.names:
        single = [name for name in remote.names if "/" not in name and name.endswith((".safetensors", ".ckpt"))]
        hint = f"; to use its {single[0]}, download that and give its path" if single else ""
        raise FileNotFoundError(f"{repo} on the hub is no pipeline: it has no model_index.json{hint}")
    remote.fetch(["model_index.json"])
    parts = pipeline_parts(read_json(remote.root / "model_index.json"), repo)
    for name in (*parts["networks"], *parts["text_encoders"]):
        remote.fetch_network(f"{name}/", variant)
    for tokenizer in parts["tokenizers"]:
        remote.fetch(f"{tokenizer}/{name}" for name in TOKENIZER_FILES if f"{tokenizer}/{name}" in remote.names)
    remote.fetch(["scheduler/scheduler_config.json"])
    return remote.root


def fetch_file(repo: str, name: str, revision: str | None = None) -> Path:
    """One file of `repo`, fetched where it is not yet. Raises: FileNotFoundError, as `fetch_model`."""
    remote = _Repository(repo, revision)
    if remote.names is None:
        return remote.cached(name) / name
    if name not in remote.names:
        raise FileNotFoundError(f"{repo} on the hub has no {name}")
    remote.fetch([name])
    return remote.root / name


class _Repository:
    """One revision of a repository; `names` of its files is None where the hub cannot be asked."""

    def __init__(self, repo: str, revision: str | None) -> None:
        from huggingface_hub import HfApi  # slow to import, and only hub ids need it

        self.repo, self.revision = repo, revision
        self.root = Path()
        self.names: list[str] | None = None
        with _in_one_line(repo, revision):
            try:
                info = HfApi().model_info(repo, revision=revision, timeout=TIMEOUT)
                self.names = [entry.rfilename for entry in info.siblings or []]
            except Exception as error:
                if _is_answer(error):
                    raise
                self._silence = f"{type(error).__name__}: {_first_line(error)}"

    def fetch(self, names: Iterable[str]) -> None:
        """Have these files in `root`."""
        from huggingface_hub import hf_hub_download

        for name in names:
            with _in_one_line(self.repo, self.revision):
                path = hf_hub_download(self.repo, name, revision=self.revision)
            self.root = Path(path).parents[name.count("/")]

    def fetch_network(self, folder: str, variant: str | None) -> None:
        """Have the config and the weights of one network in `root`; `folder` is empty or ends with a slash."""
        names = self.names or []
        if f"{folder}config.json" not in names:
            homes = sorted(name.removesuffix("/config.json") for name in names if name.endswith("/config.json"))
            raise FileNotFoundError(
                f"{self.repo} on the hub has no {folder}config.json; folders with one: {', '.join(homes) or 'none'}"
            )
        inside = [name.removeprefix(folder) for name in names if name.startswith(folder)]
        weights = choose_weights(inside, variant, f"{self.repo}/{folder}".rstrip("/"))
        self.fetch([f"{folder}config.json", f"{folder}{weights}"])
        if weights.endswith(".json"):
            self.fetch(f"{folder}{shard.name}" for shard in shards(self.root / folder / weights))

    def cached(self, name: str) -> Path:
        """The folder in the cache that holds the file `name` of this revision."""
        from huggingface_hub import constants, try_to_load_from_cache

        path = try_to_load_from_cache(self.repo, name, revision=self.revision)
        if not isinstance(path, str):
            raise FileNotFoundError(
                f"{self.repo}: no such folder; the hub cannot be asked ({self._silence}), and {constants.HF_HUB_CACHE} "
                f"holds no {name} of it"
            )
        return Path(path).parents[name.count("/")]


@contextmanager
def _in_one_line(repo: str, revision: str | None) -> Iterator[None]:
    from huggingface_hub import constants, errors

    try:
        yield
    except errors.GatedRepoError as error:
        raise PermissionError(
            f"{repo} is gated: accept its terms at {constants.ENDPOINT}/{repo}, then log in with `hf auth login`"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"{repo}: no such folder, and no such model on the hub (a private one needs `hf auth login`)"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise FileNotFoundError(f"{repo} on the hub has no revision {revision!r}") from error
    except Exception as error:
        raise OSError(f"{repo}: the download failed, run it again to go on ({_first_line(error)})") from error


def _is_answer(error: Exception) -> bool:
    """Whether the hub has answered, if only to refuse; else there is no connection, or one is not wanted."""
    from huggingface_hub import errors

    return isinstance(error, (errors.RepositoryNotFoundError, errors.RevisionNotFoundError))


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
