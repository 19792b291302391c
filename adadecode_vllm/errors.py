# SPDX-License-Identifier: Apache-2.0
"""The exception for mistakes a user can mend."""


class AdaDecodeError(ValueError):
    """A user's mistake: a wrong flag, directory or combination of options.

    The message is for the user alone and says three things: the flag or option that is
    wrong, the reason, and the remedy. The CLI prints it without a traceback and exits
    with code 2. Defects of this package raise other exceptions.
    """
