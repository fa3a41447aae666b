"""Opens a data set by name or path: local files, arrays, the Hub, and two built-in sets."""
