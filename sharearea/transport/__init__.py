"""Frames to and from domains, one module for each way that a domain can be reached."""
