"""Makes the libraries in a wheel find each other: `wheel_rpath.py WHEEL PATCHELF`, in place.

maturin copies LLVM and what LLVM needs into `tilewright.libs`, renames them, and tells our module where they are. Debian's libLLVM says for
itself where to look (`$ORIGIN/../lib`), which hides that from its own needs; so each library is told to look beside itself.
"""

import base64
import hashlib
import os
import pathlib
import subprocess
import sys
import tempfile
import zipfile


def main() -> None:
    wheel, patchelf = pathlib.Path(sys.argv[1]), sys.argv[2]
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        with zipfile.ZipFile(wheel) as archive:
            infos = archive.infolist()
            archive.extractall(root)
        libraries = sorted(root.glob("*.libs/*.so*"))
        if not libraries:
            raise SystemExit(f"{wheel} carries no libraries")
        for library in libraries:
            library.chmod(0o755)
            subprocess.run([patchelf, "--set-rpath", "$ORIGIN", library], check=True)
        (record,) = root.glob("*.dist-info/RECORD")
        lines = []
        for info in infos:
            if info.filename == record.relative_to(root).as_posix():
                lines.append(f"{info.filename},,")
            elif not info.is_dir():
                data = (root / info.filename).read_bytes()
                digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
                lines.append(f"{info.filename},sha256={digest},{len(data)}")
        record.write_text("\n".join(lines) + "\n")
        finished = wheel.with_suffix(".part")
        with zipfile.ZipFile(finished, "w", zipfile.ZIP_DEFLATED, compresslevel=6) as archive:
            for info in infos:
                if not info.is_dir():
                    # The names, times and modes of the first archive: the same input gives the same wheel.
                    entry = zipfile.ZipInfo(info.filename, info.date_time)
                    entry.compress_type, entry.external_attr = zipfile.ZIP_DEFLATED, info.external_attr
                    archive.writestr(entry, (root / info.filename).read_bytes())
        os.replace(finished, wheel)


main()
