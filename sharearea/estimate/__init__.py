"""What guests-to-be would share: page by page, from their files, before anything is mapped. docs/estimate.md.

`figures` is the arithmetic; `packages` reads what dpkg and rpm say of files; `folder`, `archive` and `image` read
roots; `counting` brings them together; `page` writes the HTML report; `command` is the verb of the command line.
"""
