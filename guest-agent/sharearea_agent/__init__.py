"""Page sharing between guests: the guest side.

Holds the agent, the library for consumers and the command line. The dom0 side is the package `sharearea`.
"""

from .common import __version__ as __version__
from .shared import SharedFile as SharedFile
from .shared import open_shared as open_shared
from .shared import open_shared_all as open_shared_all
