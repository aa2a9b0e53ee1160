"""The half that broker and agent both carry: errors, wire format, the native facade.

One text, two packages: `sharearea_agent.common` is a link to this folder, so every import in it is relative, and
nothing in it knows the broker or the agent.
"""

__version__ = "0.1.0"
"""Version of both distributions; their pyproject files read it from here."""
