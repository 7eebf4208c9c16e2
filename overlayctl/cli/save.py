"""``save``: images as an archive or a layout that other tools load."""

import contextlib
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from typing import Annotated, Literal

import typer

from overlayctl.cli import asked, engine, render
from overlayctl.cli.render import Verb
from overlayctl.errors import Conflict, NotFound, Usage

app = render.noun()

Form = Literal["docker-archive", "oci-archive", "oci-dir"]
Codec = Literal["none", "gzip", "zstd"]


@app.command("save", cls=Verb)
def save(
    names: Annotated[list[str], typer.Argument(metavar="IMAGE...")],
    *,
    output: Annotated[
        str, typer.Option("--output", "-o", metavar="FILE|DIR", help="Else standard output.")
    ] = "-",
    form: Annotated[
        Form, typer.Option("--format", help="docker-archive is an OCI layout, too.")
    ] = "docker-archive",
    codec: Annotated[Codec, typer.Option("--compress", help="What to do to layers.")] = "none",
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")] = False,
) -> None:
    """Write images as docker load, podman load, skopeo and ctr images import read them.

    A docker-archive is an OCI layout as well. oci-dir makes the directory that -o names. A name
    without a tag stands for all its tags. Layers are written byte for byte as they were loaded;
    compressed, they have other digests, and so has the manifest. The image's id stays.
    """
    from overlayctl.cli import output as outputs
    from overlayctl.cli.progress import progress

    store = engine()
    with contextlib.ExitStack() as owned:
        if form == "oci-dir":
            directory = owned.enter_context(_new_directory(output))
            bar = owned.enter_context(contextlib.closing(progress(quiet=quiet)))
            done = store.save_directory(names, directory, codec=codec, progress=bar)
        else:
            write = owned.enter_context(outputs.opened(output))
            bar = owned.enter_context(contextlib.closing(progress(quiet=quiet)))
            done = store.save(names, write, form=form, codec=codec, progress=bar)
    if asked.json and output != "-":
        render.document(
            {
                "Output": output,
                "Format": form,
                "Compress": codec,
                "Size": done.size,
                "Images": [{"Id": name, "RepoTags": list(tags)} for name, tags in done.images],
            }
        )


@contextlib.contextmanager
def _new_directory(path: str) -> Iterator[str]:
    """A directory beside ``path``, which gets its name when the block ends without an error.

    It is private, or as open as the empty one that it replaces.
    """
    if path in {"-", ""}:
        raise Usage("a directory is no stream", hint="-o DIR, or --format oci-archive")
    from overlayctl.cli import output as outputs

    place = os.path.realpath(path)
    try:
        there = os.listdir(place)
    except FileNotFoundError:
        there = []
    except NotADirectoryError:
        raise Conflict(f"{path} is no directory", hint="name a new or an empty one") from None
    except OSError as error:
        raise outputs.refused(path, error, what="DIR") from error
    if there:
        raise Conflict(f"the directory {path} is not empty", hint="name a new or an empty one")
    above, name = os.path.split(place)
    try:
        beside = tempfile.mkdtemp(dir=above, prefix=f".{name[:50]}.")
    except (FileNotFoundError, NotADirectoryError):
        raise NotFound(f"there is no directory {above}", hint=f"mkdir -p {above}") from None
    except OSError as error:
        raise outputs.refused(path, error, what="DIR") from error
    try:
        yield beside
        if os.path.isdir(place):
            info = os.stat(place)
            os.chown(beside, info.st_uid, info.st_gid)
            os.chmod(beside, stat.S_IMODE(info.st_mode))
        os.rename(beside, place)
    except OSError as error:
        shutil.rmtree(beside, ignore_errors=True)
        raise outputs.refused(path, error, what="DIR") from error
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
