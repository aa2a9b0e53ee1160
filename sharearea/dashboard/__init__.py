"""Answers from log files: SQL views over them (views.sql), what loads the files (logs.py), and `sharearea stats`."""
