"""The one error a user sees for a mistake of his own: what was given, the rule, the remedy."""

from __future__ import annotations

from collections.abc import Sequence


class UserError(ValueError):
    """A mistake in what the user gave (a config, a file, an option), never a fault of the program.

    The entries print it without a traceback and exit with its status. All problems of one input are
    collected before it is raised, so that one run tells them all.

    Args:
        headline: the file or input that cannot be used, as one sentence without a final colon.
        problems: one line per problem: key or place, value given, rule, remedy.
        status: 2, or that of what may go another time (EX_TEMPFAIL, 75): launch scripts try it again.
    """

    def __init__(self, headline: str, problems: Sequence[str] = (), status: int = 2) -> None:
        self.headline, self.status = headline, status
        self.problems = tuple(problems)
        super().__init__("\n  ".join([headline + (":" if problems else ""), *problems]))
