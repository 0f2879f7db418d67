r"""Which files a command works on, and where its results go."""

__all__ = ["Job", "Writer", "list_jobs", "writing"]

import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from probnets.backend.checkpoints import replace


@dataclass(frozen=True)
class Job:
    r"""Is a file to work on, and where the result belongs.

    Arguments:
        source: The file.
        folder: The folder of the result.
        name: Its name, if the user gave it.
    """

    source: Path
    folder: Path
    name: str | None = None

    def target(self, name: str) -> Path:
        r"""Returns the file of the result, by default of this name."""
        return self.folder / (self.name or name)


def list_jobs(
    files: Sequence[Path],
    out: str | None,
    search: Callable[[Path], list[Path]],
    complain: Callable[[Exception, Path], None],
) -> list[Job]:
    r"""Lists what there is to do.

    A result lies beside its source unless `out` names a place: a file for a single source, or a
    folder, in which sub-folders of a folder of sources are kept.

    Arguments:
        files: Files and folders.
        out: The file or folder to write.
        search: Lists the files of interest in a folder.
        complain: Is told of each folder that holds none.

    Raises:
        ValueError: If `out` is a file and there are several sources.
    """
    many = len(files) > 1 or files[0].is_dir()
    if out and many and Path(out).is_file():
        raise ValueError(f"expected a folder for several results, got the file {out}")
    jobs = []
    for file in files:
        try:
            sources = search(file) if file.is_dir() else [file]
        except OSError as error:
            complain(error, file)
            continue
        base = file if file.is_dir() else file.parent
        for source in sources:
            if not out:
                jobs.append(Job(source, source.parent))
            elif many or Path(out).is_dir() or out.endswith((os.sep, "/")):
                jobs.append(Job(source, Path(out) / source.parent.relative_to(base)))
            else:
                jobs.append(Job(source, Path(out).parent, Path(out).name))
    return jobs


class Writer:
    r"""Creates a writer that spares what is there, for any number of threads.

    Arguments:
        force: Whether files may be overwritten.
    """

    def __init__(self, *, force: bool) -> None:
        self.force = force
        self._claimed: set[Path] = set()
        self._lock = threading.Lock()

    def claim(self, target: Path, source: Path | None = None) -> None:
        r"""Takes a file for one writer alone, or raises if it may not be written.

        Arguments:
            target: The file.
            source: What it is made from.

        Raises:
            FileExistsError: If there is such a file, or if it was claimed before.
            ValueError: If it is its own source.
        """
        place = target.resolve()
        if source is not None and place == source.resolve():
            raise ValueError(f"expected a result beside its source, got {target} for both")
        with self._lock:
            if place in self._claimed:
                raise FileExistsError(
                    f"expected a target for each file, got {target} twice; see -o"
                )
            self._spare(target)
            self._claimed.add(place)

    def write(self, target: Path, content: bytes) -> None:
        r"""Writes a file that is claimed, whole or not at all.

        Arguments:
            target: The file.
            content: Its content.

        Raises:
            FileExistsError: If another program has made such a file meanwhile.
            OSError: If it cannot be written.
        """
        self._spare(target)
        with writing(target):
            replace(target, content)

    def _spare(self, target: Path) -> None:
        if target.exists() and not self.force:
            raise FileExistsError(
                f"expected no file at {target}, got one; pass --force to overwrite it, or "
                "another name with -o"
            )


@contextlib.contextmanager
def writing(target: Path) -> Iterator[None]:
    r"""Says which file it was that could not be written."""
    try:
        yield
    except OSError as error:
        if error.strerror is None:  # a sentence of ours
            raise
        raise OSError(f"expected to write {target}, got: {error.strerror}") from error
