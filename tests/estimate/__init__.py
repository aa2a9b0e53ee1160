"""Tests of `sharearea estimate`: real images and archives by real tools, compared with a slow count in Python."""
