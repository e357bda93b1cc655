"""Saves generated images as PNG files, or as one .npz in the layout of ADM's evaluator."""

import io
import json
import pathlib
import re

import numpy as np

from meanflow import files
from meanflow.process_group import ProcessGroup, gather_rows, pack

KINDS = ("png", "npz")
INDEX = "dataset.json"  # labels of the PNG files, in EDM2's layout


class Saver:
    """Takes the images of this process batch by batch; create one for each set of samples.

    png: DIRECTORY/000123.png for sample 123, and dataset.json with {"labels": [["000123.png", label], ...]}.
    npz: DIRECTORY/samples_uint8.npz with arr_0 uint8 [n h w c] and arr_1 the labels.  Images stay in memory
    until `finish` gathers them in the first process and writes the file.
    """

    def __init__(self, directory: pathlib.Path, kind: str):
        """kind: one of `KINDS`.  Raises UserError if the directory cannot be created."""
        self.directory, self.kind = directory, kind
        self.parts: list[dict[str, np.ndarray]] = []
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise files.cannot_write(directory, error) from error

    def add(self, indices: np.ndarray, images: np.ndarray, labels: np.ndarray) -> None:
        """Take a batch: indices [b], images uint8 [b h w c], labels [b].  Raises UserError if writing fails."""
        part = {"indices": np.asarray(indices), "labels": np.asarray(labels)}
        if self.kind == "png":
            for index, image in zip(indices, images, strict=True):
                files.replace_bytes(self.directory / name(index), png(image))
        else:
            part["images"] = images
        self.parts.append(part)

    def finish(self, group: ProcessGroup) -> pathlib.Path:
        """Write the index or the .npz of all processes' samples; every process calls it.  Returns the path."""
        rows = gather_rows(self.parts, group)
        path = self.directory / (INDEX if self.kind == "png" else "samples_uint8.npz")
        if group.process:
            return path
        if self.kind == "png":
            pairs = [[name(i), int(y)] for i, y in zip(rows["indices"], rows["labels"], strict=True)]
            files.replace_text(path, json.dumps({"labels": pairs}) + "\n")
            self._remove_others({file for file, _ in pairs})
        else:
            files.replace_bytes(path, pack({"arr_0": rows["images"], "arr_1": rows["labels"]}))
        return path

    def _remove_others(self, names: set[str]) -> None:
        """Remove surplus images of an earlier, larger set."""
        for path in self.directory.glob("*.png"):
            if re.fullmatch(r"\d{6,}\.png", path.name) and path.name not in names:
                path.unlink()


def name(index: int) -> str:
    """Return the file name of a sample."""
    return f"{index:06d}.png"


def png(image: np.ndarray) -> bytes:
    """Return an image uint8 [h w 1 or 3] as the bytes of a PNG."""
    import PIL.Image  # slow: imported only here, because all commands import this module

    buffer = io.BytesIO()
    PIL.Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image[..., :3]).save(buffer, format="PNG")
    return buffer.getvalue()
