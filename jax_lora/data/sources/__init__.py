"""Data of one's own: files, folders and hub ids -> `Example`s in sets."""
