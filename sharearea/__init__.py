"""Page sharing between guests: the dom0 side.

Holds the broker, its index, its store and its command line. The guest side is the package `sharearea_agent`.
"""

from .common import __version__ as __version__
