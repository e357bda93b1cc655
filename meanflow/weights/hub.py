"""Fetches files from the Hugging Face hub, through its own cache.

An address is hf://OWNER/NAME[@REVISION][/PATH], PATH a file or a folder; without it, the whole repository.
HF_HUB_OFFLINE, HF_HOME, HF_ENDPOINT and HF_TOKEN mean what they mean to huggingface_hub.
"""

import contextlib
import pathlib
import re
from collections.abc import Iterator

from meanflow.errors import UserError

SCHEME = "hf://"
ADDRESS = re.compile(r"hf://([\w.-]+/[\w.-]+)(?:@([^/]+))?(?:/(.+?))?/?")
LEFT_OUT = ["*.png", "*.jpg", "*.jpeg", "*.gif", "*.mp4", "*.npz", "*.ipynb"]  # in a folder of weights


def is_address(source: object) -> bool:
    """Return whether this names something on the hub."""
    return str(source).startswith(SCHEME)


def locate(address: str) -> pathlib.Path:
    """Return the local path of what an address names, fetched unless it is in the cache.  Raises UserError."""
    match = ADDRESS.fullmatch(address)
    if not match:
        raise UserError(f"{address} is not an address on the hub: it is hf://OWNER/NAME[@REVISION][/PATH]")
    repo, revision, path = match.groups()
    with reaching(address, repo):
        import huggingface_hub

        if path and pathlib.PurePosixPath(path).suffix:
            return pathlib.Path(huggingface_hub.hf_hub_download(repo, path, revision=revision))
        wanted = [f"{path}/*"] if path else None
        root = pathlib.Path(
            huggingface_hub.snapshot_download(repo, revision=revision, allow_patterns=wanted, ignore_patterns=LEFT_OUT)
        )
    found = root / path if path else root
    if not found.exists():
        raise UserError(f"cannot fetch {address}: there is no {path} in {repo}")
    return found


def fetch(repo: str, *names: str, what: str) -> pathlib.Path:
    """Return the local path of the first of these files that a repository has.

    what: what is fetched, for the UserError if there is none, or the hub is out of reach.
    """
    with reaching(what, repo):
        import huggingface_hub
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

        for name in names[:-1]:
            try:
                return pathlib.Path(huggingface_hub.hf_hub_download(repo, name))
            except LocalEntryNotFoundError:  # the hub is out of reach; says nothing about the file
                raise
            except EntryNotFoundError:
                continue
        return pathlib.Path(huggingface_hub.hf_hub_download(repo, names[-1]))


def check_repository(address: str) -> tuple[str, str | None]:
    """Return OWNER/NAME and the revision of a repository's address.  Raises UserError if it is none."""
    match = ADDRESS.fullmatch(address)
    if not match or match[3]:
        raise UserError(f"{address} is not a repository on the hub: it is hf://OWNER/NAME[@REVISION]")
    return match[1], match[2]


def push(folder: pathlib.Path, address: str, message: str) -> str:
    """Upload a folder to a repository, which is made if there is none, and return the address of the commit.

    Raises UserError if that is not possible.
    """
    repo, revision = check_repository(address)
    with reaching(address, repo, "upload to"):
        import huggingface_hub

        huggingface_hub.create_repo(repo, exist_ok=True)
        return str(
            huggingface_hub.upload_folder(
                repo_id=repo, folder_path=str(folder), revision=revision, commit_message=message
            )
        )


@contextlib.contextmanager
def reaching(what: str, repo: str, doing: str = "fetch") -> Iterator[None]:
    """Turn what goes wrong with the hub into a UserError with the way out.  doing: `fetch` or `upload to`."""
    try:
        from huggingface_hub import errors
    except ModuleNotFoundError as error:
        raise UserError(
            f"to {doing} {what} needs the package huggingface_hub, which is not installed: "
            'pip install --constraint constraints.txt -e ".[latents]"'
        ) from error
    try:
        yield
    except errors.LocalEntryNotFoundError as error:  # neither in the cache nor within reach
        raise out_of_reach(what, repo, error) from error
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.EntryNotFoundError) as error:
        raise UserError(
            f"cannot {doing} {what}: {one_line(error)}  See what there is at https://huggingface.co/{repo}; a private "
            "repository needs a token (hf auth login)"
        ) from error
    except (errors.HfHubHTTPError, OSError, ValueError) as error:
        if doing != "fetch":
            raise UserError(f"cannot {doing} {what}: {one_line(error)}  (hf auth login stores a token)") from error
        raise out_of_reach(what, repo, error) from error


def out_of_reach(what: str, repo: str, error: Exception) -> UserError:
    """Return the error for what is neither in the cache nor can be fetched."""
    return UserError(
        f"cannot fetch {what}: {one_line(error)}  On a machine without a network, copy the directory from one that has "
        f"it (hf download {repo} --local-dir DIR), and name DIR instead."
    )


def one_line(error: Exception) -> str:
    return f"{' '.join(str(error).split()):.300}"
