"""A real Xen host in an emulator, and what sharearea has to prove on it. README.md says how to use it."""
