"""The error for a user's mistakes. It names what was given, the rule, and the fix."""

import errno
from collections.abc import Sequence

from dsyolo.base.text import escaped

# Faults of a path that a user gave, which Python raises from the first call that looks at it.
_PATH_REMEDIES = {
    errno.ENAMETOOLONG: "Give a shorter path.",
    errno.EACCES: "Change its permissions, or those of the folders above it.",
    errno.EPERM: "Change its permissions, or those of the folders above it.",
    errno.ELOOP: "Remove the links that lead in a circle.",
}


class UserError(ValueError):
    """A mistake in a config, file or option of the user, never a bug of the program.

    Commands print it without a traceback and exit with its status. All problems of one input are collected before it
    is raised, so that one run shows them all.

    Args:
        headline: the file or input that cannot be used, as one sentence without a final colon.
        problems: one line per problem: key or place, value given, rule, remedy.
        status: exit status: 2, or 75 (EX_TEMPFAIL) for what launch scripts should try again.
    """

    def __init__(self, headline: str, problems: Sequence[str] = (), status: int = 2) -> None:
        self.headline, self.status = headline, status
        self.problems = tuple(problems)
        super().__init__("\n  ".join([headline + (":" if problems else ""), *problems]))


def path_error(error: OSError) -> UserError | None:
    """Return the error of a path that cannot be looked at: too long a name, no permission, a circle of links; else None."""
    remedy = _PATH_REMEDIES.get(error.errno or 0)
    if remedy is None or error.filename is None:
        return None
    name = escaped(str(error.filename), lines=False)
    shown = name if len(name) <= 200 else f"{name[:200]} ..."
    return UserError("A path cannot be used", [f"{shown}: {error.strerror}. {remedy}"])
