"""The one exception that a person caused and a person can mend.

Everything that can be wrong with what a user hands over (a file, a sample, an option) is reported through
:class:`ClocError`. The command line prints its text, without a traceback, and exits with code 2.
"""

from __future__ import annotations

from os import PathLike


class ClocError(Exception):
    """Bad input or usage, worded for the person who has to mend it.

    Args:
        problem: What is wrong, as a clause without a final full stop.
        file: The file the problem sits in, if there is one.
        sample: The id (or number) of the sample within that file.
        remedy: What to do about it.
    """

    def __init__(
        self,
        problem: str,
        *,
        file: str | PathLike[str] | None = None,
        sample: str | int | None = None,
        remedy: str | None = None,
    ) -> None:
        self.problem = problem
        self.file = None if file is None else str(file)
        self.sample = None if sample is None else str(sample)
        self.remedy = remedy
        super().__init__(str(self))

    def __str__(self) -> str:
        where = [part for part in (self.file, None if self.sample is None else f"sample '{self.sample}'") if part]
        text = ": ".join([*where, self.problem])
        return f"{text}. {self.remedy}" if self.remedy else text
