"""The sharing area behind one small protocol, and one module for each backend that can hold it."""
