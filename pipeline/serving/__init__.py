"""A web page and an HTTP API over one bundle: requests join a running batch of codes. Needs the
extra `serve`."""
