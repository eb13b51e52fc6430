"""The error for a user's mistakes. It names what was given, the rule, and the fix."""

from collections.abc import Sequence


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
