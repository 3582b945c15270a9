"""Check that nobody else can put a file into a folder.

What is loaded from it runs as the user. So the folder, everything above it
and every link on the way must belong to the user or to root, and nobody else
may write there. One exception: above the folder others may have files of
their own where the sticky bit keeps them from touching those of the user, as
in `/tmp`.
"""

import os
import stat
from pathlib import Path

# As many as Linux follows.
LINKS = 40


def distrust(path: Path, user: int) -> str:
    """Why somebody else can put another file in the place of a path.

    Args:
        path: absolute, of a folder or a file that is there.
        user: number of the user.

    Returns:
        What is wrong, to come after "Received: "; empty if nothing is.

    Raises:
        OSError: if the path cannot be followed.
    """
    place = Path(path.anchor)
    left = list(reversed(path.parts[1:]))
    problem = _problem(place, os.lstat(place), user, above=True)
    links = 0
    while left and not problem:
        name = left.pop()
        if name == os.pardir:
            place = place.parent
            continue
        here = place / name
        found = os.lstat(here)
        problem = _problem(here, found, user, above=True)
        if not stat.S_ISLNK(found.st_mode):
            place = here
            continue
        links += 1
        if links > LINKS:
            raise OSError(f"There are too many links in {path}.")
        target = Path(os.readlink(here))
        if target.is_absolute():
            place = Path(target.anchor)
        left += reversed(target.parts[1 if target.is_absolute() else 0 :])
    # Steps back may have led up to it.
    return problem or _problem(place, os.lstat(place), user, above=False)


def _problem(path: Path, found: os.stat_result, user: int, above: bool) -> str:
    """Problem of one step of a path, if there is one.

    Args:
        path: the step; all before it is as it should be.
        found: of the step itself, also if it is a link.
        user: number of the user.
        above: whether what is asked about lies further down.
    """
    # Whoever owns the root of all owns everything; where users are mapped
    # that may be nobody who has a name here.
    if path != path.parent and found.st_uid not in (0, user):
        return (
            f"{path}, which belongs to the user {found.st_uid}. Only files of "
            f"the user {user} or of root are loaded."
        )
    # The mode of a link means nothing.
    if stat.S_ISLNK(found.st_mode) or not found.st_mode & 0o022:
        return ""
    if above and stat.S_ISDIR(found.st_mode) and found.st_mode & stat.S_ISVTX:
        return ""
    mode = stat.S_IMODE(found.st_mode)
    return (
        f"{path} with the mode {mode:04o}, where others may write. If it is "
        f"yours alone, say `chmod go-w '{path}'`."
    )
