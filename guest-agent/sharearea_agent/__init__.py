"""Page sharing between guests: the guest side.

Holds the agent, the library for consumers and the command line. The dom0 side is the package `sharearea`.
"""

from typing import TYPE_CHECKING

from .common import __version__ as __version__

if TYPE_CHECKING:
    from .shared import SharedFile as SharedFile
    from .shared import open_shared as open_shared
    from .shared import open_shared_all as open_shared_all
else:

    def __getattr__(name):
        # The library of consumers is loaded when it is asked for: the agent's own commands do without it.
        if name in ("SharedFile", "open_shared", "open_shared_all"):
            from . import shared

            return getattr(shared, name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
