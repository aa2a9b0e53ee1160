"""Tests of what answers from log files."""
