"""Libraries of `kernels/` that are built at first use and found in the cache afterwards."""

from __future__ import annotations

import atexit
import fcntl
import hashlib
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from harmony.core.files import PACKAGE, cache_folder
from harmony.core.warn import warn
from harmony.errors import HarmonyError

_ADMINISTRATOR = 0


@dataclass(frozen=True)
class Compiled:
    """One library, compiled from the file of its own name in a folder of `kernels/`.

    Attributes:
        what: it is, in errors: ``"the virtual GPU"``.
        folder: of the sources, below `kernels/`.
        flags: of the compiler.
        error: what is raised where it cannot be built.
        depends: what else the library depends on than sources, compiler and flags.
        links: what it is compiled against, which follows from ``depends``.
        takes: how long that is, where it is long enough to be said.
    """

    what: str
    folder: str
    flags: tuple[str, ...]
    error: type[HarmonyError]
    depends: tuple[str, ...] = ()
    links: tuple[str, ...] = ()
    takes: str = ""

    def path(self) -> Path:
        """Return the built library, building it first if there is none in the cache.

        Several processes may call this at once: one builds, the others wait. What is in the cache
        is only used if it is ours, nobody else may write to it, and it is what was built; else it
        is built again. Without a folder to keep it in it is built for this process alone.

        Raises:
            HarmonyError: `error`, without a C++ compiler, or if the compiler fails.
        """
        library = self.kept()
        directory = library.parent
        if _is_sound(library):
            return library
        try:
            with _locked(directory):
                if not _is_sound(library):
                    self._build(library)
            if _is_sound(library):
                return library
            why = f"{directory} is not ours alone"
        except OSError as error:
            why = str(error)
        warn(
            f"{self.what} cannot be kept for the next run ({why}): built for this process. "
            "HARMONY_CACHE names a folder for it",
        )
        return self._build_for_now()

    def kept(self) -> Path:
        """Where the library is kept once it is built.

        Raises:
            HarmonyError: `error`, without a C++ compiler, or without the sources.
        """
        name = f"{self.folder}-{self._fingerprint()}"
        return cache_folder() / name / f"lib{self.folder}.so"

    def sources(self) -> Path:
        """Return the folder of the sources, of the checkout or of the installed package."""
        places = [PACKAGE.parent / "kernels" / self.folder, PACKAGE / "_kernels" / self.folder]
        for candidate in places:
            if self._main(candidate).exists():
                return candidate
        raise self.error(
            f"the sources of {self.what} are neither in {places[0]} nor in {places[1]}; "
            "reinstall harmony"
        )

    def compiler(self) -> str:
        """The C++ compiler: ``$CXX``, else g++ or clang++.

        Raises:
            HarmonyError: `error`, if there is none.
        """
        for name in (os.environ.get("CXX", ""), "g++", "clang++"):
            path = shutil.which(name) if name else None
            if path:
                return path
        raise self.error(
            f"no C++ compiler was found, and {self.what} is compiled at first use: install one "
            "(apt-get install g++, or dnf install gcc-c++), or name it in the variable CXX"
        )

    def command(self, output: Path) -> list[str]:
        """The command that builds the library at a place."""
        source = str(self._main(self.sources()))
        return [self.compiler(), *self.flags, source, "-o", str(output), *self.links]

    def _main(self, sources: Path) -> Path:
        return sources / f"{self.folder}.cpp"

    def _fingerprint(self) -> str:
        """Whatever the library depends on: sources, compiler, flags, and the rest."""
        compiler = self.compiler()
        version = subprocess.run(
            [compiler, "--version"], capture_output=True, text=True, errors="replace", check=False
        )
        digest = hashlib.sha256()
        for part in (*self.depends, compiler, version.stdout, *self.flags):
            digest.update(part.encode() + b"\0")
        for path in sorted(self.sources().iterdir()):
            if path.suffix in (".cpp", ".h"):
                digest.update(path.name.encode() + b"\0" + path.read_bytes())
        return digest.hexdigest()[:16]

    def _build_for_now(self) -> Path:
        """Build the library in a folder that goes when the process ends."""
        try:
            scratch = Path(tempfile.mkdtemp(prefix=f"harmony-{self.folder}-"))
            atexit.register(shutil.rmtree, scratch, ignore_errors=True)
            library = scratch / f"lib{self.folder}.so"
            self._build(library)
        except OSError as error:
            raise self.error(
                f"no place to build {self.what}: {error}. HARMONY_CACHE names a folder for it"
            ) from None
        return library

    def _build(self, library: Path) -> None:
        # Built beside its place and renamed, so that no process ever loads half a library.
        with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
            output = Path(scratch) / library.name
            command = self.command(output)
            if self.takes and sys.stderr is not None:
                sys.stderr.write(f"harmony: compiling {self.what}, once ({self.takes})\n")
            done = subprocess.run(
                command, capture_output=True, text=True, errors="replace", check=False
            )
            if done.returncode != 0:
                errors = [line for line in done.stderr.splitlines() if "error" in line]
                raise self.error(
                    f"{self.what} did not compile (Python {sys.version.split()[0]}): "
                    + "; ".join(errors[:3] or [done.stderr[-500:]])
                    + f"\nthe command was: {' '.join(command)}"
                )
            output.chmod(0o700)
            _digest_file(output).write_text(_digest(output), encoding="ascii")
            # What was there goes with its name: a folder or a link cannot be in the way.
            for made, place in ((_digest_file(output), _digest_file(library)), (output, library)):
                if place.is_dir() and not place.is_symlink():
                    shutil.rmtree(place)
                made.replace(place)


def _is_sound(library: Path) -> bool:
    """Whether a library is there, nobody else can have written to it, and no byte has changed."""
    try:
        for path in (library.parent, library):
            status = path.lstat()
            if status.st_uid not in (os.geteuid(), _ADMINISTRATOR) or status.st_mode & 0o022:
                return False
        if not stat.S_ISREG(library.lstat().st_mode) or library.parent.is_symlink():
            return False
        return _digest_file(library).read_text(encoding="ascii") == _digest(library)
    except (OSError, ValueError):
        return False


def _digest_file(library: Path) -> Path:
    return library.with_suffix(".sha256")


def _digest(library: Path) -> str:
    return hashlib.sha256(library.read_bytes()).hexdigest()


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Make a folder that only we can write to, and let one process at a time work in it.

    Raises:
        OSError: if it cannot be made, or is somebody else's.
    """
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = directory.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
        raise PermissionError(f"{directory} is somebody else's")
    directory.chmod(0o700)
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    with os.fdopen(os.open(directory / "lock", flags, 0o600), "r+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
