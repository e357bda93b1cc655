"""The files of a folder or .zip, and the labels in an index file among them."""

import contextlib
import os
import pathlib
import stat
import threading
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence

from absl import logging

from meanflow.data import label_files
from meanflow.errors import UserError

# Added to zips and disks by operating systems; Synology's @eaDir contains thumbnails.
IGNORED = ("__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found")
ARCHIVES = ("7z", "bz2", "gz", "rar", "tar", "tgz", "zip")
COMPRESSIONS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
ENCRYPTED, UTF8 = 0x1, 0x800  # flags of a zip's entry
# Errors from reading a truncated or corrupt file in a zip.
DAMAGED = (EOFError, NotImplementedError, RuntimeError, zipfile.BadZipFile, zlib.error)
Listing = tuple[list[str], set[str]]


class Folder:
    """The files of a folder."""

    def __init__(self, path: str):
        self.path = path

    def list(self) -> Listing:
        """Return the paths of all files, with /, and the names of the top-level folders, without hidden ones.

        Links are followed, each folder once: links to a folder around them are left out with a warning.
        Raises UserError for broken links, and for links that put a folder below two top-level folders.
        """
        names, folders, links = _walk(self.path, "")
        seen = _Seen(self.path)
        if links:
            seen.add("", folders)
        while links:
            links.sort()
            link = links.pop(0)
            if seen.leads_on(link):
                more_names, more_folders, more_links = _walk(self.path, link)
                seen.add(link, more_folders)
                names.extend(more_names)
                folders.extend(more_folders)
                links.extend(more_links)
        return names, {folder for folder in folders if folder and "/" not in folder}

    def read(self, name: str) -> bytes:
        """Return the bytes of a file."""
        return pathlib.Path(self.path, name).read_bytes()


class Zip:
    """The files of a zip; each process opens it once, for all its threads."""

    def __init__(self, path: str):
        """Raises UserError unless this is a zip with readable files."""
        self.path = path
        self._lock, self._opened = threading.Lock(), (0, None)
        self._open()

    def list(self) -> Listing:
        """Return the paths of all files, with /, and the names of the top-level folders, without hidden ones."""
        paths = list(self._open()[1])
        return [p for p in paths if not p.endswith("/")], {path.split("/")[0] for path in paths if "/" in path}

    def read(self, name: str) -> bytes:
        """Return the bytes of a file.  Raises KeyError if there is none of this name."""
        file, entries = self._open()
        return file.read(entries[name])

    def _open(self) -> tuple[zipfile.ZipFile, dict[str, zipfile.ZipInfo]]:
        """Return the zip and its entries by path."""
        with self._lock:
            process, opened = self._opened
            if opened is None or process != os.getpid():  # a fork would share the position in the file
                try:
                    file = zipfile.ZipFile(self.path)
                except (OSError, zipfile.BadZipFile, NotImplementedError) as error:
                    raise UserError(
                        f"cannot open {self.path} as a zip: {error}.  Give a folder, or repair it"
                    ) from error
                opened = file, _entries(file, self.path)
                self._opened = os.getpid(), opened
            return opened

    def __getstate__(self) -> str:
        return self.path

    def __setstate__(self, path: str) -> None:
        self.path = path
        self._lock, self._opened = threading.Lock(), (0, None)


def read_index(files: Folder | Zip) -> dict[str, int] | None:
    """Return the labels by name in the index of the files, names as `plain_path`; None if it has null for labels.

    Raises UserError as `label_files.parse`.
    """
    path = f"{files.path}/{label_files.INDEX}"
    try:
        content = files.read(label_files.INDEX)
    except (OSError, LookupError, *DAMAGED) as error:
        raise UserError(f"cannot read the labels of {path}: {error}.  Copy it again") from error
    pairs = label_files.parse(content, path, plain_path)
    return None if pairs is None else dict(pairs)


def plain_path(name: str) -> str:
    """Return a path with / as separator, without . parts and leading /; a trailing / stays."""
    name = name.replace("\\", "/")
    path = "/".join(part for part in name.split("/") if part not in ("", "."))
    return path + "/" if path and name.endswith("/") else path


def with_suffix(names: Iterable[str], suffixes: Sequence[str], where: str) -> list[str]:
    """Return the names that end in one of the suffixes, sorted.  Raises UserError if there are none."""
    names = list(names)
    chosen = sorted(name for name in names if name.rpartition(".")[2].lower() in suffixes)
    if not chosen:
        packed = [name for name in sorted(names) if name.rpartition(".")[2].lower() in ARCHIVES]
        way_out = f"unpack its {packed[0]}, and name that" if packed else "name another"
        raise UserError(f"{where} holds no files of {', '.join(f'.{suffix}' for suffix in suffixes)}: {way_out}")
    others = len(names) - len(chosen) - (label_files.INDEX in names)
    if others:
        example = min(set(names) - set(chosen) - {label_files.INDEX})
        logging.warning("%s: %d other files are ignored, %s for one", where, others, example)
    return chosen


def labels_of(names: Sequence[str], known: Mapping[str, int], where: str) -> list[int]:
    """Return the labels of files by name.  Raises UserError for a file without a label, or a label without a file."""
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UserError(f"{where} has no label of {unknown[0]} ({len(unknown)} such files): add it, or remove the file")
    if len(known) > len(names):
        raise UserError(f"{where} names {min(set(known) - set(names))}, which is not there: copy all files")
    return [known[name] for name in names]


def is_hidden(name: str) -> bool:
    """Return whether a file or folder is not part of the data."""
    return name.startswith(".") or name in IGNORED


def _walk(root: str, start: str) -> tuple[list[str], list[str], list[str]]:
    """Return the files and folders below root/start, and the links to folders there, which are not followed.

    All are paths within `root`, without hidden ones.  `start` is the first of the folders.
    """
    names, folders, links = [], [start], []
    for folder in folders:  # grows during the loop
        for entry in _scan(root, folder):
            if is_hidden(entry.name):
                continue
            path = f"{folder}/{entry.name}" if folder else entry.name
            if _is_folder(entry):
                (links if entry.is_symlink() else folders).append(path)
            elif "\\" in entry.name:
                raise UserError(
                    f"{root}/{path} has a \\ in its name, from a zip of Windows unpacked as it is: give the zip"
                )
            else:
                names.append(path)
    return names, folders, links


def _scan(root: str, folder: str) -> Iterator[os.DirEntry[str]]:
    try:
        with os.scandir(os.path.join(root, folder)) as entries:
            yield from entries
    except OSError as error:
        raise UserError(f"cannot list {error.filename}: {error.strerror}.  Make it readable") from error


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Return whether this is a folder or a link to one, not a file.  Raises UserError for anything else."""
    with contextlib.suppress(OSError):  # a circular link
        if entry.is_dir():
            return True
        if entry.is_file():
            return False
    what = "a link that leads nowhere: restore what it links to" if entry.is_symlink() else "no file: move it away"
    raise UserError(f"{entry.path} is {what}, or remove it")


class _Seen:
    """The folders listed so far, by their real paths."""

    def __init__(self, root: str):
        self._root = root
        self._listed: dict[str, str] = {}  # real path: path within the root
        self._around: dict[str, str] = {}  # real path of a folder around listed ones: path of one of them

    def add(self, start: str, folders: Iterable[str]) -> None:
        """Add the folders that `_walk` found below root/start."""
        real = os.path.realpath(os.path.join(self._root, start))
        self._listed.update((os.path.normpath(f"{real}/{folder[len(start) :]}"), folder) for folder in folders)
        for parent in pathlib.Path(real).parents:
            self._around.setdefault(str(parent), start)

    def leads_on(self, link: str) -> bool:
        """Return whether a link leads to folders not listed yet; logs a warning if it leads back.

        Raises UserError if it leads to folders of another top-level folder.
        """
        target = os.path.realpath(os.path.join(self._root, link))
        other = self._listed.get(target, self._around.get(target))
        if other is None:
            return True
        same_top = target in self._listed and link.split("/")[0] == other.split("/")[0]
        if not other or same_top:
            logging.warning("%s/%s is left out: it links to files that are listed already", self._root, link)
            return False
        raise UserError(
            f"{self._root}/{link} and {self._root}/{other} hold the same files, which would count twice: remove one"
        )


def _entries(file: zipfile.ZipFile, where: str) -> dict[str, zipfile.ZipInfo]:
    """Return the entries of a zip by their plain path, without hidden ones; paths of folders end in /.

    Raises UserError naming an entry that cannot be read, or that occurs twice.
    """
    entries: dict[str, zipfile.ZipInfo] = {}
    for entry in file.infolist():
        name = entry.filename
        if not entry.flag_bits & UTF8 and not name.isascii():
            with contextlib.suppress(UnicodeError):  # macOS writes UTF-8 without setting the flag
                name = name.encode("cp437").decode()
        path = plain_path(name)
        if not path or any(is_hidden(part) and part != ".." for part in path.rstrip("/").split("/")):
            continue
        problem = None if path.endswith("/") else _problem(entry, path)
        if path in entries and not path.endswith("/"):
            problem = "is in it twice: zip the files anew"
        if problem:
            raise UserError(f"{path} of {where} {problem}")
        entries[path] = entry
    return entries


def _problem(entry: zipfile.ZipInfo, path: str) -> str | None:
    """Return why a file of a zip cannot be read, and how to fix it; None if it can be read."""
    if ".." in path.split("/"):
        return "has .. in its path: zip the files anew"
    if entry.flag_bits & ENCRYPTED:
        return "is encrypted: unzip it with its password and give the folder, or zip that without one"
    if entry.compress_type not in COMPRESSIONS:
        return f"is compressed by method {entry.compress_type}, which Python cannot read: unzip it and give the folder"
    if stat.S_ISLNK(entry.external_attr >> 16):
        return "is a link, without what it links to: zip the files themselves"
    return None
